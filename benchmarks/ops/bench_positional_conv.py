"""``positional_conv`` beside PyTorch's grouped convolution with GELU and residual.

    python -m benchmarks.ops.bench_positional_conv

The model's parameters are float32 and its rows 16-bit, so every side normalises and casts the weight too. Ours works on packed
rows; the others are handed the padded grid, and packing is not counted against them. FLOPs are those of the valid frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_fast.ops.positional_conv import positional_conv

from ..sizes import Size
from .case import OURS, Inputs, OperatorCase, Side, Tensors, Work, both_ways, generator_on, ours, pytorch, randn
from .command_line import main
from .utterances import Utterances

OPERATOR = "positional_conv"


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    for padded in (True, False):
        yield from _cases(size, dtype, Utterances.of(size, device, padded=padded))


def _cases(size: Size, dtype: torch.dtype, utterances: Utterances) -> Iterator[OperatorCase]:
    values = utterances.rows * size.dim * dtype.itemsize
    parameters = 4 * size.dim * size.group_channels * size.taps
    flops = 2.0 * utterances.rows * size.dim * size.group_channels * size.taps
    sides = _sides(size, utterances)
    case = OperatorCase(
        name=f"{size.name}, {utterances.description}",
        shape={"model": size.name, **utterances.shape, "channels": size.dim, "groups": size.groups, "taps": size.taps},
        device=utterances.device,
        dtype=dtype,
        draw=partial(_draw, size, dtype, utterances),
        sides=sides,
        truth=sides["PyTorch, conv1d"],
        least=Work(2 * values + parameters, flops),
    )
    # Preactivation, gradient of the output, rows; gradient of the rows; parameters and their gradients.
    yield from both_ways(case, Work(4 * values + 2 * parameters, 2 * flops))


def _draw(size: Size, dtype: torch.dtype, utterances: Utterances, seed: int) -> Inputs:
    """The padded grid, weight, bias, gain, and which frames are valid."""
    generator, valid = generator_on(utterances.device, seed), utterances.valid()
    grids = [randn(generator, *valid.shape, size.dim, dtype=dtype) * valid[:, :, None].to(dtype) for _ in range(2)]
    weight = randn(generator, size.dim, size.group_channels, size.taps)
    bias = 0.1 * randn(generator, size.dim)
    gain = 1.0 + randn(generator, 1, 1, size.taps).abs()
    leaves = (each.requires_grad_() for each in (grids[0], weight, bias, gain))
    return Inputs((*leaves, valid), (grids[1],))


def _sides(size: Size, utterances: Utterances) -> dict[str, Side]:
    on_grid = {"canonical": partial(_valid_only, utterances)}
    return {
        OURS: ours(OPERATOR, utterances.device, partial(_ours, size=size), prepare=partial(_packed, utterances)),
        **pytorch("PyTorch, conv1d", partial(_conv1d, groups=size.groups), **on_grid),
        **pytorch("PyTorch, conv2d channels-last", partial(_conv2d_channels_last, groups=size.groups), **on_grid),
    }


def _packed(utterances: Utterances, inputs: Inputs) -> Inputs:
    """The same without the padding."""
    grid, *parameters, valid = inputs.tensors
    rows = grid.detach()[valid].requires_grad_()
    return Inputs((rows, *parameters, utterances.offsets()), (inputs.directions[0][valid],))


def _valid_only(utterances: Utterances, results: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradient of the grid as packed rows; the parameters' gradients as they are."""
    valid = utterances.valid()
    return [each[valid] if each.shape[:2] == valid.shape else each for each in results]


def _ours(tensors: Tensors, dropout_p: float, *, size: Size) -> Tensors:
    rows, weight, bias, gain, offsets = tensors
    return (positional_conv(rows, weight, bias, offsets, groups=size.groups, max_frames=size.frames, gain=gain),)


def _conv1d(tensors: Tensors, dropout_p: float, *, groups: int) -> Tensors:
    """As torchaudio computes it: [batch, channels, frames], a grouped convolution, one frame too many cut off."""
    grid, weight, bias, gain, _ = tensors
    x = grid.transpose(1, 2)
    filters = torch._weight_norm(weight, gain, 2).to(x.dtype)
    padding = filters.shape[2] // 2
    z = F.conv1d(x, filters, bias.to(x.dtype), padding=padding, groups=groups)[:, :, : x.shape[2]]
    return (F.gelu(z).transpose(1, 2) + grid,)


def _conv2d_channels_last(tensors: Tensors, dropout_p: float, *, groups: int) -> Tensors:
    """The same in the memory format that cuDNN's tensor-core kernels prefer; [batch, channels, 1, frames]."""
    grid, weight, bias, gain, _ = tensors
    x = grid.transpose(1, 2)[:, :, None]
    filters = torch._weight_norm(weight, gain, 2).to(x.dtype)[:, :, None]
    filters = filters.to(memory_format=torch.channels_last)
    padding = (0, filters.shape[3] // 2)
    z = F.conv2d(x, filters, bias.to(x.dtype), padding=padding, groups=groups)[:, :, 0, : x.shape[3]]
    return (F.gelu(z).transpose(1, 2) + grid,)


if __name__ == "__main__":
    main(OPERATOR)
