"""Operator ``conv_frontend``: raw audio to features, ``[batch, samples] -> [batch, frames, channels]``.

The strided convolutions of HuBERT with their norm (group norm after layer 0, or layer norm after each) and exact GELU.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Sequence
from typing import List, NamedTuple, Optional

import torch
from torch import Tensor

from hubert_fast import backend, cpu, extension
from hubert_fast.cpu_backend import conv_frontend as cpu_backend
from hubert_fast.cuda_backend import conv_frontend as cuda_backend
from hubert_fast.ops.arguments import autocast_dtype
from hubert_fast.ops.operator import Operator
from hubert_fast.reference import conv_frontend as reference

NORMS = ("group_norm", "layer_norm")

# Samples a row and in all up to which PyTorch's convolutions take less time on a CPU.
_SHORT, _FEW_SAMPLES = 24_000, 96_000


class Arguments(NamedTuple):
    waveforms: Tensor  # [batch, samples]
    weights: List[Tensor]  # each [out_channels, in_channels, kernel]
    biases: List[Tensor]  # each [out_channels], or none at all
    norm_weights: List[Tensor]  # one, or one a layer, each [out_channels]
    norm_biases: List[Tensor]
    strides: List[int]
    norm: str
    valid_samples: Optional[Tensor]  # [batch] int64
    dtype: torch.dtype  # to compute in

    @property
    def parameters(self) -> tuple[List[Tensor], ...]:
        return self[1:5]

    @property
    def layer_norm(self) -> bool:
        return self.norm == "layer_norm"

    @property
    def frames(self) -> list[int]:
        """Frames that each layer gives."""
        frames = [self.waveforms.shape[1]]
        for weight, stride in zip(self.weights, self.strides):
            frames.append((frames[-1] - weight.shape[2]) // stride + 1)
        return frames[1:]


def conv_frontend(
    waveforms: Tensor,  # [batch, samples] float
    weights: Sequence[Tensor],  # each [out_channels, in_channels, kernel]
    biases: Sequence[Tensor],  # each [out_channels], or none at all
    norm_weights: Sequence[Tensor],  # 1 (group_norm) or one a layer (layer_norm), each [out_channels]
    norm_biases: Sequence[Tensor],
    *,
    strides: Sequence[int],
    norm: str,
    valid_samples: Optional[Tensor] = None,
) -> Tensor:
    """Features of a batch of audio.

    Args:
        waveforms: ``[batch, samples]``, at least one frame long.
        weights: convolution filters, ``[out_channels, in_channels, kernel]`` each; the first has one input channel.
        biases: ``[out_channels]`` each, or an empty sequence.
        norm_weights, norm_biases: ``[out_channels]`` each; one of each for ``group_norm``, one a layer for ``layer_norm``.
        strides: of each layer.
        norm: ``"group_norm"`` (one group a channel, after layer 0) or ``"layer_norm"`` (over channels, after each layer).
        valid_samples: ``[batch]`` int64. The group-norm statistics of a row are taken over its first
            ``valid_samples`` samples, so padding does not change its features; over all of them where those are too few
            for one frame of layer 0. None: over all, as torchaudio does.

    Returns:
        ``[batch, frames, out_channels]``, in autocast's dtype where it is on, else in that of the filters.

    Raises:
        ValueError: for a wrong rank, shape, dtype, device or number of arguments, an empty batch, or audio shorter than
            one frame.

    Source: wav2vec 2.0, section 2 (feature encoder). Gradients flow to the parameters; a waveform that requires a
    gradient takes the reference path, which ``auto`` chooses by itself.
    """
    dtype = _check(waveforms, weights, biases, norm_weights, norm_biases, strides, norm, valid_samples)
    if valid_samples is not None:
        # Statistics over nothing would divide by the root of eps: features of hundreds in the penalty, for a row of padding.
        valid_samples = valid_samples.masked_fill(valid_samples < weights[0].shape[2], waveforms.shape[1])
    groups = [list(group) for group in (weights, biases, norm_weights, norm_biases)]
    arguments = Arguments(waveforms, *groups, list(strides), norm, valid_samples, dtype)
    chosen = _operator.choose(arguments)
    if chosen in ("torch", "reference") and not torch.compiler.is_compiling():
        _say_why_not_faster(waveforms, weights, strides)
    if chosen != "reference":
        arguments = arguments._replace(waveforms=waveforms.detach())
    if chosen in ("cpu", "torch"):
        arguments = arguments._replace(dtype=cpu.product_dtype(waveforms.device, dtype))
    return _operator.run(chosen, arguments)[0].to(dtype)


def _say_why_not_faster(waveforms: Tensor, weights: Sequence[Tensor], strides: Sequence[int]) -> None:
    """Layers that the compiled kernels cannot take run slower, which is worth a warning (Python shows each once)."""
    name, module = ("cuda", cuda_backend) if waveforms.is_cuda else ("cpu", cpu_backend)
    if extension.why_not(name) is not None:
        return  # `hubert-fast info` tells
    reason = module.layers_objection(weights, strides)
    if reason is not None and backend.is_automatic("conv_frontend"):
        warnings.warn(f"conv_frontend does not run on backend {name!r}, which would be faster: {reason}", stacklevel=3)


def _check(
    waveforms: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    strides: Sequence[int],
    norm: str,
    valid_samples: Optional[Tensor],
) -> torch.dtype:
    """The dtype to compute in, once the arguments are known to be good: the kernels below trust them."""
    if waveforms.ndim != 2:
        raise ValueError(f"waveforms must be 2-D [batch, samples]; got shape {tuple(waveforms.shape)}")
    if waveforms.shape[0] == 0:
        raise ValueError("waveforms is an empty batch (shape [0, samples]); at least one row is needed")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}; got {norm!r}")
    layers = len(weights)
    norms = 1 if norm == "group_norm" else layers
    if len(strides) != layers or len(biases) not in (0, layers) or not len(norm_weights) == len(norm_biases) == norms:
        raise ValueError(
            f"{layers} weights with norm {norm!r} need {layers} strides, 0 or {layers} biases and {norms} norm weights and "
            f"biases; got {len(strides)}, {len(biases)}, {len(norm_weights)} and {len(norm_biases)}"
        )
    _check_layers(waveforms.device, weights, biases, norm_weights, norm_biases, strides)
    if valid_samples is not None and (
        valid_samples.shape != waveforms.shape[:1] or valid_samples.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"valid_samples must be int64 of shape [{waveforms.shape[0]}]; got {valid_samples.dtype} "
            f"{tuple(valid_samples.shape)}"
        )
    dtype = autocast_dtype(waveforms.device)
    if dtype is None:
        dtype = weights[0].dtype
        if waveforms.dtype != dtype:
            raise ValueError(f"waveforms must have the dtype of the model, {dtype}; got {waveforms.dtype}")
    elif not waveforms.is_floating_point():
        raise ValueError(f"waveforms must be floating point; got {waveforms.dtype}")
    kernels = [weight.shape[2] for weight in weights]
    if reference.output_length(waveforms.shape[1], kernels, strides) == 0:
        shortest = 1
        for kernel, stride in zip(reversed(kernels), reversed(strides)):
            shortest = (shortest - 1) * stride + kernel
        raise ValueError(
            f"waveforms has {waveforms.shape[1]} samples a row, which is shorter than one frame ({shortest} samples)"
        )
    return dtype


def _check_layers(
    device: torch.device,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    strides: Sequence[int],
) -> None:
    if not weights:
        raise ValueError("weights is empty; at least one layer is needed")
    if min(strides) < 1:
        raise ValueError(f"strides must be positive; got {list(strides)}")
    in_channels = 1
    for i, weight in enumerate(weights):
        if weight.ndim != 3 or weight.shape[1] != in_channels or weight.numel() == 0:
            raise ValueError(
                f"weights[{i}] must be [out_channels, {in_channels}, kernel]; got shape {tuple(weight.shape)}"
            )
        in_channels = weight.shape[0]
    groups = {"weights": weights, "biases": biases, "norm_weights": norm_weights, "norm_biases": norm_biases}
    for name, group in groups.items():
        for i, tensor in enumerate(group):
            if name != "weights" and tensor.shape != weights[i].shape[:1]:
                raise ValueError(f"{name}[{i}] must have shape [{weights[i].shape[0]}]; got {tuple(tensor.shape)}")
            if tensor.device != device:
                raise ValueError(f"{name}[{i}] must be on the device of the waveforms, {device}; got {tensor.device}")


def _objection(name: str, arguments: Arguments) -> backend.Objection:
    if arguments.waveforms.requires_grad and torch.is_grad_enabled():
        return "it has no gradient with respect to the waveforms (use 'reference' or 'auto')"
    modules = {"cuda": cuda_backend, "cpu": cpu_backend}
    return modules[name].objection(arguments) if name in modules else None


def _reference(arguments: Arguments) -> tuple[Tensor]:
    waveforms, *groups, strides, norm, valid_samples, _ = arguments
    return (reference.conv_frontend(waveforms, *groups, strides=strides, norm=norm, valid_samples=valid_samples),)


def _fake(arguments: Arguments, save: bool) -> tuple[Tensor]:
    shape = arguments.waveforms.shape[0], arguments.frames[-1], arguments.weights[-1].shape[0]
    return (arguments.waveforms.new_empty(shape, dtype=arguments.dtype),)


def _flops(arguments: Arguments, backward: bool) -> int:
    """Audio has no gradient, so layer 0 has one product backward, and the others two."""
    batch, sizes = len(arguments.waveforms), zip(arguments.frames, arguments.weights)
    first, *later = [2 * batch * frames * weight.numel() for frames, weight in sizes]
    return first + (2 if backward else 1) * sum(later)


def _whole_passes_win(arguments: Arguments) -> bool:
    """Few samples of audio without a gradient: the filters' other layout costs more than layer 0's passes over memory."""
    batch, samples = arguments.waveforms.shape
    short = samples <= _SHORT and batch * samples <= _FEW_SAMPLES
    if not short or arguments.layer_norm or arguments.valid_samples is not None:
        return False
    tensors = [arguments.waveforms, *itertools.chain(*arguments.parameters)]
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        return False
    # PyTorch's functions refuse some mixtures of dtypes.
    of_one_dtype = {each.dtype for each in tensors} in ({torch.float32}, {arguments.dtype})
    return of_one_dtype and cpu.product_dtype(arguments.waveforms.device, arguments.dtype) == arguments.dtype


_operator = Operator(
    "conv_frontend",
    Arguments,
    backends={
        "cuda": "CUDA kernels: layer 0 in one pass and recomputed in the backward, implicit GEMMs with GELU in their epilogues",
        "cpu": "GEMMs between fused C++ passes, layer 0 in closed form and recomputed in the backward",
        "torch": "GEMMs in channels-last layout, layer 0 in closed form and recomputed in the backward",
        "reference": "conv1d, norm and GELU layer by layer",
    },
    unavailable={name: functools.partial(extension.why_not, name) for name in ("cuda", "cpu")},
    reference=_reference,
    results=["features"],
    fake=_fake,
    gradients=["weights", "biases", "norm_weights", "norm_biases"],
    kept=["waveforms", "valid_samples"],
    objection=_objection,
    flops=_flops,
    whole_passes_win=_whole_passes_win,  # benchmarks/NOTES.md, "Whole passes on a CPU"
)
