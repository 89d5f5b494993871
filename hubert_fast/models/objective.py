"""The pre-training loss as one module: no logits are built, and nothing is computed that has no weight."""

from __future__ import annotations

from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from hubert_fast.models.hubert import HeadInput, HuBERTPretrainModel
from hubert_fast.models.plan import StepPlan
from hubert_fast.models.wrappers import is_sharded


class FrameLosses(NamedTuple):
    """The fields of `PretrainingLoss` that come of the encoded frames."""

    masked_count: Tensor
    masked_correct: Optional[Tensor]
    masked_loss: Optional[Tensor]
    unmasked_count: Optional[Tensor]
    unmasked_correct: Optional[Tensor]
    unmasked_loss: Optional[Tensor]


class PretrainingLoss(NamedTuple):
    """What `PretrainingObjective` returns. Sums are over the frames of the batch; all are scalars on its device."""

    loss: Tensor  # float: masked_weight * masked_loss + unmasked_weight * unmasked_loss + feature_weight * penalty * count
    masked_count: Tensor  # int64
    masked_correct: Optional[Tensor]  # int64: masked frames whose own class scores highest; None where the weight is 0
    masked_loss: Optional[Tensor]  # float: summed cross-entropy of the masked frames; None where the weight is 0
    unmasked_count: Optional[Tensor]  # None, as the next two, where the weight is 0
    unmasked_correct: Optional[Tensor]
    unmasked_loss: Optional[Tensor]
    feature_penalty: Tensor  # float: mean square of the features

    @property
    def mean(self) -> Tensor:
        """``loss`` over the masked frames of the batch, or over 1 where there is none: float. No host waits for it."""
        return mean_of(self.loss, self.masked_count)


def mean_of(loss: Tensor, masked_count: Tensor) -> Tensor:
    """A sum over masked frames as a mean: over at least one, for a quotient of zeros would spoil every weight."""
    return loss / masked_count.clamp(min=1)


class PretrainingObjective(nn.Module):
    """HuBERT's loss (Hsu et al. 2021, eq. 2) with the feature penalty of the released recipes.

    ``loss = masked_weight * L_m + unmasked_weight * L_u + feature_weight * feature_penalty * masked_count``, where L_m and
    L_u are sums of cross-entropies; ``mean`` of the result is ``loss / max(1, masked_count)``; that of several ranks is
    the sum of their losses over that of their counts, again at least 1. It is a module, so DDP and FSDP wrap it; its only
    submodule is ``model``.

    Args:
        model: the model.
        masked_weight: weight of the masked frames.
        unmasked_weight: weight of the unmasked frames; 0 leaves them out from the queries of the last layer on.
        feature_weight: weight of the mean square of the features.

    Raises:
        ValueError: for a negative weight.
    """

    def __init__(
        self,
        model: HuBERTPretrainModel,
        *,
        masked_weight: float = 1.0,
        unmasked_weight: float = 0.0,
        feature_weight: float = 10.0,
    ) -> None:
        super().__init__()
        weights = {"masked_weight": masked_weight, "unmasked_weight": unmasked_weight, "feature_weight": feature_weight}
        for name, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"{name} must be at least 0; got {weight}")
        self.model = model
        self.masked_weight = masked_weight
        self.unmasked_weight = unmasked_weight
        self.feature_weight = feature_weight

    def forward(
        self,
        waveforms: Tensor,
        labels: Optional[Tensor] = None,
        audio_lengths: Optional[Tensor] = None,
        *,
        mask: Optional[Tensor] = None,
        plan: Optional[StepPlan] = None,
    ) -> PretrainingLoss:
        """The loss of a batch; arguments and errors as those of `HuBERTPretrainModel.forward`.

        ``plan``, made ahead by `plan`, stands for ``labels`` and ``mask``.
        """
        if (labels is None) == (plan is None) or (mask is not None and plan is not None):
            raise ValueError("give either labels, and a mask if you have one, or a plan")
        if plan is not None and plan.keep is not None and self.unmasked_weight > 0:
            raise ValueError(
                "plan keeps the masked rows alone, and unmasked_weight is not 0; make it with this objective"
            )
        self._require_called_parts()
        encoded = self.model.encode(
            waveforms, labels, audio_lengths, mask=mask, masked_only=self.unmasked_weight == 0, plan=plan
        )
        return self.with_penalty(self.frame_losses(encoded.head), encoded.feature_penalty)

    def _require_called_parts(self) -> None:
        """Refuse what is sharded and nobody calls here, so that its weights would stay with the ranks that have them."""
        model = self.model
        for name, part in (("", model), (".wav2vec2", model.wav2vec2), (".logit_generator", model.logit_generator)):
            if is_sharded(part):
                raise ValueError(
                    f"objective.model{name} must not be sharded by itself, for the objective does not call it; shard the "
                    "objective, and in it the encoder or its layers"
                )

    def frame_losses(self, head: HeadInput) -> FrameLosses:
        """The sums over the frames of a batch that have a weight."""
        sums: list[Optional[Tensor]] = [head.masked.sum()]
        for weight, chosen in ((self.masked_weight, head.masked), (self.unmasked_weight, head.unmasked)):
            if weight == 0:
                sums += [None, None, None]
                continue
            part = self.model.logit_generator.cross_entropy(head.hidden, torch.where(chosen, head.labels, -1))
            sums += [part.correct, part.loss, chosen.sum()]
        count, masked_correct, masked_loss, _, unmasked_correct, unmasked_loss, unmasked_count = sums
        return FrameLosses(count, masked_correct, masked_loss, unmasked_count, unmasked_correct, unmasked_loss)

    def with_penalty(self, sums: FrameLosses, feature_penalty: Tensor) -> PretrainingLoss:
        """The weighted sum of what `frame_losses` gives and the penalty."""
        loss = self.feature_weight * feature_penalty * sums.masked_count
        for weight, part in ((self.masked_weight, sums.masked_loss), (self.unmasked_weight, sums.unmasked_loss)):
            if part is not None:
                loss = loss + weight * part
        return PretrainingLoss(loss, *sums, feature_penalty)

    def plan(
        self,
        labels: Tensor,
        audio_lengths: Optional[Tensor] = None,
        *,
        samples: int,
        device: Union[str, torch.device],
        mask: Optional[Tensor] = None,
        rows: Optional[int] = None,
        kept: Optional[int] = None,
    ) -> StepPlan:
        """`HuBERTPretrainModel.plan` for this objective, which decides by its weights which rows are kept."""
        return self.model.plan(
            labels,
            audio_lengths,
            samples=samples,
            device=device,
            mask=mask,
            masked_only=self.unmasked_weight == 0,
            rows=rows,
            kept=kept,
        )
