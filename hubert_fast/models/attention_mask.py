"""torchaudio's attention masks: what to add to the scores, ``[batch, 1, frames, frames]``.

Ours know the lengths they were made of, so that who is given one back need not read it to leave the padding out.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from hubert_fast.models.rows import Rows, padding_mask, whole_grid
from hubert_fast.ops.host_tensors import may_decide_shapes

_PADDED = -10000.0
_AT_MOST = -9000.0  # at padding in masks of others: bfloat16 rounds


def attention_mask(lengths: Tensor, frames: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """-10000 at keys that are padding: ``[batch, 1, frames, frames]`` in ``dtype``; one row of it lies in memory.

    ``lengths``, ``[batch]`` frames, may lie on another device, and stay there.
    """
    padded = padding_mask(lengths.to(device, non_blocking=True), frames)
    mask = (_PADDED * padded[:, None, None].to(dtype)).expand(-1, 1, frames, -1)
    # Tensors of inference mode do not count what is written to them.
    if not torch.compiler.is_compiling() and not mask.is_inference():
        mask._of_lengths = lengths.clone(), mask._version  # who gave them may write to them
    return mask


def grid_layout(x: Tensor, mask: Optional[Tensor]) -> Rows:
    """All frames of ``x`` (``[batch, frames, dim]``) as rows, with the keys that ``mask`` leaves them.

    Raises:
        ValueError: for a mask of another shape than ``[batch, 1, frames, frames]``.
    """
    batch, frames = x.shape[:2]
    if mask is not None and mask.shape != (batch, 1, frames, frames):
        raise ValueError(
            f"attention_mask must have shape {(batch, 1, frames, frames)}, [batch, 1, frames, frames] of x; got "
            f"{tuple(mask.shape)}"
        )
    lengths = valid_frames(mask)
    layout = whole_grid(batch, frames, lengths, x.device)
    return layout if mask is None or lengths is not None else layout._replace(mask=mask)


def valid_frames(mask: Optional[Tensor]) -> Optional[Tensor]:
    """The valid frames of each sequence, ``[batch]``, where ``mask`` is nothing but padding; None where it may be more.

    Masks of others are read on a CPU alone, and only where all queries share one row in memory.
    """
    if mask is None:
        return None
    lengths, version = (None, None) if torch.compiler.is_compiling() else getattr(mask, "_of_lengths", (None, None))
    if lengths is not None and version == mask._version:
        return lengths
    if mask.requires_grad:
        return None
    shared = mask.stride(2) == 0 or mask.shape[2] == 1
    if mask.device.type != "cpu" or not mask.is_floating_point() or not shared or not may_decide_shapes(mask):
        return None
    keys = mask[:, 0, 0]
    lengths = (keys == 0).sum(1)
    padded = padding_mask(lengths, mask.shape[3])
    return lengths if torch.equal(keys <= _AT_MOST, padded) else None
