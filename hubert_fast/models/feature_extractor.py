"""The convolutional feature extractor: raw audio to a feature every 20 ms. Names and shapes of parameters are torchaudio's."""

from __future__ import annotations

from typing import Any, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_fast.models.checks import usable_lengths
from hubert_fast.models.plain import is_plain
from hubert_fast.ops.conv_frontend import NORMS, conv_frontend
from hubert_fast.ops.host_tensors import to_device
from hubert_fast.reference.conv_frontend import NORM_EPS, channel_norm


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``[batch, channels, time]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(-2, -1)).transpose(-2, -1)


class ChannelNorm(nn.GroupNorm):
    """GroupNorm over the time of each channel of ``[batch, channels, time]``, or over what of it is valid."""

    def forward(
        self,
        x: Tensor,  # [batch, channels, time]
        valid: Optional[Tensor] = None,  # [batch], of the time
    ) -> Tensor:
        if valid is None:
            return super().forward(x)
        valid = to_device(valid, x.device)
        # Over nothing there are no statistics: those of a row of padding are taken over all of it.
        return channel_norm(x, self.weight, self.bias, valid.masked_fill(valid < 1, x.shape[2]))


class ConvLayerBlock(nn.Module):
    """A convolution, its norm where it has one, and GELU.

    `FeatureExtractor` runs all blocks as one operator and calls none, unless somebody hooked or replaced a part of one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        bias: bool,
        layer_norm: Optional[nn.Module],
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride
        self.layer_norm = layer_norm
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride=stride, bias=bias)
        self._padding_invariant = isinstance(layer_norm, ChannelNorm)

    def forward(
        self,
        x: Tensor,  # [batch, in_channels, time]
        length: Optional[Tensor],  # [batch]
    ) -> tuple[Tensor, Optional[Tensor]]:
        """The block's output and what of its time is valid.

        Args:
            x: ``[batch, in_channels, time]`` float.
            length: ``[batch]``: how much of the time of each row is valid. None: not asked.

        Returns:
            ``[batch, out_channels, shorter time]`` and ``[batch]`` in the dtype of ``length``, or None where that is.

        Raises:
            ValueError: where the statistics of the norm are to leave the padding out and another norm stands in its place.
        """
        x = self.conv(x)
        length = None if length is None else output_lengths(length, [(self.kernel_size, self.stride)])
        if self._padding_invariant and length is not None:
            if not isinstance(self.layer_norm, ChannelNorm):
                raise ValueError(
                    "layer_norm must be the ChannelNorm it was built as, or the model be built without padding_invariant: "
                    f"no other norm leaves the padding out; got {type(self.layer_norm).__name__}"
                )
            x = self.layer_norm(x, length)
        elif self.layer_norm is not None:
            x = self.layer_norm(x)
        return F.gelu(x), length


class FeatureExtractor(nn.Module):
    """All layers through the ``conv_frontend`` operator, or one by one where somebody hooked or replaced a part of one.

    Args:
        norm_mode: ``"group_norm"`` or ``"layer_norm"``.
        shapes: (channels, kernel, stride) of each layer.
        bias: whether the convolutions have one.
        padding_invariant: take the group-norm statistics of a row over its valid samples only, so that its features do
            not depend on the padding of its batch (torchaudio takes them over the padding too).
    """

    def __init__(
        self, norm_mode: str, shapes: Sequence[tuple[int, int, int]], bias: bool, *, padding_invariant: bool = False
    ) -> None:
        super().__init__()
        if norm_mode not in NORMS:
            raise ValueError(f"extractor_mode must be one of {NORMS}; got {norm_mode!r}")
        group_norm = ChannelNorm if padding_invariant else nn.GroupNorm
        self._norm_kind: type[nn.Module] = LayerNorm if norm_mode == "layer_norm" else group_norm
        blocks, in_channels = [], 1
        for i, (channels, kernel, stride) in enumerate(shapes):
            norm: Optional[nn.Module] = None
            if norm_mode == "layer_norm":
                norm = LayerNorm(channels)
            elif i == 0:
                norm = group_norm(channels, channels)
            blocks.append(ConvLayerBlock(in_channels, channels, kernel, stride, bias, norm))
            in_channels = channels
        self.conv_layers = nn.ModuleList(blocks)
        self.norm_mode = norm_mode
        self.padding_invariant = padding_invariant

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Frames of ``lengths`` samples, element by element: floor((n - kernel) / stride) + 1 a layer, at least 0."""
        return output_lengths(lengths, [(block.kernel_size, block.stride) for block in self.conv_layers])

    def forward(
        self,
        x: Tensor,  # [batch, samples]
        length: Optional[Tensor],  # [batch], samples
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Features and, where ``length`` is given, the valid frames of each row.

        Args:
            x: ``[batch, samples]`` float, 16 kHz.
            length: ``[batch]`` whole numbers, integer or float: valid samples of each row. None: not asked. More
                than there are count as all, with a warning, the first time.

        Returns:
            ``[batch, frames, channels]`` and ``[batch]`` frames in the dtype of ``length``, or None where that is.

        Raises:
            ValueError: for a wrong rank, dtype or length, an empty batch, or audio shorter than one frame.
        """
        length = usable_lengths(x, length)
        parameters = self._parameters_of_plain_blocks()
        if parameters is None:
            x = x.unsqueeze(1)
            for block in self.conv_layers:
                x, length = block(x, length)
            return x.transpose(1, 2).contiguous(), length
        features = conv_frontend(
            x,
            *parameters,
            strides=[block.stride for block in self.conv_layers],
            norm=self.norm_mode,
            valid_samples=to_device(length.long(), x.device) if self.padding_invariant and length is not None else None,
        )
        return features, None if length is None else self.output_lengths(length)

    def _parameters_of_plain_blocks(self) -> Optional[tuple[list[Tensor], ...]]:
        """Filters, biases, and the norms' weights and biases; None where the blocks are not what the operator computes."""
        weights, biases, norm_weights, norm_biases = [], [], [], []
        for i, block in enumerate(self.conv_layers):
            if not is_plain(block, ConvLayerBlock):
                return None
            conv, norm = _part(block, "conv"), _part(block, "layer_norm")
            if not (_is_plain_conv(conv, block.stride) and self._is_plain_norm(norm, i)):
                return None
            weights.append(_part(conv, "weight"))
            if (bias := _part(conv, "bias")) is not None:
                biases.append(bias)
            if norm is not None:
                norm_weights.append(_part(norm, "weight"))
                norm_biases.append(_part(norm, "bias"))
        return None if len(biases) not in (0, len(weights)) else (weights, biases, norm_weights, norm_biases)

    def _is_plain_norm(self, norm: Optional[nn.Module], i: int) -> bool:
        """Whether ``norm`` is what the operator has after convolution ``i``."""
        if self.norm_mode == "group_norm" and i > 0:
            return norm is None
        if norm is None or not is_plain(norm, self._norm_kind) or norm.eps != NORM_EPS or _part(norm, "bias") is None:
            return False
        return self._norm_kind is LayerNorm or norm.num_groups == norm.num_channels


def _part(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)`` of a module or parameter, in less time: this is on the way of every step."""
    for parts in (module._modules, module._parameters):
        if name in parts:
            return parts[name]
    return getattr(module, name)


def _is_plain_conv(conv: nn.Module, stride: int) -> bool:
    return (
        is_plain(conv, nn.Conv1d)
        and conv.stride == (stride,)
        and conv.padding == (0,)
        and conv.dilation == (1,)
        and conv.groups == 1
    )


def output_lengths(lengths: Tensor, layers: Sequence[tuple[int, int]]) -> Tensor:
    """Frames of ``lengths`` samples after convolutions of these (kernel, stride), element by element."""
    for kernel, stride in layers:
        lengths = torch.div(lengths - kernel, stride, rounding_mode="floor").add(1).clamp(min=0)
    return lengths
