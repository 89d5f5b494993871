"""dropout(gelu(x + bias)), as the formula says.

Source: Hendrycks and Gimpel 2016 (GELU, the exact one); Srivastava et al. 2014 (dropout).
"""

from __future__ import annotations

from typing import Optional

import torch.nn.functional as F
from torch import Tensor

from hubert_fast.reference.dropout import Kept, dropped
from hubert_fast.reference.sums import biased, cast, gelu_


def bias_gelu_dropout(
    x: Tensor,  # [rows, channels]
    bias: Optional[Tensor],  # [channels]
    *,
    kept: Optional[Kept] = None,
) -> Tensor:  # [rows, channels], in the dtype of x
    activated = F.gelu(x) if bias is None else gelu_(biased(x, bias))
    return cast(dropped(activated, kept), x.dtype)
