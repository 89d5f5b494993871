"""A learned embedding in the place of masked frames, and 0 in the place of padding, as the formula says.

Source: wav2vec 2.0, section 3.1 (masking); HuBERT, section II.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from hubert_fast.reference.dropout import Kept, dropped
from hubert_fast.reference.sums import biased, cast


def mask_fill(
    x: Tensor,  # [rows, channels]
    bias: Optional[Tensor],  # [channels]
    embedding: Tensor,  # [channels]
    mask: Tensor,  # [rows] bool
    padding: Optional[Tensor],  # [rows] bool
    *,
    kept: Optional[Kept] = None,
) -> Tensor:  # [rows, channels], in the dtype of x
    filled = dropped(biased(x, bias), kept)
    if padding is not None:
        filled = filled.masked_fill(padding[:, None], 0.0)
    return cast(cast(embedding, filled.dtype).where(mask[:, None], filled), x.dtype)
