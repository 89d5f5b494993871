"""A transformer's feed-forward block, as the formula says.

Source: Vaswani et al. 2017 (section 3.3), with the GELU of Hendrycks and Gimpel 2016.
"""

from __future__ import annotations

from typing import Optional

import torch.nn.functional as F
from torch import Tensor

from hubert_fast.reference.dropout import Kept, dropped


def feed_forward(
    x: Tensor,  # [rows, dim]
    weight1: Tensor,  # [hidden, dim]
    bias1: Tensor,  # [hidden]
    weight2: Tensor,  # [dim, hidden]
    *,
    kept: Optional[Kept] = None,  # of [rows, hidden]
) -> Tensor:  # [rows, dim]
    return F.linear(dropped(F.gelu(F.linear(x, weight1, bias1)), kept), weight2)
