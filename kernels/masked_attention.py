"""Attention within each sequence of packed rows, read straight from ``[rows, 3, heads, head_dim]``; no scores in memory.

With ``query_rows``, blocks of queries hold the wanted rows alone. Output, log-sum-exp and delta of a query lie at its position
in ``query_rows``; its dropout bits are those of its row.

Forward: online softmax over blocks of keys (Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023, algorithm 1). Backward: one
kernel over blocks of queries for dQ, one over blocks of keys for dK and dV. Each computes the scores again, so that no program
adds to what another one writes and results repeat to the bit.

Scores stay in base 2: p = exp2(s log2(e) / sqrt(head_dim) - lse). Dropout multiplies p by keep / (1 - p_drop) after the sum; its
factor leaves every loop, for with ds = p (keep dp / (1 - p_drop) - delta) the backward uses (1 - p_drop) ds. Column bits come
from a table: 32 random bits a key would cost each program more than its exponentials.

The gradient of the keys reads three numbers a row (log-sum-exp, delta, dropout bits) that the queries' gradient leaves for it.
Those of a sequence begin on a multiple of ROOM and have room for its last block (`_row_place`), so that blocks are read 16 bytes
at a time and without a mask. Past a sequence's end stands what follows from rows of zeros: finite, and gradients there are 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_fast import tf32
from hubert_fast.kernels import dropout
from hubert_fast.kernels import head_vectors as vectors
from hubert_fast.kernels.column_tiles import contiguous, sum_parts
from hubert_fast.kernels.launch import INTERPRETER, Blocks, architecture, cdiv, launch

if TYPE_CHECKING:
    from hubert_fast.ops.masked_attention import Arguments

_LOG2_E = math.log2(math.e)
# The longest blocks of rows and columns. The vectors of `_key_backward` are padded to multiples of it, the column bits too.
ROOM = 128
_ROOM = tl.constexpr(ROOM)  # in kernels
# From batch to batch, and the alignment of a seed, which may be a view of several: nothing is compiled anew for them.
_VARYING = ["rows", "queried", "sequences", "part_count", "threshold", "seed"]


@triton.jit
def _first_place(start, sequence, SIZE: tl.constexpr):
    """The first of the places, each for SIZE rows, of ``sequence``, whose first row is ``start``: there are enough before it."""
    return start // SIZE + sequence


@triton.jit
def _rows_of_program(offsets, rows, sequences, BLOCK: tl.constexpr):
    """The program's sequence, where that starts, its frames, and which of them the program's BLOCK begins with.

    Found by a binary search over `_first_place`. Dead rows are one sequence more. Blocks may begin past a sequence's end.
    """
    place = tl.program_id(0)
    sequence = place * 0  # the last that is known to begin no later
    count = sequences + 1  # from there on, one of these is the program's
    while count > 1:
        middle = sequence + count // 2
        begins = _first_place(tl.load(offsets + middle), middle, BLOCK)
        sequence = tl.where(begins <= place, middle, sequence)
        count -= count // 2
    start, end = tl.load(offsets + sequence).to(tl.int32), rows
    if sequence < sequences:
        end = tl.load(offsets + sequence + 1).to(tl.int32)
    return sequence, start, end - start, (place - _first_place(start, sequence, BLOCK)) * BLOCK


@triton.jit
def _rows_of(offsets, sequence):
    """The first row of ``sequence``, and how many rows it has."""
    start = tl.load(offsets + sequence).to(tl.int32)
    return start, tl.load(offsets + sequence + 1).to(tl.int32) - start


@triton.jit
def _queried_rows(query_rows, query, left, BLOCK: tl.constexpr):
    """The rows of the BLOCK queries from ``query`` on, of which ``left`` are there."""
    index = tl.arange(0, BLOCK)
    rows = query + index
    if query_rows is not None:
        rows = tl.load(query_rows + rows, mask=index < left, other=0).to(tl.int32)
    return rows


@triton.jit
def _row_place(head, queried, sequences, start, sequence):
    """The place in [HEADS, row_places] of the first query of ``sequence``, which is number ``start`` of all."""
    of_head = head.to(tl.int64) * ((queried // _ROOM + sequences) * _ROOM)
    return of_head + _first_place(start, sequence, _ROOM) * _ROOM


@triton.jit
def _keys_of(sequence, key_lengths, frames):
    keys = frames
    if key_lengths is not None:
        length = tl.load(key_lengths + sequence)
        keys = tl.where(length > 0, tl.minimum(length, frames), frames).to(tl.int32)
    return keys


@triton.jit
def _block_of_queries(qkv, query_rows, offsets, key_lengths, sequence, start, frames, first, head, STRIDE: tl.constexpr,
                      HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The vectors of BLOCK queries and their rows; a pointer to the first row of their sequence, and how many keys that has.

    The sequence's queries begin at ``start`` among all and are ``frames``; the block is those from ``first`` on.
    """
    row, left = start + first, frames - first
    rows = _queried_rows(query_rows, row, left, BLOCK)
    if query_rows is not None:
        start, frames = _rows_of(offsets, sequence)
    keys = _keys_of(sequence, key_lengths, frames)
    qkv_start = qkv + start.to(tl.int64) * STRIDE + head * HEAD_DIM
    if query_rows is None:
        query = vectors.load(qkv_start + first.to(tl.int64) * STRIDE, left, STRIDE, BLOCK, WIDTH, REST, HEAD_DIM, True)
    else:
        query = vectors.load(qkv_start, left, STRIDE, BLOCK, WIDTH, REST, HEAD_DIM, True, rows - start)
    return query, rows, qkv_start, keys


@triton.jit(do_not_specialize=_VARYING)
def _draw_columns(columns, seed):
    """The dropout bits of every key position, for each of the seeds from ``seed``: ``columns`` is [seeds, column_places]."""
    column, number = tl.program_id(0) * _ROOM + tl.arange(0, _ROOM), tl.program_id(1)
    bits = dropout.column_bits(tl.load(seed + number), column).to(tl.int32, bitcast=True)
    tl.store(columns + number * tl.num_programs(0) * _ROOM + column, bits)


@triton.jit
def _kept(row_bits, columns, key, keys, threshold, MASKED: tl.constexpr):
    """Which weights of rows x columns dropout keeps: ``row_bits`` and ``key`` broadcast with each other."""
    if MASKED:  # the table goes further, but the loads of whole blocks would take registers that there are not
        bits = tl.load(columns + key, mask=key < keys, other=0)
    else:
        bits = tl.load(columns + key)
    return dropout.keep(row_bits, bits.to(tl.uint32, bitcast=True), threshold)


@triton.jit
def _attend(state, query, row_bits, key, value, columns, first, keys, scale, threshold, STRIDE: tl.constexpr,
            HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, DROPOUT: tl.constexpr,
            PRECISION: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """``state`` (sums, total, largest) after the BLOCK keys from ``first``; MASKED: ``keys`` may end in them."""
    sums, total, largest = state
    away = tl.cast(first, tl.int64) * STRIDE
    block_key = vectors.load(key + away, keys - first, STRIDE, BLOCK, WIDTH, REST, HEAD_DIM, MASKED)
    block_value = vectors.load(value + away, keys - first, STRIDE, BLOCK, WIDTH, REST, HEAD_DIM, MASKED)
    index = first + tl.arange(0, BLOCK)[None]
    scores = vectors.products(query, block_key, REST, PRECISION)
    if MASKED:
        scores = tl.where(index < keys, scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(weights, 1)
    if DROPOUT:
        # A zero that the compiler cannot see: it would move the choice behind the conversion to 16 bits, where it takes longer.
        weights = tl.where(_kept(row_bits[:, None], columns, index, keys, threshold, MASKED), weights, 0.0 * scale)
    sums = vectors.add_weighted(vectors.scaled(sums, shrink[:, None]), weights, block_value, REST, PRECISION)
    return sums, total, new_largest


@triton.jit(do_not_specialize=_VARYING)
def _forward(
    qkv,  # [rows, 3, HEADS, HEAD_DIM]
    offsets,  # [sequences + 1] int64
    key_lengths,  # [sequences] int64, or None
    query_rows,  # [queried] int64, or None: all rows
    query_offsets,  # [sequences + 1] int64: where each sequence's queries begin among all
    out,  # [queried, HEADS, HEAD_DIM]
    lse,  # [HEADS, queried] float32: log2 of the sum of 2^score, or None
    columns,  # [column_places] int32, or None
    seed,  # [] int64, or None
    queried,
    sequences,
    scale,
    threshold,
    keep_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """A program: BLOCK_QUERIES queries of a head of a sequence, or zeros for as many dead rows."""
    HEAD_STRIDE: tl.constexpr = HEADS * HEAD_DIM
    STRIDE: tl.constexpr = 3 * HEAD_STRIDE
    sequence, start, frames, first = _rows_of_program(query_offsets, queried, sequences, BLOCK_QUERIES)
    if first >= frames:
        return
    head, row, left = tl.program_id(1), start + first, frames - first
    index = tl.arange(0, BLOCK_QUERIES)
    out += head * HEAD_DIM
    if sequence == sequences:
        nothing = vectors.zeros(BLOCK_QUERIES, WIDTH, REST)
        away = row.to(tl.int64) * HEAD_STRIDE
        vectors.store(out + away, nothing, left, HEAD_STRIDE, BLOCK_QUERIES, WIDTH, REST, HEAD_DIM)
        if lse is not None:
            tl.store(
                lse + head.to(tl.int64) * queried + row + index,
                tl.zeros([BLOCK_QUERIES], tl.float32),
                mask=index < left,
            )
        return
    query, rows, qkv, keys = _block_of_queries(qkv, query_rows, offsets, key_lengths, sequence, start, frames, first, head,
                                               STRIDE, HEAD_DIM, WIDTH, REST, BLOCK_QUERIES)  # fmt: skip
    row_bits = tl.zeros([BLOCK_QUERIES], tl.uint32)
    if DROPOUT:
        row_bits = dropout.row_bits(tl.load(seed), rows * HEADS + head)
    largest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    state = vectors.zeros(BLOCK_QUERIES, WIDTH, REST), tl.zeros([BLOCK_QUERIES], tl.float32), largest
    key, value = qkv + HEAD_STRIDE, qkv + 2 * HEAD_STRIDE
    # The last block, which alone needs masks, comes first. The loop stands behind a condition of its own: with one that may
    # run no times, ptxas makes every tensor-core instruction wait for the one before.
    last = (keys - 1) // BLOCK_KEYS * BLOCK_KEYS
    state = _attend(state, query, row_bits, key, value, columns, last, keys, scale, threshold,
                    STRIDE, HEAD_DIM, WIDTH, REST, DROPOUT, PRECISION, BLOCK_KEYS, True)  # fmt: skip
    if last > 0:
        for first_key in range(0, last, BLOCK_KEYS):
            state = _attend(state, query, row_bits, key, value, columns, first_key, keys, scale, threshold,
                            STRIDE, HEAD_DIM, WIDTH, REST, DROPOUT, PRECISION, BLOCK_KEYS, False)  # fmt: skip
    sums, total, largest = state
    sums = vectors.scaled(sums, (keep_scale / total)[:, None])
    away = row.to(tl.int64) * HEAD_STRIDE
    vectors.store(out + away, sums, left, HEAD_STRIDE, BLOCK_QUERIES, WIDTH, REST, HEAD_DIM)
    if lse is not None:
        tl.store(lse + head.to(tl.int64) * queried + row + index, largest + tl.log2(total), mask=index < left)


@triton.jit
def _store_part(parts, part_count, which: tl.constexpr, sums, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                WIDTH: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    """Store ``sums``, a row, as the program's part of a sum over all rows; parts that no program has become 0."""
    if parts is not None:
        parts += (which * HEADS + tl.program_id(1)) * HEAD_DIM
        part = tl.program_id(0)
        vectors.store_row(parts + part * 3 * HEADS * HEAD_DIM, sums, WIDTH, REST, HEAD_DIM)
        part += tl.num_programs(0)
        while part < part_count:
            nothing = tl.zeros([WIDTH], tl.float32), tl.zeros([REST if REST > 0 else 1], tl.float32)
            vectors.store_row(parts + part * 3 * HEADS * HEAD_DIM, nothing, WIDTH, REST, HEAD_DIM)
            part += tl.num_programs(0)


@triton.jit
def _add_query_gradient(sums, query, grad, lse, delta, row_bits, key, value, columns, first, keys, scale, threshold,
                        STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr,
                        DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """``sums`` + ds k over the BLOCK keys from ``first``; MASKED: ``keys`` may end in them."""
    away = tl.cast(first, tl.int64) * STRIDE
    block_key = vectors.load(key + away, keys - first, STRIDE, BLOCK, WIDTH, REST, HEAD_DIM, MASKED)
    block_value = vectors.load(value + away, keys - first, STRIDE, BLOCK, WIDTH, REST, HEAD_DIM, MASKED)
    index = first + tl.arange(0, BLOCK)[None]
    scores = vectors.products(query, block_key, REST, PRECISION)
    if MASKED:
        scores = tl.where(index < keys, scores, float("-inf"))
    weights = tl.exp2(scores * scale - lse[:, None])
    weights_grad = vectors.products(grad, block_value, REST, PRECISION)
    if DROPOUT:
        weights_grad = tl.where(_kept(row_bits[:, None], columns, index, keys, threshold, MASKED), weights_grad, 0.0)
    return vectors.add_weighted(sums, weights * (weights_grad - delta[:, None]), block_key, REST, PRECISION)


@triton.jit(do_not_specialize=_VARYING)
def _query_backward(
    qkv,  # [rows, 3, HEADS, HEAD_DIM]
    qkv_grad,  # [rows, 3, HEADS, HEAD_DIM]: the queries' part is written
    queries,  # [queried, HEADS, HEAD_DIM], or None, written: the queries, for `_key_backward`
    out,  # [queried, HEADS, HEAD_DIM]
    out_grad,  # [queried, HEADS, HEAD_DIM]
    offsets,  # [sequences + 1] int64
    key_lengths,  # [sequences] int64, or None
    query_rows,  # as in `_forward`; with them, rows without a query keep what is in qkv_grad
    query_offsets,  # as in `_forward`
    lse,  # [HEADS, queried] float32
    row_lse,  # [HEADS, row_places] float32, written: ``lse``
    delta,  # [HEADS, row_places] float32, written: (1 - p_drop) sum of out out_grad
    row_bits,  # [HEADS, row_places] int32, written: dropout bits of each query; or None
    columns,  # [column_places] int32, or None
    seed,  # [] int64, or None
    parts,  # [part_count, 3, HEADS, HEAD_DIM] float32, or None: the queries' part is written, the sum of each program's rows
    queried,
    sequences,
    part_count,
    scale,
    threshold,
    grad_scale,
    inverse_keep_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """dQ of BLOCK_QUERIES queries of a head of a sequence, and what `_key_backward` needs to know of each query."""
    HEAD_STRIDE: tl.constexpr = HEADS * HEAD_DIM
    STRIDE: tl.constexpr = 3 * HEAD_STRIDE
    sequence, start, frames, first = _rows_of_program(query_offsets, queried, sequences, BLOCK_QUERIES)
    head, row, left = tl.program_id(1), start + first, frames - first
    if query_rows is None:
        qkv_grad += row.to(tl.int64) * STRIDE + head * HEAD_DIM
    else:
        qkv_grad += head * HEAD_DIM
    if (first >= frames) | (sequence == sequences):
        nothing = vectors.zeros(BLOCK_QUERIES, WIDTH, REST)
        if query_rows is None:
            vectors.store(qkv_grad, nothing, left, STRIDE, BLOCK_QUERIES, WIDTH, REST, HEAD_DIM)
        _store_part(parts, part_count, 0, vectors.column_sums(nothing), HEADS, HEAD_DIM, WIDTH, REST)
        return
    query, rows, qkv, keys = _block_of_queries(qkv, query_rows, offsets, key_lengths, sequence, start, frames, first, head,
                                               STRIDE, HEAD_DIM, WIDTH, REST, BLOCK_QUERIES)  # fmt: skip
    block = row.to(tl.int64) * HEAD_STRIDE + head * HEAD_DIM
    grad = vectors.load(out_grad + block, left, HEAD_STRIDE, BLOCK_QUERIES, WIDTH, REST, HEAD_DIM, True)
    result = vectors.load(out + block, left, HEAD_STRIDE, BLOCK_QUERIES, WIDTH, REST, HEAD_DIM, True)
    block_delta = vectors.row_sums(grad, result, REST) * inverse_keep_scale
    if queries is not None:
        vectors.store(queries + block, query, left, HEAD_STRIDE, BLOCK_QUERIES, WIDTH, REST, HEAD_DIM)
    index = tl.arange(0, BLOCK_QUERIES)
    place = _row_place(head, queried, sequences, start, sequence) + first + index
    block_lse = tl.load(lse + head.to(tl.int64) * queried + row + index, mask=index < left, other=0.0)
    tl.store(row_lse + place, block_lse)
    tl.store(delta + place, block_delta)
    block_bits = tl.zeros([BLOCK_QUERIES], tl.uint32)
    if DROPOUT:
        block_bits = dropout.row_bits(tl.load(seed), rows * HEADS + head)
        tl.store(row_bits + place, block_bits.to(tl.int32, bitcast=True))
    key, value = qkv + HEAD_STRIDE, qkv + 2 * HEAD_STRIDE
    sums = vectors.zeros(BLOCK_QUERIES, WIDTH, REST)
    last = (keys - 1) // BLOCK_KEYS * BLOCK_KEYS
    sums = _add_query_gradient(sums, query, grad, block_lse, block_delta, block_bits, key, value, columns, last, keys, scale,
                               threshold, STRIDE, HEAD_DIM, WIDTH, REST, DROPOUT, PRECISION, BLOCK_KEYS, True)  # fmt: skip
    if last > 0:  # as in `_forward`
        for first_key in range(0, last, BLOCK_KEYS):
            sums = _add_query_gradient(sums, query, grad, block_lse, block_delta, block_bits, key, value, columns, first_key,
                                       keys, scale, threshold, STRIDE, HEAD_DIM, WIDTH, REST, DROPOUT, PRECISION, BLOCK_KEYS,
                                       False)  # fmt: skip
    sums = vectors.scaled(sums, grad_scale)
    if query_rows is None:
        vectors.store(qkv_grad, sums, left, STRIDE, BLOCK_QUERIES, WIDTH, REST, HEAD_DIM)
    else:  # read again: the loop leaves no registers that could keep them
        rows = tl.load(query_rows + row + index, mask=index < left)
        vectors.store(qkv_grad, sums, left, STRIDE, BLOCK_QUERIES, WIDTH, REST, HEAD_DIM, rows)
    _store_part(parts, part_count, 0, vectors.column_sums(sums), HEADS, HEAD_DIM, WIDTH, REST)


@triton.jit
def _add_key_gradients(key_sums, value_sums, key, value, column_bits, queries, out_grad, row_lse, delta, row_bits, place, first,
                       count, scale, threshold, QUERY_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr,
                       HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, DROPOUT: tl.constexpr,
                       PRECISION: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Both sums after the BLOCK queries from ``first``: + ds^T q, + (keep p)^T dout; MASKED: all ``count`` may end in them."""
    away, left = tl.cast(first, tl.int64), count - first
    query = vectors.load(queries + away * QUERY_STRIDE, left, QUERY_STRIDE, BLOCK, WIDTH, REST, HEAD_DIM, MASKED)
    grad = vectors.load(out_grad + away * HEAD_STRIDE, left, HEAD_STRIDE, BLOCK, WIDTH, REST, HEAD_DIM, MASKED)
    row = place + first + tl.arange(0, BLOCK)
    weights = tl.exp2(vectors.products(key, query, REST, PRECISION) * scale - tl.load(row_lse + row)[None])
    weights_grad = vectors.products(value, grad, REST, PRECISION)
    dropped = weights
    if DROPOUT:
        bits = tl.load(row_bits + row).to(tl.uint32, bitcast=True)
        kept = dropout.keep(bits[None], column_bits[:, None], threshold)
        dropped = tl.where(kept, weights, 0.0 * scale)  # as in `_attend`
        weights_grad = tl.where(kept, weights_grad, 0.0)
    value_sums = vectors.add_weighted(value_sums, dropped, grad, REST, PRECISION)
    scores_grad = weights * (weights_grad - tl.load(delta + row)[None])
    return vectors.add_weighted(key_sums, scores_grad, query, REST, PRECISION), value_sums


@triton.jit(do_not_specialize=_VARYING)
def _key_backward(
    qkv,  # [rows, 3, HEADS, HEAD_DIM]
    qkv_grad,  # [rows, 3, HEADS, HEAD_DIM]: the keys' and the values' parts are written
    queries,  # [queried, HEADS, HEAD_DIM], of `_query_backward`; or None: those of all rows, in qkv
    out_grad,  # [queried, HEADS, HEAD_DIM]
    offsets,  # [sequences + 1] int64
    key_lengths,  # [sequences] int64, or None
    query_offsets,  # as in `_forward`
    row_lse,  # [HEADS, row_places] float32, of `_query_backward`
    delta,  # [HEADS, row_places] float32, of `_query_backward`
    row_bits,  # [HEADS, row_places] int32, of `_query_backward`; or None
    columns,  # [column_places] int32, or None
    parts,  # as in `_query_backward`: the keys' and the values' parts are written
    rows,
    queried,
    sequences,
    part_count,
    scale,
    threshold,
    grad_scale,
    keep_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """dK and dV of BLOCK_KEYS keys of a head of a sequence: 0 where they are not attended to. Scores are [keys, queries]."""
    HEAD_STRIDE: tl.constexpr = HEADS * HEAD_DIM
    STRIDE: tl.constexpr = 3 * HEAD_STRIDE
    QUERY_STRIDE: tl.constexpr = STRIDE if queries is None else HEAD_STRIDE
    sequence, start, frames, first_key = _rows_of_program(offsets, rows, sequences, BLOCK_KEYS)
    head = tl.program_id(1)
    away, left = first_key.to(tl.int64) * STRIDE, frames - first_key
    qkv += start.to(tl.int64) * STRIDE + head * HEAD_DIM
    key_grad = qkv_grad + (start + first_key).to(tl.int64) * STRIDE + head * HEAD_DIM + HEAD_STRIDE
    value_grad = key_grad + HEAD_STRIDE
    is_idle = (first_key >= frames) | (sequence == sequences)
    first_query, count = start, frames
    if queries is not None:
        if sequence < sequences:
            first_query, count = _rows_of(query_offsets, sequence)
        is_idle |= count == 0
    if is_idle:
        nothing = vectors.zeros(BLOCK_KEYS, WIDTH, REST)
        vectors.store(key_grad, nothing, left, STRIDE, BLOCK_KEYS, WIDTH, REST, HEAD_DIM)
        vectors.store(value_grad, nothing, left, STRIDE, BLOCK_KEYS, WIDTH, REST, HEAD_DIM)
        _store_part(parts, part_count, 1, vectors.column_sums(nothing), HEADS, HEAD_DIM, WIDTH, REST)
        _store_part(parts, part_count, 2, vectors.column_sums(nothing), HEADS, HEAD_DIM, WIDTH, REST)
        return
    keys = _keys_of(sequence, key_lengths, frames)
    key = vectors.load(qkv + HEAD_STRIDE + away, keys - first_key, STRIDE, BLOCK_KEYS, WIDTH, REST, HEAD_DIM, True)
    value = vectors.load(
        qkv + 2 * HEAD_STRIDE + away, keys - first_key, STRIDE, BLOCK_KEYS, WIDTH, REST, HEAD_DIM, True
    )
    index = first_key + tl.arange(0, BLOCK_KEYS)
    column_bits = tl.zeros([BLOCK_KEYS], tl.uint32)
    if DROPOUT:
        column_bits = tl.load(columns + index).to(tl.uint32, bitcast=True)
    if queries is None:
        queries = qkv
    else:
        queries += first_query.to(tl.int64) * HEAD_STRIDE + head * HEAD_DIM
    out_grad += first_query.to(tl.int64) * HEAD_STRIDE + head * HEAD_DIM
    place = _row_place(head, queried, sequences, first_query, sequence)
    key_sums = vectors.zeros(BLOCK_KEYS, WIDTH, REST)
    value_sums = vectors.zeros(BLOCK_KEYS, WIDTH, REST)
    last = (count - 1) // BLOCK_QUERIES * BLOCK_QUERIES
    key_sums, value_sums = _add_key_gradients(
        key_sums, value_sums, key, value, column_bits, queries, out_grad, row_lse, delta, row_bits, place, last, count,
        scale, threshold, QUERY_STRIDE, HEAD_STRIDE, HEAD_DIM, WIDTH, REST, DROPOUT, PRECISION, BLOCK_QUERIES, True,
    )  # fmt: skip
    # Nothing is to be added up where no key is attended to.
    if (last > 0) & (first_key < keys):  # as in `_forward`
        for first in range(0, last, BLOCK_QUERIES):
            key_sums, value_sums = _add_key_gradients(
                key_sums, value_sums, key, value, column_bits, queries, out_grad, row_lse, delta, row_bits, place, first,
                count, scale, threshold, QUERY_STRIDE, HEAD_STRIDE, HEAD_DIM, WIDTH, REST, DROPOUT, PRECISION, BLOCK_QUERIES,
                False,
            )  # fmt: skip
    attended = (index < keys)[:, None]
    key_sums = vectors.where(attended, vectors.scaled(key_sums, grad_scale))
    value_sums = vectors.where(attended, vectors.scaled(value_sums, keep_scale))
    vectors.store(key_grad, key_sums, left, STRIDE, BLOCK_KEYS, WIDTH, REST, HEAD_DIM)
    vectors.store(value_grad, value_sums, left, STRIDE, BLOCK_KEYS, WIDTH, REST, HEAD_DIM)
    _store_part(parts, part_count, 1, vectors.column_sums(key_sums), HEADS, HEAD_DIM, WIDTH, REST)
    _store_part(parts, part_count, 2, vectors.column_sums(value_sums), HEADS, HEAD_DIM, WIDTH, REST)


def draw_columns(seeds: Tensor, max_frames: int) -> Tensor:
    """[..., column_places] int32, the dropout bits of every key position for each of ``seeds`` ([...] int64)."""
    columns = seeds.new_empty(*seeds.shape, cdiv(max_frames, ROOM) * ROOM, dtype=torch.int32)
    grid = columns.shape[-1] // ROOM, seeds.numel()
    launch(_draw_columns, lambda _: grid, {"columns": columns, "seed": seeds.contiguous()}, [Blocks()])
    return columns


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor], list[Tensor]]:
    dropout_p, seed = arguments.dropout_p, arguments.seed
    given, (queried, heads, _) = _given(arguments), arguments.out_shape
    qkv = given["qkv"]
    out = qkv.new_empty(arguments.out_shape)
    lse, columns = qkv.new_empty(heads, queried, dtype=torch.float32), arguments.columns
    saved = [lse]
    if dropout_p > 0.0 and columns is None:
        columns = draw_columns(seed, arguments.max_frames)
        saved.append(columns)
    given |= {
        "query_rows": contiguous(arguments.query_rows)[0], "out": out, "lse": lse if save else None, "columns": columns,
        "seed": seed, "keep_scale": dropout.scale(dropout_p),
    }  # fmt: skip
    launch(_forward, _grid("BLOCK_QUERIES", queried, arguments), given, _forward_blocks(*_kind(qkv), dropout_p > 0.0))
    return (out,), saved if save else []


def saved_tensors(arguments: Arguments) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Log-sum-exp of each query, and with dropout random bits of each key position, where they are not given."""
    queried, heads, _ = arguments.out_shape
    lse, columns = ((heads, queried), torch.float32), ((cdiv(arguments.max_frames, ROOM) * ROOM,), torch.int32)
    return [lse, columns] if arguments.dropout_p > 0.0 and arguments.columns is None else [lse]


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Tensor], wanted: list[bool]
) -> tuple[Optional[Tensor], ...]:
    dropout_p, seed = arguments.dropout_p, arguments.seed
    given, (grad, query_rows) = _given(arguments), contiguous(*gradients, arguments.query_rows)
    qkv, sequences, rows, queried = given["qkv"], given["sequences"], len(arguments.qkv), len(grad)
    out, lse, columns = saved if len(saved) == 3 else (*saved, arguments.columns)
    keep_scale = dropout.scale(dropout_p)
    qkv_grad, queries = torch.empty_like(qkv), None
    if query_rows is not None:
        queries = torch.empty_like(out)
        qkv_grad[:, 0].zero_()  # `_query_backward` writes that of rows with a query
    query_blocks = _query_backward_blocks(*_kind(qkv), dropout_p > 0.0)
    key_blocks = _key_backward_blocks(*_kind(qkv))
    parts, part_count = None, 0
    if wanted[1]:
        shortest = min(
            *(each.sizes["BLOCK_QUERIES"] for each in query_blocks), *(each.sizes["BLOCK_KEYS"] for each in key_blocks)
        )
        part_count = max(rows, queried) // shortest + sequences + 1
        parts = qkv.new_empty(part_count, 1, *qkv.shape[1:], dtype=torch.float32)
    places = len(lse), (queried // ROOM + sequences) * ROOM
    given |= {
        "qkv_grad": qkv_grad, "queries": queries, "out_grad": grad, "columns": columns,
        "row_lse": lse.new_empty(places), "delta": lse.new_empty(places),
        "row_bits": None if columns is None else columns.new_empty(places),
        "parts": parts, "part_count": part_count, "grad_scale": keep_scale * qkv.shape[3] ** -0.5,
    }  # fmt: skip
    of_queries = {"query_rows": query_rows, "out": out, "lse": lse, "seed": seed, "inverse_keep_scale": 1 / keep_scale}
    launch(_query_backward, _grid("BLOCK_QUERIES", queried, arguments), given | of_queries, query_blocks)
    of_keys = {"rows": rows, "keep_scale": keep_scale}
    launch(_key_backward, _grid("BLOCK_KEYS", rows, arguments), given | of_keys, key_blocks)
    if parts is None:
        return [qkv_grad, None]
    return [qkv_grad, *sum_parts(parts.flatten(2), [arguments.qkv_bias])]


def _given(arguments: Arguments) -> dict[str, object]:
    """The arguments that all three kernels share, by name."""
    dropout_p, (queried, heads, head_dim) = arguments.dropout_p, arguments.out_shape
    qkv, offsets, key_lengths, query_offsets = contiguous(*arguments[:3], arguments.out_offsets)
    width, rest = vectors.tiles(head_dim)
    return {
        "qkv": qkv, "offsets": offsets, "key_lengths": key_lengths, "query_offsets": query_offsets,
        "queried": queried, "sequences": len(offsets) - 1, "scale": _LOG2_E * head_dim**-0.5,
        "threshold": dropout.threshold(dropout_p), "HEADS": heads, "HEAD_DIM": head_dim, "WIDTH": width, "REST": rest,
        "DROPOUT": dropout_p > 0.0,
        "PRECISION": "tf32" if qkv.dtype == torch.float32 and tf32.in_products() else "ieee",
    }  # fmt: skip


def _grid(block: str, rows: int, arguments: Arguments) -> Callable[[Mapping[str, int]], tuple[int, ...]]:
    """Blocks of ``rows`` x heads; the last block of each sequence, dead rows too, may be a part of one."""
    return lambda sizes: (rows // sizes[block] + len(arguments.offsets), arguments.qkv.shape[2])


def _kind(qkv: Tensor) -> tuple[int, torch.dtype, int]:
    """What the block sizes follow from."""
    return architecture(qkv), qkv.dtype, qkv.shape[3]


@functools.cache
def _forward_blocks(arch: int, dtype: torch.dtype, head_dim: int, dropout: bool) -> list[Blocks]:
    wide = head_dim > 64
    if arch == INTERPRETER:
        return [_blocks(32, 32, 4, 1)]
    if dtype == torch.float32:
        # For sm_100 ptxas settles for 80 registers and spills some bytes, unless it is told that there are 128.
        return [_blocks(32, 32, 8, 2) if wide else _blocks(32, 16, 4, 2, registers=128 if arch == 100 else None)]
    if arch == 90:  # two or three programs a multiprocessor: while one is at its exponentials, another multiplies
        if wide:
            return [_blocks(64, 64, 4, 2), _blocks(128, 64, 8, 2)]
        four, eight = _blocks(128, 64, 4, 3), _blocks(128, 64, 8, 3, registers=128)
        return [eight, four] if dropout else [four, eight]  # with random bits four warps run out of registers
    if arch == 100:
        # Without dropout ptxas spills some bytes of eight warps, but of four where vectors are wide.
        return [_blocks(128, 64, 8, 2), _blocks(128, 64, 8, 3)] if dropout else [_blocks(128, 64, 8 if wide else 4, 2)]
    return [_blocks(128, 64, 8, 2)] if wide else [_blocks(128, 64, 8, 3), _blocks(64, 64, 4, 3)]


@functools.cache
def _query_backward_blocks(arch: int, dtype: torch.dtype, head_dim: int, dropout: bool) -> list[Blocks]:
    wide = head_dim > 64
    most = 128 if dropout and not wide else None
    if arch == INTERPRETER:
        return [_blocks(32, 32, 4, 1)]
    if dtype == torch.float32:
        # Triton 3.6 spills four warps' 32 keys.
        return [_blocks(32, 32, 8, 2) if wide else _blocks(32, 16, 4, 2)]
    small, large = _blocks(64, 64, 4, 2), _blocks(128, 64, 8, 2, registers=most if arch == 90 else None)
    if arch in (90, 100):
        return [small, large] if wide else [large, small]
    return [_blocks(128, 32, 8, 2)] if wide else [_blocks(128, 32, 8, 3, registers=most), _blocks(64, 32, 4, 3)]


@functools.cache
def _key_backward_blocks(arch: int, dtype: torch.dtype, head_dim: int) -> list[Blocks]:
    wide = head_dim > 64
    if arch == INTERPRETER:
        return [_blocks(32, 32, 4, 1)]
    if dtype == torch.float32:
        narrow = arch == (80 if wide else 100)  # where ptxas spills some bytes of 32 keys
        return [_blocks(16, 16 if narrow else 32, 4, 2)]
    if arch == 90:
        wider = head_dim > 80
        return [_blocks(32, 128, 8, 2)] if wider else [_blocks(64, 64, 4, 2), _blocks(32, 64, 4, 2)]
    if arch == 100:
        return [_blocks(64, 128, 8, 2), _blocks(64, 64, 4, 2)]
    return [_blocks(16, 128, 8, 2)] if wide else [_blocks(32, 128, 8, 2), _blocks(32, 64, 4, 2)]


def _blocks(queries: int, keys: int, warps: int, stages: int, registers: Optional[int] = None) -> Blocks:
    """Blocks of queries and keys. With 128 ``registers`` a thread eight warps leave room for eight more."""
    return Blocks({"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys}, warps, stages, registers)
