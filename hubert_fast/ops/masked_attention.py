"""Operator ``masked_attention``: multi-head self-attention within each sequence of a batch of packed rows.

The rows of all sequences lie one after another, straight out of one QKV product. A padded batch is the same thing with
sequences of equal length whose ``key_lengths`` leave the padding out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from hubert_fast import backend, extension
from hubert_fast.cpu_backend import masked_attention as cpu_backend
from hubert_fast.exporters import is_exporting
from hubert_fast.ops import triton_backend
from hubert_fast.ops.arguments import dropout_seed, without_autocast
from hubert_fast.ops.host_tensors import to_device
from hubert_fast.ops.operator import Operator
from hubert_fast.reference import masked_attention as reference
from hubert_fast.torch_backend import masked_attention as torch_backend


class Arguments(NamedTuple):
    qkv: Tensor  # [rows, 3, heads, head_dim]
    offsets: Tensor  # [sequences + 1] int64; for "triton" on the device of qkv, as key_lengths
    key_lengths: Optional[Tensor]  # [sequences] int64
    max_frames: int
    dropout_p: float
    seed: Optional[Tensor]  # [] int64
    qkv_bias: Optional[Tensor] = None  # [3, heads, head_dim]
    columns: Optional[Tensor] = None  # [at least max_frames] int32
    query_rows: Optional[Tensor] = None  # [queried] int64; on the device of qkv
    query_offsets: Optional[Tensor] = None  # [sequences + 1] int64; as offsets

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """Shape of the output: queries, heads, head_dim."""
        rows = self.qkv if self.query_rows is None else self.query_rows
        return rows.shape[0], *self.qkv.shape[2:]

    @property
    def out_offsets(self) -> Tensor:
        """Offsets of the sequences in the output: ``[sequences + 1]`` int64."""
        return self.offsets if self.query_offsets is None else self.query_offsets


def masked_attention(
    qkv: Tensor,  # [rows, 3, heads, head_dim]
    offsets: Tensor,  # [sequences + 1] int64
    key_lengths: Optional[Tensor] = None,  # [sequences] int64
    *,
    max_frames: int,
    dropout_p: float = 0.0,
    seed: Optional[Tensor] = None,  # [] int64
    qkv_bias: Optional[Tensor] = None,  # [3, heads, head_dim]
    columns: Optional[Tensor] = None,  # [at least max_frames] int32
    query_rows: Optional[Tensor] = None,  # [queried] int64
    query_offsets: Optional[Tensor] = None,  # [sequences + 1] int64
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v within each sequence (Vaswani et al. 2017, eq. 1), with dropout on the softmax.

    Args:
        qkv: ``[rows, 3, heads, head_dim]``, float: query, key and value of every row.
        offsets: ``[sequences + 1]`` int64, ascending from 0; sequence i is rows ``offsets[i]`` up to ``offsets[i + 1]``. May
            lie on the host whatever the device of ``qkv``. Rows from ``offsets[-1]`` on belong to no sequence: their output
            and their gradient are 0.
        key_lengths: ``[sequences]`` int64: of sequence i only the first ``key_lengths[i]`` rows are attended to; 0 means all of
            them, so that no softmax is empty. None: all.
        max_frames: rows of the longest sequence, or more.
        dropout_p: probability that an attention weight is dropped, in [0, 1).
        seed: scalar int64 on the device of ``qkv``, from which the dropout mask follows. None: drawn from torch's default
            generator, only where ``dropout_p > 0``. Backends make different masks of it, and PyTorch's attention for GPUs
            (backend "torch") draws its mask itself.
        qkv_bias: ``[3, heads, head_dim]``, float: a bias that every row of ``qkv`` contains already. It is not added again; it
            gets its gradient, the sum of that of ``qkv`` over the rows, with which the caller needs no pass of its own.
        columns: what `dropout_columns` made of ``seed`` for as many frames or more. Only backend "triton" reads it. None: made
            in the call; the result is the same.
        query_rows: ``[queried]`` int64 on the device of ``qkv``: the rows whose output is wanted, those of a sequence together
            and none twice, in any order within it. None: all. Values are not checked.
        query_offsets: ``[sequences + 1]`` int64, ascending from 0 to ``queried`` at most, given with ``query_rows``; may lie on
            the host as ``offsets``. ``query_rows[query_offsets[i] : query_offsets[i + 1]]`` are rows of sequence i. What follows
            ``query_offsets[-1]`` fills ``query_rows`` up: it may name any of the rows, and has output and gradient 0.

    Returns:
        ``[rows, heads, head_dim]``, or ``[queried, heads, head_dim]`` where ``query_rows`` are given, in the dtype of ``qkv``.
        There is no second derivative, but through "reference".

    Raises:
        ValueError: for a wrong rank, shape, dtype, device, probability or seed; for ``columns`` without ``seed``; for one of
            ``query_rows`` and ``query_offsets`` without the other.
    """
    _check(qkv, offsets, key_lengths, qkv_bias)
    _check_columns(columns, max_frames, seed, qkv.device)
    _check_queries(query_rows, query_offsets, qkv.device, len(offsets))
    seed = dropout_seed(seed, qkv.device, dropout_p=dropout_p)
    columns = None if seed is None else columns
    settings = max_frames, dropout_p, seed, qkv_bias, columns
    arguments = Arguments(qkv, offsets, key_lengths, *settings, query_rows, query_offsets)
    chosen = _operator.choose(arguments)
    if chosen == "torch" and qkv.device.type not in ("cpu", "meta"):
        return _padded(arguments)
    if chosen == "triton":
        names = [name for name in ("offsets", "key_lengths", "query_offsets") if getattr(arguments, name) is not None]
        arguments = arguments._replace(**{name: to_device(getattr(arguments, name), qkv.device) for name in names})
    return _operator.run(chosen, arguments)[0]


class _Bias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: int, *biases: Tensor) -> Tensor:
        return biases[0].detach().expand(3, -1).unflatten(1, (heads, -1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], ...]:
        return None, *gradient.flatten(1)


def bias_of_heads(biases: Sequence[Tensor], heads: int) -> Tensor:
    """The biases of queries, keys and values, ``[heads * head_dim]`` each, as `masked_attention` takes ``qkv_bias``.

    ``[3, heads, head_dim]``, in their dtype. Gradients pass through it; its values are never read, and not those of the biases.
    """
    return _Bias.apply(heads, *biases)


def dropout_columns(seeds: Tensor, max_frames: int) -> Optional[Tensor]:
    """A part of the dropout masks of `masked_attention` that depends on the seed alone, for many seeds in one launch.

    Args:
        seeds: ``[layers]`` int64, the seed of each layer.
        max_frames: rows of the longest sequence, or more.

    Returns:
        ``[layers, max_frames or more]`` int32 on the device of ``seeds``: row i is argument ``columns`` of a call with seed i.
        None where Triton's kernels do not run, and under compilers and dispatch modes: then calls need none.

    Raises:
        ValueError: for a wrong rank or dtype.
    """
    if seeds.ndim != 1 or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be int64 of shape [layers]; got {seeds.dtype} {tuple(seeds.shape)}")
    if _operator.must_be_seen((seeds,)):
        return None
    chosen = backend.choose(
        _operator.name, lambda name: triton_backend.objection(_operator.name, seeds) if name == "triton" else None
    )
    return _operator.implementation(chosen).draw_columns(seeds, max_frames) if chosen == "triton" else None


def _check_columns(columns: Optional[Tensor], max_frames: int, seed: Optional[Tensor], device: torch.device) -> None:
    if columns is None:
        return
    if seed is None:
        raise ValueError("columns were given without the seed that they were made of")
    if columns.dtype != torch.int32 or columns.ndim != 1 or len(columns) < max_frames or columns.device != device:
        raise ValueError(
            f"columns must be int32 of shape [{max_frames} or more] on {device}; got {columns.dtype} "
            f"{tuple(columns.shape)} on {columns.device}"
        )


def _check_queries(
    query_rows: Optional[Tensor], query_offsets: Optional[Tensor], device: torch.device, count: int
) -> None:
    if (query_rows is None) != (query_offsets is None):
        raise ValueError("query_rows and query_offsets must be given together")
    if query_rows is None:
        return
    if query_rows.dtype != torch.int64 or query_rows.ndim != 1 or query_rows.device != device:
        raise ValueError(
            f"query_rows must be int64 of shape [queried] on {device}; got {query_rows.dtype} {tuple(query_rows.shape)} "
            f"on {query_rows.device}"
        )
    if query_offsets.dtype != torch.int64 or query_offsets.shape != (count,):
        raise ValueError(
            f"query_offsets must be int64 of shape [{count}], as offsets; got {query_offsets.dtype} "
            f"{tuple(query_offsets.shape)}"
        )


def _padded(arguments: Arguments) -> Tensor:
    """Backend "torch" on other devices than the CPU, and what is exported; autograd differentiates it."""
    qkv, offsets, key_lengths, max_frames, dropout_p = arguments[:5]
    given = _containing(qkv, arguments.qkv_bias)
    return _wanted(torch_backend.padded_attention(given, offsets, key_lengths, max_frames, dropout_p), arguments)


def _wanted(out: Tensor, arguments: Arguments) -> Tensor:
    """The rows of ``out`` ([rows, heads, head_dim]) that are wanted; 0 where one is of no sequence."""
    rows, offsets = arguments.query_rows, arguments.query_offsets
    if rows is None:
        return out
    live = torch.arange(rows.shape[0], device=rows.device) < to_device(offsets[-1], rows.device)
    return out.index_select(0, rows).where(live[:, None, None], out.new_zeros(()))


def _containing(qkv: Tensor, qkv_bias: Optional[Tensor]) -> Tensor:
    """``qkv``, which autograd sees as a sum with the bias: 0 is added."""
    return qkv if qkv_bias is None else qkv + (qkv_bias - qkv_bias.detach()).to(qkv.dtype)


def _check(qkv: Tensor, offsets: Tensor, key_lengths: Optional[Tensor], qkv_bias: Optional[Tensor]) -> None:
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must have shape [rows, 3, heads, head_dim]; got {tuple(qkv.shape)}")
    if not qkv.is_floating_point():
        raise ValueError(f"qkv must be floating point; got {qkv.dtype}")
    if offsets.ndim != 1 or offsets.dtype != torch.int64 or len(offsets) == 0:
        raise ValueError(f"offsets must be int64 of shape [sequences + 1]; got {offsets.dtype} {tuple(offsets.shape)}")
    sequences = len(offsets) - 1
    if key_lengths is not None and (key_lengths.dtype != torch.int64 or key_lengths.shape != (sequences,)):
        raise ValueError(
            f"key_lengths must be int64 of shape [{sequences}], a length a sequence; got {key_lengths.dtype} "
            f"{tuple(key_lengths.shape)}"
        )
    if qkv_bias is not None and (qkv_bias.shape != qkv.shape[1:] or not qkv_bias.is_floating_point()):
        raise ValueError(
            f"qkv_bias must be floating point of shape {list(qkv.shape[1:])}; got {qkv_bias.dtype} {tuple(qkv_bias.shape)}"
        )


def _objection(name: str, arguments: Arguments) -> backend.Objection:
    if name == "cpu":
        return cpu_backend.objection(arguments)
    if name != "triton":
        return None
    head_dim = arguments.qkv.shape[3]
    return None if 1 <= head_dim <= 128 else f"it takes head dims up to 128; got {head_dim}"


def _reference(arguments: Arguments) -> tuple[Tensor]:
    if is_exporting():
        return (_padded(arguments),)  # the formula goes from sequence to sequence
    qkv, offsets, key_lengths, _, dropout_p, seed, qkv_bias = arguments[:7]
    qkv = _containing(qkv, qkv_bias)
    with without_autocast(qkv.device):
        out = reference.masked_attention(qkv, offsets, key_lengths, dropout_p=dropout_p, seed=seed)
    return (_wanted(out, arguments),)


# Scores up to which keeping them costs less than computing them again: of one sequence of 49 frames and 12 heads the formula
# takes 0.7 to 0.9 of the others' time, of one of 99 frames or 4 of 49 as long (benchmarks/NOTES.md, "Whole passes on a CPU").
# In 16 bits it would round the scores.
_FEW_SCORES = 1 << 17


def _whole_passes_win(arguments: Arguments) -> bool:
    frames, heads = arguments.max_frames, arguments.qkv.shape[2]
    alone = arguments.dropout_p > 0.0 and arguments.offsets.shape[0] == 2
    return alone and heads * frames**2 <= _FEW_SCORES and arguments.qkv.dtype.itemsize >= 4


def _flops(arguments: Arguments, backward: bool) -> int:
    """Two products forward; five backward, of which one is the scores again: as PyTorch counts flash attention.

    Where the offsets lie on a GPU, which nobody should wait for, all sequences count as if they were the longest.
    """
    _, _, heads, head_dim = arguments.qkv.shape
    offsets, queries = arguments.offsets, arguments.out_offsets
    if all(type(each) is Tensor and each.device.type == "cpu" for each in (offsets, queries)):
        pairs = int((offsets.diff() * queries.diff()).sum())
    elif arguments.query_rows is None:
        pairs = (len(offsets) - 1) * arguments.max_frames**2
    else:
        pairs = arguments.query_rows.shape[0] * arguments.max_frames
    return (5 if backward else 2) * 2 * heads * head_dim * pairs


_operator = Operator(
    "masked_attention",
    Arguments,
    backends={
        "triton": "flash attention on the packed rows, scores computed again in a deterministic backward",
        "cpu": "PyTorch's flash kernel; with dropout a few heads at a time, dropped in C++ without a mask in memory",
        "torch": "CPU: PyTorch's flash kernel, with dropout a few heads at a time; GPU: scaled_dot_product_attention",
        "reference": "softmax(q k^T) v, a sequence at a time",
    },
    reference=_reference,
    results=["out"],
    fake=lambda arguments, save: (arguments.qkv.new_empty(arguments.out_shape),),
    gradients=["qkv", "qkv_bias"],
    kept=["qkv", "offsets", "key_lengths", "seed", "columns", "query_rows", "query_offsets"],
    kept_results=["out"],
    objection=_objection,
    unavailable={"cpu": functools.partial(extension.why_not, "cpu")},
    flops=_flops,
    whole_passes_win=_whole_passes_win,
)
