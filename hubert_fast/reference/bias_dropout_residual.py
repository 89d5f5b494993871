"""residual + dropout(x + bias), as the formula says."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from hubert_fast.reference.dropout import Kept, dropped
from hubert_fast.reference.sums import biased, cast, plus_


def bias_dropout_residual(
    x: Tensor,  # [rows, channels]
    bias: Optional[Tensor],  # [channels]
    residual: Optional[Tensor],  # [positions, channels]
    index: Optional[Tensor],  # [rows] int64: the position of each row
    *,
    kept: Optional[Kept] = None,
) -> Tensor:  # [rows, channels], in the dtype of x
    out = dropped(biased(x, bias), kept)
    if residual is not None:
        rows = residual if index is None else residual.index_select(0, index)
        out = rows + out if out is x else plus_(out, rows)
    return cast(out, x.dtype)
