"""Self-attention within each sequence of a packed batch, sequence after sequence, as the formula says.

Source: Vaswani et al. 2017, eq. 1; the rule for empty keys is torchaudio's (its mask of -10000 on every key cancels out).
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from hubert_fast.reference.dropout import keep_mask, keep_scale


def masked_attention(
    qkv: Tensor,  # [rows, 3, heads, head_dim]
    offsets: Tensor,  # [sequences + 1] int64: sequence i is rows offsets[i] : offsets[i + 1]
    key_lengths: Optional[Tensor],  # [sequences] int64: its first key_lengths[i] rows are keys; 0 and None mean all
    *,
    dropout_p: float = 0.0,
    seed: Optional[Tensor] = None,  # [] int64: of the dropout mask
) -> Tensor:  # [rows, heads, head_dim]
    generator = None
    if dropout_p > 0.0:
        generator = torch.Generator().manual_seed(int(seed))
    outputs = []
    for i, (start, stop) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        query, key, value = qkv[start:stop].permute(1, 2, 0, 3)  # each [heads, frames, head_dim]
        keys = int(key_lengths[i]) if key_lengths is not None and key_lengths[i] > 0 else stop - start
        scores = query @ key[:, :keys].transpose(1, 2) / query.shape[-1] ** 0.5
        weights = scores.softmax(-1)  # [heads, frames, keys]
        if generator is not None:
            kept = keep_mask(generator, weights.shape[0], weights[0].numel(), dropout_p)
            weights = weights * kept.view(weights.shape).to(qkv.device) * keep_scale(dropout_p)
        outputs.append((weights @ value[:, :keys]).transpose(0, 1))
    return torch.cat([*outputs, torch.zeros_like(qkv[int(offsets[-1]) :, 0])])  # rows of no sequence
