"""minimal-hubert, the fastest published HuBERT pre-training code, compiled as its own trainer compiles it.

The trainer's other settings of PyTorch (its lowering of the convolutions' backward among them) are not made.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..architecture import ARCHITECTURES, Architecture
from ..batches import Batch
from ..torchaudio_peer import import_models, installed
from .peer import Peer, PeerModel, Setting, quiet_dynamo, why_not_compile
from .recipe import FEATURE_WEIGHT, scale_gradient

_SIZES = ("base", "large", "xlarge")
_LAYER = "wav2vec2.encoder.transformer.layers."


class _MinimalHubertModel(PeerModel):
    """The recipe's loss from the parts that the model returns; its own counts the penalty once."""

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        self.module = model
        self._architecture = architecture

    def loss(self, batch: Batch) -> Tensor:
        device = batch.waveforms.device
        mask = batch.mask.to(device, non_blocking=True)
        attention_mask = self._attention_mask(batch)
        _, parts = self.module(batch.waveforms, batch.labels, mask=mask, attention_mask=attention_mask)
        cross_entropies = parts["logits_loss"]  # [masked frames]
        return cross_entropies.sum() + FEATURE_WEIGHT * parts["feature_loss"] * len(cross_entropies)

    def features(self, batch: Batch) -> Tensor:
        """Not compiled, as where the package extracts features itself."""
        attention_mask = self._attention_mask(batch)
        outputs = self.module.get_intermediate_outputs(
            batch.waveforms, attention_mask=attention_mask, before_residual=False
        )  # fmt: skip
        return outputs[-1]

    def _attention_mask(self, batch: Batch) -> Tensor | None:
        """``[utterances, 1, 1, frames]`` bool, made on the CPU, as its data loader makes it."""
        if batch.lengths is None:
            return None
        frames = torch.tensor([self._architecture.frames_of(samples) for samples in batch.samples])
        valid = torch.arange(batch.mask.shape[1]) < frames[:, None]
        return valid[:, None, None].to(batch.waveforms.device, non_blocking=True)


class MinimalHubert(Peer):
    """`HuBERTPretrain` in the published sizes, with the dropouts of the architecture and no LayerDrop."""

    name = package = "minimal-hubert"
    compiled = True
    broadcasts_logits = True

    def why_not(self, setting: Setting) -> str | None:
        if sys.version_info < (3, 12):
            return "minimal-hubert needs Python 3.12 or newer"
        if importlib.util.find_spec("minimal_hubert") is None or not installed():
            return "minimal-hubert is not installed, or torchaudio, which it imports"
        if not _is_published(setting.architecture):
            return f"minimal-hubert has the sizes {', '.join(_SIZES)} alone"
        return why_not_compile(setting.device)

    def build(self, setting: Setting, weights: Mapping[str, Tensor]) -> PeerModel:
        quiet_dynamo()
        import_models()  # it imports torchaudio
        from minimal_hubert import HuBERTPretrain

        architecture = setting.architecture
        model = HuBERTPretrain(setting.num_classes, architecture.name)
        model.load_state_dict(_with_all_layers(weights, ARCHITECTURES[architecture.name].layers))
        model.encoder.layers = model.encoder.layers[: architecture.layers]
        model.encoder.layer_drop = 0.0
        _set_dropouts(model, architecture)
        scale = architecture.feature_grad_mult
        model.feature_extractor.register_forward_hook(lambda module, inputs, features: scale_gradient(features, scale))
        model.to(setting.device).train().compile(dynamic=True)
        return _MinimalHubertModel(model, architecture)


def _is_published(architecture: Architecture) -> bool:
    """Whether it is one of the package's sizes, but for dropout and the number of layers, of which there may be fewer."""
    if architecture.name not in _SIZES:
        return False
    published = ARCHITECTURES[architecture.name]
    like = architecture.without_dropout().changed(layers=published.layers)
    return like == published.without_dropout() and architecture.layers <= published.layers


def _with_all_layers(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The package tells the size by the number of layers, so those that are cut off later are filled with the first one's."""
    first = {name: weights[name] for name in weights if name.startswith(f"{_LAYER}0.")}
    copies = {
        name.replace(f"{_LAYER}0.", f"{_LAYER}{i}."): tensor for i in range(layers) for name, tensor in first.items()
    }
    return {**copies, **weights}


def _set_dropouts(model: nn.Module, architecture: Architecture) -> None:
    model.feature_projection[1].p = architecture.projection_dropout
    model.encoder.dropout.p = architecture.dropout
    for layer in model.encoder.layers:
        layer.dropout.p = architecture.dropout
        layer.attention.dropout = architecture.attention_dropout
        layer.feed_forward.intermediate_dropout.p = architecture.ffn_dropout
