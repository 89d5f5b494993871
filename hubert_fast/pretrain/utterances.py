"""From the utterances of one global batch to its micro-batches: reading, cropping, labelling, masking, padding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor
from torch.utils.data import Dataset

from hubert_fast.pretrain.audio import AudioError, load_audio, normalized, utterance_samples
from hubert_fast.pretrain.config import DataConfig
from hubert_fast.pretrain.frames import FRAME_SHIFT, SAMPLE_RATE, num_frames, num_samples
from hubert_fast.pretrain.units import Units

if TYPE_CHECKING:
    from hubert_fast.models.masking import MaskGenerator

TRAINING, VALIDATION = 2, 3
"""What random numbers are for, besides the 1 of `epoch_plan`: the same seed gives each purpose numbers of its own"""


@dataclass
class Batch:
    """A micro-batch: rows of a global batch, padded to the longest row of all of it."""

    waveforms: Tensor  # [batch, samples] float32, 0 beyond a row's length
    audio_lengths: Tensor  # [batch] int64, samples
    labels: Tensor  # [batch, frames] int64, 0 beyond a row's frames
    mask: Tensor  # [batch, frames] bool
    ids: list[str]
    seconds: float
    """audio, without padding"""

    def pin_memory(self) -> Batch:
        """Page-locked copies, which a GPU fetches by itself. (The data loader calls it.)"""
        tensors = (tensor.pin_memory() for tensor in (self.waveforms, self.audio_lengths, self.labels, self.mask))
        return Batch(*tensors, self.ids, self.seconds)


class Place(NamedTuple):
    """Where a global batch stands in the run. ``last``: of its epoch."""

    epoch: int
    batch: int
    last: bool


class Utterances(Dataset):
    """Maps ``(place, indices of the utterances)`` to ``(place, this rank's micro-batches)``, or to an `AudioError` in
    their stead: raised in a worker it would reach the user wrapped in the worker's traceback.

    Args:
        purpose: `TRAINING` crops what is longer than ``max_seconds`` on a frame boundary, anew for every place;
            `VALIDATION` never crops.
        parts: the rows of a global batch that each micro-batch of this rank takes.
    """

    def __init__(
        self,
        cuts: Sequence[Cut],
        units: Units,
        config: DataConfig,
        masks: MaskGenerator,
        *,
        seed: int,
        purpose: int,
        parts: Sequence[slice],
    ) -> None:
        self._cuts = list(cuts)
        self._units = units
        # A copy on the CPU: the model's own may be on a GPU, which a forked worker must not touch.
        self._masks = copy.deepcopy(masks).cpu()
        self._seed, self._purpose, self._parts = seed, purpose, parts
        self._normalize = config.normalize_audio
        whole = np.array([utterance_samples(cut) for cut in self._cuts])
        _check_units(self._cuts, whole, units)
        whole_frames = _frames(whole)
        limit = round(config.max_seconds * SAMPLE_RATE) if purpose == TRAINING else int(whole.max())
        most_frames = num_frames(limit)
        self.samples: np.ndarray = np.where(whole > limit, num_samples(most_frames), whole)
        """int64 ``[utterances]``, after cropping"""
        self._frames = np.minimum(whole_frames, most_frames)
        self._spare_frames = whole_frames - self._frames

    def in_parts(self, parts: Sequence[slice]) -> Utterances:
        """The same utterances, in other micro-batches."""
        other = copy.copy(self)
        other._parts = parts
        return other

    def __getitem__(self, wanted: tuple[Place, np.ndarray]) -> tuple[Place, list[Batch] | AudioError]:
        place, rows = wanted
        try:
            return place, self._global_batch(place, rows)
        except AudioError as error:
            return place, error

    def _global_batch(self, place: Place, rows: np.ndarray) -> list[Batch]:
        rng = np.random.default_rng([self._seed, self._purpose, place.epoch, place.batch])
        starts = rng.integers(0, self._spare_frames[rows], endpoint=True)
        mask = _draw(self._masks, self._frames[rows], seed=int(rng.integers(2**63)))
        longest = int(self.samples[rows].max())
        return [self._micro_batch(rows[part], starts[part], mask[part], longest) for part in self._parts]

    def _micro_batch(self, rows: np.ndarray, starts: np.ndarray, mask: Tensor, longest: int) -> Batch:
        lengths = self.samples[rows]
        waveforms = torch.zeros(len(rows), longest)
        labels = torch.zeros(mask.shape, dtype=torch.int64)
        for position, (row, start) in enumerate(zip(rows, starts, strict=True)):
            waveform, units = self._crop(row, start)
            waveforms[position, : len(waveform)] = torch.from_numpy(waveform)
            labels[position, : len(units)] = torch.from_numpy(units)
        ids = [self._cuts[row].id for row in rows]
        return Batch(waveforms, torch.from_numpy(lengths), labels, mask, ids, float(lengths.sum()) / SAMPLE_RATE)

    def _crop(self, row: int, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Audio and units from frame ``start`` on: frame t begins at sample 320 t, so they stay aligned."""
        cut = self._cuts[row]
        waveform = load_audio(cut)
        if self._normalize:
            waveform = normalized(waveform)
        first = start * FRAME_SHIFT
        return waveform[first : first + self.samples[row]], self._units[cut.id][start : start + self._frames[row]]


def _draw(masks: MaskGenerator, frames: np.ndarray, *, seed: int) -> Tensor:
    """One mask for all rows of a global batch, so that all its micro-batches mask as many frames in a row."""
    # Not torch.manual_seed: it would seed the GPUs too, where there is no worker and this is the training process.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return masks.draw(len(frames), int(frames.max()), torch.from_numpy(frames))


def _frames(samples: np.ndarray) -> np.ndarray:
    return np.array([num_frames(int(count)) for count in samples])


def _check_units(cuts: list[Cut], samples: np.ndarray, units: Units) -> None:
    known = set(units.ids)
    missing = [cut.id for cut in cuts if cut.id not in known]
    if missing:
        raise ValueError(
            f"units: {len(missing)} of {len(cuts)} utterances have none, the first is {missing[0]!r}; "
            "they were made from another manifest"
        )
    for cut, frames in zip(cuts, _frames(samples), strict=True):
        if units.frames(cut.id) != frames:
            raise ValueError(
                f"units: utterance {cut.id!r} has {units.frames(cut.id)} units, its audio has {frames} frames; "
                "they were made from another version of the audio"
            )
