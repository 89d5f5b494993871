"""HuBERT for pre-training (Hsu et al. 2021), with the interface of torchaudio's ``HuBERTPretrainModel``."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from hubert_fast.models.checks import check_audio, check_labels, check_mask, check_values
from hubert_fast.models.logits import LogitGenerator
from hubert_fast.models.masking import MaskGenerator
from hubert_fast.models.rows import Rows, to_device, valid_rows
from hubert_fast.models.wav2vec2 import Wav2Vec2Model


class Encoded(NamedTuple):
    """The transformer's output on some rows, and what the head needs of them."""

    hidden: Tensor  # [rows, dim]
    labels: Tensor  # [rows] int64
    masked: Tensor  # [rows] bool: masked and valid
    unmasked: Tensor  # [rows] bool: not masked and valid
    feature_penalty: Tensor  # [] float


class HuBERTPretrainModel(nn.Module):
    """Encoder, mask and head.

    Args:
        wav2vec2: encoder that generates the transformer outputs.
        mask_generator: generates the mask of masked prediction.
        logit_generator: predicts the logits of the masked and unmasked frames.
        feature_grad_mult: scales the gradient of the convolutional feature extractor, in (0, 1); None leaves it. The
            forward pass is not affected.

    Raises:
        ValueError: for ``feature_grad_mult`` outside (0, 1).
    """

    def __init__(
        self,
        wav2vec2: Wav2Vec2Model,
        mask_generator: MaskGenerator,
        logit_generator: LogitGenerator,
        feature_grad_mult: Optional[float],
    ) -> None:
        super().__init__()
        self.wav2vec2 = wav2vec2
        self.mask_generator = mask_generator
        self.logit_generator = logit_generator
        if feature_grad_mult is not None and not 0.0 < feature_grad_mult < 1.0:
            raise ValueError(f"feature_grad_mult must be None or in (0, 1); got {feature_grad_mult}")
        self.feature_grad_mult = feature_grad_mult

    def forward(
        self,
        waveforms: Tensor,
        labels: Tensor,
        audio_lengths: Optional[Tensor] = None,
        *,
        mask: Optional[Tensor] = None,
    ) -> tuple[Optional[Tensor], Optional[Tensor], Tensor]:
        """Logits of the masked and of the unmasked frames.

        Args:
            waveforms: ``[batch, samples]`` float, 16 kHz.
            labels: ``[batch, frames]`` integer in ``[0, num_classes)``: the unit of each frame. What stands in the padding
                is not read.
            audio_lengths: ``[batch]`` integer: valid samples of each row, on the CPU (best: nothing then waits for the
                GPU) or on the device of ``waveforms``. None: all.
            mask: ``[batch, frames]`` bool, True is masked: one made ahead by ``mask_generator.draw``, on the CPU or the
                device. None: drawn here, in eval mode too.

        Returns:
            ``logits_masked`` ``[masked_frames, 1 + num_classes]`` and ``logits_unmasked`` ``[unmasked_frames, 1 +
            num_classes]``, in (batch, frame) order, padding left out; None where the logit generator skips them.
            ``feature_penalty``: the mean square of the extracted features, padding included, scalar, float32 or wider.

        Raises:
            ValueError: for a wrong shape, dtype, device or value of an argument (values of tensors on a GPU are asserted
                there, without a synchronisation).
        """
        encoded = self.encode(waveforms, labels, audio_lengths, mask=mask)
        logits = self.logit_generator(encoded.hidden, encoded.labels, encoded.masked, encoded.unmasked)
        return *logits, encoded.feature_penalty

    def encode(
        self,
        waveforms: Tensor,
        labels: Tensor,
        audio_lengths: Optional[Tensor] = None,
        *,
        mask: Optional[Tensor] = None,
        masked_only: bool = False,
    ) -> Encoded:
        """The transformer's output, with arguments as in `forward`.

        ``masked_only`` asks for the masked rows alone, and the last layer computes no others; in a compiled graph, whose
        shapes may not depend on the mask, all rows come all the same, and ``masked`` tells them apart.
        """
        check_audio(waveforms, audio_lengths)
        features, lengths = self.wav2vec2.feature_extractor(waveforms, audio_lengths)
        batch, frames = features.shape[:2]
        check_labels(labels, batch, frames)
        if mask is not None:
            check_mask(mask, batch, frames)
        if self.feature_grad_mult is not None:
            features = _ScaleGradient.apply(features, self.feature_grad_mult)
        penalty = features.to(torch.promote_types(features.dtype, torch.float32)).square().mean()

        layout = valid_rows(batch, frames, lengths, features.device)
        x = self.wav2vec2.encoder.project(features, layout)
        if mask is None:
            mask = self.mask_generator.draw(batch, frames, lengths)
        elif lengths is not None:
            # An embedding in the padding would reach valid frames through the positional convolution.
            mask = mask & (torch.arange(frames, device=mask.device) < lengths.to(mask.device)[:, None])
        x, _ = self.mask_generator(x, mask=mask)
        selection = _select(layout, labels, mask, features.device, masked_only, self.logit_generator.num_classes)
        hidden = self.wav2vec2.encoder.transformer(x, layout, selection.keep)
        masked, unmasked = selection.masked & selection.valid, ~selection.masked & selection.valid
        return Encoded(hidden, selection.labels, masked, unmasked, penalty)


class _Selection(NamedTuple):
    keep: Optional[Tensor]  # [kept] int64: which of the layout's rows; None: all
    labels: Tensor  # [kept]
    masked: Tensor  # [kept] bool
    valid: Tensor  # [kept] bool


def _select(
    layout: Rows, labels: Tensor, mask: Tensor, device: torch.device, masked_only: bool, num_classes: int
) -> _Selection:
    """The rows that are wanted. With the mask on the host their number is known without a synchronisation."""
    labels = layout.pack(to_device(labels, device).long())
    valid = torch.ones_like(labels, dtype=torch.bool)
    if layout.key_lengths is not None:  # otherwise the padding is not among the rows
        grid = torch.arange(layout.frames, device=device) < layout.key_lengths.to(device)[:, None]
        valid = grid.flatten()
    within = (labels >= 0) & (labels < num_classes)
    check_values(within | ~valid, f"labels must be in [0, {num_classes})", labels)
    if not masked_only or torch.compiler.is_compiling():
        return _Selection(None, labels, layout.pack(to_device(mask, device)), valid)
    flat = mask.flatten() if layout.host_index is None else mask.flatten()[layout.host_index.to(mask.device)]
    keep = to_device(flat.nonzero().squeeze(1), device)
    labels, valid = labels.index_select(0, keep), valid.index_select(0, keep)
    return _Selection(keep, labels, torch.ones_like(valid), valid)


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is scaled."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.scale, None
