"""A stand-in for ``hubert_fast._C.cuda`` on CPU memory, written in PyTorch: the same names and arguments, no other knowledge.

Every function sees what the compiled one sees: addresses, sizes, strides. `Memory` knows the tensors that were allocated while
it was active; an access outside them raises, and memory that ``torch.empty`` gives is filled with NaN first, so a value that is
read before it is written shows.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterator

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_DTYPES = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16, -1: torch.float64}


class Memory(TorchDispatchMode):
    """Remembers the storages of all tensors that operations take or give, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.empty and result.is_floating_point():
            result.fill_(float("nan"))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self._storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())

    def view(self, address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """The tensor at ``address``: an error where it is not inside one live allocation or is not aligned to 16 bytes."""
        last = sum((size - 1) * stride for size, stride in zip(shape, strides))
        first = min(0, last)
        for start, (storage, size) in list(self._storages.items()):
            if storage.expired():
                del self._storages[start]
            elif start <= address < start + size:
                begin, end = address + first * dtype.itemsize, address + (last + 1) * dtype.itemsize
                assert all(extent > 0 for extent in shape), shape
                assert begin >= start and end <= start + size, f"[{begin - start}, {end - start}) of {size} bytes"
                whole = torch.empty(0, dtype=dtype).set_(torch.UntypedStorage._new_with_weak_ptr(storage.cdata))
                assert (address - start) % dtype.itemsize == 0
                return whole.as_strided(shape, strides, (address - start) // dtype.itemsize)
        raise AssertionError(f"address {address:#x} is in no live tensor")


@dataclass
class FirstLayer:
    signal: int
    signal_stride: int
    batch: int
    frames: int
    kernel: int
    stride: int
    channels: int


@dataclass
class Rows:
    batch: int
    rows: int
    frames: int
    channels: int


@dataclass
class Product:
    input: int
    input_stride: int
    weight: int
    rows: int
    columns: int
    depth: int


class CudaTwin:
    """``wide`` is the dtype of what the compiled functions take as float; ``tensor_cores``: whether it offers products."""

    MOMENT_FRAMES = 7
    GROUP_NORM_BACKWARD_FRAMES = 5
    LAYER_NORM_BACKWARD_FRAMES = 3
    FirstLayer = staticmethod(FirstLayer)
    Rows = staticmethod(Rows)
    Product = staticmethod(Product)

    def __init__(self, wide: torch.dtype, *, tensor_cores: bool) -> None:
        self.wide = wide
        self.memory = Memory()
        self._tensor_cores = tensor_cores

    @contextmanager
    def active(self) -> Iterator[None]:
        with self.memory:
            yield

    def _tensor(self, address: int, *shape: int, dtype: torch.dtype) -> Tensor:
        strides, step = [], 1
        for extent in reversed(shape):
            strides.insert(0, step)
            step *= extent
        return self.memory.view(address, dtype, shape, tuple(strides))

    def _wide(self, address: int, *shape: int) -> Tensor:
        return self._tensor(address, *shape, dtype=self.wide)

    def _double(self, address: int, *shape: int) -> Tensor:
        return self._tensor(address, *shape, dtype=torch.float64)

    def _rows(self, address: int, rows: int, stride: int, length: int, dtype: torch.dtype) -> Tensor:
        return self.memory.view(address, dtype, (rows, length), (stride, 1))

    def tensor_core_products_available(self, dtype: int) -> bool:
        return self._tensor_cores

    # first_layer.h

    def _windows(self, layer: FirstLayer) -> Tensor:
        """[batch, frames, kernel] in float64."""
        shape = layer.batch, layer.frames, layer.kernel
        return self.memory.view(layer.signal, self.wide, shape, (layer.signal_stride, layer.stride, 1)).double()

    def _valid(self, layer: FirstLayer, address: int) -> Tensor:
        """[batch, frames] of 0 and 1."""
        frames = torch.full((layer.batch,), layer.frames)
        if address:
            samples = self._tensor(address, layer.batch, dtype=torch.int64)
            frames = (torch.div(samples - layer.kernel, layer.stride, rounding_mode="floor") + 1).clamp(min=0)
        return (torch.arange(layer.frames) < frames[:, None]).double()

    @staticmethod
    def _pairs(kernel: int) -> tuple[Tensor, Tensor]:
        first, second = torch.triu_indices(kernel, kernel)
        return first, second

    def first_layer_moments(self, layer, *, valid_samples, partial, stream):
        first, second = self._pairs(layer.kernel)
        parts = -(-layer.frames // self.MOMENT_FRAMES)
        out = self._double(partial, layer.batch, parts, layer.kernel + len(first))
        windows = self._windows(layer) - self._windows(layer)[:, :1, :1]
        terms = torch.cat([windows, windows[..., first] * windows[..., second]], dim=2)
        terms = terms * self._valid(layer, valid_samples)[..., None]
        for part, chunk in enumerate(terms.split(self.MOMENT_FRAMES, dim=1)):
            out[:, part] = chunk.sum(1)

    def first_layer_group_norm(
        self, layer, *, valid_samples, partial, weight, norm_weight, norm_bias, epsilon, statistics, filters, stream
    ):
        kernel, channels = layer.kernel, layer.channels
        first, second = self._pairs(kernel)
        parts = -(-layer.frames // self.MOMENT_FRAMES)
        counts = self._valid(layer, valid_samples).sum(1)
        sums = self._double(partial, layer.batch, parts, kernel + len(first)).sum(1) / counts.clamp(min=1)[:, None]
        shift = self._windows(layer)[:, 0, 0] * (counts > 0)
        means, products = sums[:, :kernel], sums[:, kernel:]
        covariance = sums.new_zeros(layer.batch, kernel, kernel)
        covariance[:, first, second] = products - means[:, first] * means[:, second]
        covariance[:, second, first] = covariance[:, first, second]
        means = means + shift[:, None]
        offset = means.mean(1).to(self.wide).double()
        out = self._double(statistics, layer.batch, kernel + kernel * kernel + 1)
        out[:, :kernel], out[:, kernel:-1], out[:, -1] = means, covariance.flatten(1), offset
        taps = self._wide(weight, channels, kernel).double()
        variance = torch.einsum("ck,bkj,cj->bc", taps, covariance, taps)
        scale = self._wide(norm_weight, channels).double() * torch.rsqrt(variance.clamp(min=0) + epsilon)
        out = self._wide(filters, layer.batch, kernel + 1, channels)
        out[:, :kernel] = torch.einsum("bc,ck->bkc", scale, taps)
        centre = (means - offset[:, None]) @ taps.T
        out[:, kernel] = self._wide(norm_bias, channels).double() - scale * centre

    def _layer_norm_statistics(self, layer, address):
        kernel = layer.kernel
        out = self._double(address, kernel * kernel + 2 * kernel + 2)
        covariance, cross, constant, mean, mean_bias = out.split([kernel * kernel, kernel, 1, kernel, 1])
        return covariance.view(kernel, kernel), cross, constant, mean, mean_bias

    def first_layer_layer_norm(self, layer, *, weight, bias, norm_weight, statistics, filters, stream):
        kernel, channels = layer.kernel, layer.channels
        taps = self._wide(weight, channels, kernel).double()
        biases = self._wide(bias, channels).double() if bias else taps.new_zeros(channels)
        centred, centred_bias = taps - taps.mean(0), biases - biases.mean()
        covariance, cross, constant, mean, mean_bias = self._layer_norm_statistics(layer, statistics)
        covariance[:] = centred.T @ centred / channels
        cross[:] = centred.T @ centred_bias / channels
        constant[:] = centred_bias.square().mean()
        mean[:], mean_bias[:] = taps.mean(0), biases.mean()
        out = self._wide(filters, kernel + 1, channels)
        gain = self._wide(norm_weight, channels).double()
        out[:kernel], out[kernel] = (centred * gain[:, None]).T, centred_bias * gain

    def _first_preactivation(self, layer, statistics, filters, norm_bias, epsilon):
        """z [batch, frames, channels], the windows it is made of, and 1 / standard deviation [batch, frames, 1]."""
        kernel, channels = layer.kernel, layer.channels
        windows = self._windows(layer)
        if norm_bias == 0:
            offset = self._double(statistics, layer.batch, kernel + kernel * kernel + 1)[:, -1]
            windows = windows - offset[:, None, None]
            taps = self._wide(filters, layer.batch, kernel + 1, channels).double()
            return windows @ taps[:, :kernel] + taps[:, kernel:], windows, None
        covariance, cross, constant, _, _ = self._layer_norm_statistics(layer, statistics)
        variance = ((windows @ covariance) * windows).sum(2) + 2 * windows @ cross + constant
        rstd = torch.rsqrt(variance.clamp(min=0) + epsilon)[..., None]
        taps = self._wide(filters, kernel + 1, channels).double()
        bias = self._wide(norm_bias, channels).double()
        return (windows @ taps[:kernel] + taps[kernel]) * rstd + bias, windows, rstd

    def first_layer_forward(self, layer, *, statistics, filters, norm_bias, epsilon, activations, rows, dtype, stream):
        z, _, _ = self._first_preactivation(layer, statistics, filters, norm_bias, epsilon)
        out = self._tensor(activations, layer.batch, rows, layer.channels, dtype=_DTYPES[dtype])
        out.zero_()
        out[:, : layer.frames] = _gelu(z)

    def _first_gradients(self, layer, z, gradients, rows, dtype):
        """The gradient of z; in memory the activations take its place."""
        memory = self._tensor(gradients, layer.batch, rows, layer.channels, dtype=_DTYPES[dtype])
        live = memory[:, : layer.frames]
        gradient = live.double() * _gelu_derivative(z)
        live.copy_(_gelu(z))
        return gradient

    def first_layer_group_norm_backward(self, layer, *, statistics, filters, gradients, rows, partial, dtype, stream):
        z, windows, _ = self._first_preactivation(layer, statistics, filters, 0, 0.0)
        gradient = self._first_gradients(layer, z, gradients, rows, dtype)
        size = self.GROUP_NORM_BACKWARD_FRAMES
        out = self._wide(partial, layer.batch, -(-layer.frames // size), layer.kernel + 1, layer.channels)
        extended = torch.cat([windows, torch.ones_like(windows[..., :1])], dim=2)
        for part, (left, right) in enumerate(zip(extended.split(size, 1), gradient.split(size, 1))):
            out[:, part] = left.transpose(1, 2) @ right

    def first_layer_layer_norm_backward(
        self, layer, *, statistics, filters, norm_weight, norm_bias, epsilon, gradients, rows, partial, frame_partial,
        dtype, stream,
    ):  # fmt: skip
        kernel, channels, size = layer.kernel, layer.channels, self.LAYER_NORM_BACKWARD_FRAMES
        z, windows, rstd = self._first_preactivation(layer, statistics, filters, norm_bias, epsilon)
        gradient = self._first_gradients(layer, z, gradients, rows, dtype)
        gain, bias = (self._wide(each, channels).double() for each in (norm_weight, norm_bias))
        s1 = rstd * (gradient * gain).mean(2, keepdim=True)
        s2 = rstd.square() * (gradient * (z - bias)).mean(2, keepdim=True)
        first, second = self._pairs(kernel)
        one = torch.ones_like(rstd)
        frame_terms = [s1 * windows, s1, s2 * windows, s2, s2 * windows[..., first] * windows[..., second]]
        frame_terms = torch.cat(frame_terms, dim=2)
        left = torch.cat([windows * rstd, rstd, one], dim=2)
        parts = -(-layer.frames // size)
        out = self._wide(partial, layer.batch, parts, kernel + 2, channels)
        frame_out = self._wide(frame_partial, layer.batch, parts, frame_terms.shape[2])
        for part, (some, right, frame) in enumerate(
            zip(left.split(size, 1), gradient.split(size, 1), frame_terms.split(size, 1))
        ):
            out[:, part] = some.transpose(1, 2) @ right
            frame_out[:, part] = frame.sum(1)

    def first_layer_group_norm_finish(
        self, layer, *, statistics, sums, weight, norm_weight, epsilon, weight_grad, norm_weight_grad, norm_bias_grad,
        stream,
    ):  # fmt: skip
        kernel, channels = layer.kernel, layer.channels
        stored = self._double(statistics, layer.batch, kernel + kernel * kernel + 1)
        means, offset = stored[:, :kernel], stored[:, -1:]
        covariance = stored[:, kernel:-1].view(layer.batch, kernel, kernel)
        stored_sums = self._double(sums, layer.batch, kernel + 1, channels)
        total = stored_sums[:, kernel]
        products = stored_sums[:, :kernel] - total[:, None] * (means - offset)[..., None]  # [batch, kernel, channels]
        taps = self._wide(weight, channels, kernel).double()
        spread = covariance @ taps.T  # [batch, kernel, channels]
        rstd = torch.rsqrt((spread * taps.T).sum(1).clamp(min=0) + epsilon)
        own = rstd * (products * taps.T).sum(1)
        scale = rstd * self._wide(norm_weight, channels).double()
        grad = scale[:, None] * (products - (own * rstd)[:, None] * spread)
        self._wide(weight_grad, channels, kernel).copy_(grad.sum(0).T)
        self._wide(norm_weight_grad, channels).copy_(own.sum(0))
        self._wide(norm_bias_grad, channels).copy_(total.sum(0))

    def first_layer_layer_norm_finish(
        self, layer, *, statistics, sums, frame_sums, weight, bias, norm_weight, weight_grad, bias_grad,
        norm_weight_grad, norm_bias_grad, stream,
    ):  # fmt: skip
        kernel, channels = layer.kernel, layer.channels
        first, second = self._pairs(kernel)
        _, _, _, mean, mean_bias = self._layer_norm_statistics(layer, statistics)
        stored = self._double(sums, kernel + 2, channels)
        scaled, scaled_total, total = stored[:kernel].T, stored[kernel], stored[kernel + 1]
        s1, s1_total, s2, s2_total, flat = self._double(frame_sums, 2 * kernel + 2 + len(first)).split(
            [kernel, 1, kernel, 1, len(first)]
        )
        s2_products = flat.new_zeros(kernel, kernel)
        s2_products[first, second] = flat
        s2_products[second, first] = flat
        taps = self._wide(weight, channels, kernel).double() - mean
        biases = (self._wide(bias, channels).double() if bias else 0.0) - mean_bias
        biases = biases.expand(channels)
        gain = self._wide(norm_weight, channels).double()
        self._wide(weight_grad, channels, kernel).copy_(
            gain[:, None] * scaled - s1 - taps @ s2_products - biases[:, None] * s2
        )
        if bias_grad:
            self._wide(bias_grad, channels).copy_(gain * scaled_total - s1_total - taps @ s2 - biases * s2_total)
        self._wide(norm_weight_grad, channels).copy_((taps * scaled).sum(1) + biases * scaled_total)
        self._wide(norm_bias_grad, channels).copy_(total)

    # activations.h

    def _norm(self, rows, norm_weight, norm_bias):
        if not norm_weight:
            return None
        return self._wide(norm_weight, rows.channels).double(), self._wide(norm_bias, rows.channels).double()

    def activation_forward(self, rows, *, norm_weight, norm_bias, epsilon, z, out, out_rows, dtype, stream):
        source = self._tensor(z, rows.batch, rows.rows, rows.channels, dtype=_DTYPES[dtype])[:, : rows.frames].double()
        norm = self._norm(rows, norm_weight, norm_bias)
        if norm is not None:
            source = torch.layer_norm(source, source.shape[-1:], *norm, epsilon)
        target = self._tensor(out, rows.batch, out_rows, rows.channels, dtype=_DTYPES[dtype])
        target.zero_()
        target[:, : rows.frames] = _gelu(source)

    def _live_gradients(self, rows, grad, grad_rows, z, dtype):
        shape = rows.batch, grad_rows, rows.channels
        upstream = self._tensor(grad, *shape, dtype=_DTYPES[dtype])[:, : rows.frames].double()
        source = self._tensor(z, rows.batch, rows.rows, rows.channels, dtype=_DTYPES[dtype])
        return upstream, source[:, : rows.frames].double()

    def _write_live(self, rows, address, values, dtype):
        if address:
            target = self._tensor(address, rows.batch, rows.rows, rows.channels, dtype=_DTYPES[dtype])
            target.zero_()
            target[:, : rows.frames] = values

    def gelu_backward(self, rows, *, grad, grad_rows, z, out, activation, dtype, stream):
        upstream, source = self._live_gradients(rows, grad, grad_rows, z, dtype)
        assert grad != out or grad_rows == rows.rows
        self._write_live(rows, out, upstream * _gelu_derivative(source), dtype)
        self._write_live(rows, activation, _gelu(source), dtype)

    def layer_norm_backward(
        self, rows, *, norm_weight, norm_bias, epsilon, grad, grad_rows, z, out, activation, partial, part_rows, dtype,
        stream,
    ):  # fmt: skip
        assert grad != out or grad_rows == rows.rows
        upstream, source = self._live_gradients(rows, grad, grad_rows, z, dtype)
        gain, bias = self._norm(rows, norm_weight, norm_bias)
        centred = source - source.mean(2, keepdim=True)
        rstd = torch.rsqrt(centred.square().mean(2, keepdim=True) + epsilon)
        normalised = centred * rstd
        y = normalised * gain + bias
        dy = upstream * _gelu_derivative(y)
        scaled = dy * gain
        dz = scaled - scaled.mean(2, keepdim=True) - normalised * (scaled * normalised).mean(2, keepdim=True)
        dz = dz * rstd
        terms = torch.stack([dy * normalised, dy, dz], dim=2)  # [batch, frames, 3, channels]
        padded = terms.new_zeros(rows.batch, rows.rows, 3, rows.channels)
        padded[:, : rows.frames] = terms
        flat = padded.flatten(0, 1)
        sums = self._wide(partial, -(-len(flat) // part_rows), 3, rows.channels)
        for part, chunk in enumerate(flat.split(part_rows)):
            sums[part] = chunk.sum(0)
        self._write_live(rows, out, dz, dtype)
        self._write_live(rows, activation, _gelu(y), dtype)

    def clear_dead_rows(self, rows, *, z, activation, dtype, stream):
        for address in (z, activation):
            if address:
                target = self._tensor(address, rows.batch, rows.rows, rows.channels, dtype=_DTYPES[dtype])
                target[:, rows.frames :] = 0.0

    def column_sums(self, *, x, total_rows, channels, partial, part_rows, dtype, stream):
        source = self._tensor(x, total_rows, channels, dtype=_DTYPES[dtype]).double()
        out = self._wide(partial, -(-total_rows // part_rows), channels)
        for part, chunk in enumerate(source.split(part_rows)):
            out[part] = chunk.sum(0)

    def sum_parts(self, *, partial, outer, parts, columns, out, out_is_double, stream):
        source = self._wide(partial, outer, parts, columns)
        target = self._tensor(out, outer, columns, dtype=torch.float64 if out_is_double else self.wide)
        target.copy_(source.double().sum(1))

    # gemm.h

    def _multiply(self, operands: Product, bias: int, dtype: torch.dtype) -> Tensor:
        left = self._rows(operands.input, operands.rows, operands.input_stride, operands.depth, dtype).double()
        result = left @ self._tensor(operands.weight, operands.columns, operands.depth, dtype=dtype).double().T
        return result + self._wide(bias, operands.columns).double() if bias else result

    def product(self, operands, *, bias, out, out_stride, dtype, stream):
        dtype = _DTYPES[dtype]
        target = self._rows(out, operands.rows, out_stride, operands.columns, dtype)
        target.copy_(self._multiply(operands, bias, dtype))

    def product_gelu(self, operands, *, bias, z, activation, dtype, stream):
        dtype = _DTYPES[dtype]
        value = self._multiply(operands, bias, dtype)
        if z:
            self._tensor(z, operands.rows, operands.columns, dtype=dtype).copy_(value)
        self._tensor(activation, operands.rows, operands.columns, dtype=dtype).copy_(_gelu(value))

    def product_gelu_gradient(self, operands, *, z, out, activation, out_stride, dtype, stream):
        dtype = _DTYPES[dtype]
        source = self._rows(z, operands.rows, out_stride, operands.columns, dtype).double()
        target = self._rows(out, operands.rows, out_stride, operands.columns, dtype)
        target.copy_(self._multiply(operands, 0, dtype) * _gelu_derivative(source))
        if activation:
            self._rows(activation, operands.rows, out_stride, operands.columns, dtype).copy_(_gelu(source))

    def weight_gradient(
        self, *, gradient, input, input_stride, partial, rows, part_rows, channels, depth, dtype, stream
    ):
        dtype = _DTYPES[dtype]
        left = self._tensor(gradient, rows, channels, dtype=dtype).double()
        right = self._rows(input, rows, input_stride, depth, dtype).double()
        out = self._wide(partial, -(-rows // part_rows), channels, depth)
        for part, (some, others) in enumerate(zip(left.split(part_rows), right.split(part_rows))):
            out[part] = some.T @ others


def _gelu(z: Tensor) -> Tensor:
    return torch.nn.functional.gelu(z)


def _gelu_derivative(z: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(torch.ones_like(z), z)
