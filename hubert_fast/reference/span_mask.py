"""Random span masks, number for number those of torchaudio (and of fairseq before it) under the same torch seed.

Random numbers are drawn from torch's default CPU generator in the order that torchaudio draws them; everything between the
draws is vectorised. Spans that must not overlap depend on one another, so those are drawn one by one.

Source: wav2vec 2.0 (Baevski et al. 2020), section 3.1; SpecAugment for the channel masks.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

SELECTIONS = ("static", "uniform", "normal", "poisson")


def span_mask(
    batch: int,
    frames: int,
    lengths: Optional[list[int]],  # [batch]: valid frames of each row; None: all
    *,
    mask_prob: float,
    mask_length: int,
    mask_selection: str,
    mask_other: float,
    min_masks: int,
    no_overlap: bool,
    min_space: int,
) -> Tensor:  # bool [batch, frames] on the CPU
    shared_count = max(min_masks, int(mask_prob * frames / float(mask_length) + torch.rand(1)))
    rows = []
    for row in range(batch):
        if lengths is None:
            size, count = frames, shared_count
        else:
            size = lengths[row]
            count = max(min_masks, int(mask_prob * size / float(mask_length) + torch.rand(1)))
        spans = _span_lengths(count, mask_selection, mask_length, mask_other)
        if int(spans.sum()) == 0 and len(spans):
            spans[0] = min(mask_length, size - 1)
        masked = _disjoint_spans(spans, size, min_space) if no_overlap else _free_spans(spans, size, count)
        rows.append(masked)
    return _equal_counts(rows, frames)


def _span_lengths(count: int, selection: str, length: int, other: float) -> Tensor:
    if selection == "static":
        return torch.full((count,), length)
    if selection == "uniform":
        return torch.randint(int(other), length * 2 + 1, size=(count,))
    if selection == "normal":
        return torch.round(torch.normal(length, other, size=(count,))).clamp(min=1).int()
    # torchaudio 2.11 raises a TypeError here (torch.poisson of an int); fairseq draws Poisson lengths of that mean.
    return torch.round(torch.poisson(torch.full((count,), float(length)))).int()


def _free_spans(spans: Tensor, size: int, count: int) -> Tensor:
    """Masked positions of spans that may overlap: bool [size]."""
    masked = torch.zeros(size, dtype=torch.bool)
    if not len(spans):
        return masked
    shortest = int(spans.min())
    if size - shortest <= count:
        shortest = size - count - 1
    starts = torch.randperm(size - shortest)[:count]
    spans = spans[: len(starts)].long()
    ends = spans.cumsum(0)
    within = torch.arange(int(spans.sum())) - (ends - spans).repeat_interleave(spans)
    positions = starts.repeat_interleave(spans) + within
    masked[positions[positions < size]] = True
    return masked


def _disjoint_spans(spans: Tensor, size: int, min_space: int) -> Tensor:
    """Masked positions of spans at least ``min_space`` apart, longest first into parts drawn by their size: bool [size]."""
    masked = torch.zeros(size, dtype=torch.bool)
    if not len(spans):
        return masked
    lengths = sorted(spans.tolist(), reverse=True)
    shortest = lengths[-1]
    parts = [(0, size)]
    for length in lengths:
        sizes = torch.tensor([end - start for start, end in parts], dtype=torch.int)
        sizes[sizes < length + min_space] = 0
        total = sizes.sum()
        if total == 0:
            break
        probabilities = sizes / total
        # Twice normalised, as torch's Categorical does it: the draw must see the same bits.
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        start, end = parts.pop(int(torch.multinomial(probabilities[None], 1, replacement=True)))
        first = int(torch.randint(start, end - length, size=(1,))) if end - length > start else start
        masked[first : first + length] = True
        if first - start - min_space >= shortest:
            parts.append((start, first - min_space + 1))
        if end - first - shortest - min_space > shortest:
            parts.append((first + length + min_space, end))
    return masked


def _equal_counts(rows: list[Tensor], frames: int) -> Tensor:
    """Every row keeps as many masked frames as the row with the fewest, drawn at random from its own."""
    mask = torch.zeros(len(rows), frames, dtype=torch.bool)
    positions = [row.nonzero().squeeze(1) for row in rows]
    fewest = min(len(each) for each in positions)
    for row, each in enumerate(positions):
        if len(each) > fewest:
            each = each[torch.randperm(len(each))[:fewest]]
        mask[row, each] = True
    return mask
