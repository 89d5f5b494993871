"""``masked_attention`` beside PyTorch's scaled_dot_product_attention (SDPA), with and without padding.

    python -m benchmarks.ops.bench_masked_attention

With padding SDPA is given the padded grid and a mask of the keys, or on a GPU a jagged nested tensor; without padding, each of
its GPU kernels in turn. SDPA's queries, keys and values lie in tensors of their own, so that no gradients have to be put
together: its best case. FLOPs are those of the valid frames, forward 4 and backward 8 times heads x head_dim x frames^2 of each
utterance; scores that a backward computes again are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hubert_fast.ops.masked_attention import masked_attention

from ..sizes import Size
from .case import OURS, Inputs, OperatorCase, Side, Tensors, Work, both_ways, generator_on, ours, randn
from .command_line import main
from .utterances import Utterances

OPERATOR = "masked_attention"

_KERNELS = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    for dropout_p in (0.1, 0.0):
        for padded in (True, False):
            yield from _cases(size, dtype, Utterances.of(size, device, padded=padded), dropout_p)


def _cases(size: Size, dtype: torch.dtype, utterances: Utterances, dropout_p: float) -> Iterator[OperatorCase]:
    values = utterances.rows * size.dim * dtype.itemsize
    flops = 4 * size.dim * utterances.squares
    case = OperatorCase(
        name=f"{size.name}, {utterances.description}, {size.heads} heads of {size.head_dim}, dropout {dropout_p}",
        shape={
            "model": size.name, **utterances.shape, "heads": size.heads, "head_dim": size.head_dim,
            "dropout": dropout_p,
        },
        device=utterances.device,
        dtype=dtype,
        draw=partial(_draw, size, dtype, utterances),
        sides=_sides(utterances),
        truth=_sdpa(utterances, SDPBackend.MATH),
        least=Work(4 * values, flops),
        dropout_p=dropout_p,
    )  # fmt: skip
    yield from both_ways(case, Work(8 * values, 2 * flops))


def _draw(size: Size, dtype: torch.dtype, utterances: Utterances, seed: int) -> Inputs:
    """Queries, keys and values [batch, frames, 3, heads, head_dim] and the output's gradient, 0 in the padding."""
    generator, valid = generator_on(utterances.device, seed), utterances.valid()
    drawn = []
    for shape in ((3, size.heads, size.head_dim), (size.heads, size.head_dim)):
        grid = randn(generator, *valid.shape, *shape, dtype=dtype)
        drawn.append(grid.masked_fill(~valid.view(*valid.shape, *(1 for _ in shape)), 0.0))
    return Inputs((drawn[0].requires_grad_(),), (drawn[1],))


def _sides(utterances: Utterances) -> dict[str, Side]:
    device, frames = utterances.device, utterances.frames
    packed = ours(OPERATOR, device, partial(_ours, max_frames=frames), prepare=partial(_packed, utterances),
                  canonical=_split_gradient)  # fmt: skip
    sides = {OURS: packed}
    on_gpu = torch.device(device).type == "cuda"
    if utterances.padded:
        sides[f"{OURS}, padded rows"] = ours(
            OPERATOR,
            device,
            partial(_ours, max_frames=frames),
            prepare=partial(_padded_rows, utterances),
            canonical=lambda results: _split_gradient([each[utterances.valid().flatten()] for each in results]),
        )
    if utterances.padded or not on_gpu:
        sides["SDPA"] = _sdpa(utterances)
    else:
        sides |= {name: _sdpa(utterances, kernel) for name, kernel in _KERNELS.items()}
    if on_gpu:
        bounds = {"min_seqlen": int(utterances.lengths.min()), "max_seqlen": frames}
        jagged = partial(_jagged, bounds=bounds)
        sides["SDPA, jagged"] = Side(jagged, torch.__version__, prepare=partial(_packed_apart, utterances))
    return sides


def _packed(utterances: Utterances, inputs: Inputs) -> Inputs:
    """The rows of the valid frames, where each utterance begins, and the seed of dropout."""
    valid, (grid,) = utterances.valid(), inputs.tensors
    rows = grid.detach()[valid].requires_grad_()
    return Inputs((rows, utterances.offsets(), _seed(utterances)), (inputs.directions[0][valid],))


def _padded_rows(utterances: Utterances, inputs: Inputs) -> Inputs:
    """All rows of the grid, and how many of each utterance are valid."""
    (grid,), (direction,) = inputs
    offsets = torch.arange(len(grid) + 1, device=grid.device) * utterances.frames
    lengths = utterances.lengths.to(grid.device)
    rows = grid.detach().flatten(0, 1).requires_grad_()
    return Inputs((rows, offsets, _seed(utterances), lengths), (direction.flatten(0, 1),))


def _seed(utterances: Utterances) -> Tensor:
    return torch.tensor(0, device=utterances.device)


def _ours(tensors: Tensors, dropout_p: float, *, max_frames: int) -> Tensors:
    qkv, offsets, seed, *lengths = tensors
    return (masked_attention(qkv, offsets, *lengths, max_frames=max_frames, dropout_p=dropout_p, seed=seed),)


def _split_gradient(results: Sequence[Tensor]) -> list[Tensor]:
    """(output, gradient of queries, keys and values) -> output and the three of them."""
    return [results[0], *(each for gradient in results[1:] for each in gradient.unbind(1))]


def _sdpa(utterances: Utterances, kernel: Optional[SDPBackend] = None) -> Side:
    """PyTorch's on the grid: by ``kernel``, or the one that it chooses itself; with a mask of the keys where there is padding."""

    def attend(tensors: Tensors, dropout_p: float) -> Tensors:
        *grids, valid = tensors
        heads = (each.transpose(1, 2) for each in grids)
        mask = valid[:, None, None] if utterances.padded else None
        with nullcontext() if kernel is None else sdpa_kernel(kernel):
            return (F.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=dropout_p).transpose(1, 2),)

    def valid_only(results: Sequence[Tensor]) -> list[Tensor]:
        return [each[utterances.valid()] for each in results]

    return Side(attend, torch.__version__, prepare=partial(_apart, utterances), canonical=valid_only)


def _apart(utterances: Utterances, inputs: Inputs) -> Inputs:
    """Queries, keys and values on the grid, each a tensor of its own, and the valid frames."""
    (grid,) = inputs.tensors
    leaves = (each.contiguous().requires_grad_() for each in grid.detach().unbind(2))
    return Inputs((*leaves, utterances.valid()), inputs.directions)


def _packed_apart(utterances: Utterances, inputs: Inputs) -> Inputs:
    """Queries, keys and values of the valid frames, each a tensor of its own, and where each utterance begins."""
    valid, (grid,) = utterances.valid(), inputs.tensors
    leaves = (each.contiguous().requires_grad_() for each in grid.detach()[valid].unbind(1))
    return Inputs((*leaves, utterances.offsets()), (inputs.directions[0][valid],))


def _jagged(tensors: Tensors, dropout_p: float, *, bounds: dict[str, int]) -> Tensors:
    """PyTorch's on nested tensors of the packed rows, which it hands to its flash kernel for variable lengths."""
    *packed, offsets = tensors
    heads = (torch.nested.nested_tensor_from_jagged(each, offsets, **bounds).transpose(1, 2) for each in packed)
    return (F.scaled_dot_product_attention(*heads, dropout_p=dropout_p).transpose(1, 2).values(),)


if __name__ == "__main__":
    main(OPERATOR)
