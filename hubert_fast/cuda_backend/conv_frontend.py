"""The convolutional front end on a GPU: each later layer is one 2-D problem over the whole batch.

Layout. Layer ``l`` lies in a buffer ``[batch * rows[l], channels]`` with ``rows[l - 1] == 2 * rows[l]``, so that output row
``g`` of the buffer, whatever its sequence, reads input rows ``2 g, 2 g + 1`` (and ``2 g + 2``): an operand whose rows are
``2 * channels`` apart and ``kernel * channels`` long. The rows past the last frame of a sequence are dead: what they hold is
finite and their gradients are zero. As ``rows[l] > frames[l]`` there is a dead row between two sequences, so a data
gradient that looks one row back finds zeros; one more row stands before the first sequence, and one after the last.

- Layer 0, its norm and GELU are one pass over the waveform, forward and backward (``csrc/cuda/first_layer.h``).
- In 16 bits the products are CUTLASS kernels with GELU or its derivative in their epilogues (``csrc/cuda/gemm.h``): one set
  for Hopper, one for every other GPU. In float32 (so that torch's TF32 setting holds), and where a build has none for the
  GPU, they are ``torch.mm`` between passes of ours (``csrc/cuda/activations.h``); there, kernel 3 in 16 bits costs a copy of
  the windows, 1.5 times the input.

What is kept for the backward: the waveform, layer 0's statistics (kilobytes), and layers 1.. before norm and GELU in the
compute dtype. The activations that weight gradients need are made again: those of layer 0 by its backward pass, in place of
the gradient it reads, and those of later layers by the pass or epilogue that takes their derivative, so what recomputing
costs is one write of them. Nothing synchronises with the host, and there are no atomics: results repeat to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from hubert_fast import extension
from hubert_fast.cuda_backend import device
from hubert_fast.reference.conv_frontend import NORM_EPS
from hubert_fast.torch_backend.conv_frontend import Gradients

if TYPE_CHECKING:
    from hubert_fast.ops.conv_frontend import Arguments

_MAX_TAPS = 16
_MAX_CHANNELS = 1024
# Rows that one block of a reduction over rows sums up: few enough to fill the GPU, many enough that partial sums are small.
_PART_ROWS = (16, 512)
_BLOCKS = 512


def objection(arguments: Arguments) -> Optional[str]:
    """Why this backend, which is there, cannot take these inputs, or None where it can."""
    reason = device.objection("waveforms", arguments.waveforms)
    if reason is not None:
        return reason
    if arguments.dtype not in device.DTYPES:
        return f"it computes in {', '.join(map(str, device.DTYPES))}, not {arguments.dtype}"
    return layers_objection(arguments.weights, arguments.strides)


def layers_objection(weights: Sequence[Tensor], strides: Sequence[int]) -> Optional[str]:
    """Why it cannot take these layers, whatever the input."""
    kernels = [weight.shape[2] for weight in weights]
    if weights[0].shape[1] != 1 or kernels[0] > _MAX_TAPS or strides[0] > _MAX_TAPS:
        return (
            f"its layer 0 has one input channel and a kernel and a stride of at most {_MAX_TAPS}; this one has "
            f"{weights[0].shape[1]}, {kernels[0]} and {strides[0]}"
        )
    for layer, (kernel, stride) in enumerate(zip(kernels[1:], strides[1:]), start=1):
        if stride != 2 or kernel not in (2, 3):
            return f"its later layers have stride 2 and kernel 2 or 3; layer {layer} has {stride} and {kernel}"
    channels = [weight.shape[0] for weight in weights]
    if len(set(channels)) > 1 or channels[0] % 64 or channels[0] > _MAX_CHANNELS:
        return (
            f"it needs the same number of channels in every layer, a multiple of 64 and at most {_MAX_CHANNELS}; "
            f"the layers have {channels}"
        )
    return None


def rows_of_layers(frames: Sequence[int]) -> list[int]:
    """Rows of a sequence in each layer's buffer: twice those of the next layer, more than its frames (layer 0: no fewer)."""
    last = len(frames) - 1
    smallest = 1
    for layer, count in enumerate(frames):
        needed = count + (1 if layer > 0 else 0)
        smallest = max(smallest, -(-needed // 2 ** (last - layer)))
    return [smallest * 2 ** (last - layer) for layer in range(last + 1)]


def saved_tensors(arguments: Arguments) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Layer 0's statistics and filters, and the later layers' buffers before norm and GELU."""
    batch, (channels, _, taps), dtype = arguments.waveforms.shape[0], arguments.weights[0].shape, arguments.dtype
    if arguments.layer_norm:
        sets, statistics = 1, (taps * taps + 2 * taps + 2,)
    else:
        sets, statistics = batch, (batch, taps + taps * taps + 1)
    wide = torch.promote_types(dtype, torch.float32)
    saved = [(statistics, torch.float64), ((sets, taps + 1, channels), wide)]
    return saved + [((batch * count, channels), dtype) for count in rows_of_layers(arguments.frames)[1:]]


class _Frontend:
    """Sizes, parameters in the layouts that the kernels want, and the calls that forward and backward share."""

    def __init__(self, arguments: Arguments, kernels: ModuleType) -> None:
        waveforms, weights, biases, norm_weights, norm_biases, strides, _, valid_samples, dtype = arguments
        self.lib = kernels
        self.dtype = dtype
        self.number = device.NUMBERS[dtype]
        self.wide = torch.promote_types(dtype, torch.float32)
        self.device = waveforms.device
        self.layer_norm = arguments.layer_norm
        self.weights = weights
        self.taps = [weight.shape[2] for weight in weights]
        self.channels = weights[0].shape[0]
        self.batch = waveforms.shape[0]
        self.frames = arguments.frames
        self.rows = rows_of_layers(self.frames)
        self.last = len(weights) - 1
        self.stream = device.stream_of(kernels, self.device)
        self.fused = kernels.tensor_core_products_available(self.number)

        def parameter(tensor: Tensor) -> Tensor:
            return device.aligned(tensor.to(self.wide).contiguous())

        self.waveforms = parameter(waveforms)
        self.first_weight = parameter(weights[0].flatten(1))  # [channels, taps]
        self.biases = [parameter(bias) for bias in biases]
        self.norm_weights = [parameter(weight) for weight in norm_weights]
        self.norm_biases = [parameter(bias) for bias in norm_biases]
        self.valid_samples = None
        if valid_samples is not None and not self.layer_norm:
            self.valid_samples = valid_samples.to(device=self.device, dtype=torch.int64).contiguous()
        self.first = kernels.FirstLayer(
            signal=self.waveforms,
            signal_stride=self.waveforms.stride(0),
            batch=self.batch,
            frames=self.frames[0],
            kernel=self.taps[0],
            stride=strides[0],
            channels=self.channels,
        )
        self.narrow = self._narrow_weights()

    def empty(self, *shape: int, dtype: Optional[torch.dtype] = None) -> Tensor:
        return torch.empty(shape, dtype=self.dtype if dtype is None else dtype, device=self.device)

    def _narrow_weights(self) -> dict[int, tuple[list[int], Tensor]]:
        """The later layers by their number of taps, and their filters in the compute dtype, [layers, out, in, taps].

        They lie together, so that one launch narrows them all and one lays out those of as many taps.
        """
        layers: dict[int, list[int]] = {}
        for layer, weight in enumerate(self.weights[1:], start=1):
            layers.setdefault(weight.shape[2], []).append(layer)
        stacks = {
            kernel: (those, self.empty(len(those), self.channels, self.channels, kernel))
            for kernel, those in layers.items()
        }
        ours = [each for _, stack in stacks.values() for each in stack]
        theirs = [self.weights[layer].detach() for those, _ in stacks.values() for layer in those]
        if ours:
            torch._foreach_copy_(ours, theirs)
        return stacks

    def window_weights(self) -> dict[int, Tensor]:
        """Filters of each later layer in the order of a window: [out, taps * in]."""
        found: dict[int, Tensor] = {}
        for those, stack in self.narrow.values():
            found.update(zip(those, stack.transpose(2, 3).flatten(2)))
        return found

    def gradient_weights(self) -> dict[int, list[Tensor]]:
        """Matrices of each later layer's data gradient (`input_gradient`), [depth, columns] of a product each."""
        found: dict[int, list[Tensor]] = {}
        for kernel, (those, stack) in self.narrow.items():
            taps = stack.unbind(3)  # each [layers, out, in]
            if kernel == 2:
                matrices = [torch.stack(taps, dim=2).flatten(2)]
            else:
                matrices = [torch.cat([taps[2], taps[0]], dim=1), taps[1].contiguous()]
            found.update((layer, [each[i] for each in matrices]) for i, layer in enumerate(those))
        return found

    def buffer(self, layer: int) -> Tensor:
        """Room for a layer's activations: its rows, and one more, which the last window of kernel 3, a dead one, reads."""
        return self.empty(self.batch * self.rows[layer] + 1, self.channels)

    def layout(self, layer: int) -> Any:
        return self.lib.Rows(batch=self.batch, rows=self.rows[layer], frames=self.frames[layer], channels=self.channels)

    def norm(self, layer: int) -> Any:
        """The norm before a later layer's GELU, as the kernels take it."""
        weight, bias = (self.norm_weights[layer], self.norm_biases[layer]) if self.layer_norm else (None, None)
        return self.lib.Norm(weight=weight, bias=bias, epsilon=NORM_EPS)

    def sum_parts(self, partial: Tensor, out_dtype: torch.dtype, *, taps: int = 1) -> Tensor:
        """Sums over dimension 1 of ``partial`` [outer, parts, ..., taps * channels], whose taps come last in the result."""
        out = self.empty(partial.shape[0], *partial.shape[2:], dtype=out_dtype)
        sizes = {"outer": partial.shape[0], "parts": partial.shape[1], "columns": out[0].numel()}
        sizes |= {"taps": taps, "channels": partial.shape[-1] // taps}
        double = out_dtype == torch.float64
        self.lib.sum_parts(**sizes, partial=partial, out=out, out_is_double=double, stream=self.stream)
        return out

    def part_rows(self, rows: int) -> int:
        fewest, most = _PART_ROWS
        return min(max(-(-rows // _BLOCKS), fewest), most)

    # Layer 0

    def first_statistics(self) -> tuple[Tensor, Tensor]:
        """What the passes over layer 0 need besides the waveform (``csrc/cuda/first_layer.h``)."""
        taps = self.taps[0]
        if self.layer_norm:
            statistics = self.empty(taps * taps + 2 * taps + 2, dtype=torch.float64)
            filters = self.empty(1, taps + 1, self.channels, dtype=self.wide)
            self.lib.first_layer_layer_norm(
                self.first,
                weight=self.first_weight,
                bias=self.biases[0] if self.biases else None,
                norm_weight=self.norm_weights[0],
                statistics=statistics,
                filters=filters,
                stream=self.stream,
            )
            return statistics, filters
        parts = -(-self.frames[0] // self.lib.MOMENT_FRAMES)
        partial = self.empty(self.batch, parts, taps + taps * (taps + 1) // 2, dtype=torch.float64)
        statistics = self.empty(self.batch, taps + taps * taps + 1, dtype=torch.float64)
        filters = self.empty(self.batch, taps + 1, self.channels, dtype=self.wide)
        shared = {"valid_samples": self.valid_samples, "partial": partial, "stream": self.stream}
        self.lib.first_layer_moments(self.first, **shared)
        self.lib.first_layer_group_norm(
            self.first,
            weight=self.first_weight,
            norm_weight=self.norm_weights[0],
            norm_bias=self.norm_biases[0],
            epsilon=NORM_EPS,
            statistics=statistics,
            filters=filters,
            **shared,
        )
        return statistics, filters

    def first_forward(self, statistics: Tensor, filters: Tensor, out: Tensor, rows: int) -> None:
        settings = {"activations": out, "rows": rows, "dtype": self.number, "stream": self.stream}
        settings |= {"statistics": statistics, "filters": filters}
        if self.layer_norm:
            norm = {"norm_bias": self.norm_biases[0], "epsilon": NORM_EPS}
            self.lib.first_layer_layer_norm_forward(self.first, **norm, **settings)
        else:
            self.lib.first_layer_group_norm_forward(self.first, **settings)

    # Later layers

    def product(self, input: Tensor, input_stride: int, weight: Tensor, rows: int) -> Any:
        sizes = {"rows": rows, "columns": weight.shape[0], "depth": weight.shape[1]}
        return self.lib.Product(input=input, input_stride=input_stride, weight=weight, **sizes)

    def windows(self, buffer: Tensor, layer: int, taps: slice) -> Tensor:
        """Taps of the windows of all rows of ``layer`` over the buffer of the layer below: [rows, taps * channels]."""
        width = (taps.stop - taps.start) * self.channels
        shape = self.batch * self.rows[layer], width
        return buffer.as_strided(shape, (2 * self.channels, 1), buffer.storage_offset() + taps.start * self.channels)

    def convolve(self, layer: int, below: Tensor, weight: Tensor, out: Tensor) -> None:
        """The convolution of ``layer`` by ``torch.mm``, into ``out`` [batch * rows, channels]."""
        taps = self.taps[layer]
        # In 16 bits a sum of two products would round twice; mm copies the overlapping windows instead.
        cuts = [0, 2, taps] if taps > 2 and self.dtype == self.wide else [0, taps]
        for start, stop in zip(cuts, cuts[1:]):
            operand = self.windows(below, layer, slice(start, stop))
            columns = weight[:, start * self.channels : stop * self.channels].T
            if start > 0:
                out.addmm_(operand, columns)
            elif self.biases:
                torch.addmm(self.biases[layer].to(self.dtype), operand, columns, out=out)
            else:
                torch.mm(operand, columns, out=out)

    def input_gradient(
        self,
        layer: int,
        upstream: Tensor,
        matrices: Sequence[Tensor],
        out: Tensor,
        epilogue: Optional[dict[str, Tensor]],
    ) -> None:
        """The data gradient of ``layer`` into ``out`` [batch * rows below, channels].

        ``upstream`` has a row of zeros before its rows. Even rows get ``dy[g] W0 + dy[g - 1] W2``, odd ones ``dy[g] W1``;
        kernel 2 has no W2, and both are one product. ``matrices`` are those of `gradient_weights`. With ``epilogue`` (z and
        activation of the layer below, as ``out``), the fused kernel multiplies by GELU'(z) and writes GELU(z).
        """
        channels, rows = self.channels, self.batch * self.rows[layer]
        firsts = [(0, 1)] if self.taps[layer] == 2 else [(0, 0), (1, 1)]  # row of `out`, and of the upstream buffer
        for (first_row, first_upstream), matrix in zip(firsts, matrices):
            depth, columns = matrix.shape
            if not self.fused:
                target = out.as_strided((rows, columns), (2 * channels, 1), out.storage_offset() + first_row * channels)
                self._multiply(upstream[first_upstream:], matrix, target)
                continue
            weight = (matrix.T if epilogue is None else matrix).contiguous()  # as either product takes it
            sizes = {"rows": rows, "columns": columns, "depth": depth}
            operands = self.lib.Product(input=upstream[first_upstream:], input_stride=channels, weight=weight, **sizes)
            settings = {"out": out[first_row:], "out_stride": 2 * channels, "dtype": self.number, "stream": self.stream}
            if epilogue is None:
                self.lib.product(operands, bias=None, **settings)
            else:
                below = {name: each[first_row:] for name, each in epilogue.items()}
                self.lib.product_gelu_gradient(operands, **below, **settings)

    def _multiply(self, upstream: Tensor, matrix: Tensor, target: Tensor) -> None:
        """``target`` = rows of one or two consecutive rows of ``upstream`` times ``matrix``."""
        rows, depth = len(target), len(matrix)
        if depth > self.channels and self.dtype == self.wide:
            torch.mm(upstream[:rows], matrix[: self.channels], out=target)
            target.addmm_(upstream[1 : rows + 1], matrix[self.channels :])
        else:
            operand = upstream.as_strided((rows, depth), (self.channels, 1), upstream.storage_offset())
            torch.mm(operand, matrix, out=target)

    def weight_gradient(self, layer: int, upstream: Tensor, below: Tensor) -> Tensor:
        """Of the filters of ``layer`` [out, in, taps], from its gradient [rows, out] and the activations below."""
        taps, channels, rows = self.taps[layer], self.channels, len(upstream)
        if self.fused:
            part_rows = self._weight_part_rows(rows, taps * channels)
            partial = self.empty(1, -(-rows // part_rows), channels, taps * channels, dtype=self.wide)
            self.lib.weight_gradient(
                gradient=upstream,
                input=below,
                input_stride=2 * channels,
                partial=partial,
                rows=rows,
                part_rows=part_rows,
                channels=channels,
                depth=taps * channels,
                dtype=self.number,
                stream=self.stream,
            )
            return self.sum_parts(partial, self.wide, taps=taps)[0].view(channels, channels, taps)
        cuts = [0, 2, taps] if taps > 2 else [0, taps]
        products = [
            torch.mm(upstream.T, self.windows(below, layer, slice(start, stop))) for start, stop in zip(cuts, cuts[1:])
        ]
        total = torch.cat(products, dim=1) if len(products) > 1 else products[0]
        return total.view(channels, taps, channels).permute(0, 2, 1).contiguous()

    def _weight_part_rows(self, rows: int, depth: int) -> int:
        """Rows of a part of the weight gradient: enough parts that the last wave of tiles is full, few enough that adding
        them up costs little. Rows that do not divide evenly are one short part more, in a launch of its own; so parts are
        rounded down, never up. The rates are those of an H100; they only need to be roughly right. A multiprocessor works
        on 128 x 256 values at a time, in one tile (sm_90a) or two (sm_80).
        """
        processors = 132
        if self.device.type == "cuda":
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        tiles = -(-self.channels // 128) * -(-depth // 256)

        def seconds(parts: int) -> float:
            waves = -(-tiles * parts // processors) * processors / (tiles * parts)
            uneven = 1 if rows % parts else 0
            adding = (parts + uneven) * self.channels * depth * 8 / 2.5e12
            return 2 * rows * self.channels * depth * waves / 650e12 + adding + uneven * 4e-6

        return rows // min(range(1, min(max(rows // 256, 1), 32) + 1), key=seconds)

    def column_sums(self, x: Tensor) -> Tensor:
        part_rows = self.part_rows(len(x))
        partial = self.empty(1, -(-len(x) // part_rows), self.channels, dtype=self.wide)
        settings = {"part_rows": part_rows, "dtype": self.number, "stream": self.stream}
        self.lib.column_sums(x=x, total_rows=len(x), channels=self.channels, partial=partial, **settings)
        return self.sum_parts(partial, self.wide)[0]


def forward(
    arguments: Arguments, save: bool, *, kernels: Optional[ModuleType] = None
) -> tuple[tuple[Tensor], list[Tensor]]:
    """The arguments must be such that `objection` has none. ``kernels`` stands in for ``hubert_fast._C.cuda`` in tests."""
    with torch.cuda.device_of(arguments.waveforms):
        features, saved = _forward(_Frontend(arguments, kernels or extension.cuda()), save)
    return (features,), saved


def _forward(frontend: _Frontend, save: bool) -> tuple[Tensor, list[Tensor]]:
    lib, last, channels = frontend.lib, frontend.last, frontend.channels
    statistics, filters = frontend.first_statistics()
    features = frontend.empty(frontend.batch, frontend.frames[last], channels)
    if last == 0:
        frontend.first_forward(statistics, filters, features, frontend.frames[0])
        return features, [statistics, filters] if save else []
    below, weights = frontend.buffer(0), frontend.window_weights()
    frontend.first_forward(statistics, filters, below, frontend.rows[0])
    saved = [statistics, filters]
    for layer in range(1, last + 1):
        fuse_gelu = frontend.fused and not frontend.layer_norm and layer < last
        z = frontend.empty(frontend.batch * frontend.rows[layer], channels) if save or not fuse_gelu else None
        above = frontend.buffer(layer) if layer < last else features
        settings = {"dtype": frontend.number, "stream": frontend.stream}
        if frontend.fused:
            bias = frontend.biases[layer] if frontend.biases else None
            operands = frontend.product(below, 2 * channels, weights[layer], frontend.batch * frontend.rows[layer])
        if fuse_gelu:
            lib.product_gelu(operands, bias=bias, z=z, activation=above, **settings)
            lib.clear_dead_rows(frontend.layout(layer), z=z, activation=above, **settings)
        else:
            if frontend.fused:
                lib.product(operands, bias=bias, out=z, out_stride=channels, **settings)
            else:
                frontend.convolve(layer, below, weights[layer], z)
            out_rows = frontend.rows[layer] if layer < last else frontend.frames[last]
            norm = frontend.norm(layer)
            lib.activation_forward(frontend.layout(layer), norm, z=z, out=above, out_rows=out_rows, **settings)
        if save:
            saved.append(z)
        below = above
    return features, saved if save else []


def backward(
    arguments: Arguments,
    saved: list[Tensor],
    gradients: tuple[Tensor],
    wanted: list[bool],
    *,
    kernels: Optional[ModuleType] = None,
) -> tuple[list[Tensor], ...]:
    """Under group norm the bias of layer 0 has no effect on the output and its gradient is exactly 0."""
    (grad,) = gradients
    with torch.cuda.device_of(arguments.waveforms):
        frontend = _Frontend(arguments, kernels or extension.cuda())
        sums = _Backward(frontend, saved).run(device.aligned(grad.to(arguments.dtype).contiguous()))
    return tuple([total.to(p.dtype) for total, p in zip(*group)] for group in zip(sums, arguments.parameters))


class _Regions:
    """Memory of the backward: of each layer's activations and its gradient before GELU, with rows of zeros at their ends.

    A layer reads its gradient and makes activations and gradient of the layer below. So the gradients of even and those of
    odd layers have a region each, at whose beginning they lie, after a row of zeros, which the first window of the data
    gradient reads. Activations lie at the end of the region of the gradient above, before a row of zeros, which the last
    window of kernel 3 reads; those of layer 0 fill the other one. In all that is as much as layers 0 and 1 need in any case.
    """

    def __init__(self, frontend: _Frontend) -> None:
        self._sizes = [frontend.batch * rows for rows in frontend.rows]
        self._starts = 0, self._sizes[0] + 1  # of the regions of even and of odd layers
        self._ends = self._sizes[0] + 1, self._sizes[0] + self._sizes[1] + 2
        self._memory = frontend.empty(self._ends[1] + 1, frontend.channels)
        torch._foreach_zero_([self._memory[row] for row in (0, *self._ends)])

    def gradient(self, layer: int) -> Tensor:
        """A row of zeros and the rows of a layer's gradient, of a layer after the first."""
        start = self._starts[layer % 2]
        return self._memory[start : start + 1 + self._sizes[layer]]

    def activations(self, layer: int) -> Tensor:
        """The rows of a layer's activations and a row of zeros."""
        end = self._ends[(layer + 1) % 2 if layer > 0 else 0]
        return self._memory[end - self._sizes[layer] : end + 1]


class _Backward:
    """Walks the layers from the last to the first and fills in every parameter's gradient."""

    def __init__(self, frontend: _Frontend, saved: Sequence[Tensor]) -> None:
        self.frontend = frontend
        self.statistics, self.filters, *self.preactivations = saved
        groups = frontend.weights, frontend.biases, frontend.norm_weights, frontend.norm_biases
        self.gradients = Gradients(*([frontend.empty(0)] * len(group) for group in groups))
        self.norm_sums: list[tuple[int, Tensor]] = []  # of layers, [3, channels] each

    def run(self, grad: Tensor) -> Gradients:
        frontend = self.frontend
        last = frontend.last
        if last == 0:
            self._first_layer(grad.clone(), frontend.frames[0])
        else:
            self.regions, self.matrices = _Regions(frontend), frontend.gradient_weights()
            upstream = self.regions.gradient(last)
            self._through_activation(last, grad, frontend.frames[last], upstream[1:], None)
            for layer in range(last, 0, -1):
                upstream = self._layer(layer, upstream)
            self._take_norm_sums()
        return self.gradients

    def _layer(self, layer: int, upstream: Tensor) -> Tensor:
        """From the gradient of a layer's convolution to that of the layer below; its own parameters on the way."""
        frontend, matrices = self.frontend, self.matrices[layer]
        activation = self.regions.activations(layer - 1)
        if layer == 1:
            # The gradient takes the place that its activations will have.
            frontend.input_gradient(layer, upstream, matrices, activation[:-1], None)
            self._first_layer(activation, frontend.rows[0])
            below = upstream
        else:
            below = self.regions.gradient(layer - 1)
            if frontend.fused and not frontend.layer_norm:
                epilogue = {"z": self.preactivations[layer - 2], "activation": activation}
                frontend.input_gradient(layer, upstream, matrices, below[1:], epilogue)
            else:
                frontend.input_gradient(layer, upstream, matrices, below[1:], None)
                self._through_activation(layer - 1, below[1:], frontend.rows[layer - 1], below[1:], activation)
        self.gradients.weights[layer] = frontend.weight_gradient(layer, upstream[1:], activation)
        if frontend.biases and not frontend.layer_norm:
            self.gradients.biases[layer] = frontend.column_sums(upstream[1:])
        return below

    def _through_activation(
        self, layer: int, grad: Tensor, grad_rows: int, out: Tensor, activation: Optional[Tensor]
    ) -> None:
        """Through GELU (and the norm before it) of a later layer, from ``grad`` to ``out``; GELU itself to ``activation``."""
        frontend = self.frontend
        settings = {
            "grad": grad,
            "grad_rows": grad_rows,
            "z": self.preactivations[layer - 1],
            "out": out,
            "activation": activation,
            "dtype": frontend.number,
            "stream": frontend.stream,
        }
        layout = frontend.layout(layer)
        if not frontend.layer_norm:
            frontend.lib.gelu_backward(layout, **settings)
            return
        part_rows = frontend.part_rows(len(out))
        partial = frontend.empty(1, -(-len(out) // part_rows), 3, frontend.channels, dtype=frontend.wide)
        frontend.lib.layer_norm_backward(layout, frontend.norm(layer), partial=partial, part_rows=part_rows, **settings)
        self.norm_sums.append((layer, frontend.sum_parts(partial, frontend.wide)[0]))

    def _take_norm_sums(self) -> None:
        """Copy the sums to tensors of their own, since outputs of a custom operator may not share memory."""
        groups = [self.gradients.norm_weights, self.gradients.norm_biases]
        groups += [self.gradients.biases] if self.frontend.biases else []
        own, sums = [], []
        for layer, found in self.norm_sums:
            for group, each in zip(groups, found):
                group[layer] = torch.empty_like(each)
                own.append(group[layer])
                sums.append(each)
        if own:
            torch._foreach_copy_(own, sums)

    def _first_layer(self, gradients: Tensor, rows: int) -> None:
        """Layer 0's parameter gradients from that of its activations, which the activations then replace."""
        frontend = self.frontend
        channels, taps, lib = frontend.channels, frontend.taps[0], frontend.lib
        weight_grad = frontend.empty(channels, taps, dtype=frontend.wide)
        norm_grads = [frontend.empty(channels, dtype=frontend.wide) for _ in range(2)]
        bias_grad = torch.zeros(channels, dtype=frontend.wide, device=frontend.device) if frontend.biases else None
        shared = {"statistics": self.statistics, "stream": frontend.stream}
        passed = {"filters": self.filters, "gradients": gradients, "rows": rows, "dtype": frontend.number}
        finished = {
            "weight": frontend.first_weight,
            "norm_weight": frontend.norm_weights[0],
            "weight_grad": weight_grad,
            "norm_weight_grad": norm_grads[0],
            "norm_bias_grad": norm_grads[1],
        }
        if frontend.layer_norm:
            parts = frontend.batch * -(-frontend.frames[0] // lib.LAYER_NORM_BACKWARD_FRAMES)
            partial = frontend.empty(1, parts, taps + 2, channels, dtype=frontend.wide)
            frame_partial = frontend.empty(1, parts, 2 * taps + 2 + taps * (taps + 1) // 2, dtype=frontend.wide)
            lib.first_layer_layer_norm_backward(
                frontend.first,
                norm_weight=frontend.norm_weights[0],
                norm_bias=frontend.norm_biases[0],
                epsilon=NORM_EPS,
                partial=partial,
                frame_partial=frame_partial,
                **passed,
                **shared,
            )
            lib.first_layer_layer_norm_finish(
                frontend.first,
                sums=frontend.sum_parts(partial, torch.float64),
                frame_sums=frontend.sum_parts(frame_partial, torch.float64),
                bias=frontend.biases[0] if frontend.biases else None,
                bias_grad=bias_grad,
                **finished,
                **shared,
            )
        else:
            parts = -(-frontend.frames[0] // lib.GROUP_NORM_BACKWARD_FRAMES)
            partial = frontend.empty(frontend.batch, parts, taps + 1, channels, dtype=frontend.wide)
            lib.first_layer_group_norm_backward(frontend.first, partial=partial, **passed, **shared)
            sums = frontend.sum_parts(partial, torch.float64)
            lib.first_layer_group_norm_finish(frontend.first, sums=sums, epsilon=NORM_EPS, **finished, **shared)
        self.gradients.weights[0] = weight_grad.unsqueeze(1)
        self.gradients.norm_weights[0], self.gradients.norm_biases[0] = norm_grads[0], norm_grads[1]
        if bias_grad is not None:
            self.gradients.biases[0] = bias_grad
