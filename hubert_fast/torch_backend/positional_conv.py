"""The convolutional positional embedding with PyTorch's grouped convolution, on a padded grid.

The grid is ``[sequences, channels, frames]`` with zeros around each sequence, so that the convolution itself pads nothing and
an even kernel gives no frame too many. The backward is written out: it needs the input and the preactivation, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_fast import cpu

if TYPE_CHECKING:
    from hubert_fast.ops.positional_conv import Arguments

# Frames from which on PyTorch's own gradients take longer than those below. On fewer (1 x 49, AMD EPYCs with AVX2 and AVX-512,
# float32 and bfloat16) they take as long, and no copy of the filters.
_MANY = 128

# Windows that are copied at a time: 25 MB in bfloat16 for Base.
_WINDOWS = 2048

# Frames from which on convolutions of rows as they lie (channels last) are faster, where `cpu.prefers_channels_last` says so.
# AMD EPYC of 2024, 2 threads, ms, forward and gradient of the rows: 1 x 249 frames in float32 18 and 16 before, 14 and 15 so;
# 4 x 249 44 and 45, 22 and 25; 4 x 499 86 and 88, 41 and 44. The whole operator and its gradients in bfloat16: 4 x 249 76 and 75,
# 4 x 499 131 and 118.
_MANY_ROWS = {torch.float32: 128, torch.bfloat16: 1024}


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor], list[Tensor]]:
    """The convolution's result before the GELU is saved, and normalised filters, as they are multiplied, with their norm."""
    x, weight, bias, gain, offsets, groups, max_frames = _contiguous(arguments)
    grid = _Grid(x, offsets, max_frames)
    if grid.is_empty:
        saved = [x.new_zeros(shape, dtype=of) for shape, of in saved_tensors(arguments)] if save else []
        return (x.new_zeros(x.shape),), saved
    dtype, normed = _convolution_dtype(x, weight), _normed(weight, gain)
    filters = (normed[0] if normed else weight).to(dtype)
    z = _convolution(grid.spread(x, weight.shape[2], dtype), filters, bias.to(dtype), groups)
    preactivation = grid.rows_of(z).to(x.dtype)
    saved = [preactivation, *((filters, normed[1]) if normed else ())] if save else []
    return (grid.clear_dead(F.gelu(preactivation).add_(x)),), saved


def saved_tensors(arguments: Arguments) -> list[tuple[tuple[int, ...], torch.dtype]]:
    x, weight, gain = arguments.x, arguments.weight, arguments.gain
    filters, norm = _convolution_dtype(x, weight), torch.promote_types(weight.dtype, torch.float32)
    normed = [] if gain is None else [(tuple(weight.shape), filters), (tuple(gain.shape), norm)]
    return [(tuple(x.shape), x.dtype), *normed]


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Tensor], wanted: list[bool]
) -> tuple[Optional[Tensor], ...]:
    x, weight, bias, gain, offsets, groups, max_frames = _contiguous(arguments)
    (preactivation, *normed), (grad,), x_wanted = saved, gradients, wanted[0]
    grid = _Grid(x, offsets, max_frames)
    if grid.is_empty:
        return tuple(None if each is None else each.new_zeros(each.shape) for each in arguments[:4])
    grad = grid.clear_dead(grad.contiguous())
    dtype, taps = _convolution_dtype(x, weight), weight.shape[2]
    filters = (normed[0] if normed else weight).to(dtype)
    z_grad = grid.spread(torch.ops.aten.gelu_backward(grad, preactivation), 1, dtype)
    x_grad = bias_grad = gain_grad = weight_grad = None
    if x_wanted:
        x_grad = grid.rows_of(_input_gradient(z_grad, filters, groups)).to(x.dtype)
        x_grad = grid.clear_dead(x_grad.add_(grad))
    if any(wanted[1:]):
        weight_grad = _filter_gradient(z_grad, grid.spread(x, taps, dtype), filters, groups).contiguous()
        bias_grad = z_grad.sum((0, 2), dtype=torch.promote_types(bias.dtype, torch.float32)).to(bias.dtype)
        if gain is not None:
            norm = normed[1]
            wide = [each.to(norm.dtype) for each in (weight_grad, weight, gain)]
            weight_grad, gain_grad = torch.ops.aten._weight_norm_interface_backward(*wide, norm, 2)
            gain_grad = gain_grad.to(gain.dtype)
        weight_grad = weight_grad.to(weight.dtype)
    return x_grad, weight_grad, bias_grad, gain_grad


def _convolution_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return cpu.convolution_dtype(x.device, x.dtype, weight.shape[1])


def _contiguous(arguments: Arguments) -> list[Any]:
    return [each.contiguous() if isinstance(each, Tensor) else each for each in arguments]


def _normed(weight: Tensor, gain: Optional[Tensor]) -> Sequence[Tensor]:
    """``gain * weight / norm`` in float32 or wider, and the norm over all but the taps (Salimans and Kingma 2016, eq. 2)."""
    if gain is None:
        return ()
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch._weight_norm_interface(weight.to(wide), gain.to(wide), 2)


def _convolution(grid: Tensor, filters: Tensor, bias: Tensor, groups: int) -> Tensor:
    if not _are_rows(grid):
        return F.conv1d(grid, filters, bias, groups=groups)
    return F.conv2d(grid.unsqueeze(2), filters.unsqueeze(2), bias, groups=groups).squeeze(2)


def _are_rows(grid: Tensor) -> bool:
    """Whether ``grid``, ``[sequences, channels, frames]``, has a frame's channels side by side."""
    return grid.stride(1) == 1


def _input_gradient(z_grad: Tensor, filters: Tensor, groups: int) -> Tensor:
    """Gradient of the convolution's input ``[sequences, channels, frames]``: a convolution backward in time.

    PyTorch's own takes two to three times as long on a CPU from 4 x 49 frames on.
    """
    channels, depth, taps = filters.shape
    if _are_few(z_grad) or _are_rows(z_grad):
        shape = len(z_grad), channels, z_grad.shape[2] + taps - 1
        gradient = _own_gradients(z_grad, _never_read(z_grad, shape), filters, groups, of_input=True)[0]
        return gradient[:, :, taps // 2 :]
    transposed = filters.view(groups, depth, depth, taps).transpose(1, 2).reshape(channels, depth, taps)
    return F.conv1d(F.pad(z_grad.flip(2), (taps // 2, taps - 1 - taps // 2)), transposed, groups=groups).flip(2)


def _filter_gradient(z_grad: Tensor, spread: Tensor, filters: Tensor, groups: int) -> Tensor:
    """Gradient of ``filters``: of tap k the product of ``z_grad`` with the input k frames on, group by group."""
    if z_grad.device.type != "cpu":
        return _own_gradients(z_grad, spread, filters, groups, of_input=False)[1]
    by_taps = z_grad.dtype in (torch.float32, torch.float64) and not _are_few(z_grad)
    form = _products_of_taps if by_taps else _products_of_windows
    return form(z_grad.contiguous(), spread.contiguous(), filters, groups)


def _products_of_taps(z_grad: Tensor, spread: Tensor, filters: Tensor, groups: int) -> Tensor:
    """Products of ``[depth, frames]`` with ``[frames, depth]``, which read the input as it lies.

    On an AMD EPYC (AVX2) they take half the time of PyTorch's own gradient in float32 from 4 x 249 frames on, and as much at
    4 x 49.
    """
    sequences, channels, frames = z_grad.shape
    _, depth, taps = filters.shape
    length = spread.shape[2]
    found = z_grad.new_zeros(groups, taps, depth, depth)
    for upstream, x in zip(
        z_grad.view(sequences, groups, depth, frames), spread.view(sequences, groups, depth, length)
    ):
        for group, total in enumerate(found):
            shifted = x[group].as_strided((taps, frames, depth), (1, 1, length))
            total.baddbmm_(upstream[group].expand(taps, depth, frames), shifted)
    return found.permute(0, 2, 3, 1).reshape(filters.shape)


def _products_of_windows(z_grad: Tensor, spread: Tensor, filters: Tensor, groups: int) -> Tensor:
    """One product of ``[depth, frames]`` with windows of the input, ``[frames, depth * taps]``, which are copied for it.

    In bfloat16, on two threads of an AMD EPYC of 2024: 1.3 ms for 1 x 49 frames, 7.7 for 1 x 249 and 40 for 4 x 499, PyTorch's
    own gradient 6.9, 15 and 61; on one thread 2.0, 7.8 and 88, and 12, 23 and 165. That gradient takes 114 MB besides, new
    memory each time: 10,000 page faults or more in a step of 1 x 49 frames.
    """
    sequences, channels, frames = z_grad.shape
    _, depth, taps = filters.shape
    together = max(1, _WINDOWS // frames)  # sequences
    found = z_grad.new_empty(groups, depth, depth * taps)
    upstream = z_grad.view(sequences, groups, depth, frames).permute(1, 2, 0, 3)
    strides = spread.stride(0), 1, spread.stride(1), 1  # of sequences, frames, channels of a group, taps
    windows = z_grad.new_empty(min(together, sequences), frames, depth, taps)
    for group, product in enumerate(found):
        total = torch.zeros_like(product, dtype=torch.promote_types(product.dtype, torch.float32))
        for start in range(0, sequences, together):
            count = min(together, sequences - start)
            x = spread[start : start + count, group * depth :]
            windows[:count] = x.as_strided((count, frames, depth, taps), strides, x.storage_offset())
            of_group = upstream[group, :, start : start + count].flatten(1)
            torch.mm(of_group, windows[:count].view(count * frames, depth * taps), out=product)
            if together < sequences:
                total += product
        if together < sequences:
            product.copy_(total)
    return found.view(filters.shape)


def _are_few(z_grad: Tensor) -> bool:
    return z_grad.shape[0] * z_grad.shape[2] < _MANY


def _own_gradients(
    z_grad: Tensor, spread: Tensor, filters: Tensor, groups: int, *, of_input: bool
) -> Sequence[Optional[Tensor]]:
    wanted, rows = [of_input, not of_input, False], _are_rows(z_grad)
    operands = [each.unsqueeze(2) if rows else each for each in (z_grad, spread, filters)]
    ones, zeros = [1] * (1 + rows), [0] * (1 + rows)
    found = torch.ops.aten.convolution_backward(*operands, None, ones, zeros, ones, False, zeros, groups, wanted)
    return [each.squeeze(2) if rows and each is not None else each for each in found]


def _never_read(like: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A tensor of ``shape`` in the dtype and the layout of ``like``, in memory that nobody touches."""
    sequences, channels, frames = shape
    if _are_rows(like):
        return like.new_empty(sequences, frames, channels).transpose(1, 2)
    return like.new_empty(1).expand(shape)


class _Grid:
    """Where packed rows lie in the grid ``[sequences, max_frames]``. Nothing here waits for a GPU."""

    def __init__(self, x: Tensor, offsets: Tensor, max_frames: int) -> None:
        rows, self.channels = x.shape
        self.sequences, self.frames = len(offsets) - 1, max_frames
        self.is_empty = rows == 0 or self.sequences * max_frames == 0
        full = rows == self.sequences * max_frames and offsets.device.type == "cpu" and int(offsets[-1]) == rows
        self._index: Optional[Tensor] = None  # of every place's row; None: the rows are the places
        if not full and not self.is_empty:
            self._locate(rows, offsets.to(x.device, non_blocking=True))

    def _locate(self, rows: int, offsets: Tensor) -> None:
        device = offsets.device
        place = offsets[:-1, None] + torch.arange(self.frames, device=device)
        self._padding = place >= offsets[1:, None]
        self._index = place.clamp_(max=rows - 1).flatten()
        row = torch.arange(rows, device=device)
        sequence = torch.searchsorted(offsets[1:], row, right=True)
        self._dead = (sequence == self.sequences)[:, None]
        sequence.clamp_(max=self.sequences - 1)
        place = sequence * self.frames + row - offsets[sequence]
        self._place = place.clamp_(max=self.sequences * self.frames - 1)

    def spread(self, rows: Tensor, taps: int, dtype: torch.dtype) -> Tensor:
        """``[rows, channels]`` to ``[sequences, channels, frames + taps - 1]`` in ``dtype``, with 0 where there is no row.

        The channels of a frame lie side by side where convolutions are faster so.
        """
        shape = self.sequences, self.frames, self.channels
        if self._index is not None:
            rows = rows.index_select(0, self._index).view(shape).masked_fill_(self._padding[:, :, None], 0.0)
        rows, frames = rows.view(shape).transpose(1, 2), self.frames + taps - 1
        many = self.sequences * self.frames >= _MANY_ROWS.get(dtype, math.inf)
        if many and self.channels > 1 and cpu.prefers_channels_last(rows.device):
            grid = rows.new_zeros(self.sequences, frames, self.channels, dtype=dtype).transpose(1, 2)
        else:
            grid = rows.new_zeros(self.sequences, self.channels, frames, dtype=dtype)
        grid[:, :, taps // 2 : taps // 2 + self.frames] = rows
        return grid

    def rows_of(self, grid: Tensor) -> Tensor:
        """The first ``frames`` of ``[sequences, channels, at least frames]`` as ``[rows, channels]``; dead rows are arbitrary."""
        places = grid[:, :, : self.frames].transpose(1, 2).reshape(-1, self.channels)
        return places.contiguous() if self._index is None else places.index_select(0, self._place)

    def clear_dead(self, rows: Tensor) -> Tensor:
        """0 in the rows beyond the last sequence."""
        return rows if self._index is None else rows.masked_fill(self._dead, 0.0)
