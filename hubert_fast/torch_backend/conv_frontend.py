"""The convolutional front end as a chain of GEMMs in channels-last layout, in chunks of rows that stay in cache.

Three ideas (derivations in the docstrings below):

- In layout ``[frames, channels]`` the window of an output frame is ``kernel * channels`` contiguous values, so a strided
  convolution is a GEMM over an overlapping view: no im2col of the whole signal.
- Layer 0 has one input channel, so the mean and variance of each of its channels follow from the 10 means and the 10 x 10
  covariance of the waveform's windows: convolution, group norm and GELU are one pass, forward and backward.
- Layer 0's activations are never stored: each chunk of layer 1 computes the rows it needs from the waveform, in the forward
  and again in the backward. Each later layer keeps one tensor, its input to norm and GELU.

What is kept for the backward: layers 1.. before their norm and GELU, in the compute dtype (for the standard layers
0.99 x 512 values for each 10 samples of audio), and the waveform.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_fast.reference.conv_frontend import NORM_EPS
from hubert_fast.torch_backend import first_layer

if TYPE_CHECKING:
    from hubert_fast.ops.conv_frontend import Arguments

# Rows of a GEMM on a CPU: enough to run at full rate, few enough that a chunk's input window and output stay in the
# last-level cache, where GELU costs a quarter of what it costs from memory. On other devices launches are what costs.
_CPU_CHUNK_ROWS = 1024
_DEVICE_CHUNK_ROWS = 1 << 20


class _Frontend:
    """The parameters in the layouts the GEMMs want, and the pieces that forward and backward share."""

    def __init__(self, arguments: Arguments) -> None:
        waveforms, weights, biases, norm_weights, norm_biases, strides, _, valid_samples, dtype = arguments
        self.dtype = dtype
        # Layer 0 and every norm run in float32 at least: their cost is nothing, their precision is everything after them.
        self.wide = torch.promote_types(dtype, torch.float32)
        self.waveforms = waveforms.to(self.wide).contiguous()
        self.layer_norm = arguments.layer_norm
        self.kernels = [weight.shape[2] for weight in weights]
        self.channels = [weight.shape[0] for weight in weights]
        self.strides = list(strides)
        # [out, in, kernel] -> [out, kernel * in]: the order of a window in channels-last layout.
        self.weights = [weight.permute(0, 2, 1).flatten(1).to(dtype) for weight in weights[1:]]
        self.first_weight = weights[0].flatten(1).to(self.wide)  # [channels, kernel]
        self.biases = [bias.to(dtype) for bias in biases]
        self.norm_weights = [weight.to(self.wide) for weight in norm_weights]
        self.norm_biases = [bias.to(self.wide) for bias in norm_biases]
        self.first_bias = biases[0].to(self.wide) if biases and self.layer_norm else None
        self.chunk_rows = _CPU_CHUNK_ROWS if waveforms.device.type == "cpu" else _DEVICE_CHUNK_ROWS
        self.frames = arguments.frames
        self.preactivations: list[Tensor] = []  # of layers 1.., each [batch, frames, channels]
        self.statistics: list[first_layer.Statistics] = []  # of each row, as a batch of one
        if not self.layer_norm:
            self.statistics = [self._statistics(row, valid_samples) for row in range(len(waveforms))]

    def layers(self) -> range:
        """The layers after the first: those that are GEMMs over channels."""
        return range(1, len(self.frames))

    def chunks(self, rows: int) -> Iterator[tuple[int, int]]:
        for start in range(0, rows, self.chunk_rows):
            yield start, min(start + self.chunk_rows, rows)

    def windows(self, row: int, start: int, stop: int) -> Tensor:
        """``X[t] = x[stride t : stride t + kernel]`` for frames ``start <= t < stop`` of layer 0: [frames, kernel]."""
        signal = self.waveforms[row, start * self.strides[0] :]
        return signal.as_strided((stop - start, self.kernels[0]), (self.strides[0], 1)).contiguous()

    def _statistics(self, row: int, valid_samples: Optional[Tensor]) -> first_layer.Statistics:
        """Windows are centred in float64 before they are squared, so neither a large DC offset nor a signal of 1e-4 loses the
        variance.
        """
        windows = self.windows(row, 0, self.frames[0]).double()
        valid = windows.new_ones(len(windows))
        if valid_samples is not None:
            frame = torch.arange(len(windows), device=windows.device)
            valid.masked_fill_(frame * self.strides[0] + self.kernels[0] > valid_samples[row].to(windows.device), 0.0)
        count = valid.sum().clamp(min=1)
        window_mean = valid @ windows / count
        centred = (windows - window_mean) * valid[:, None]
        covariance = centred.T @ centred / count
        return first_layer.statistics(self.first_weight, window_mean[None], covariance[None])

    def first_preactivation(self, row: int, start: int, stop: int) -> Tensor:
        """Layer 0 before GELU (group norm folded in) or before LayerNorm, in the wide dtype: [rows, channels]."""
        windows = self.windows(row, start, stop)
        if self.layer_norm:
            return F.linear(windows, self.first_weight, self.first_bias)
        statistics = self.statistics[row]
        centred = windows - statistics.window_mean.to(self.wide)
        filters = first_layer.scaled_filters(self.first_weight, self.norm_weights[0], statistics.rstd)[0]
        return F.linear(centred, filters.to(self.wide), self.norm_biases[0])

    def preactivation(self, layer: int, row: int, start: int, stop: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The input of GELU for rows ``start <= t < stop`` and, under layer norm, (input, mean, rstd) of the norm."""
        if layer == 0:
            x = self.first_preactivation(row, start, stop)
        else:
            x = self.preactivations[layer - 1][row, start:stop]
        if not self.layer_norm:
            return x, ()
        normalised, mean, rstd = torch.native_layer_norm(
            x.to(self.wide), x.shape[-1:], self.norm_weights[layer], self.norm_biases[layer], NORM_EPS
        )
        return normalised, (x, mean, rstd)

    def activation(self, layer: int, row: int, start: int, stop: int) -> Tensor:
        """Rows ``start <= t < stop`` of a layer's output, in the compute dtype: [rows, channels]."""
        return F.gelu(self.preactivation(layer, row, start, stop)[0]).to(self.dtype)

    def taps(self, layer: int, x: Tensor, rows: int) -> list[tuple[slice, Tensor]]:
        """The windows of ``rows`` frames of ``layer`` over its input rows ``x``, in parts that BLAS takes as they lie.

        Rows of a whole window overlap where the kernel is longer than the stride, which BLAS refuses; the taps of one
        ``j // stride`` do not. Each part comes with its columns of the GEMM's weight: [rows, taps * in_channels].
        """
        width = x.shape[1]
        block = self.strides[layer] * width
        total = self.kernels[layer] * width
        parts = []
        for shift, column in enumerate(range(0, total, block)):
            columns = slice(column, min(column + block, total))
            view = x[shift * self.strides[layer] :].as_strided((rows, columns.stop - column), (block, 1))
            parts.append((columns, view))
        if len(parts) > 1 and self.dtype != self.wide:
            # In a narrow dtype a sum of parts would round twice, and oneDNN is slow on strided rows: the copy is cheaper.
            parts = [(slice(None), torch.cat([view for _, view in parts], dim=1))]
        return parts

    def convolve(self, layer: int, x: Tensor, out: Tensor) -> None:
        """``layer``'s convolution over its input rows ``x``, into ``out`` [rows, out_channels]."""
        weight = self.weights[layer - 1]
        parts = self.taps(layer, x, len(out))
        columns, operand = parts[0]
        if self.biases:
            torch.addmm(self.biases[layer], operand, weight[:, columns].T, out=out)
        else:
            torch.mm(operand, weight[:, columns].T, out=out)
        for columns, operand in parts[1:]:
            out.addmm_(operand, weight[:, columns].T)


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor], list[Tensor]]:
    frontend, waveforms, dtype = _Frontend(arguments), arguments.waveforms, arguments.dtype
    batch = len(waveforms)
    preactivations = frontend.preactivations
    for layer in frontend.layers():
        out = waveforms.new_empty(batch, frontend.frames[layer], frontend.channels[layer], dtype=dtype)
        stride, kernel = frontend.strides[layer], frontend.kernels[layer]
        for row in range(batch):
            for start, stop in frontend.chunks(frontend.frames[layer]):
                first, end = start * stride, (stop - 1) * stride + kernel
                below = frontend.activation(layer - 1, row, first, end)
                frontend.convolve(layer, below, out[row, start:stop])
        if layer >= 2 and not save:
            preactivations[layer - 2] = out.new_empty(0)  # the layer below has been used up
        preactivations.append(out)
    last = len(frontend.frames) - 1
    features = waveforms.new_empty(batch, frontend.frames[last], frontend.channels[last], dtype=dtype)
    for row in range(batch):
        for start, stop in frontend.chunks(frontend.frames[last]):
            features[row, start:stop] = frontend.activation(last, row, start, stop)
    return (features,), preactivations if save else []


def saved_tensors(arguments: Arguments) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Of layers 1.. what comes before norm and GELU."""
    batch, layers = arguments.waveforms.shape[0], zip(arguments.frames[1:], arguments.weights[1:])
    return [((batch, frames, weight.shape[0]), arguments.dtype) for frames, weight in layers]


class Gradients(NamedTuple):
    """Of each parameter, in the order of the operator's arguments."""

    weights: list[Tensor]
    biases: list[Tensor]
    norm_weights: list[Tensor]
    norm_biases: list[Tensor]

    def like(self, parameters: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], ...]:
        """In the dtypes of ``parameters``, contiguous, each in memory of its own."""
        return tuple(
            [
                torch.empty_like(each, memory_format=torch.contiguous_format).copy_(total)
                for total, each in zip(totals, of)
            ]
            for totals, of in zip(self, parameters)
        )


class _Backward:
    """Walks the layers from the last to the first, chunk by chunk, summing every parameter's gradient."""

    def __init__(self, frontend: _Frontend, parameters: Sequence[Sequence[Tensor]]) -> None:
        self.frontend = frontend
        self.sums = Gradients(
            *(
                [parameter.new_zeros(parameter.shape, dtype=frontend.wide) for parameter in group]
                for group in parameters
            )
        )
        # Gradients of the GEMM layers in the GEMM's layout [out, kernel * in].
        self.weight_sums = [torch.zeros_like(weight, dtype=frontend.wide) for weight in frontend.weights]

    def run(self, grad: Tensor) -> Gradients:
        frontend = self.frontend
        last = len(frontend.frames) - 1
        upstream = grad.new_empty(grad.shape, dtype=frontend.dtype)
        for row in range(len(grad)):
            for start, stop in frontend.chunks(frontend.frames[last]):
                normalised, norm_state = frontend.preactivation(last, row, start, stop)
                through = self._through_activation(last, grad[row, start:stop], normalised, norm_state)
                if last == 0:
                    self._sum_first_layer(row, start, stop, through)
                upstream[row, start:stop] = through
        for layer in reversed(frontend.layers()):
            upstream = self._layer(layer, upstream)
        for layer in frontend.layers():
            out_channels, in_channels, kernel = self.sums.weights[layer].shape
            total = self.weight_sums[layer - 1].view(out_channels, kernel, in_channels)
            self.sums.weights[layer].copy_(total.permute(0, 2, 1))
        return self.sums

    def _layer(self, layer: int, upstream: Tensor) -> Tensor:
        """From the gradient of a layer's GEMM output to that of the layer below; its own parameters on the way.

        A chunk is a range of blocks of ``stride`` input rows: block t holds the inputs that frame t reads first, so the
        blocks partition the input and each is written once. Nothing is returned from layer 1: layer 0's gradient
        goes straight into its sums, and no tensor of its size is ever allocated.
        """
        frontend = self.frontend
        batch, frames, _ = upstream.shape
        stride, kernel = frontend.strides[layer], frontend.kernels[layer]
        rows_below = frontend.frames[layer - 1]
        below = upstream.new_empty(batch, rows_below if layer > 1 else 0, frontend.channels[layer - 1])
        for row in range(batch):
            for start, stop in frontend.chunks(-(-rows_below // stride)):
                first, end = start * stride, min(stop * stride, rows_below)
                last_frame = min(stop, frames)
                window_end = max((last_frame - 1) * stride + kernel, end)
                normalised, norm_state = frontend.preactivation(layer - 1, row, first, window_end)
                if last_frame > start:
                    self._sum_weight(layer, upstream[row, start:last_frame], F.gelu(normalised).to(frontend.dtype))
                grad = self._input_gradient(layer, upstream[row], start, stop)[: end - first]
                own = normalised[: end - first], tuple(state[: end - first] for state in norm_state)
                grad = self._through_activation(layer - 1, grad, *own)
                if layer == 1:
                    self._sum_first_layer(row, first, end, grad)
                else:
                    below[row, first:end] = grad
        return below

    def _sum_weight(self, layer: int, upstream: Tensor, below: Tensor) -> None:
        frontend = self.frontend
        for columns, operand in frontend.taps(layer, below, len(upstream)):
            total = self.weight_sums[layer - 1][:, columns]
            if frontend.dtype == frontend.wide:
                total.addmm_(upstream.T, operand)
            else:
                total.add_(upstream.T @ operand)  # a chunk's product in the compute dtype, the sum in float32
        if frontend.biases:
            self.sums.biases[layer].add_(upstream.sum(0, dtype=frontend.wide))

    def _input_gradient(self, layer: int, upstream: Tensor, start: int, stop: int) -> Tensor:
        """Gradient of the input rows of blocks ``start <= t < stop``: [blocks * stride, in_channels].

        Tap j of frame t reads row j % stride of block t + j // stride, so the taps of one j // stride are one GEMM onto
        whole blocks: for kernel 3 and stride 2, taps 0 and 1 go to block t and tap 2 to the first half of block t + 1.
        """
        frontend = self.frontend
        width = frontend.channels[layer - 1]
        block = frontend.strides[layer] * width
        weight = frontend.weights[layer - 1]
        grad = upstream.new_empty(stop - start, block)
        for shift, column in enumerate(range(0, weight.shape[1], block)):
            taps = weight[:, column : column + block]
            first = max(start, shift)
            end = max(min(stop, len(upstream) + shift), first)
            rows, product = grad[first - start : end - start], upstream[first - shift : end - shift]
            if shift == 0:
                grad[len(rows) :].zero_()  # blocks past the last frame: read only by later taps, or by none
                grad[:, taps.shape[1] :].zero_()  # rows that a stride longer than the kernel leaves out
                torch.mm(product, taps, out=rows[:, : taps.shape[1]])
            elif len(rows):
                rows[:, : taps.shape[1]].addmm_(product, taps)
        return grad.view(-1, width)

    def _through_activation(
        self, layer: int, grad: Tensor, normalised: Tensor, norm_state: tuple[Tensor, ...]
    ) -> Tensor:
        grad = torch.ops.aten.gelu_backward(grad.to(normalised.dtype), normalised)
        if not norm_state:
            return grad
        frontend = self.frontend
        x, mean, rstd = norm_state
        weight, bias = frontend.norm_weights[layer], frontend.norm_biases[layer]
        grad, weight_grad, bias_grad = torch.ops.aten.native_layer_norm_backward(
            grad, x.to(frontend.wide), x.shape[-1:], mean, rstd, weight, bias, [True, True, True]
        )
        self.sums.norm_weights[layer].add_(weight_grad)
        self.sums.norm_biases[layer].add_(bias_grad)
        return grad if layer == 0 else grad.to(frontend.dtype)

    def _sum_first_layer(self, row: int, start: int, stop: int, grad: Tensor) -> None:
        """S0 = sum_t dz, S1 = sum_t dz X[t]; under group norm each row of the batch has its own."""
        frontend = self.frontend
        windows = frontend.windows(row, start, stop)
        if frontend.layer_norm:
            self.sums.weights[0].add_((grad.T @ windows).unsqueeze(1))
            if frontend.biases:
                self.sums.biases[0].add_(grad.sum(0))
            return
        if start == 0:
            self._row_sums = (grad.new_zeros(grad.shape[1], dtype=torch.float64), 0.0)
        total, products = self._row_sums
        centred = windows - frontend.statistics[row].window_mean.to(frontend.wide)
        total, products = self._row_sums = total + grad.sum(0).double(), products + (grad.T @ centred).double()
        if stop == frontend.frames[0]:
            gradients = first_layer.gradients(
                frontend.first_weight, frontend.norm_weights[0], frontend.statistics[row], total[None], products[None]
            )
            self.sums.weights[0].add_(gradients.filters.unsqueeze(1).to(frontend.wide))
            self.sums.norm_weights[0].add_(gradients.norm_weight.to(frontend.wide))
            self.sums.norm_biases[0].add_(gradients.norm_bias.to(frontend.wide))


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Tensor], wanted: list[bool]
) -> tuple[list[Tensor], ...]:
    """Sums over chunks and rows run in float32 or wider.

    Under group norm the bias of layer 0 has no effect on the output and its gradient is exactly 0.
    """
    frontend = _Frontend(arguments)
    frontend.preactivations = saved
    return _Backward(frontend, arguments.parameters).run(*gradients).like(arguments.parameters)
