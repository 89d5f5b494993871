"""The positional convolution. Names and shapes of parameters are torchaudio's."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from hubert_fast import cpu
from hubert_fast.exporters import is_exporting
from hubert_fast.models.plain import is_plain
from hubert_fast.models.rows import Rows
from hubert_fast.ops.arguments import autocast_dtype
from hubert_fast.ops.positional_conv import positional_conv


class ConvolutionalPositionalEmbedding(nn.Module):
    """A grouped convolution over time whose output says where a frame stands (wav2vec 2.0, section 2).

    ``[batch, frames, channels] -> [batch, frames, channels]``
    """

    def __init__(self, embed_dim: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.kernel_size = kernel_size
        self.num_remove = 1 - kernel_size % 2  # frames that the convolution gives more than it is given
        conv = nn.Conv1d(embed_dim, embed_dim, kernel_size, padding=kernel_size // 2, groups=groups)
        self.conv = parametrizations.weight_norm(conv, name="weight", dim=2)

    def __prepare_scriptable__(self) -> ConvolutionalPositionalEmbedding:
        """This module with its weight as it is, no longer computed of gain and direction: as quantisation asks for it."""
        if parametrize.is_parametrized(self.conv, "weight"):
            parametrize.remove_parametrizations(self.conv, "weight")
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self._convolved(x.transpose(1, 2))[:, :, : x.shape[1]]
        return F.gelu(x).transpose(1, 2)

    def _convolved(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x.device) or x.dtype
        wide = cpu.convolution_dtype(x.device, dtype, self.embed_dim // self.conv.groups)
        if wide == dtype or not torch.is_autocast_enabled(x.device.type):
            return self.conv(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.conv(x.to(wide)).to(dtype)

    def add_to(self, x: Tensor, layout: Rows) -> Tensor:
        """Rows plus their positional embedding: ``[rows, channels] -> [rows, channels]``."""
        if is_exporting() or not (is_plain(self, ConvolutionalPositionalEmbedding) and _is_plain_conv(self.conv)):
            return x + layout.pack(self(layout.unpack(x)))
        weight, gain = _filters(self.conv)
        return positional_conv(
            x, weight, self.conv.bias, layout.offsets, groups=self.conv.groups, max_frames=layout.frames, gain=gain
        )


def _is_plain_conv(conv: nn.Module) -> bool:
    """Whether ``conv`` is a convolution as `ConvolutionalPositionalEmbedding` makes it, parametrized or not."""
    kind = type(conv).__base__ if parametrize.is_parametrized(conv) else type(conv)
    return (
        kind is nn.Conv1d
        and is_plain(conv, type(conv))
        and conv.bias is not None
        and (conv.stride, conv.dilation, conv.padding_mode) == ((1,), (1,), "zeros")
        and conv.padding == (conv.kernel_size[0] // 2,)
    )


def _filters(conv: nn.Conv1d) -> tuple[Tensor, Optional[Tensor]]:
    """The filters and, where they are weight-normalised over dim 2, the gain: asking for ``conv.weight`` would compute them."""
    if parametrize.is_parametrized(conv, "weight"):
        steps = conv.parametrizations.weight
        if len(steps) == 1 and type(steps[0]) is parametrizations._WeightNorm and steps[0].dim == 2:
            return steps.original1, steps.original0
    return conv.weight, None
