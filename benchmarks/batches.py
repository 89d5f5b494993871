"""Batches of synthetic audio: how long their utterances are is what decides about speed, so that is made like real speech."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hubert_fast.ops.span_mask import span_mask

from .architecture import Architecture

SAMPLE_RATE = 16_000

# What HuBERT's recipes keep of LibriSpeech (Hsu et al. 2021, section IV): shorter ones are left out, longer ones cut.
_SHORTEST, _LONGEST = 2.0, 15.6
_BUCKETS = 10


@dataclass(frozen=True)
class Batch:
    """A training batch. ``lengths`` and ``mask`` stay on the CPU, where data loaders make them."""

    waveforms: Tensor  # [utterances, samples] float32, 0 behind each utterance's end
    lengths: Tensor | None  # [utterances] int64, samples; None where there is no padding
    labels: Tensor  # [utterances, frames] int64
    mask: Tensor  # [utterances, frames] bool; what span_mask draws after torch.manual_seed(seed)
    seed: int

    @property
    def audio_seconds(self) -> float:
        """Without the padding."""
        return sum(self.samples) / SAMPLE_RATE

    @property
    def samples(self) -> list[int]:
        """Of each utterance, without the padding."""
        return [self.waveforms.shape[1]] * len(self.waveforms) if self.lengths is None else self.lengths.tolist()

    def to(self, device: torch.device | str) -> Batch:
        """Audio and labels on ``device``. What stays on the CPU is pinned for a GPU, as data loaders do."""
        pinned = {}
        if torch.device(device).type == "cuda":
            lengths = None if self.lengths is None else self.lengths.pin_memory()
            pinned = {"lengths": lengths, "mask": self.mask.pin_memory()}
        return replace(self, waveforms=self.waveforms.to(device), labels=self.labels.to(device), **pinned)


def even(utterances: int, seconds: float) -> list[int]:
    """Lengths (samples) of a batch without padding."""
    return [round(seconds * SAMPLE_RATE)] * utterances


def librispeech_like(seconds: float, *, batches: int) -> list[list[int]]:
    """Lengths (samples) of ``batches`` batches of at most ``seconds`` each, padding counted.

    Durations are drawn from a mixture made to have the mean of LibriSpeech's training set, 12.3 s (960.9 hours in 281,241
    utterances), most of them between 12 and 16 s, and kept within 2 and 15.6 s. Bucketing is what data loaders do: a batch
    holds utterances of one of ten equally full classes of duration, in random order. The batches come from classes spread
    evenly from short to long.
    """
    generator = torch.Generator().manual_seed(0)
    count = _BUCKETS * max(64, 4 * round(seconds / _SHORTEST))
    short = _SHORTEST + 11.0 * torch.rand(count, generator=generator)
    long = 14.3 + 1.4 * torch.randn(count, generator=generator)
    chosen = torch.where(torch.rand(count, generator=generator) < 0.27, short, long).clamp(_SHORTEST, _LONGEST)
    classes = chosen.sort().values.view(_BUCKETS, -1)
    places = [round((2 * i + 1) * _BUCKETS / (2 * batches) - 0.5) for i in range(batches)]
    return [_fill(classes[min(place, _BUCKETS - 1)], seconds, generator) for place in places]


def _fill(durations: Tensor, seconds: float, generator: torch.Generator) -> list[int]:
    """Random ones of ``durations`` while they fit into ``seconds``, each padded to the longest."""
    taken: list[float] = []
    for duration in durations[torch.randperm(len(durations), generator=generator)].tolist():
        if (len(taken) + 1) * max([duration, *taken]) > seconds:
            break
        taken.append(duration)
    return [round(duration * SAMPLE_RATE) for duration in taken]


def make(lengths: list[int], architecture: Architecture, num_classes: int, *, seed: int = 0) -> Batch:
    """A batch of noise with utterances of ``lengths`` (samples); on the CPU. What it holds depends on ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.tensor(lengths)
    longest = int(samples.max())
    waveforms = torch.randn(len(lengths), longest, generator=generator)
    frames = architecture.frames_of(longest)
    labels = torch.randint(num_classes, (len(lengths), frames), generator=generator)
    padded = bool((samples < longest).any())
    waveforms *= torch.arange(longest) < samples[:, None]
    valid = torch.tensor([architecture.frames_of(each) for each in lengths]) if padded else None
    return Batch(waveforms, samples if padded else None, labels, _mask(len(lengths), frames, valid, seed), seed)


def _mask(utterances: int, frames: int, valid: Tensor | None, seed: int) -> Tensor:
    """What the model itself draws after ``torch.manual_seed(seed)``, ours and torchaudio's alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return span_mask((utterances, frames), valid, mask_prob=0.8, mask_length=10, min_masks=2)
