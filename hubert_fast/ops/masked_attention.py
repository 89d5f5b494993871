"""Operator ``masked_attention``: multi-head self-attention within each sequence of a batch of packed rows.

The rows of all sequences lie one after another, straight out of one QKV product. A padded batch is the same thing with
sequences of equal length whose ``key_lengths`` leave the padding out.
"""

from __future__ import annotations

from typing import List, Optional, Tuple

import torch
from torch import Tensor

from hubert_fast import backend
from hubert_fast.ops.autocast import without_autocast
from hubert_fast.reference import masked_attention as reference
from hubert_fast.torch_backend import masked_attention as torch_backend

backend.register(
    "masked_attention",
    {
        "torch": "CPU: PyTorch's flash kernel, with dropout a few heads at a time; GPU: scaled_dot_product_attention",
        "reference": "softmax(q k^T) v, a sequence at a time",
    },
)


def masked_attention(
    qkv: Tensor,  # [rows, 3, heads, head_dim]
    offsets: Tensor,  # [sequences + 1] int64
    key_lengths: Optional[Tensor] = None,  # [sequences] int64
    *,
    max_frames: int,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v within each sequence (Vaswani et al. 2017, eq. 1), with dropout on the softmax.

    Args:
        qkv: ``[rows, 3, heads, head_dim]``, float: query, key and value of every row.
        offsets: ``[sequences + 1]`` int64, from 0 to ``rows``; sequence i is rows ``offsets[i]`` up to ``offsets[i + 1]``.
            May lie on the host whatever the device of ``qkv``.
        key_lengths: ``[sequences]`` int64: only its first ``key_lengths[i]`` rows are attended to; 0 means all of them,
            so that no softmax is empty. None: all.
        max_frames: rows of the longest sequence.
        dropout_p: probability that an attention weight is dropped, in [0, 1). On a CPU the mask follows from a seed that
            is drawn from torch's default generator, and only where ``dropout_p > 0``; on a GPU PyTorch draws it.

    Returns:
        ``[rows, heads, head_dim]``, in the dtype of ``qkv``. On a CPU there is no second derivative.

    Raises:
        ValueError: for a wrong rank, dtype or probability.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must have shape [rows, 3, heads, head_dim]; got {tuple(qkv.shape)}")
    if not qkv.is_floating_point():
        raise ValueError(f"qkv must be floating point; got {qkv.dtype}")
    if offsets.ndim != 1 or offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be int64 of shape [sequences + 1]; got {offsets.dtype} {tuple(offsets.shape)}")
    if key_lengths is not None and (key_lengths.dtype != torch.int64 or key_lengths.ndim != 1):
        raise ValueError(
            f"key_lengths must be int64 of shape [sequences]; got {key_lengths.dtype} {tuple(key_lengths.shape)}"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1); got {dropout_p}")
    chosen = backend.choose("masked_attention", lambda name: None)
    if chosen == "torch" and qkv.device.type not in ("cpu", "meta"):
        return torch_backend.padded_attention(qkv, offsets, key_lengths, max_frames, dropout_p)
    seed = torch.randint(1 << 62, ()) if dropout_p > 0.0 else None
    if chosen == "reference":
        return reference.masked_attention(qkv, offsets, key_lengths, dropout_p=dropout_p, seed=seed)
    save = torch.is_grad_enabled() and qkv.requires_grad
    return _masked_attention(qkv, offsets, key_lengths, dropout_p, seed, save)[0]


@torch.library.custom_op("hubert_fast::masked_attention", mutates_args=())
def _masked_attention(
    qkv: Tensor,
    offsets: Tensor,
    key_lengths: Optional[Tensor],
    dropout_p: float,
    seed: Optional[Tensor],
    save: bool,
) -> Tuple[Tensor, List[Tensor]]:
    with without_autocast(qkv.device):
        return torch_backend.masked_attention(qkv, offsets, key_lengths, dropout_p, seed, save)


@_masked_attention.register_fake
def _(qkv, offsets, key_lengths, dropout_p, seed, save):
    rows, _, heads, head_dim = qkv.shape
    saved = []
    if save and dropout_p == 0.0:
        saved = [qkv.new_empty(rows, heads, dtype=torch.promote_types(qkv.dtype, torch.float32))]
    return qkv.new_empty(rows, heads, head_dim), saved


@torch.library.custom_op("hubert_fast::masked_attention_backward", mutates_args=())
def _masked_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    saved: List[Tensor],
    offsets: Tensor,
    key_lengths: Optional[Tensor],
    dropout_p: float,
    seed: Optional[Tensor],
) -> Tensor:
    with without_autocast(qkv.device):
        return torch_backend.masked_attention_backward(grad, qkv, out, saved, offsets, key_lengths, dropout_p, seed)


@_masked_attention_backward.register_fake
def _(grad, qkv, out, saved, offsets, key_lengths, dropout_p, seed):
    return torch.empty_like(qkv)


def _setup_context(ctx, inputs, output) -> None:
    qkv, offsets, key_lengths, ctx.dropout_p, seed, _ = inputs
    out, saved = output
    ctx.set_materialize_grads(False)  # no zeros for what is only saved
    ctx.save_for_backward(qkv, offsets, key_lengths, seed, out, *saved)


def _backward(ctx, grad, _saved_grads):
    qkv, offsets, key_lengths, seed, out, *saved = ctx.saved_tensors
    qkv_grad = _masked_attention_backward(grad, qkv, out, saved, offsets, key_lengths, ctx.dropout_p, seed)
    return qkv_grad, None, None, None, None, None


_masked_attention.register_autograd(_backward, setup_context=_setup_context)
