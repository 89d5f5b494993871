"""Operator ``positional_conv``: the convolutional positional embedding of packed rows, added to them.

The rows of all sequences lie one after another; the convolution sees zeros beyond the ends of each.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from hubert_fast.ops.arguments import autocast_dtype, without_autocast
from hubert_fast.ops.host_tensors import to_device
from hubert_fast.ops.operator import Operator
from hubert_fast.reference import positional_conv as reference


class Arguments(NamedTuple):
    x: Tensor  # [rows, channels]
    weight: Tensor  # [channels, channels / groups, taps]
    bias: Tensor  # [channels]
    gain: Optional[Tensor]  # [1, 1, taps]
    offsets: Tensor  # [sequences + 1] int64; for "triton" on the device of x
    groups: int
    max_frames: int


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
    arguments = Arguments(x, weight, bias, gain, offsets, groups, max_frames)
    chosen = _operator.choose(arguments)
    if chosen == "triton":
        arguments = arguments._replace(offsets=to_device(offsets, x.device))
    return _operator.run(chosen, arguments)[0]


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


def _reference(arguments: Arguments) -> tuple[Tensor]:
    x, weight, bias, gain, offsets, groups, _ = arguments
    with without_autocast(x.device):
        return (reference.positional_conv(x, weight, bias, offsets, groups=groups, gain=gain),)


def _flops(arguments: Arguments, backward: bool) -> int:
    return (2 if backward else 1) * 2 * len(arguments.x) * arguments.weight.numel()


_operator = Operator(
    "positional_conv",
    Arguments,
    backends={
        "triton": "an implicit GEMM a group, with bias, GELU and residual in its epilogue",
        "torch": "PyTorch's grouped convolution on a padded grid",
        "reference": "conv1d, GELU and residual, a sequence at a time",
    },
    reference=_reference,
    results=["out"],
    fake=lambda arguments, save: (arguments.x.new_empty(arguments.x.shape),),
    gradients=["x", "weight", "bias", "gain"],
    kept=["x", "weight", "bias", "gain", "offsets"],
    flops=_flops,
)
