"""transformers' HubertModel, with the head and loss that it lacks written as a good user would in plain PyTorch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_fast.interop.transformers import to_transformers

from .. import torchaudio_peer
from ..architecture import Architecture
from ..batches import Batch
from .peer import Peer, PeerModel, Setting
from .recipe import FEATURE_WEIGHT, scale_gradient

if TYPE_CHECKING:
    from transformers import HubertConfig

_TEMPERATURE = 0.1


class _Pretraining(nn.Module):
    """The encoder, the projection and the classes' embeddings.

    Cosines are one product of normalised rows, of masked frames alone; no ``[classes, frames, dim]`` is built.
    """

    def __init__(self, hubert: nn.Module, architecture: Architecture, num_classes: int) -> None:
        super().__init__()
        self.hubert = hubert
        self.final_proj = nn.Linear(architecture.dim, architecture.final_dim)
        self.label_embeddings = nn.Parameter(torch.empty(num_classes, architecture.final_dim))
        self._feature_grad_mult = architecture.feature_grad_mult
        self._penalty: Tensor | None = None
        hubert.feature_extractor.register_forward_hook(self._scale_and_keep_penalty)

    def _scale_and_keep_penalty(self, module: nn.Module, inputs: tuple[Tensor, ...], features: Tensor) -> Tensor:
        if not self.training:
            return features
        features = scale_gradient(features, self._feature_grad_mult)
        self._penalty = features.float().square().mean()
        return features

    def forward(self, batch: Batch) -> Tensor:
        device = batch.waveforms.device
        mask = batch.mask.to(device, non_blocking=True)
        outputs = self.hubert(batch.waveforms, attention_mask=_attention_mask(batch), mask_time_indices=mask)
        # Which frames is known on the host, so nothing waits for a GPU here.
        index = batch.mask.flatten().nonzero()[:, 0].to(device, non_blocking=True)
        x = self.final_proj(outputs.last_hidden_state.flatten(0, 1).index_select(0, index))
        logits = F.linear(F.normalize(x, dim=1), F.normalize(self.label_embeddings, dim=1)) / _TEMPERATURE
        labels = batch.labels.flatten().index_select(0, index)
        penalty, self._penalty = self._penalty, None
        return F.cross_entropy(logits, labels, reduction="sum") + FEATURE_WEIGHT * penalty * len(index)


class _TransformersModel(PeerModel):
    def __init__(self, module: _Pretraining) -> None:
        self.module = module

    def loss(self, batch: Batch) -> Tensor:
        return self.module(batch)

    def features(self, batch: Batch) -> Tensor:
        outputs = self.module.hubert(
            batch.waveforms, attention_mask=_attention_mask(batch), output_hidden_states=True
        )  # fmt: skip
        return outputs.hidden_states[-1]


def _attention_mask(batch: Batch) -> Tensor | None:
    """``[utterances, samples]`` bool."""
    if batch.lengths is None:
        return None
    samples, device = batch.waveforms.shape[1], batch.waveforms.device
    return torch.arange(samples, device=device) < batch.lengths.to(device, non_blocking=True)[:, None]


class TransformersSdpa(Peer):
    """With PyTorch's scaled_dot_product_attention."""

    name = "transformers sdpa"
    package = "transformers"
    _attention = "sdpa"

    def why_not(self, setting: Setting) -> str | None:
        return None if importlib.util.find_spec("transformers") else "transformers is not installed"

    def build(self, setting: Setting, weights: Mapping[str, Tensor]) -> PeerModel:
        if torchaudio_peer.installed():
            torchaudio_peer.import_models()  # or transformers would import torchaudio with the library that may not load
        from transformers import AutoModel

        config = hubert_config(setting.architecture)
        hubert = AutoModel.from_config(config, attn_implementation=self._attention)
        hubert.load_state_dict(to_transformers(weights))
        module = _Pretraining(hubert, setting.architecture, setting.num_classes)
        head = {name: weights[f"logit_generator.{name}"] for name in ("final_proj.weight", "final_proj.bias")}
        module.final_proj.load_state_dict({name.removeprefix("final_proj."): each for name, each in head.items()})
        module.label_embeddings.data.copy_(weights["logit_generator.label_embeddings"])
        return _TransformersModel(module.to(setting.device).train())


class TransformersFlash(TransformersSdpa):
    """With flash-attn."""

    name = "transformers flash"
    _attention = "flash_attention_2"

    def why_not(self, setting: Setting) -> str | None:
        reason = super().why_not(setting)
        if reason is not None:
            return reason
        if setting.device.type != "cuda":
            return "flash attention needs a GPU"
        if setting.dtype == torch.float32:
            return "flash attention does not compute in float32"
        return None if importlib.util.find_spec("flash_attn") else "flash-attn is not installed"


def hubert_config(architecture: Architecture) -> HubertConfig:
    """transformers' HubertConfig of the same model."""
    from transformers import HubertConfig

    channels, taps, strides = zip(*architecture.convolutions)
    return HubertConfig(
        hidden_size=architecture.dim,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        intermediate_size=architecture.ffn,
        hidden_dropout=architecture.dropout,
        activation_dropout=architecture.ffn_dropout,
        attention_dropout=architecture.attention_dropout,
        feat_proj_dropout=architecture.projection_dropout,
        layerdrop=0.0,
        feat_extract_norm={"group_norm": "group", "layer_norm": "layer"}[architecture.norm],
        conv_dim=channels,
        conv_kernel=taps,
        conv_stride=strides,
        conv_bias=False,
        num_conv_pos_embeddings=architecture.taps,
        num_conv_pos_embedding_groups=architecture.groups,
        do_stable_layer_norm=architecture.pre_norm,
        mask_time_prob=0.8,  # above 0 it has a mask embedding; the mask itself is handed over
        mask_feature_prob=0.0,
    )
