"""Masking for masked prediction: which frames, and what stands in their place."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from hubert_fast.models.checks import check_mask
from hubert_fast.models.plain import is_plain
from hubert_fast.models.rows import Rows
from hubert_fast.ops.host_tensors import to_device
from hubert_fast.ops.span_mask import span_mask

__all__ = ["InputMask", "MaskGenerator", "draw_masks", "span_mask"]


class InputMask(NamedTuple):
    """The masked frames and channels of the transformer's input."""

    frames: Tensor  # bool, [batch, frames] or [rows]: replaced by the mask embedding
    channels: Optional[Tensor]  # [batch, dim] bool: channels of a sequence that are zeroed; None: none

    def to_rows(self, layout: Rows) -> InputMask:
        """The frames' mask as rows, valid ones alone, and both on the device of ``layout``."""
        device = layout.offsets.device
        frames, padding = layout.pack(to_device(self.frames, device)), layout.padding()
        channels = None if self.channels is None else to_device(self.channels, device)
        return InputMask(frames if padding is None else frames & ~padding, channels)


class MaskGenerator(nn.Module):
    """Replaces spans of frames by a learned embedding, and zeroes spans of channels.

    Arguments and parameter names are torchaudio's.
    """

    def __init__(
        self,
        encoder_embed_dim: int,
        mask_prob: float,
        mask_selection: str,
        mask_other: float,
        mask_length: int,
        no_mask_overlap: bool,
        mask_min_space: int,
        mask_channel_prob: float,
        mask_channel_selection: str,
        mask_channel_other: float,
        mask_channel_length: int,
        no_mask_channel_overlap: bool,
        mask_channel_min_space: int,
    ) -> None:
        super().__init__()
        self.mask_prob = mask_prob
        self.mask_selection = mask_selection
        self.mask_other = mask_other
        self.mask_length = mask_length
        self.no_mask_overlap = no_mask_overlap
        self.mask_min_space = mask_min_space
        self.mask_channel_prob = mask_channel_prob
        self.mask_channel_selection = mask_channel_selection
        self.mask_channel_other = mask_channel_other
        self.mask_channel_length = mask_channel_length
        self.no_mask_channel_overlap = no_mask_channel_overlap
        self.mask_channel_min_space = mask_channel_min_space
        self.mask_embedding = nn.Parameter(torch.empty(encoder_embed_dim).uniform_())
        self._channels = encoder_embed_dim  # the embedding may lie on several ranks

    def draw(self, batch: int, frames: int, lengths: Optional[Tensor] = None) -> Tensor:
        """A mask with this generator's settings: bool ``[batch, frames]`` on the CPU, from torch's default generator.

        ``lengths`` (``[batch]``, frames) keeps the padding unmasked. No frame is masked where ``mask_prob`` is 0.
        """
        if self.mask_prob <= 0:
            return torch.zeros(batch, frames, dtype=torch.bool)
        return span_mask(
            (batch, frames),
            lengths,
            mask_prob=self.mask_prob,
            mask_length=self.mask_length,
            mask_selection=self.mask_selection,
            mask_other=self.mask_other,
            min_masks=2,
            no_overlap=self.no_mask_overlap,
            min_space=self.mask_min_space,
        )

    def draw_channels(self, batch: int) -> Optional[Tensor]:
        """A mask of channels with this generator's settings: bool ``[batch, channels]`` on the CPU, None where there is none."""
        if self.mask_channel_prob <= 0:
            return None
        return span_mask(
            (batch, self._channels),
            mask_prob=self.mask_channel_prob,
            mask_length=self.mask_channel_length,
            mask_selection=self.mask_channel_selection,
            mask_other=self.mask_channel_other,
            no_overlap=self.no_mask_channel_overlap,
            min_space=self.mask_channel_min_space,
        )

    def forward(
        self,
        x: Tensor,  # [batch, frames, channels]
        padding_mask: Optional[Tensor] = None,  # [batch, frames] bool, True is padding
        *,
        mask: Optional[Tensor] = None,  # [batch, frames] bool
    ) -> tuple[Tensor, Optional[Tensor]]:
        """``x`` with the masked frames replaced and the masked channels zeroed, and the mask of frames.

        ``mask`` is one made ahead by `draw`; without it one is drawn here, or None is returned for it where ``mask_prob`` is 0.
        ``x`` is not changed.
        """
        batch, frames, _ = x.shape
        if mask is None and self.mask_prob > 0:
            lengths = None if padding_mask is None else (~padding_mask).sum(1)
            mask = self.draw(batch, frames, lengths)
        if mask is not None:
            mask = to_device(mask, x.device)
            x = torch.where(mask[:, :, None], self.mask_embedding.to(x.dtype), x)
        channel_mask = self.draw_channels(batch)
        if channel_mask is not None:
            x = x.masked_fill(to_device(channel_mask, x.device)[:, None], 0.0)
        return x, mask


def draw_masks(
    generator: MaskGenerator,
    batch: int,
    frames: int,
    lengths: Optional[Tensor] = None,  # [batch], frames
    mask: Optional[Tensor] = None,  # [batch, frames] bool
) -> tuple[Tensor, Optional[Tensor]]:
    """The mask of frames, ``mask`` or one drawn here, and that of channels, None where a generator is called that draws it.

    Raises:
        ValueError: for a mask of another shape or dtype.
    """
    if mask is not None:
        check_mask(mask, batch, frames)
    else:
        if lengths is not None and not torch.compiler.is_compiling():
            lengths = lengths.cpu()  # the draw needs them
        mask = generator.draw(batch, frames, lengths)
    return mask, generator.draw_channels(batch) if is_plain(generator, MaskGenerator) else None
