"""torchaudio's model with its recipe's loss: as it is, without the logits that weigh nothing, and compiled."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..batches import Batch
from ..torchaudio_peer import import_models, installed
from .compiling import quiet_dynamo, why_not_compile
from .peer import Peer, PeerModel, Setting
from .recipe import recipe_loss


class _TorchaudioModel(PeerModel):
    def __init__(self, model: nn.Module) -> None:
        self.module = model

    def loss(self, batch: Batch) -> Tensor:
        return recipe_loss(*self.module(batch.waveforms, batch.labels, _lengths(batch)))

    def features(self, batch: Batch) -> Tensor:
        return self.module.wav2vec2.extract_features(batch.waveforms, _lengths(batch))[0][-1]


class _CompiledModel(_TorchaudioModel):
    """Its loss is compiled when first called, all but the drawing of masks: compiled code has random numbers of its own, and
    the masks would be others than those of the rest. Its features are not compiled: of compiled peers, training is measured."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        model.mask_generator.forward = torch.compiler.disable(model.mask_generator.forward)
        self._model = torch.compile(model, dynamic=True)

    def loss(self, batch: Batch) -> Tensor:
        with quiet_dynamo():
            return recipe_loss(*self._model(batch.waveforms, batch.labels, _lengths(batch)))


def _lengths(batch: Batch) -> Tensor | None:
    """On the device, where torchaudio wants them."""
    return None if batch.lengths is None else batch.lengths.to(batch.waveforms.device, non_blocking=True)


class Torchaudio(Peer):
    """As its recipe trains it."""

    name = "torchaudio"
    broadcasts_logits = True
    _overrides: Mapping[str, bool] = {}

    def version(self) -> str:
        return importlib.metadata.version("torchaudio")

    def why_not(self, setting: Setting) -> str | None:
        return None if installed() else "torchaudio is not installed"

    def build(self, setting: Setting, weights: Mapping[str, Tensor]) -> PeerModel:
        return _TorchaudioModel(self._model(setting, weights))

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
