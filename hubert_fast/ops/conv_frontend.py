"""Operator ``conv_frontend``: raw audio to features, ``[batch, samples] -> [batch, frames, channels]``.

The strided convolutions of HuBERT with their norm (group norm after layer 0, or layer norm after each) and exact GELU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from hubert_fast import backend, extension
from hubert_fast.cpu_backend import conv_frontend as cpu_backend
from hubert_fast.cuda_backend import conv_frontend as cuda_backend
from hubert_fast.ops.autocast import autocast_dtype, without_autocast
from hubert_fast.reference import conv_frontend as reference
from hubert_fast.torch_backend import conv_frontend as torch_backend

NORMS = ("group_norm", "layer_norm")

backend.register(
    "conv_frontend",
    {
        "cuda": "CUDA kernels: layer 0 in one pass and recomputed in the backward, implicit GEMMs with GELU in their epilogues",
        "cpu": "GEMMs between fused C++ passes, layer 0 in closed form and recomputed in the backward",
        "torch": "GEMMs in channels-last layout, layer 0 in closed form and recomputed in the backward",
        "reference": "conv1d, norm and GELU layer by layer",
    },
    unavailable={name: functools.partial(extension.why_not, name) for name in ("cuda", "cpu")},
    on_gpu=("cuda",),
)

_BACKENDS = {"cuda": cuda_backend, "cpu": cpu_backend, "torch": torch_backend}


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
    chosen = backend.choose("conv_frontend", lambda name: _objection(name, waveforms, weights, strides, dtype))
    if chosen in ("torch", "reference") and not torch.compiler.is_compiling():
        _say_why_not_faster(waveforms, weights, strides)
    if chosen == "reference":
        return reference.conv_frontend(
            waveforms,
            weights,
            biases,
            norm_weights,
            norm_biases,
            strides=strides,
            norm=norm,
            valid_samples=valid_samples,
        )
    parameters = [*weights, *biases, *norm_weights, *norm_biases]
    save = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    features, _ = _conv_frontend(
        waveforms.detach(), list(weights), list(biases), list(norm_weights), list(norm_biases),
        list(strides), norm, valid_samples, dtype, save, chosen,
    )  # fmt: skip
    return features


def _objection(
    name: str, waveforms: Tensor, weights: Sequence[Tensor], strides: Sequence[int], dtype: torch.dtype
) -> backend.Objection:
    if name == "reference":
        return None
    if waveforms.requires_grad and torch.is_grad_enabled():
        return "it has no gradient with respect to the waveforms (use 'reference' or 'auto')"
    return None if name == "torch" else _BACKENDS[name].objection(waveforms, weights, strides, dtype)


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
    """The dtype to compute in, once the arguments are known to be good: the kernels below take addresses and trust them."""
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


@torch.library.custom_op("hubert_fast::conv_frontend", mutates_args=())
def _conv_frontend(
    waveforms: Tensor,
    weights: List[Tensor],
    biases: List[Tensor],
    norm_weights: List[Tensor],
    norm_biases: List[Tensor],
    strides: List[int],
    norm: str,
    valid_samples: Optional[Tensor],
    dtype: torch.dtype,
    save: bool,
    implementation: str,
) -> Tuple[Tensor, List[Tensor]]:
    with without_autocast(waveforms.device):
        return _BACKENDS[implementation].conv_frontend(
            waveforms, weights, biases, norm_weights, norm_biases, strides, norm, valid_samples, dtype, save
        )


@_conv_frontend.register_fake
def _(waveforms, weights, biases, norm_weights, norm_biases, strides, norm, valid_samples, dtype, save, implementation):
    frames, saved = waveforms.shape[1], []
    for i, (weight, stride) in enumerate(zip(weights, strides)):
        frames = (frames - weight.shape[2]) // stride + 1
        shape = (waveforms.shape[0], frames, weight.shape[0])
        if save and i > 0:
            saved.append(waveforms.new_empty(shape, dtype=dtype))
    features = waveforms.new_empty(shape, dtype=dtype)
    if save and implementation == "cuda":
        kernels = [weight.shape[2] for weight in weights]
        sizes = cuda_backend.saved_tensors(*waveforms.shape, weights[0].shape[0], kernels, strides, norm, dtype)
        saved = [waveforms.new_empty(size, dtype=its) for size, its in sizes]
    return features, saved


@torch.library.custom_op("hubert_fast::conv_frontend_backward", mutates_args=())
def _conv_frontend_backward(
    grad: Tensor,
    waveforms: Tensor,
    weights: List[Tensor],
    biases: List[Tensor],
    norm_weights: List[Tensor],
    norm_biases: List[Tensor],
    preactivations: List[Tensor],
    strides: List[int],
    norm: str,
    valid_samples: Optional[Tensor],
    dtype: torch.dtype,
    implementation: str,
) -> List[Tensor]:
    with without_autocast(waveforms.device):
        gradients = _BACKENDS[implementation].conv_frontend_backward(
            grad,
            waveforms,
            weights,
            biases,
            norm_weights,
            norm_biases,
            preactivations,
            strides,
            norm,
            valid_samples,
            dtype,
        )
    return [each for group in gradients for each in group]


@_conv_frontend_backward.register_fake
def _(grad, waveforms, weights, biases, norm_weights, norm_biases, preactivations, *settings):
    return [
        torch.empty_like(p, memory_format=torch.contiguous_format)
        for p in (*weights, *biases, *norm_weights, *norm_biases)
    ]


def _setup_context(ctx, inputs, output) -> None:
    waveforms, weights, biases, norm_weights, norm_biases, strides, norm, valid_samples, dtype, _, implementation = (
        inputs
    )
    _, preactivations = output
    ctx.set_materialize_grads(False)  # or autograd would make a tensor of zeros for every saved one, as large as it
    ctx.counts = [len(group) for group in (weights, biases, norm_weights, norm_biases, preactivations)]
    ctx.settings = strides, norm, dtype, implementation
    ctx.save_for_backward(waveforms, valid_samples, *weights, *biases, *norm_weights, *norm_biases, *preactivations)


def _backward(ctx, grad, _saved_grads):
    if grad is None:
        return (None,) * 11
    waveforms, valid_samples, *rest = ctx.saved_tensors
    groups = _split(rest, ctx.counts)
    strides, norm, dtype, implementation = ctx.settings
    gradients = _conv_frontend_backward(grad, waveforms, *groups, strides, norm, valid_samples, dtype, implementation)
    return None, *_split(gradients, ctx.counts[:4]), None, None, None, None, None, None


def _split(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    groups, start = [], 0
    for count in counts:
        groups.append(list(tensors[start : start + count]))
        start += count
    return groups


_conv_frontend.register_autograd(_backward, setup_context=_setup_context)
