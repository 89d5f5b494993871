"""Operator ``positional_conv``: the convolutional positional embedding of packed rows, added to them.

The rows of all sequences lie one after another; the convolution sees zeros beyond the ends of each.
"""

from __future__ import annotations

from typing import List, Optional, Tuple

import torch
from torch import Tensor

from hubert_fast import backend
from hubert_fast.ops import triton_backend
from hubert_fast.ops.autocast import autocast_dtype, without_autocast
from hubert_fast.ops.host_tensors import to_device
from hubert_fast.reference import positional_conv as reference
from hubert_fast.torch_backend import positional_conv as torch_backend

backend.register(
    "positional_conv",
    {
        "triton": "an implicit GEMM a group, with bias, GELU and residual in its epilogue",
        "torch": "PyTorch's grouped convolution on a padded grid",
        "reference": "conv1d, GELU and residual, a sequence at a time",
    },
    unavailable={"triton": triton_backend.why_not()},
    on_gpu=("triton",),
)


def positional_conv(
    x: Tensor,  # [rows, channels]
    weight: Tensor,  # [channels, channels / groups, taps]
    bias: Tensor,  # [channels]
    offsets: Tensor,  # [sequences + 1] int64
    *,
    groups: int,
    max_frames: int,
    gain: Optional[Tensor] = None,  # [1, 1, taps]
) -> Tensor:
    """gelu(conv(x) + bias) + x within each sequence (wav2vec 2.0, section 2), with the exact GELU.

    The convolution pads ``taps // 2`` zeros on either side of a sequence, and the frame that an even kernel then gives too
    many is dropped: z[t] = sum over k of W[k] x[t + k - taps // 2].

    Args:
        x: ``[rows, channels]``, float.
        weight: ``[channels, channels / groups, taps]``, float: the filters, or with ``gain`` their direction.
        bias: ``[channels]``, float.
        offsets: ``[sequences + 1]`` int64, from 0 to at most ``rows``; sequence i is rows ``offsets[i]`` up to
            ``offsets[i + 1]``. May lie on the host whatever the device of ``x``. Rows beyond ``offsets[-1]`` give 0.
        groups: of the convolution.
        max_frames: rows of the longest sequence, or more.
        gain: ``[1, 1, taps]``, float: the filters are ``gain * weight / norm(weight)``, the norm taken over all but the taps
            (Salimans and Kingma 2016; PyTorch's ``weight_norm`` with ``dim=2``). None: the filters are ``weight``.

    Returns:
        ``[rows, channels]``, in autocast's dtype where it is on, else in that of ``x``. Parameters may be wider than ``x``;
        their gradients are in their own dtypes. There is no second derivative except on backend "reference".

    Raises:
        ValueError: for a wrong rank, shape, dtype or device.
    """
    _check(x, weight, bias, offsets, groups, max_frames, gain)
    x = x.to(autocast_dtype(x.device) or x.dtype)
    chosen = backend.choose("positional_conv", lambda name: _objection(name, x, weight, bias, gain))
    if chosen == "reference":
        with without_autocast(x.device):
            return reference.positional_conv(x, weight, bias, offsets, groups=groups, gain=gain)
    save = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias, gain))
    return _positional_conv(x, weight, bias, gain, offsets, groups, max_frames, save, chosen)[0]


def _objection(name: str, x: Tensor, weight: Tensor, bias: Tensor, gain: Optional[Tensor]) -> backend.Objection:
    return triton_backend.objection("positional_conv", x, weight, bias, gain) if name == "triton" else None


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, groups: int, max_frames: int, gain: Optional[Tensor]
) -> None:
    if x.ndim != 2:
        raise ValueError(f"x must have shape [rows, channels]; got {tuple(x.shape)}")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of x; got {groups}")
    if weight.ndim != 3 or weight.shape[:2] != (channels, channels // groups) or weight.shape[2] == 0:
        raise ValueError(
            f"weight must have shape [{channels}, {channels // groups}, taps] for {channels} channels in {groups} groups; "
            f"got {tuple(weight.shape)}"
        )
    if bias.shape != (channels,):
        raise ValueError(f"bias must have shape [{channels}]; got {tuple(bias.shape)}")
    if gain is not None and gain.shape != (1, 1, weight.shape[2]):
        raise ValueError(f"gain must have shape [1, 1, {weight.shape[2]}]; got {tuple(gain.shape)}")
    for name, each in (("x", x), ("weight", weight), ("bias", bias), ("gain", gain)):
        if each is not None and not each.is_floating_point():
            raise ValueError(f"{name} must be floating point; got {each.dtype}")
        if each is not None and each.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}; got {each.device}")
    if offsets.ndim != 1 or offsets.dtype != torch.int64 or offsets.shape[0] == 0:
        raise ValueError(f"offsets must be int64 of shape [sequences + 1]; got {offsets.dtype} {tuple(offsets.shape)}")
    if max_frames < 0:
        raise ValueError(f"max_frames must be at least 0; got {max_frames}")


@torch.library.custom_op("hubert_fast::positional_conv", mutates_args=())
def _positional_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gain: Optional[Tensor],
    offsets: Tensor,
    groups: int,
    max_frames: int,
    save: bool,
    chosen: str,
) -> Tuple[Tensor, List[Tensor]]:
    """The output, and where ``save`` what the backward needs besides the inputs: the preactivation first."""
    inputs = x.contiguous(), weight.contiguous(), bias.contiguous(), None if gain is None else gain.contiguous()
    if chosen == "triton":
        from hubert_fast.kernels import positional_conv as kernels

        return kernels.positional_conv(*inputs, to_device(offsets, x.device), save)
    with without_autocast(x.device):
        out, preactivation = torch_backend.positional_conv(*inputs, offsets, groups, max_frames)
    return out, [preactivation] if save else []


@_positional_conv.register_fake
def _(x, weight, bias, gain, offsets, groups, max_frames, save, chosen):
    if not save:
        saved = []
    elif chosen == "triton":
        from hubert_fast.kernels import positional_conv as kernels

        saved = kernels.new_saved(x, weight, gain)
    else:
        saved = [x.new_empty(x.shape)]
    return x.new_empty(x.shape), saved


@torch.library.custom_op("hubert_fast::positional_conv_backward", mutates_args=())
def _positional_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gain: Optional[Tensor],
    offsets: Tensor,
    saved: List[Tensor],
    groups: int,
    max_frames: int,
    x_wanted: bool,
    parameters_wanted: bool,
    chosen: str,
) -> List[Tensor]:
    """The gradients that are wanted: of x; of weight, bias and, if there is one, gain."""
    grad, x, weight, bias = (each.contiguous() for each in (grad, x, weight, bias))
    inputs = grad, x, weight, bias, None if gain is None else gain.contiguous()
    wanted = {"x_wanted": x_wanted, "parameters_wanted": parameters_wanted}
    if chosen == "triton":
        from hubert_fast.kernels import positional_conv as kernels

        return kernels.positional_conv_backward(*inputs, to_device(offsets, x.device), saved, **wanted)
    with without_autocast(x.device):
        gradients = torch_backend.positional_conv_backward(*inputs, offsets, *saved, groups, max_frames, **wanted)
    return [each for each in gradients if each is not None]


@_positional_conv_backward.register_fake
def _(grad, x, weight, bias, gain, offsets, saved, groups, max_frames, x_wanted, parameters_wanted, chosen):
    parameters = [each for each in (weight, bias, gain) if each is not None]
    wanted = [x] * x_wanted + parameters * parameters_wanted
    return [each.new_empty(each.shape) for each in wanted]


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, gain, offsets, ctx.groups, ctx.max_frames, _, ctx.chosen = inputs
    ctx.set_materialize_grads(False)  # no zeros for what is only saved
    ctx.save_for_backward(x, weight, bias, gain, offsets, *output[1])


def _backward(ctx, grad, _saved_grads):
    if grad is None:
        return (None,) * 9
    saved = list(ctx.saved_tensors)  # activation checkpointing lets them be asked for once
    *inputs, offsets = saved[:5]
    saved = saved[5:]
    x_wanted, parameters_wanted = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:4])
    gradients = _positional_conv_backward(
        grad, *inputs, offsets, saved, ctx.groups, ctx.max_frames, x_wanted, parameters_wanted, ctx.chosen
    )
    gradients = [None] * (not x_wanted) + list(gradients) + [None] * 4
    return *gradients[:4], *[None] * 5


_positional_conv.register_autograd(_backward, setup_context=_setup_context)
