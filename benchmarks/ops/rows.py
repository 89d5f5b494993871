"""Cases of passes over rows of channels, ours beside PyTorch's operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..sizes import Size
from .case import OURS, Function, Inputs, OperatorCase, Tensors, Work, both_ways, generator_on, ours, pytorch, randn


def row_cases(
    operator: str,
    size: Size,
    dtype: torch.dtype,
    device: str,
    dropout_p: float,
    *,
    name: str,
    shape: dict[str, Any],
    draw: Callable[[torch.Generator], tuple[Tensors, Tensors]],
    functions: tuple[Function, Function],
    least_bytes: tuple[float, float],
) -> Iterator[OperatorCase]:
    """A pass with its backward, and by itself.

    Args:
        name, shape: of the case, less model and dropout.
        draw: the tensors, and the gradients of the outputs. Behind the tensors comes the seed of dropout's mask, which is given,
            as a model gives it, so that drawing one is not timed.
        functions: ours and PyTorch's.
        least_bytes: that the forward and that the backward have to move.
    """

    def inputs(seed: int) -> Inputs:
        tensors, directions = draw(generator_on(device, seed))
        return Inputs((*tensors, torch.tensor(0, device=device)), tuple(each.detach() for each in directions))

    call, plain = functions
    sides = {OURS: ours(operator, device, call), **pytorch("PyTorch", plain)}
    case = OperatorCase(
        name=f"{size.name}, {name}, dropout {dropout_p}",
        shape={"model": size.name, **shape, "dropout": dropout_p},
        device=device,
        dtype=dtype,
        draw=inputs,
        sides=sides,
        truth=sides["PyTorch"],
        least=Work(least_bytes[0]),
        dropout_p=dropout_p,
    )
    return both_ways(case, Work(least_bytes[1]))


def rows(generator: torch.Generator, count: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Activations ``[count, channels]`` that want a gradient."""
    return randn(generator, count, channels, dtype=dtype).requires_grad_()


def parameter(generator: torch.Generator, channels: int) -> Tensor:
    """A parameter ``[channels]``: float32, as under autocast."""
    return randn(generator, channels).requires_grad_()


def some_of(generator: torch.Generator, count: int, chosen: int) -> Tensor:
    """``[chosen]`` random ones of ``count`` indices, rising."""
    return torch.randperm(count, device=generator.device, generator=generator)[:chosen].sort().values


def stream_dtype(dtype: torch.dtype, device: str, *, pre_norm: bool) -> torch.dtype:
    """The residual stream's dtype under autocast: post-norm, it is made of LayerNorm's results, float32 on CUDA."""
    return dtype if pre_norm or torch.device(device).type != "cuda" else torch.float32
