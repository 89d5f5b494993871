"""Operator ``span_mask``: random span masks for masked prediction, drawn from torch's default CPU generator."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from hubert_fast.reference import span_mask as reference


def span_mask(
    shape: tuple[int, int],
    lengths: Optional[Tensor] = None,  # [batch] int
    *,
    mask_prob: float,
    mask_length: int,
    mask_selection: str = "static",
    mask_other: float = 0.0,
    min_masks: int = 0,
    no_overlap: bool = False,
    min_space: int = 0,
) -> Tensor:
    """A random mask with the same number of masked frames in every row.

    Args:
        shape: (batch, frames).
        lengths: ``[batch]`` valid frames of each row; none beyond them is masked. None: all are valid.
        mask_prob: share of the frames to mask, before overlaps.
        mask_length: frames of a span, or the mean of its distribution.
        mask_selection: ``"static"``, ``"uniform"`` (``mask_other`` to twice ``mask_length``), ``"normal"`` (standard
            deviation ``mask_other``) or ``"poisson"``.
        mask_other: see ``mask_selection``.
        min_masks: fewest spans of a row.
        no_overlap: spans do not touch, and stay ``min_space`` frames apart.

    Returns:
        Bool ``[batch, frames]`` on the CPU; True is masked. Equal to torchaudio's for the same torch seed, and so is the
        state of the generator afterwards.

    Raises:
        ValueError: for an unknown selection, a length out of range or a wrong shape.
    """
    batch, frames = shape
    if mask_selection not in reference.SELECTIONS:
        raise ValueError(f"mask_selection must be one of {reference.SELECTIONS}; got {mask_selection!r}")
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape [{batch}]; got {tuple(lengths.shape)}")
    if torch.compiler.is_compiling():
        return _span_mask(
            batch, frames, lengths, mask_prob, mask_length, mask_selection, mask_other, min_masks, no_overlap, min_space
        )
    return _draw(
        batch, frames, lengths, mask_prob, mask_length, mask_selection, mask_other, min_masks, no_overlap, min_space
    )


def _draw(
    batch: int,
    frames: int,
    lengths: Optional[Tensor],
    mask_prob: float,
    mask_length: int,
    mask_selection: str,
    mask_other: float,
    min_masks: int,
    no_overlap: bool,
    min_space: int,
) -> Tensor:
    host_lengths = None if lengths is None else lengths.tolist()
    if host_lengths is not None and (min(host_lengths) < 0 or max(host_lengths) > frames):
        raise ValueError(f"lengths must be within [0, {frames}]; got {host_lengths}")
    return reference.span_mask(
        batch,
        frames,
        host_lengths,
        mask_prob=mask_prob,
        mask_length=mask_length,
        mask_selection=mask_selection,
        mask_other=mask_other,
        min_masks=min_masks,
        no_overlap=no_overlap,
        min_space=min_space,
    )


# Inside a compiled graph the draw is one opaque operator: it reads lengths, and its loops are no business of a compiler.
_span_mask = torch.library.custom_op("hubert_fast::span_mask", _draw, mutates_args=())


@_span_mask.register_fake
def _(batch, frames, lengths, *settings):
    return torch.empty(batch, frames, dtype=torch.bool, device="cpu")
