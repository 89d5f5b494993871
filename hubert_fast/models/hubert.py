"""HuBERT for pre-training (Hsu et al. 2021), with the interface of torchaudio's ``HuBERTPretrainModel``."""

from __future__ import annotations

from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from hubert_fast.models.checks import check_audio, check_labels
from hubert_fast.models.encoder import Encoder
from hubert_fast.models.logits import LogitGenerator
from hubert_fast.models.masking import MaskGenerator, draw_masks
from hubert_fast.models.plain import Stream, is_plain
from hubert_fast.models.plan import PlanSettings, StepPlan, make_plan
from hubert_fast.models.rows import padding_mask
from hubert_fast.models.wav2vec2 import Wav2Vec2Model
from hubert_fast.models.wrappers import as_built, is_sharded, runs_as, takes_rows
from hubert_fast.ops.host_tensors import on_host, to_device


class HeadInput(NamedTuple):
    """The transformer's output on some rows, and what the head needs of them."""

    hidden: Tensor  # [rows, dim]
    labels: Tensor  # [rows] int64
    masked: Tensor  # [rows] bool: masked and valid
    unmasked: Tensor  # [rows] bool: not masked and valid


class Encoded(NamedTuple):
    """The result of `HuBERTPretrainModel.encode`."""

    head: HeadInput
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
            audio_lengths: ``[batch]`` integer: valid samples of each row, on the CPU or the device of ``waveforms``, from
                where they are copied to the CPU, so that no padding is computed. None: all.
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
        # How many logits there are is waited for in any case, as in torchaudio; at the start the wait is the shortest.
        if audio_lengths is not None:
            audio_lengths = on_host(audio_lengths)
        masked_only = is_plain(self.logit_generator, LogitGenerator) and self.logit_generator.skip_nomask
        if mask is not None and masked_only:
            mask = on_host(mask)
        encoded = self.encode(waveforms, labels, audio_lengths, mask=mask, masked_only=masked_only)
        return *self.logit_generator(*encoded.head), encoded.feature_penalty

    def encode(
        self,
        waveforms: Tensor,
        labels: Tensor,
        audio_lengths: Optional[Tensor] = None,
        *,
        mask: Optional[Tensor] = None,
        masked_only: bool = False,
        plan: Optional[StepPlan] = None,
    ) -> Encoded:
        """The transformer's output, with arguments as in `forward`.

        ``masked_only`` asks for the masked rows alone; the last layer has no queries of others. Where the mask lies on a GPU,
        and in a compiled graph that is given no ``plan``, no shape may depend on it: all rows come all the same, and
        ``masked`` tells them apart. ``plan`` is one made ahead by `plan`; ``labels`` and ``mask`` are then not read.
        """
        check_audio(waveforms, audio_lengths)
        if plan is not None and plan.valid_samples is not None:
            audio_lengths = plan.valid_samples
        features, lengths = self.wav2vec2.feature_extractor(waveforms, audio_lengths)
        encoder = self.wav2vec2.encoder
        if plan is None and self._calls_parts(mask):
            return self._encode_by_parts(features, labels, lengths, mask, masked_only)
        if plan is None:  # made while a GPU is at work on the features
            plan = self._plan(labels, lengths, mask, features.shape[:2], features.device, PlanSettings(masked_only))
        elif features.shape[:2] != plan.layout[:2]:
            raise ValueError(
                f"plan must be of the {features.shape[0]} x {features.shape[1]} frames of waveforms; it is of "
                f"{plan.layout.batch} x {plan.layout.frames}"
            )
        features = self.scaled_gradient(features)
        penalty = feature_penalty(features)
        if is_sharded(encoder):  # it gathers its weights as it is called
            hidden = encoder(features, plan=plan, mask_generator=self.mask_generator)
        else:
            hidden = self.head_rows(encoder.masked_stream(features, plan, self.mask_generator))
        return Encoded(HeadInput(hidden, plan.labels, plan.masked, plan.unmasked), penalty)

    def _calls_parts(self, mask: Optional[Tensor]) -> bool:
        """Whether the parts are called one by one: one is not ours, or somebody looks at the mask, and may change it."""
        generator = self.mask_generator
        if as_built(self.wav2vec2.encoder)[1] is not Encoder or as_built(generator)[1] is not MaskGenerator:
            return True
        return mask is None and not (is_plain(generator, MaskGenerator) or takes_rows(generator, MaskGenerator))

    def _encode_by_parts(
        self, features: Tensor, labels: Tensor, lengths: Optional[Tensor], mask: Optional[Tensor], masked_only: bool
    ) -> Encoded:
        """`encode` by calls of the parts, as torchaudio makes them."""
        features, encoder = self.scaled_gradient(features), self.wav2vec2.encoder
        check_labels(labels, *features.shape[:2])
        x, attention_mask = encoder._preprocess(features, lengths)
        padding = None if lengths is None else padding_mask(lengths.to(x.device), x.shape[1])
        x, mask = self.mask_generator(x, padding, **({} if mask is None else {"mask": mask}))
        mask = torch.zeros(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        classes, settings = getattr(self.logit_generator, "num_classes", None), PlanSettings(masked_only)
        plan = make_plan(labels, lengths, mask, None, x.device, classes, settings)
        hidden = plan.layout.pack(encoder.transformer(x, attention_mask=attention_mask))
        if plan.keep is not None:
            hidden = hidden.index_select(0, plan.keep)
        return Encoded(HeadInput(hidden, plan.labels, plan.masked, plan.unmasked), feature_penalty(features))

    def head_rows(self, stream: Stream) -> Tensor:
        """The rows that the head is given, ``[rows, dim]``: in the dtype of its product, where its code is ours."""
        return stream.operand if runs_as(type(self.logit_generator)) is LogitGenerator else stream.x

    def scaled_gradient(self, features: Tensor) -> Tensor:
        """``features``, whose gradient is scaled by ``feature_grad_mult``."""
        return features if self.feature_grad_mult is None else _ScaleGradient.apply(features, self.feature_grad_mult)

    def plan(
        self,
        labels: Tensor,
        audio_lengths: Optional[Tensor] = None,
        *,
        samples: int,
        device: Union[str, torch.device],
        mask: Optional[Tensor] = None,
        masked_only: bool = False,
        rows: Optional[int] = None,
        kept: Optional[int] = None,
    ) -> StepPlan:
        """Where the rows of a step lie: everything about a batch that decides about shapes, made ahead of the step.

        A step that is given its plan depends on no other number of the batch than ``waveforms``, so it may be captured in
        a CUDA graph; with fixed capacities the graph serves every batch of the same ``[batch, samples]``.

        Args:
            labels, audio_lengths, mask, masked_only: as in `encode`.
            samples: of a row of the waveforms.
            device: of the waveforms.
            rows: make this many rows of the valid frames, with dead ones at the end. None: as many as are valid.
            kept: with ``masked_only``, keep this many rows, filled up at the end with others, whose output and logits mean
                nothing. None: as many as are masked.

        Raises:
            ValueError: as `forward`, and for a capacity that is too small or too large, or has no ``audio_lengths`` or mask
                on the CPU to fill it from.
        """
        extractor = self.wav2vec2.feature_extractor
        lengths = None if audio_lengths is None else extractor.output_lengths(audio_lengths)
        grid = len(labels), int(extractor.output_lengths(torch.tensor(samples)))
        plan = self._plan(labels, lengths, mask, grid, torch.device(device), PlanSettings(masked_only, rows, kept))
        if extractor.padding_invariant and audio_lengths is not None:
            plan = plan._replace(valid_samples=to_device(audio_lengths, torch.device(device)))
        return plan

    def _plan(
        self,
        labels: Tensor,
        lengths: Optional[Tensor],  # [batch], frames
        mask: Optional[Tensor],
        grid: tuple[int, int],  # (batch, frames)
        device: torch.device,
        settings: PlanSettings,
    ) -> StepPlan:
        batch, frames = grid
        check_labels(labels, batch, frames)
        mask, channel_mask = draw_masks(self.mask_generator, batch, frames, lengths, mask)
        classes = getattr(self.logit_generator, "num_classes", None)  # somebody else's may not say
        return make_plan(labels, lengths, mask, channel_mask, device, classes, settings)


def feature_penalty(features: Tensor) -> Tensor:
    """The mean square, padding included, in float32 or wider."""
    return features.to(torch.promote_types(features.dtype, torch.float32)).square().mean()


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is scaled."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.scale, None
