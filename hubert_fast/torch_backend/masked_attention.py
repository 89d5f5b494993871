"""Self-attention on packed rows with PyTorch's own kernels; no attention mask of size frames x frames is kept.

On a CPU each sequence runs by itself, so padding costs nothing: PyTorch's flash kernel without dropout; with dropout, a
few heads at a time so that the scores stay in cache (PyTorch has no fused CPU kernel with dropout), recomputed in the
backward. There rows in 16 bits are widened: with products in bfloat16 and scores rounded to it, results and gradients erred
3 times as much as scaled_dot_product_attention's, which are float32 on the way too, and 1.5 times with weights rounded alone.
On other devices the rows are padded for scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_fast import cpu
from hubert_fast.reference.dropout import keep_mask, keep_scale

if TYPE_CHECKING:
    from hubert_fast.ops.masked_attention import Arguments

_softmax_backward = torch.ops.aten._softmax_backward_data.out

# Scores of a group of heads, in bytes: a fraction of a usual last-level cache, large enough that calls cost little.
_SCORES_BYTES = 1 << 22


class _Sequence(NamedTuple):
    """One sequence: its rows, those with a query, their place in the output, and the heads' [heads, frames, head_dim]."""

    rows: slice
    queried: Union[slice, Tensor]
    place: slice
    query: Tensor
    key: Tensor
    value: Tensor


# Drops weights of a group of heads of a sequence, [group, queries, keys], into the second tensor, which may be the first, and
# returns it. The same again every time.
Drop = Callable[[Tensor, Tensor], Tensor]


class Masks:
    """The dropout masks of a call: drawn for a sequence and a group of heads after the other, of all rows of a sequence."""

    def __init__(self, arguments: Arguments) -> None:
        self._generator, self._p = torch.Generator().manual_seed(int(arguments.seed)), arguments.dropout_p

    def of(self, sequence: _Sequence, group: slice) -> Drop:
        """Dropout by the mask of ``group``, which is drawn here; it is that of all rows, whichever have a query."""
        rows, (heads, keys, _) = sequence.rows, sequence.key[group].shape
        kept = keep_mask(self._generator, heads, (rows.stop - rows.start) * keys, self._p).view(heads, -1, keys)
        if isinstance(sequence.queried, Tensor):
            kept = kept.index_select(1, sequence.queried - rows.start)
        multipliers = kept.to(sequence.key.dtype).mul_(keep_scale(self._p))
        return lambda x, out: torch.mul(x, multipliers, out=out)


def forward(
    arguments: Arguments, save: bool, masks: Callable[[Arguments], Masks] = Masks
) -> tuple[tuple[Tensor], list[Tensor]]:
    """Without dropout the log-sum-exp of the scores is saved. ``masks``: whose masks are taken."""
    dropout_p = arguments.dropout_p
    drawn = masks(arguments) if dropout_p > 0.0 else None
    qkv = _operand(arguments.qkv) if drawn is None else arguments.qkv
    grid = _grid(qkv, arguments) if drawn is None else None
    if grid is not None:
        result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*grid)
        result, sums = (each.transpose(1, 2).flatten(0, 1) for each in (result, sums))
        # `set_`: autograd would not let anybody change a view in place.
        return (qkv.new_empty(0).set_(result).to(arguments.qkv.dtype),), [sums] if save else []
    out = qkv.new_empty(arguments.out_shape)
    count, heads, _ = out.shape
    lse = qkv.new_empty(count if dropout_p == 0.0 else 0, heads, dtype=torch.promote_types(qkv.dtype, torch.float32))
    dead = int(arguments.out_offsets[-1])  # from here on, rows of no sequence
    out[dead:] = 0
    lse[dead:] = 0
    for sequence in _sequences(qkv, arguments):
        if drawn is None:
            _flash_forward(sequence, out, lse)
        else:
            sequence = _widened(sequence)
            for group in _head_groups(sequence):
                weights = _weights(sequence.query[group] * _scale(sequence), sequence.key[group])
                drawn.of(sequence, group)(weights, weights)
                out[sequence.place, group] = (weights @ sequence.value[group]).transpose(0, 1)
    return (out.to(arguments.qkv.dtype),), [lse] if save and dropout_p == 0.0 else []


def saved_tensors(arguments: Arguments) -> list[tuple[tuple[int, ...], torch.dtype]]:
    lse = (arguments.out_shape[:2], torch.promote_types(arguments.qkv.dtype, torch.float32))
    return [lse] if arguments.dropout_p == 0.0 else []


def backward(
    arguments: Arguments,
    saved: list[Tensor],
    gradients: tuple[Tensor],
    wanted: list[bool],
    masks: Callable[[Arguments], Masks] = Masks,
) -> tuple[Optional[Tensor], ...]:
    qkv, grad = arguments.qkv, gradients[0]
    drawn = masks(arguments) if arguments.dropout_p > 0.0 else None
    grid = None
    if drawn is None:
        qkv, grad, *saved = (_operand(each) for each in (qkv, grad, *saved))
        grid = _grid(qkv, arguments)
    if grid is not None:
        qkv_grad = _grid_backward(grid, grad, *saved)
    else:
        # The gradient of the bias is a sum over rows: of rows in float32 where products are float32.
        dtype = cpu.product_dtype(qkv.device, qkv.dtype) if wanted[1] else qkv.dtype
        qkv_grad = _sequences_backward(arguments, qkv, grad, saved, drawn, dtype)
    bias_grad = None
    if wanted[1]:
        wide = torch.promote_types(qkv.dtype, torch.float32)
        bias_grad = cpu.sum_over_rows(qkv_grad, wide).to(arguments.qkv_bias.dtype)
    return [qkv_grad.to(arguments.qkv.dtype), bias_grad]


def _grid_backward(grid: Sequence[Tensor], grad: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    sequences, _, frames, _ = grid[0].shape
    grad, out, lse = (each.unflatten(0, (sequences, frames)).transpose(1, 2) for each in (grad, out, lse))
    results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, *grid, out, lse, 0.0, False)
    return torch.stack([each.transpose(1, 2) for each in results], 2).flatten(0, 1)


def _sequences_backward(
    arguments: Arguments, qkv: Tensor, grad: Tensor, saved: list[Tensor], drawn: Optional[Masks], dtype: torch.dtype
) -> Tensor:
    unwritten = arguments.key_lengths is not None or arguments.query_rows is not None  # below, of rows of sequences
    qkv_grad = (qkv.new_zeros if unwritten else qkv.new_empty)(qkv.shape, dtype=dtype)
    qkv_grad[int(arguments.offsets[-1]) :] = 0
    for sequence in _sequences(qkv, arguments):
        query_grad = qkv_grad[sequence.queried, 0].transpose(0, 1)  # indexed by a tensor, a copy
        grads = [query_grad, *qkv_grad[sequence.rows, 1:].permute(1, 2, 0, 3)]  # each [heads, frames, head_dim]
        out_grad = grad[sequence.place].transpose(0, 1)
        if drawn is None:
            _flash_backward(sequence, grads, out_grad, *saved)
        else:
            sequence = _widened(sequence)
            for group in _head_groups(sequence):
                _group_backward(sequence, group, grads, out_grad, drawn.of(sequence, group))
        if isinstance(sequence.queried, Tensor):
            qkv_grad[sequence.queried, 0] = query_grad.transpose(0, 1)
    return qkv_grad


def _operand(x: Tensor) -> Tensor:
    """``x`` in the dtype of the products, contiguous: the flash kernel takes a last stride of 1 for granted."""
    return x.to(cpu.product_dtype(x.device, x.dtype)).contiguous()


def _sequences(qkv: Tensor, arguments: Arguments) -> list[_Sequence]:
    """All sequences that have a row. One without a query is among them, for dropout draws a mask for it all the same."""
    query_rows, key_lengths = arguments.query_rows, arguments.key_lengths
    rows, places = (
        [slice(*each) for each in zip(bounds, bounds[1:])]
        for bounds in (arguments.offsets.tolist(), arguments.out_offsets.tolist())
    )
    keys = [0] * len(rows) if key_lengths is None else key_lengths.tolist()
    sequences = []
    for own, place, length in zip(rows, places, keys):
        if own.start < own.stop:
            queried = own if query_rows is None else query_rows[place]
            query, (key, value) = qkv[queried, 0].transpose(0, 1), qkv[own, 1:].permute(1, 2, 0, 3)
            length = length or own.stop - own.start
            sequences.append(_Sequence(own, queried, place, query, key[:, :length], value[:, :length]))
    return sequences


def _grid(qkv: Tensor, arguments: Arguments) -> Optional[Sequence[Tensor]]:
    """Query, key and value of all sequences, ``[sequences, heads, frames, head_dim]``; None where those differ in length."""
    frames, sequences = arguments.max_frames, len(arguments.offsets) - 1
    if (
        arguments.query_rows is not None
        or arguments.key_lengths is not None
        or len(qkv) != frames * sequences
        or not len(qkv)
    ):
        return None
    if arguments.offsets.tolist() != list(range(0, len(qkv) + 1, frames)):
        return None
    return qkv.unflatten(0, (sequences, frames)).permute(2, 0, 3, 1, 4).unbind()


def _flash_forward(sequence: _Sequence, out: Tensor, lse: Tensor) -> None:
    if not sequence.query.shape[1]:
        return
    result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        sequence.query[None], sequence.key[None], sequence.value[None]
    )
    out[sequence.place] = result[0].transpose(0, 1)
    lse[sequence.place] = sums[0].T


def _flash_backward(sequence: _Sequence, grads: list[Tensor], out_grad: Tensor, out: Tensor, lse: Tensor) -> None:
    if not sequence.query.shape[1]:
        return
    results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        out_grad[None],
        sequence.query[None],
        sequence.key[None],
        sequence.value[None],
        out[sequence.place].transpose(0, 1)[None],
        lse[sequence.place].T[None],
        0.0,
        False,
    )
    for grad, result in zip(grads, results):
        grad[:, : result.shape[2]] = result[0]


def _widened(sequence: _Sequence) -> _Sequence:
    """``sequence`` in float32, or its own dtype where that is wider."""
    dtype = torch.promote_types(sequence.query.dtype, torch.float32)
    return sequence._replace(**{name: getattr(sequence, name).to(dtype) for name in ("query", "key", "value")})


def _head_groups(sequence: _Sequence) -> list[slice]:
    heads, frames = len(sequence.query), sequence.rows.stop - sequence.rows.start
    size = max(1, _SCORES_BYTES // (frames * sequence.key.shape[1] * sequence.query.element_size()))
    return [slice(start, min(start + size, heads)) for start in range(0, heads, size)]


def _scale(sequence: _Sequence) -> float:
    return sequence.query.shape[-1] ** -0.5


def _weights(scaled_query: Tensor, key: Tensor) -> Tensor:
    """Softmax of the scores: [group, frames, keys]."""
    scores = scaled_query @ key.transpose(1, 2)
    return torch.softmax(scores, -1, out=scores)


def _group_backward(sequence: _Sequence, group: slice, grads: list[Tensor], out_grad: Tensor, drop: Drop) -> None:
    scale, keys = _scale(sequence), sequence.key.shape[1]
    query, key, value = sequence.query[group] * scale, sequence.key[group], sequence.value[group]
    weights = _weights(query, key)
    upstream = out_grad[group].to(weights.dtype).contiguous()
    dropped = drop(weights, torch.empty_like(weights))
    grads[2][group, :keys] = dropped.transpose(1, 2) @ upstream
    scores_grad = torch.matmul(upstream, value.transpose(1, 2), out=dropped)
    drop(scores_grad, scores_grad)
    # In place: a row is added up before any of it is written.
    _softmax_backward(scores_grad, weights, -1, weights.dtype, grad_input=scores_grad)
    grads[0][group] = (scores_grad @ key).mul_(scale)
    grads[1][group, :keys] = scores_grad.transpose(1, 2) @ query


def padded_attention(
    qkv: Tensor,  # [rows, 3, heads, head_dim]
    offsets: Tensor,  # [sequences + 1] int64
    key_lengths: Optional[Tensor],  # [sequences] int64
    max_frames: int,
    dropout_p: float,
) -> Tensor:  # [rows, heads, head_dim]
    """scaled_dot_product_attention on padded rows, for devices other than the CPU; autograd differentiates it.

    Nothing here waits for the device: ``max_frames`` and the number of rows are known on the host. Where the rows lie is not,
    so they are padded even where they are a grid already.
    """
    rows, _, heads, head_dim = qkv.shape
    sequences = len(offsets) - 1
    offsets = offsets.to(qkv.device, non_blocking=True)
    row = torch.arange(rows, device=qkv.device)
    live = row < offsets[-1]
    sequence = torch.searchsorted(offsets[1:], row, right=True).clamp(max=max(sequences - 1, 0))
    # Rows of no sequence go where nothing is read: one row behind the grid.
    position = torch.where(live, sequence * max_frames + row - offsets[sequence], sequences * max_frames)
    grid = qkv.new_zeros(sequences * max_frames + 1, 3, heads, head_dim)
    padded = grid.index_copy(0, position, qkv)[:-1]
    keys = offsets.diff()
    if key_lengths is not None:
        key_lengths = key_lengths.to(qkv.device, non_blocking=True)
        keys = key_lengths.where(key_lengths > 0, keys)
    keys = keys.where(keys > 0, max_frames)  # no softmax is empty; sequences without rows are never read
    mask = (torch.arange(max_frames, device=qkv.device) < keys[:, None])[:, None, None]
    query, key, value = padded.view(sequences, max_frames, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p)
    out = F.pad(out.transpose(1, 2).reshape(-1, heads, head_dim), (0, 0, 0, 0, 0, 1))
    return out.index_select(0, position)
