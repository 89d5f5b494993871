"""``conv_frontend`` beside torchaudio's feature extractor, and its layer 0 by itself.

    python -m benchmarks.ops.bench_conv_frontend

Parameters and audio are float32, and 16-bit dtypes are autocast's, as in training. Audio wants no gradient, so layer 0 computes
none for its input. "layer 0" is that layer into a tensor of its own, which the whole front end need not make.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import islice
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hubert_fast.ops.conv_frontend import conv_frontend
from hubert_fast.reference import conv_frontend as reference

from ..flops import convolution_flops
from ..machine import version
from ..sizes import Size
from ..torchaudio_peer import import_components, installed
from .case import OURS, Inputs, OperatorCase, Side, Tensors, Work, both_ways, generator_on, ours, pytorch, randn
from .command_line import main

OPERATOR = "conv_frontend"

_SAMPLES_OF_FRAME, _STRIDE = 400, 320


class Stack(NamedTuple):
    """A model whose convolutions are the layers of a case, and how much audio they take."""

    size: Size
    dtype: torch.dtype
    device: str
    batch: int
    samples: int

    @property
    def strides(self) -> list[int]:
        return [stride for _, _, stride in self.size.convolutions]

    @property
    def has_biases(self) -> bool:
        return self.size.norm == "layer_norm"  # as HuBERT Large has them

    @property
    def norms(self) -> int:
        return 1 if self.size.norm == "group_norm" else len(self.size.convolutions)

    @property
    def filters(self) -> list[tuple[int, int, int]]:
        """(channels, channels that are read, taps) of each layer."""
        read = [1, *(channels for channels, _, _ in self.size.convolutions)]
        return [(channels, into, taps) for into, (channels, taps, _) in zip(read, self.size.convolutions)]

    def work(self) -> tuple[Work, Work]:
        """FLOPs and bytes of a forward and of a backward.

        The backward reads audio, gradient of the features and filters, writes their gradients, and has two products of each
        layer but the first.
        """
        features = self.batch * self.size.frames_of(self.samples) * self.size.conv_channels
        read, filters = 4 * self.batch * self.samples + features * self.dtype.itemsize, 4 * sum(map(prod, self.filters))
        first, *others = (self.batch * flops for flops in convolution_flops(self.size, self.samples))
        return Work(read + filters, first + sum(others)), Work(read + 2 * filters, first + 2 * sum(others))

    def draw(self, seed: int) -> Inputs:
        """Audio, then filters, biases, norm weights and norm biases."""
        generator, channels = generator_on(self.device, seed), self.size.conv_channels
        audio = randn(generator, self.batch, self.samples)
        filters = [randn(generator, *each) * (2 / prod(each[1:])) ** 0.5 for each in self.filters]
        biases = [0.1 * randn(generator, channels) for _ in range(len(filters) * self.has_biases)]
        norm_weights = [1.0 + 0.1 * randn(generator, channels) for _ in range(self.norms)]
        norm_biases = [0.1 * randn(generator, channels) for _ in range(self.norms)]
        parameters = (each.requires_grad_() for each in (*filters, *biases, *norm_weights, *norm_biases))
        direction = randn(generator, self.batch, self.size.frames_of(self.samples), channels)
        return Inputs((audio, *parameters), (direction,))

    def split(self, parameters: Tensors) -> list[list[Tensor]]:
        """Filters, biases, norm weights and norm biases."""
        layers, rest = len(self.size.convolutions), iter(parameters)
        return [list(islice(rest, count)) for count in (layers, layers * self.has_biases, self.norms, self.norms)]

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, self.dtype, enabled=self.dtype != torch.float32)


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    batch = 1 if torch.device(device).type == "cpu" else size.batch  # seconds, even of one utterance
    samples = _SAMPLES_OF_FRAME + (size.frames - 1) * _STRIDE
    for name, layers in (("all layers", len(size.convolutions)), ("layer 0", 1)):
        stack = Stack(size.changed(convolutions=size.convolutions[:layers]), dtype, device, batch, samples)
        forward, backward = stack.work()
        case = OperatorCase(
            name=f"{size.name}, {name}, {batch} x {samples / 16_000:.1f} s, {size.norm}",
            shape={
                "model": size.name, "layers": layers, "utterances": batch, "samples": samples,
                "channels": size.conv_channels, "norm": size.norm,
            },
            device=device,
            dtype=dtype,
            draw=stack.draw,
            sides=_sides(stack),
            truth=Side(partial(_plain, stack=stack._replace(dtype=torch.float32)), torch.__version__),
            least=forward,
        )  # fmt: skip
        yield from both_ways(case, backward)


def _sides(stack: Stack) -> dict[str, Side]:
    call = partial(_ours, stack=stack)
    sides = {OURS: ours(OPERATOR, stack.device, call), f"{OURS} torch": ours(OPERATOR, stack.device, call, "torch")}
    if not installed():
        return sides | pytorch("PyTorch", partial(_plain, stack=stack))
    sides["torchaudio"] = Side(partial(_torchaudio, stack=stack), version("torchaudio"))
    compiled = "PyTorch, compiled"  # by itself it would be the same operations
    return sides | {compiled: pytorch("PyTorch", partial(_plain, stack=stack))[compiled]}


def _ours(tensors: Tensors, dropout_p: float, *, stack: Stack) -> Tensors:
    audio, *parameters = tensors
    with stack.autocast():
        return (conv_frontend(audio, *stack.split(tuple(parameters)), strides=stack.strides, norm=stack.size.norm),)


def _plain(tensors: Tensors, dropout_p: float, *, stack: Stack) -> Tensors:
    """Convolution, norm and GELU layer by layer."""
    audio, *parameters = tensors
    groups = stack.split(tuple(parameters))
    with stack.autocast():
        return (reference.conv_frontend(audio, *groups, strides=stack.strides, norm=stack.size.norm),)


def _torchaudio(tensors: Tensors, dropout_p: float, *, stack: Stack) -> Tensors:
    """torchaudio's own module, called with the tensors of the case as its parameters."""
    audio, *parameters = tensors
    named = _named(*stack.split(tuple(parameters)))
    with stack.autocast():
        return (torch.func.functional_call(_torchaudios_extractor(stack), named, (audio, None))[0],)


@lru_cache(maxsize=1)
def _torchaudios_extractor(stack: Stack) -> nn.Module:
    norm, shapes = stack.size.norm, stack.size.convolutions
    return import_components()._get_feature_extractor(norm, shapes, stack.has_biases).to(stack.device)


def _named(filters: list[Tensor], biases: list[Tensor], norm_weights: list[Tensor], norm_biases: list[Tensor]) -> dict:
    """Parameters under the names that torchaudio gives them."""
    groups = {
        "conv.weight": filters,
        "conv.bias": biases,
        "layer_norm.weight": norm_weights,
        "layer_norm.bias": norm_biases,
    }
    return {f"conv_layers.{layer}.{name}": each for name, group in groups.items() for layer, each in enumerate(group)}


if __name__ == "__main__":
    main(OPERATOR)
