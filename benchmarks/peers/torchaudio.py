"""torchaudio's model with its recipe's loss: as it is, without the logits that weigh nothing, and compiled."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..batches import Batch
from ..torchaudio_peer import import_models, installed
from .peer import Peer, PeerModel, Setting, quiet_dynamo, why_not_compile
from .recipe import RecipeModel, lengths_on_device, recipe_loss


class _CompiledModel(RecipeModel):
    """Its loss is compiled when first called, all but the drawing of masks: compiled code has random numbers of its own, and
    the masks would be others than those of the rest. Its features are not compiled: of compiled peers, training is measured."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        quiet_dynamo()
        model.mask_generator.forward = torch.compiler.disable(model.mask_generator.forward)
        self._model = torch.compile(model, dynamic=True)

    def loss(self, batch: Batch) -> Tensor:
        return recipe_loss(*self._model(batch.waveforms, batch.labels, lengths_on_device(batch)))


class Torchaudio(Peer):
    """As its recipe trains it."""

    name = package = "torchaudio"
    broadcasts_logits = True
    _overrides: Mapping[str, bool] = {}

    def why_not(self, setting: Setting) -> str | None:
        return None if installed() else "torchaudio is not installed"

    def build(self, setting: Setting, weights: Mapping[str, Tensor]) -> PeerModel:
        return RecipeModel(self._model(setting, weights))

    def _model(self, setting: Setting, weights: Mapping[str, Tensor]) -> nn.Module:
        arguments = setting.architecture.factory_arguments(setting.num_classes) | dict(self._overrides)
        model = import_models().hubert_pretrain_model(**arguments)
        model.load_state_dict(weights)
        return model.to(setting.device).train()


class TorchaudioMaskedOnly(Torchaudio):
    """Without the logits of the unmasked frames, to which the recipe gives weight 0."""

    name = "torchaudio masked only"
    _overrides = {"skip_nomask": True}


class TorchaudioCompiled(Torchaudio):
    """Under ``torch.compile(model, dynamic=True)``."""

    name = "torchaudio compiled"
    compiled = True

    def why_not(self, setting: Setting) -> str | None:
        return super().why_not(setting) or why_not_compile(setting.device)

    def build(self, setting: Setting, weights: Mapping[str, Tensor]) -> PeerModel:
        return _CompiledModel(self._model(setting, weights))
