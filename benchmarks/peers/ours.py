"""hubert_fast itself: as its README recommends, and with one import changed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

import hubert_fast

from ..batches import Batch
from .peer import Peer, PeerModel, Setting
from .recipe import RecipeModel


def build_model(setting: Setting, weights: Mapping[str, Tensor]) -> hubert_fast.HuBERTPretrainModel:
    model = hubert_fast.hubert_pretrain_model(**setting.architecture.factory_arguments(setting.num_classes))
    model.load_state_dict(weights)
    return model.to(setting.device).train()


class ObjectiveModel(PeerModel):
    """The loss without logits. Masks are drawn inside, as torchaudio draws them; lengths stay on the CPU."""

    def __init__(self, model: hubert_fast.HuBERTPretrainModel) -> None:
        self.module = hubert_fast.PretrainingObjective(model)

    def loss(self, batch: Batch) -> Tensor:
        return self.module(batch.waveforms, batch.labels, batch.lengths).loss

    def features(self, batch: Batch) -> Tensor:
        return self.module.model.wav2vec2.extract_features(batch.waveforms, batch.lengths)[0][-1]


class Ours(Peer):
    """What all variants share: they run wherever this package does."""

    def version(self) -> str:
        return hubert_fast.__version__

    def why_not(self, setting: Setting) -> str | None:
        return None


class HubertFast(Ours):
    """`PretrainingObjective`."""

    name = "hubert_fast"

    def build(self, setting: Setting, weights: Mapping[str, Tensor]) -> PeerModel:
        return ObjectiveModel(build_model(setting, weights))


class HubertFastSwappedIn(Ours):
    """`HuBERTPretrainModel` in torchaudio's place, with its logits and the recipe's loss."""

    name = "hubert_fast swapped in"

    def build(self, setting: Setting, weights: Mapping[str, Tensor]) -> PeerModel:
        return RecipeModel(build_model(setting, weights))
