"""From the utterances of one global batch to its micro-batches: reading, cropping, labelling, masking, padding."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hubert_fast.pretrain.audio import load_audio, normalized
from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.config import DataConfig
from hubert_fast.pretrain.frames import FRAME_SHIFT, SAMPLE_RATE, num_frames, num_samples
from hubert_fast.pretrain.left_out import LeftOut
from hubert_fast.pretrain.manifest import Manifest
from hubert_fast.pretrain.units import Units

if TYPE_CHECKING:
    from hubert_fast import MicroBatch, MicroBatchPlanner
    from hubert_fast.models.masking import MaskGenerator

TRAINING, VALIDATION = 2, 3
"""What random numbers are for, besides the 1 of `epoch_plan`: the same seed gives each purpose numbers of its own"""


@dataclass
class Batch:
    """A micro-batch: rows of a global batch, padded to the longest row of all of it.

    Rows whose audio cannot be read are left out. Where none is left, one of no length stands in, whose loss is 0: other ranks
    wait for the gradients of this one.
    """

    waveforms: Tensor  # [batch, samples] float32, 0 beyond a row's length
    audio_lengths: Tensor  # [batch] int64, samples
    labels: Tensor  # [batch, frames] int64, 0 beyond a row's frames
    mask: Tensor  # [batch, frames] bool
    ids: list[str]
    channel_mask: Optional[Tensor] = None  # [batch, dim] bool, where ``planned`` is made with one
    failed: dict[str, str] = field(default_factory=dict)
    """rows that are not there because their audio could not be read: their ids, and the reasons"""
    planned: Optional[MicroBatch] = None
    """the same for a `hubert_fast.GraphedStep`"""

    @property
    def seconds(self) -> float:
        """Audio, without padding."""
        return float(self.audio_lengths.sum()) / SAMPLE_RATE

    def rows(self, chosen: list[int]) -> Batch:
        """Some of the rows, in their order, without a plan."""
        if chosen:
            tensors = [each if each is None else each[chosen] for each in self._tensors()]
        else:
            tensors = [each if each is None else torch.zeros_like(each[:1]) for each in self._tensors()]
        waveforms, lengths, labels, mask, channel_mask = tensors
        ids = [self.ids[row] for row in chosen]
        return Batch(waveforms, lengths, labels, mask, ids, channel_mask, self.failed)

    def pin_memory(self) -> Batch:
        """Page-locked copies, which a GPU fetches by itself. (The data loader calls it.)"""
        if self.planned is not None:  # all that is copied to the GPU then
            planned = self.planned.pin_memory()
            return dataclasses.replace(self, waveforms=planned.waveforms, planned=planned)
        waveforms, lengths, labels, mask, _ = (each if each is None else each.pin_memory() for each in self._tensors())
        return dataclasses.replace(self, waveforms=waveforms, audio_lengths=lengths, labels=labels, mask=mask)

    def _tensors(self) -> list[Optional[Tensor]]:
        return [self.waveforms, self.audio_lengths, self.labels, self.mask, self.channel_mask]


class Place(NamedTuple):
    """Where a global batch stands in the run. ``last``: of its epoch."""

    epoch: int
    batch: int
    last: bool


class Utterances(Dataset):
    """Maps ``(place, indices of the utterances)`` to ``(place, this rank's micro-batches)``.

    The utterances are those of ``units``, by their places there; ``manifest`` says where their audio is.

    Args:
        purpose: `TRAINING` crops what is longer than ``max_seconds`` on a frame boundary, anew for every place;
            `VALIDATION` never crops.
        parts: the rows of a global batch that each micro-batch of this rank takes.
        left_out: utterances whose audio is not read any more.
    """

    def __init__(
        self,
        manifest: Manifest,
        units: Units,
        config: DataConfig,
        masks: MaskGenerator,
        *,
        seed: int,
        purpose: int,
        parts: Sequence[slice],
        left_out: LeftOut,
    ) -> None:
        self._manifest, self._units, self._left_out = manifest, units, left_out
        self._place_in_manifest = units.places_in(manifest)
        # A copy on the CPU: the model's own may be on a GPU, which a forked worker must not touch.
        self._masks = copy.deepcopy(masks).cpu()
        self._seed, self._purpose, self._parts = seed, purpose, parts
        self.planner: Optional[MicroBatchPlanner] = None
        self._normalize = config.normalize_audio
        whole = np.array(units.samples)
        whole_frames = num_frames(whole)
        self.samples: np.ndarray = cropped(whole, config) if purpose == TRAINING else whole
        """int64 ``[utterances]``, after cropping"""
        self._frames = num_frames(self.samples)
        self._spare_frames = whole_frames - self._frames

    def in_parts(self, parts: Sequence[slice]) -> Utterances:
        """The same utterances, in other micro-batches."""
        other = copy.copy(self)
        other._parts = parts
        return other

    def unusable(self) -> dict[str, str]:
        """The utterances that have no units or no audio in the manifest: ids and reasons."""
        ids, known = self._units.ids, self._units.known
        reasons = {ids[row]: "its audio could not be read when the units were made" for row in np.flatnonzero(~known)}
        gone = np.flatnonzero(known & (self._place_in_manifest < 0))
        return reasons | {
            ids[row]: "the manifest has no such utterance any more, or one of other audio" for row in gone
        }

    def __getitem__(self, wanted: tuple[Place, np.ndarray]) -> tuple[Place, list[Batch]]:
        place, rows = wanted
        rng = np.random.default_rng([self._seed, self._purpose, place.epoch, place.batch])
        starts = rng.integers(0, self._spare_frames[rows], endpoint=True)
        mask = _draw(self._masks, self._frames[rows], seed=int(rng.integers(2**63)))
        longest = int(self.samples[rows].max())
        channels = None
        if self.planner is not None:
            channels = _draw_channels(self._masks, len(rows), seed=int(rng.integers(2**63)))
        return place, [
            self._micro_batch(
                rows[part], starts[part], mask[part], None if channels is None else channels[part], longest
            )
            for part in self._parts
        ]

    def noise(self, rows: int, samples: int) -> Batch:
        """A micro-batch of ``rows`` rows of ``samples`` samples, of no audio: to learn how much memory it takes."""
        frames = np.full(rows, num_frames(samples))
        mask = _draw(self._masks, frames, seed=0)
        lengths = torch.full((rows,), samples)
        waveforms = torch.randn(rows, samples, generator=torch.Generator().manual_seed(0))
        return Batch(waveforms, lengths, torch.zeros(mask.shape, dtype=torch.int64), mask, ids=[])

    def without(self, batch: Batch) -> Batch:
        """``batch`` without the rows that were left out since it was read: workers are ahead."""
        chosen = [row for row, each in enumerate(batch.ids) if each not in self._left_out]
        if len(chosen) == len(batch.ids):
            return batch
        rest = self._planned(batch.rows(chosen))
        return rest.pin_memory() if batch.waveforms.is_pinned() else rest

    def _micro_batch(
        self, rows: np.ndarray, starts: np.ndarray, mask: Tensor, channel_mask: Optional[Tensor], longest: int
    ) -> Batch:
        waveforms = torch.zeros(len(rows), longest)
        labels = torch.zeros(mask.shape, dtype=torch.int64)
        ids = [self._units.ids[row] for row in rows]
        chosen, failed = [], {}
        for position, (row, start) in enumerate(zip(rows, starts, strict=True)):
            if ids[position] in self._left_out:
                continue
            try:
                waveform, units = self._crop(row, start)
            except AudioError as error:
                failed[ids[position]] = error.reason
                continue
            waveforms[position, : len(waveform)] = torch.from_numpy(waveform)
            labels[position, : len(units)] = torch.from_numpy(units.astype(np.int64))
            chosen.append(position)
        batch = Batch(waveforms, torch.from_numpy(self.samples[rows]), labels, mask, ids, channel_mask, failed)
        return self._planned(batch if len(chosen) == len(rows) else batch.rows(chosen))

    def _planned(self, batch: Batch) -> Batch:
        if self.planner is None:
            return batch
        planned = self.planner(
            batch.waveforms, batch.labels, batch.audio_lengths, mask=batch.mask, channel_mask=batch.channel_mask
        )
        return dataclasses.replace(batch, planned=planned)

    def _crop(self, row: int, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Audio and units from frame ``start`` on: frame t begins at sample 320 t, so they stay aligned."""
        waveform = load_audio(self._manifest[self._place_in_manifest[row]])
        if self._normalize:
            waveform = normalized(waveform)
        first = start * FRAME_SHIFT
        return waveform[first : first + self.samples[row]], self._units[row][start : start + self._frames[row]]


def cropped(samples: np.ndarray, config: DataConfig) -> np.ndarray:
    """Lengths of utterances in a training batch, int64 ``[utterances]`` at 16 kHz: ``config.max_seconds`` at most."""
    limit = round(config.max_seconds * SAMPLE_RATE)
    return np.where(samples > limit, num_samples(num_frames(limit)), samples)


def _draw(masks: MaskGenerator, frames: np.ndarray, *, seed: int) -> Tensor:
    """One mask for all rows of a global batch, so that all its micro-batches mask as many frames in a row."""
    with _seeded(seed):
        return masks.draw(len(frames), int(frames.max()), torch.from_numpy(frames))


def _draw_channels(masks: MaskGenerator, rows: int, *, seed: int) -> Optional[Tensor]:
    with _seeded(seed):
        return masks.draw_channels(rows)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # Not torch.manual_seed: it would seed the GPUs too, where there is no worker and this is the training process.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
