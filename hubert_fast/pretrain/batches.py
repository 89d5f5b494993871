"""Streams of batches: what is random about a batch is decided by its place in the run and by nothing else.

A global batch is what one optimizer update sees. Its rows, crops and masks are a pure function of (seed, epoch, batch),
and all its rows are padded to one length; so data-loader workers, the number of processes, gradient accumulation and
resuming change how it is computed, never its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from hubert_fast import Capacities
from hubert_fast.pretrain.config import DataConfig
from hubert_fast.pretrain.distributed import Process
from hubert_fast.pretrain.epoch_plan import largest_parts, plan_epoch, smallest_batch
from hubert_fast.pretrain.frames import SAMPLE_RATE, num_frames
from hubert_fast.pretrain.left_out import LeftOut
from hubert_fast.pretrain.like_length import batches_of_like_length
from hubert_fast.pretrain.manifest import Manifest
from hubert_fast.pretrain.units import Units
from hubert_fast.pretrain.utterances import TRAINING, VALIDATION, Batch, Place, Utterances

if TYPE_CHECKING:
    from hubert_fast import MicroBatchPlanner
    from hubert_fast.models.masking import MaskGenerator

# Audio of a batch without a backward, which takes little memory: enough to keep a GPU at work.
_VALIDATION_SECONDS = 160.0


class GlobalBatches:
    """The training batches, without end: from the place of ``state_dict()`` on, this rank's micro-batches of each
    global batch.

    Every epoch holds every utterance once. Rows are dealt as evenly as can be over the ``world_size * accumulate``
    micro-batches. For a GPU their tensors are page-locked.

    An utterance whose audio cannot be read, or that ``left_out`` has by the time its batch is handed out, is not in it: the
    plan of the batches, crops and masks of the others stay as they are.

    Args:
        manifest: where the audio is.
        units: of the utterances to train on.
        masks: the model's mask generator.
        left_out: utterances that are not read. Those without units or audio are added here; whoever iterates adds those that
            failed (`Batch.failed`), on all ranks alike.
        accumulate: micro-batches of each rank.

    Raises:
        ValueError: fewer utterances than micro-batches, or a ``batch_seconds`` in which fewer of the longest fit.
        TooManyBadUtterancesError: too many utterances have no units or no audio.
    """

    def __init__(
        self,
        manifest: Manifest,
        units: Units,
        config: DataConfig,
        masks: MaskGenerator,
        left_out: LeftOut,
        *,
        seed: int,
        accumulate: int = 1,
        process: Process,
    ) -> None:
        options = {"seed": seed, "purpose": TRAINING, "left_out": left_out}
        self._utterances = Utterances(manifest, units, config, masks, parts=[], **options)
        self.left_out = left_out
        left_out.add(self._utterances.unusable(), quiet=not process.is_main)
        self._batch_seconds, self._process = config.batch_seconds, process
        self._seed, self._workers = seed, config.workers
        self._epoch = self._batch = 0
        self.divide(accumulate)

    @property
    def most_micro_batches(self) -> int:
        """The most micro-batches into which each rank can divide its share: every one must find an utterance."""
        return smallest_batch(self._utterances.samples, self._budget) // self._process.world_size

    def divide(self, accumulate: int) -> None:
        """Go on in ``accumulate`` micro-batches of each rank. Iterators that exist stay as they are.

        Raises:
            ValueError: for more than `most_micro_batches`.
        """
        world_size = self._process.world_size
        micro_batches = world_size * accumulate
        self._budget = batch_budget(self._utterances.samples, self._batch_seconds, micro_batches)
        parts = [slice(part, None, micro_batches) for part in range(self._process.rank, micro_batches, world_size)]
        self._utterances = self._utterances.in_parts(parts)
        self.accumulate = accumulate

    def largest_sizes(self, accumulate: int) -> list[tuple[int, int]]:
        """The largest of ``accumulate`` micro-batches of each rank, as `largest_parts` has them."""
        return largest_parts(self._utterances.samples, self._budget, self._process.world_size * accumulate)

    def capacities(self) -> Capacities:
        """The sizes that the largest micro-batches need."""
        lengths, parts = self._utterances.samples, self._process.world_size * self.accumulate
        largest = self.largest_sizes(self.accumulate)
        rows = max(count * num_frames(samples) for count, samples in largest)
        sequences = math.ceil(min(len(lengths), self._budget // int(lengths.min())) / parts)
        # Batches into which few utterances are dealt evenly have rows beyond the budget.
        sequences = max(sequences, largest[0][0])
        return Capacities(rows=rows, sequences=sequences, max_frames=num_frames(int(lengths.max())))

    def plan_with(self, planner: MicroBatchPlanner) -> None:
        """Have workers make plans. Iterators that exist stay as they are."""
        self._utterances.planner = planner

    def seconds(self) -> float:
        """Audio of the largest micro-batch, padding included."""
        return largest_seconds(self.largest_sizes(self.accumulate))

    def largest_micro_batch(self) -> Batch:
        """A micro-batch as large as any that the stream may come to, the same on every rank; it holds noise."""
        rows, samples = max(self.largest_sizes(self.accumulate), key=math.prod)
        return self._utterances.noise(rows, samples)

    def __iter__(self) -> Iterator[list[Batch]]:
        for place, micro_batches in _load(self._utterances, self._places(), self._workers, self._process.device):
            # The place after the batch that the caller gets now; the workers are further ahead.
            self._epoch, self._batch = (place.epoch + 1, 0) if place.last else (place.epoch, place.batch + 1)
            yield [self._utterances.without(batch) for batch in micro_batches]

    def state_dict(self) -> dict[str, int]:
        """The place of the next global batch: those before it have been handed out."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a place without reading what lies before it. Iterators that exist stay where they are."""
        self._epoch, self._batch = state["epoch"], state["batch"]

    def epoch_plan(self, epoch: int) -> list[np.ndarray]:
        """Indices of the utterances in the rows of each global batch of an epoch."""
        return plan_epoch(self._utterances.samples, self._budget, seed=self._seed, epoch=epoch)

    def _places(self) -> Iterator[tuple[Place, np.ndarray]]:
        epoch, first = self._epoch, self._batch
        while True:
            plan = self.epoch_plan(epoch)
            for batch in range(first, len(plan)):
                yield Place(epoch, batch, last=batch + 1 == len(plan)), plan[batch]
            epoch, first = epoch + 1, 0


class ValidationBatches:
    """The held-out utterances, each time it is iterated over: whole and by falling length, with the same masks every time.

    A batch takes 160 s of audio, padding included, or ``batch_seconds`` where that is less (a longer utterance has one of
    its own) and goes to one rank; its numbers do not depend on how many ranks and micro-batches there are. Each comes as a
    list of one, as `GlobalBatches` has it. Arguments and errors are those of `GlobalBatches`.
    """

    def __init__(
        self,
        manifest: Manifest,
        units: Units,
        config: DataConfig,
        masks: MaskGenerator,
        left_out: LeftOut,
        *,
        seed: int,
        process: Process,
    ) -> None:
        options = {"seed": seed, "purpose": VALIDATION, "left_out": left_out}
        self._utterances = Utterances(manifest, units, config, masks, parts=[slice(None)], **options)
        self.left_out = left_out
        left_out.add(self._utterances.unusable(), quiet=not process.is_main)
        # A batch has its masks drawn together: what followed from the machine would give each machine masks of its own.
        budget = round(min(config.batch_seconds, _VALIDATION_SECONDS) * SAMPLE_RATE)
        plan = batches_of_like_length(self._utterances.samples, budget)
        places = [(Place(0, batch, last=batch + 1 == len(plan)), np.array(rows)) for batch, rows in enumerate(plan)]
        self._places = places[process.rank :: process.world_size]
        self._workers, self._device = config.workers, process.device

    def __iter__(self) -> Iterator[list[Batch]]:
        for _, micro_batches in _load(self._utterances, self._places, self._workers, self._device):
            yield [self._utterances.without(batch) for batch in micro_batches]


def largest_seconds(sizes: Iterable[tuple[int, int]]) -> float:
    """Audio of the largest of ``sizes``, each (rows, samples of each)."""
    return max(rows * samples for rows, samples in sizes) / SAMPLE_RATE


def batch_budget(samples: np.ndarray, batch_seconds: float, micro_batches: int) -> int:
    """Samples of a global batch, in which every micro-batch must find a row."""
    if len(samples) < micro_batches:
        raise ValueError(
            f"{len(samples)} utterances cannot fill world_size x accumulate = {micro_batches} micro-batches"
        )
    budget, longest = round(batch_seconds * SAMPLE_RATE), int(samples.max())
    if smallest_batch(samples, budget) < micro_batches:
        seconds = longest / SAMPLE_RATE
        raise ValueError(
            f"batch_seconds={batch_seconds} holds {budget // longest} of the longest utterances ({seconds:.2f} s), "
            f"fewer than world_size x accumulate = {micro_batches} micro-batches: "
            f"{ceil(10 * micro_batches * seconds) / 10} or more is accepted"
        )
    return budget


def _load(
    utterances: Utterances, places: Iterable[tuple[Place, np.ndarray]], workers: int, device: torch.device
) -> Iterator[tuple[Place, list[Batch]]]:
    """The batches at ``places``, in order, read ahead by worker processes."""
    loader = DataLoader(
        utterances,
        sampler=places,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=device.type == "cuda",
        # A loader draws a seed for its workers as it starts: not from the generator that dropout draws from.
        generator=torch.Generator(),
    )
    return iter(loader)


def _unchanged(loaded: Any) -> Any:
    return loaded
