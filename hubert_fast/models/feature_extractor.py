"""The convolutional feature extractor: raw audio to a feature every 20 ms. Names and shapes of parameters are torchaudio's."""

from __future__ import annotations

from typing import Optional, Sequence

import torch
from torch import Tensor, nn

from hubert_fast.ops.conv_frontend import NORMS, conv_frontend
from hubert_fast.ops.host_tensors import to_device


class ConvLayerBlock(nn.Module):
    """The parameters of one layer: a convolution and, where it has one, its norm. `FeatureExtractor` runs them."""

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


class FeatureExtractor(nn.Module):
    """All layers through the ``conv_frontend`` operator.

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
        blocks, in_channels = [], 1
        for i, (channels, kernel, stride) in enumerate(shapes):
            norm: Optional[nn.Module] = None
            if norm_mode == "layer_norm":
                norm = nn.LayerNorm(channels)
            elif i == 0:
                norm = nn.GroupNorm(channels, channels)
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
        """Features ``[batch, frames, channels]`` and, where ``length`` is given, the valid frames of each row."""
        blocks = list(self.conv_layers)
        norms = [block.layer_norm for block in blocks if block.layer_norm is not None]
        features = conv_frontend(
            x,
            [block.conv.weight for block in blocks],
            [block.conv.bias for block in blocks if block.conv.bias is not None],
            [norm.weight for norm in norms],
            [norm.bias for norm in norms],
            strides=[block.stride for block in blocks],
            norm=self.norm_mode,
            valid_samples=to_device(length, x.device) if self.padding_invariant and length is not None else None,
        )
        return features, None if length is None else self.output_lengths(length)


def output_lengths(lengths: Tensor, layers: Sequence[tuple[int, int]]) -> Tensor:
    """Frames of ``lengths`` samples after convolutions of these (kernel, stride), element by element."""
    for kernel, stride in layers:
        lengths = torch.div(lengths - kernel, stride, rounding_mode="floor").add(1).clamp(min=0)
    return lengths
