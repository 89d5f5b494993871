"""The convolutional front end on a CPU: GEMMs of torch between passes in C++, in chunks of rows that stay in cache.

The formulation is that of `hubert_fast.torch_backend.conv_frontend`. What the C++ passes (``csrc/cpu``) add:

- convolution 0, norm and GELU, or norm and GELU of a later layer, are one pass, and so are their gradients;
- a pass writes its activations as the windows that the next GEMM reads, so nothing is copied in between;
- the backward computes a layer's GELU once, for the weight gradient above and for its own.

What is kept for the backward: the waveform, and layers 1.. before their norm and GELU and their filters in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from hubert_fast import extension
from hubert_fast.cpu import product_into, product_over_rows
from hubert_fast.reference.conv_frontend import NORM_EPS
from hubert_fast.torch_backend import conv_frontend as torch_backend
from hubert_fast.torch_backend import first_layer
from hubert_fast.torch_backend.conv_frontend import Gradients

if TYPE_CHECKING:
    from hubert_fast.ops.conv_frontend import Arguments

__all__ = ["backward", "forward", "layers_objection", "objection", "saved_tensors"]

# Rows of a GEMM: few enough that the operands of a chunk stay in the last-level cache, and in the backward enough that adding a
# chunk's product to the weight's gradient (1.5 M values for kernel 3) costs little beside the product.
_FORWARD_ROWS = 1024
_BACKWARD_ROWS = 2048

# Asked once, here: torch.compile cannot trace the question.
_MAX_TAPS = getattr(extension.cpu(), "max_taps", 0)

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def objection(arguments: Arguments) -> Optional[str]:
    """Why this backend, which is there, cannot take these inputs, or None where it can."""
    waveforms, dtype = arguments.waveforms, arguments.dtype
    if waveforms.device.type != "cpu":
        return f"it runs on a CPU, and the waveforms are on {waveforms.device}"
    if dtype not in _DTYPES:
        return f"it computes in {' or '.join(map(str, _DTYPES))}, not {dtype}"
    if waveforms.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it reads waveforms of at most 32 bits, not {waveforms.dtype}"
    return layers_objection(arguments.weights, arguments.strides)


def layers_objection(weights: Sequence[Tensor], strides: Sequence[int]) -> Optional[str]:
    """Why it cannot take these layers, whatever the input."""
    channels = [weight.shape[0] for weight in weights]
    if any(each % 16 for each in channels):
        return f"it needs channels in multiples of 16; the layers have {channels}"
    if weights[0].shape[2] > _MAX_TAPS:
        return f"its layer 0 has at most {_MAX_TAPS} taps; this one has {weights[0].shape[2]}"
    return None


class _Frontend:
    """The parameters in the layouts that kernels and GEMMs want, and the calls that forward and backward share.

    ``weights``: of layers 1.., where they are at hand, ``[out, kernel, in]``: the order of a window in channels-last layout.
    """

    def __init__(self, arguments: Arguments, weights: Optional[Sequence[Tensor]] = None) -> None:
        waveforms, filters, biases, norm_weights, norm_biases, strides, _, valid_samples, dtype = arguments
        kernels = extension.cpu()
        assert kernels is not None, extension.why_not("cpu")
        self.c: ModuleType = kernels
        self.threads = torch.get_num_threads()
        self.dtype = dtype
        self.layer_norm = arguments.layer_norm
        self.waveforms = waveforms.float().contiguous()
        self.kernels = [each.shape[2] for each in filters]
        self.channels = [each.shape[0] for each in filters]
        self.strides = list(strides)
        self.frames = arguments.frames
        # Copies in any case: what is kept for the backward may not be a parameter itself.
        self.weights = weights or [
            each.detach().to(dtype).permute(0, 2, 1).clone(memory_format=torch.contiguous_format)
            for each in filters[1:]
        ]
        self.biases = [bias.to(dtype) for bias in biases]
        self.norm_weights = [weight.float().contiguous() for weight in norm_weights]
        self.norm_biases = [bias.float().contiguous() for bias in norm_biases]
        self.preactivations: list[Tensor] = []  # of layers 1.., each [batch, frames, channels]
        self._prepare_first_layer(filters[0].flatten(1), biases, valid_samples)

    def _prepare_first_layer(self, filters: Tensor, biases: Sequence[Tensor], valid_samples: Optional[Tensor]) -> None:
        """Layer 0 as z = shift + scaled . (X - centre): scaled [batch or 1, taps, channels], centre [batch or 1, taps]."""
        self.filters = filters
        if self.layer_norm:
            self.scaled = filters.float().T.contiguous()[None]
            self.centre = torch.zeros(1, self.kernels[0])
            self.shift = biases[0].float().contiguous() if biases else torch.zeros(self.channels[0])
            return
        self.statistics = first_layer.statistics(filters, *self._window_moments(valid_samples))
        scaled = first_layer.scaled_filters(filters, self.norm_weights[0], self.statistics.rstd)
        self.scaled = scaled.transpose(1, 2).float().contiguous()
        self.centre = self.statistics.window_mean.float()
        self.shift = self.norm_biases[0]

    def _window_moments(self, valid_samples: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean [batch, taps] and covariance [batch, taps, taps] of each row's windows, in float64."""
        batch, samples = self.waveforms.shape
        taps, stride = self.kernels[0], self.strides[0]
        frames = torch.full((batch,), self.frames[0])
        if valid_samples is not None:
            valid = torch.div(valid_samples.to("cpu", torch.int64) - taps, stride, rounding_mode="floor") + 1
            frames = valid.clamp(torch.zeros_like(frames), frames)
        means = torch.empty(batch, taps, dtype=torch.float64)
        covariances = torch.empty(batch, taps, taps, dtype=torch.float64)
        self.c.first_layer_statistics(
            signals=self.waveforms,
            row_stride=samples,
            batch=batch,
            taps=taps,
            stride=stride,
            frames=frames,
            means=means,
            covariances=covariances,
            threads=self.threads,
        )
        return means, covariances

    def layers(self) -> range:
        """The layers after the first: those that are GEMMs over channels."""
        return range(1, len(self.frames))

    def pass_over(self, layer: int, row: int) -> dict[str, Any]:
        """The arguments with which a C++ pass reads one sequence's preactivations of ``layer``."""
        arguments = dict(dtype=_DTYPES[self.dtype], channels=self.channels[layer], threads=self.threads)
        if layer == 0:
            group = 0 if self.layer_norm else row
            arguments["first_layer"] = self.c.FirstLayer(
                signal=self.waveforms[row],
                filters=self.scaled[group],
                centre=self.centre[group],
                shift=self.shift,
                taps=self.kernels[0],
                stride=self.strides[0],
            )
        else:
            arguments["preactivations"] = self.preactivations[layer - 1][row]
        if self.layer_norm:
            arguments["norm"] = self.c.LayerNorm(
                weight=self.norm_weights[layer], bias=self.norm_biases[layer], eps=NORM_EPS
            )
        return arguments

    def windows(self, layer: int, operand: Tensor) -> Any:
        """``operand`` [rows, kernel * in_channels] as the place where the layer below leaves its activations."""
        return self.c.Windows(data=operand, kernel=self.kernels[layer], stride=self.strides[layer], rows=len(operand))

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)


def _chunks(rows: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor], list[Tensor]]:
    frontend = _Frontend(arguments)
    batch, preactivations = len(arguments.waveforms), frontend.preactivations
    for layer in frontend.layers():
        out = frontend.empty(batch, frontend.frames[layer], frontend.channels[layer])
        weight = frontend.weights[layer - 1].flatten(1)
        stride, kernel = frontend.strides[layer], frontend.kernels[layer]
        operand = frontend.empty(min(_FORWARD_ROWS, frontend.frames[layer]), weight.shape[1])
        for row in range(batch):
            below = frontend.pass_over(layer - 1, row)
            for start, stop in _chunks(frontend.frames[layer], _FORWARD_ROWS):
                windows = operand[: stop - start]
                frontend.c.forward(
                    **below,
                    start=start * stride,
                    stop=(stop - 1) * stride + kernel,
                    windows=frontend.windows(layer, windows),
                )
                bias = frontend.biases[layer] if frontend.biases else None
                product_into(out[row, start:stop], windows, weight, bias)
        if layer >= 2 and not save:
            preactivations[layer - 2] = out.new_empty(0)  # the layer below has been used up
        preactivations.append(out)
    last = len(frontend.frames) - 1
    frames = frontend.frames[last]
    features = frontend.empty(batch, frames, frontend.channels[last])
    for row in range(batch):
        plain = frontend.c.Windows(data=features[row], kernel=1, stride=1, rows=frames)
        frontend.c.forward(**frontend.pass_over(last, row), start=0, stop=frames, windows=plain)
    return (features,), [*preactivations, *frontend.weights] if save else []


def saved_tensors(arguments: Arguments) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Inputs of norm and GELU in layers 1.., then the filters of these layers as GEMMs take them."""
    weights = [
        ((out, kernel, width), arguments.dtype) for out, width, kernel in (w.shape for w in arguments.weights[1:])
    ]
    return [*torch_backend.saved_tensors(arguments), *weights]


class _DataGradient:
    """The gradient of a layer's input, as GEMMs onto blocks of ``stride`` input rows.

    Block t holds input rows stride t + p for phases p < stride. Tap j of frame u reads row stride u + j, which is phase
    j % stride of block u + j // stride: the gradient of phase p of block t is the sum over i of dy[t - i] W_(p + i stride).
    Phases that as many taps reach share a GEMM over the rows [dy[t - n + 1], ..., dy[t]]: for kernel 3 and stride 2, phase 0 has
    two taps (the "head") and phase 1 one (the "tail"); for kernel 2 there is only a tail, of both phases.
    """

    def __init__(self, weight: Tensor, stride: int, rows: int) -> None:  # [out_channels, kernel, in_channels]
        kernel = weight.shape[1]
        self.stride, self.split = stride, kernel % stride
        self.head_taps, self.tail_taps = -(-kernel // stride), kernel // stride
        self._head = self._matrix(weight, self.head_taps, range(self.split))
        self._tail = self._matrix(weight, self.tail_taps, range(self.split, stride))
        self._head_out = weight.new_empty(rows, self._head.shape[1])
        self._tail_out = weight.new_empty(rows, self._tail.shape[1])

    def _matrix(self, weight: Tensor, taps: int, phases: range) -> Tensor:
        """[taps * out_channels, phases * in_channels]; its row blocks go from dy[t - taps + 1] to dy[t]."""
        shape = taps * weight.shape[0], len(phases) * weight.shape[2]
        blocks = [weight[:, phase + i * self.stride] for i in reversed(range(taps)) for phase in phases]
        if not blocks:
            return weight.new_empty(shape)
        stacked = torch.stack(blocks).view(taps, len(phases), *blocks[0].shape)
        return stacked.permute(0, 2, 1, 3).reshape(shape)

    def front_rows(self) -> int:
        """Rows of zeros that the gradient needs in front of its first frame."""
        return self.head_taps - 1

    def __call__(self, gradient: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Head and tail of blocks start .. stop, from ``gradient`` [front_rows + blocks, out_channels] of one sequence."""
        results = []
        for matrix, taps, out in (
            (self._head, self.head_taps, self._head_out),
            (self._tail, self.tail_taps, self._tail_out),
        ):
            out = out[: stop - start]
            first = start + self.front_rows() - (taps - 1)
            if matrix.shape[0] == 0:
                out.zero_()  # rows that a stride longer than the kernel leaves out
            elif matrix.shape[1] > 0:
                width = gradient.shape[1]
                rows = gradient[first:].as_strided((stop - start, taps * width), (width, 1))
                product_into(out, rows, matrix.T)
            results.append(out)
        return results[0], results[1]


class _Backward:
    """Walks the layers from the last to the first, chunk by chunk, summing every parameter's gradient."""

    def __init__(self, frontend: _Frontend) -> None:
        self.frontend = frontend
        f = frontend
        norms = 2 if f.layer_norm else 0
        # What the passes add up, in float64 (see csrc/cpu/kernels.h); under group norm each row of layer 0 has its own.
        groups = 1 if f.layer_norm else len(f.waveforms)
        self.sums = [torch.zeros(groups, 1 + f.kernels[0] + norms, f.channels[0], dtype=torch.float64)]
        self.sums += [torch.zeros(1, 1 + norms, f.channels[layer], dtype=torch.float64) for layer in f.layers()]
        self.weight_gradients: list[Optional[Tensor]] = [None] * len(f.weights)

    def run(self, grad: Tensor) -> None:
        f, last = self.frontend, len(self.frontend.frames) - 1
        grad = grad.to(f.dtype).contiguous()
        frames = f.frames[last]
        upstream = self._gradient_buffer(last)
        for row in range(len(grad)):
            plain = f.c.BlockGradient(head=None, tail=grad[row], split=0, stride=1)
            self._pass(last, row, 0, frames, frames, plain, upstream, windows=None)
        for layer in reversed(f.layers()):
            upstream = self._layer(layer, upstream)

    def _gradient_buffer(self, layer: int) -> Tensor:
        """For the gradient of a layer's GEMM output: [batch, front + blocks, channels], zero where there is no frame."""
        f = self.frontend
        if layer == 0:
            return torch.empty(0)  # its gradient goes straight into sums: no tensor of its size is ever allocated
        frames, front, blocks = f.frames[layer], self._front_rows(layer), self._blocks(layer)
        buffer = f.empty(len(f.waveforms), front + max(blocks, frames), f.channels[layer])
        buffer[:, :front] = 0
        buffer[:, front + frames :] = 0
        return buffer

    def _front_rows(self, layer: int) -> int:
        return -(-self.frontend.kernels[layer] // self.frontend.strides[layer]) - 1

    def _blocks(self, layer: int) -> int:
        return -(-self.frontend.frames[layer - 1] // self.frontend.strides[layer])

    def _layer(self, layer: int, upstream: Tensor) -> Tensor:
        """From the gradient of a layer's GEMM output to that of the layer below; its weight's gradient on the way."""
        f = self.frontend
        weight = f.weights[layer - 1]
        stride, kernel, frames = f.strides[layer], f.kernels[layer], f.frames[layer]
        blocks, front = self._blocks(layer), self._front_rows(layer)
        rows = min(_BACKWARD_ROWS, blocks)
        data_gradient = _DataGradient(weight, stride, rows)
        operand = f.empty(rows, weight[0].numel())
        below = self._gradient_buffer(layer - 1)
        for row in range(len(upstream)):
            for start, stop in _chunks(blocks, _BACKWARD_ROWS):
                head, tail = data_gradient(upstream[row], start, stop)
                gradient = f.c.BlockGradient(head=head, tail=tail, split=data_gradient.split, stride=stride)
                last = max(min(stop, frames), start)
                windows = operand[: last - start]
                first, end = start * stride, min(stop * stride, f.frames[layer - 1])
                windows_stop = max((last - 1) * stride + kernel, end) if last > start else end
                self._pass(layer - 1, row, first, end, windows_stop, gradient, below, windows=f.windows(layer, windows))
                if last > start:
                    self._add_to_weight(layer, upstream[row, front + start : front + last], windows)
        return below

    def _add_to_weight(self, layer: int, gradient: Tensor, windows: Tensor) -> None:
        """Add what a chunk gives to a weight's gradient: its product in the compute dtype, the sum in float32."""
        product, total = product_over_rows(gradient, windows), self.weight_gradients[layer - 1]
        if total is None:
            self.weight_gradients[layer - 1] = product
        elif total.dtype == torch.float32:
            total.add_(product)
        else:
            self.weight_gradients[layer - 1] = total.float().add_(product)

    def _pass(
        self,
        layer: int,
        row: int,
        start: int,
        stop: int,
        windows_stop: int,
        gradient: Any,
        below: Tensor,
        windows: Any,
    ) -> None:
        f = self.frontend
        sums = self.sums[layer][row if layer == 0 and not f.layer_norm else 0]
        f.c.backward(
            **f.pass_over(layer, row),
            start=start,
            stop=stop,
            windows=windows,
            windows_stop=windows_stop,
            gradient=gradient,
            preactivation_gradient=below[row, self._front_rows(layer) + start] if layer else None,
            sums=sums if layer == 0 or f.layer_norm or f.biases else None,
        )

    def gradients(self) -> Gradients:
        """The gradients of all parameters, in float32 or wider, or a weight's in the compute dtype, if one chunk gave it."""
        f = self.frontend
        weights, biases = [], []
        norm_weights, norm_biases = [], []
        for sums in self.sums:
            biases.append(sums[0, 0])
            if f.layer_norm:
                norm_weights.append(sums[0, -2])
                norm_biases.append(sums[0, -1])
        taps = f.kernels[0]
        if f.layer_norm:
            weights.append(self.sums[0][0, 1 : 1 + taps].T.unsqueeze(1))
        else:
            products = self.sums[0][:, 1 : 1 + taps].transpose(1, 2)
            first = first_layer.gradients(f.filters, f.norm_weights[0], f.statistics, self.sums[0][:, 0], products)
            weights.append(first.filters.unsqueeze(1))
            norm_weights.append(first.norm_weight)
            norm_biases.append(first.norm_bias)
            biases[0] = torch.zeros_like(biases[0])  # the norm takes it out again
        weights += [
            (torch.zeros_like(weight) if found is None else found.view_as(weight)).permute(0, 2, 1)
            for weight, found in zip(f.weights, self.weight_gradients)
        ]
        return Gradients(weights, biases if f.biases else [], norm_weights, norm_biases)


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Tensor], wanted: list[bool]
) -> tuple[list[Tensor], ...]:
    """Sums over chunks and rows run in float32 or wider.

    Under group norm the bias of layer 0 has no effect on the output and its gradient is exactly 0.
    """
    layers = len(arguments.weights) - 1
    frontend = _Frontend(arguments, saved[layers:])
    frontend.preactivations = saved[:layers]
    walk = _Backward(frontend)
    walk.run(*gradients)
    return walk.gradients().like(arguments.parameters)
