"""``conv_frontend`` beside torchaudio's feature extractor, and its layer 0 by itself.

    python -m benchmarks.ops.bench_conv_frontend

Parameters and audio are float32, and 16-bit dtypes are autocast's, as in training. Audio wants no gradient, so layer 0 computes
none for its input. "layer 0" is that layer into a tensor of its own, which the whole front end need not make.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hubert_fast.ops.conv_frontend import conv_frontend
from hubert_fast.reference import conv_frontend as reference

from ..sizes import Size
from ..torchaudio_peer import import_models, installed
from .case import (
    OURS,
    Function,
    Inputs,
    OperatorCase,
    Side,
    Tensors,
    Work,
    both_ways,
    generator_on,
    ours,
    pytorch,
    randn,
    torchaudio_version,
)

OPERATOR = "conv_frontend"

_SHAPES = ((10, 5), *((3, 2),) * 4, *((2, 2),) * 2)  # (taps, stride) of each layer
_SAMPLES_OF_FRAME, _STRIDE = 400, 320


class _Stack(NamedTuple):
    """The layers of a case."""

    shapes: tuple[tuple[int, int], ...]
    channels: int
    norm: str
    dtype: torch.dtype
    device: str

    @property
    def strides(self) -> list[int]:
        return [stride for _, stride in self.shapes]

    @property
    def has_biases(self) -> bool:
        return self.norm == "layer_norm"  # as HuBERT Large has them

    def split(self, parameters: Tensors) -> list[list[Tensor]]:
        """Filters, biases, norm weights and norm biases."""
        layers = len(self.shapes)
        norms = 1 if self.norm == "group_norm" else layers
        groups, rest = [], list(parameters)
        for count in (layers, layers * self.has_biases, norms, norms):
            groups.append(rest[:count])
            rest = rest[count:]
        return groups

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, self.dtype, enabled=self.dtype != torch.float32)


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    batch = 1 if torch.device(device).type == "cpu" else size.batch  # seconds, even of one utterance
    for name, layers in (("all layers", len(_SHAPES)), ("layer 0", 1)):
        stack = _Stack(_SHAPES[:layers], size.conv_channels, size.conv_norm, dtype, device)
        yield from _cases(name, size, batch, stack)


def _cases(name: str, size: Size, batch: int, stack: _Stack) -> Iterator[OperatorCase]:
    samples = _SAMPLES_OF_FRAME + (size.frames - 1) * _STRIDE
    case = OperatorCase(
        name=f"{size.name}, {name}, {batch} x {samples / 16_000:.1f} s, {stack.norm}",
        shape={
            "model": size.name, "layers": len(stack.shapes), "utterances": batch, "samples": samples,
            "channels": stack.channels, "norm": stack.norm,
        },
        device=stack.device,
        dtype=stack.dtype,
        draw=partial(_draw, stack, batch, samples),
        sides=_sides(stack),
        truth=Side(partial(_plain, stack=stack._replace(dtype=torch.float32)), torch.__version__),
        least=_forward_work(stack, batch, samples),
    )  # fmt: skip
    yield from both_ways(case, _backward_work(stack, batch, samples))


def _draw(stack: _Stack, batch: int, samples: int, seed: int) -> Inputs:
    """Audio, then filters, biases, norm weights and norm biases."""
    generator, channels = generator_on(stack.device, seed), stack.channels
    audio = randn(generator, batch, samples)
    inputs_of = [1] + [channels] * (len(stack.shapes) - 1)
    filters = [
        randn(generator, channels, into, taps) * (2 / (into * taps)) ** 0.5
        for into, (taps, _) in zip(inputs_of, stack.shapes)
    ]
    norms = 1 if stack.norm == "group_norm" else len(filters)
    biases = [0.1 * randn(generator, channels) for _ in range(len(filters) * stack.has_biases)]
    norm_weights = [1.0 + 0.1 * randn(generator, channels) for _ in range(norms)]
    norm_biases = [0.1 * randn(generator, channels) for _ in range(norms)]
    parameters = (each.requires_grad_() for each in (*filters, *biases, *norm_weights, *norm_biases))
    return Inputs((audio, *parameters), (randn(generator, batch, _frames(stack, samples)[-1], channels),))


def _frames(stack: _Stack, samples: int) -> list[int]:
    """Of each layer."""
    frames = []
    for taps, stride in stack.shapes:
        samples = (samples - taps) // stride + 1
        frames.append(samples)
    return frames


def _products(stack: _Stack, batch: int, samples: int) -> list[float]:
    """FLOPs of each layer's convolution."""
    channels = stack.channels
    return [
        2.0 * batch * frames * channels * taps * (channels if layer else 1)
        for layer, (frames, (taps, _)) in enumerate(zip(_frames(stack, samples), stack.shapes))
    ]


def _values(stack: _Stack, batch: int, samples: int) -> tuple[int, int, int]:
    """Bytes of the audio, of the features and of the filters."""
    inputs = [stack.channels * taps * (stack.channels if layer else 1) for layer, (taps, _) in enumerate(stack.shapes)]
    features = batch * _frames(stack, samples)[-1] * stack.channels
    return 4 * batch * samples, features * stack.dtype.itemsize, 4 * sum(inputs)


def _forward_work(stack: _Stack, batch: int, samples: int) -> Work:
    return Work(sum(_values(stack, batch, samples)), sum(_products(stack, batch, samples)))


def _backward_work(stack: _Stack, batch: int, samples: int) -> Work:
    """Audio, gradient of the features and filters read, their gradients written; two products of each layer but the first."""
    audio, features, filters = _values(stack, batch, samples)
    first, *others = _products(stack, batch, samples)
    return Work(audio + features + 2 * filters, first + 2 * sum(others))


def _sides(stack: _Stack) -> dict[str, Side]:
    sides = {OURS: _ours(stack), f"{OURS} torch": _ours(stack, "torch")}
    plain = pytorch("PyTorch", partial(_plain, stack=stack))
    if installed():
        sides["torchaudio"] = Side(_TorchaudiosExtractor(stack), torchaudio_version())
        del plain["PyTorch"]  # the same operations
    return sides | plain


def _ours(stack: _Stack, name: str | None = None) -> Side:
    def call(tensors: Tensors, dropout_p: float) -> Tensors:
        audio, *parameters = tensors
        with stack.autocast():
            return (conv_frontend(audio, *stack.split(tuple(parameters)), strides=stack.strides, norm=stack.norm),)

    return ours(OPERATOR, stack.device, call, name)


def _plain(tensors: Tensors, dropout_p: float, *, stack: _Stack) -> Tensors:
    """Convolution, norm and GELU layer by layer."""
    audio, *parameters = tensors
    groups = stack.split(tuple(parameters))
    with stack.autocast():
        return (reference.conv_frontend(audio, *groups, strides=stack.strides, norm=stack.norm),)


class _TorchaudiosExtractor:
    """torchaudio's own module, called with the tensors of the case as its parameters."""

    def __init__(self, stack: _Stack) -> None:
        self._stack = stack
        self._called: Function | None = None

    def __call__(self, tensors: Tensors, dropout_p: float) -> Tensors:
        if self._called is None:
            self._called = self._build()
        return self._called(tensors, dropout_p)

    def _build(self) -> Function:
        import_models()
        from torchaudio.models.wav2vec2 import components

        stack = self._stack
        shapes = [(stack.channels, *shape) for shape in stack.shapes]
        module = components._get_feature_extractor(stack.norm, shapes, stack.has_biases).to(stack.device)

        def call(tensors: Tensors, dropout_p: float) -> Tensors:
            audio, *parameters = tensors
            named = _named(*stack.split(tuple(parameters)))
            with stack.autocast():
                return (torch.func.functional_call(module, named, (audio, None))[0],)

        return call


def _named(filters: list[Tensor], biases: list[Tensor], norm_weights: list[Tensor], norm_biases: list[Tensor]) -> dict:
    """Parameters under the names that torchaudio gives them."""
    groups = {
        "conv.weight": filters,
        "conv.bias": biases,
        "layer_norm.weight": norm_weights,
        "layer_norm.bias": norm_biases,
    }
    return {f"conv_layers.{layer}.{name}": each for name, group in groups.items() for layer, each in enumerate(group)}


def test_conv_frontend(timed) -> None:
    timed()


if __name__ == "__main__":
    from .command_line import main

    main(OPERATOR)
