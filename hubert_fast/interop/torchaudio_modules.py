"""torchaudio's modules on the code of ours; see `hubert_fast.interop.acceleration`.

Names of parameters and submodules are the same on both sides; what ours keep beside them is read off torchaudio's.
"""

from __future__ import annotations

from typing import Any, Optional

from torch import nn
from torchaudio.models.wav2vec2 import components
from torchaudio.models.wav2vec2 import model as models
from torchaudio.models.wav2vec2.wavlm_attention import WavLMSelfAttention

from hubert_fast.interop.acceleration import Accelerated, accelerated_classes
from hubert_fast.models import (
    encoder,
    encoder_layer,
    feature_extractor,
    hubert,
    logits,
    masking,
    positional_embedding,
    transformer,
    wav2vec2,
)
from hubert_fast.reference.conv_frontend import NORM_EPS


class ConvLayerBlock(Accelerated, feature_extractor.ConvLayerBlock, components.ConvLayerBlock):
    runs_as = feature_extractor.ConvLayerBlock

    @staticmethod
    def attributes(module: nn.Module) -> dict[str, Any]:
        return {"_padding_invariant": False}


class LayerNorm(Accelerated, feature_extractor.LayerNorm, components.LayerNorm):
    runs_as = feature_extractor.LayerNorm


class FeatureExtractor(Accelerated, feature_extractor.FeatureExtractor, components.FeatureExtractor):
    runs_as = feature_extractor.FeatureExtractor

    @staticmethod
    def attributes(module: nn.Module) -> dict[str, Any]:
        over_channels = isinstance(getattr(module.conv_layers[0], "layer_norm", None), nn.LayerNorm)
        return {
            "norm_mode": "layer_norm" if over_channels else "group_norm",
            "padding_invariant": False,
            "_norm_kind": feature_extractor.LayerNorm if over_channels else nn.GroupNorm,
        }

    @staticmethod
    def differs(module: nn.Module) -> Optional[str]:
        norms = [each for each in module.modules() if isinstance(each, (nn.LayerNorm, nn.GroupNorm))]
        other = sorted({each.eps for each in norms} - {NORM_EPS})
        return f"its norms have an eps of {other[0]}, the operator's have {NORM_EPS}" if other else None


class FeatureProjection(Accelerated, encoder.FeatureProjection, components.FeatureProjection):
    runs_as = encoder.FeatureProjection


class ConvolutionalPositionalEmbedding(
    Accelerated, positional_embedding.ConvolutionalPositionalEmbedding, components.ConvolutionalPositionalEmbedding
):
    runs_as = positional_embedding.ConvolutionalPositionalEmbedding


class SelfAttention(Accelerated, encoder_layer.SelfAttention, components.SelfAttention):
    runs_as = encoder_layer.SelfAttention


class FeedForward(Accelerated, encoder_layer.FeedForward, components.FeedForward):
    runs_as = encoder_layer.FeedForward


class EncoderLayer(Accelerated, encoder_layer.EncoderLayer, components.EncoderLayer):
    runs_as = encoder_layer.EncoderLayer

    @staticmethod
    def refuse(module: nn.Module) -> None:
        if isinstance(module.attention, WavLMSelfAttention):
            raise TypeError(
                "model is or holds a WavLM, which cannot be accelerated: its layers hand on a position bias"
            )


class Transformer(Accelerated, transformer.Transformer, components.Transformer):
    runs_as = transformer.Transformer


class Encoder(Accelerated, encoder.Encoder, components.Encoder):
    runs_as = encoder.Encoder


class MaskGenerator(Accelerated, masking.MaskGenerator, components.MaskGenerator):
    runs_as = masking.MaskGenerator

    @staticmethod
    def attributes(module: nn.Module) -> dict[str, Any]:
        return {"_channels": len(module.mask_embedding)}


class LogitGenerator(Accelerated, logits.LogitGenerator, components.LogitGenerator):
    runs_as = logits.LogitGenerator

    @staticmethod
    def attributes(module: nn.Module) -> dict[str, Any]:
        return {"_built_classes": len(module.label_embeddings)}


class Wav2Vec2Model(Accelerated, wav2vec2.Wav2Vec2Model, models.Wav2Vec2Model):
    runs_as = wav2vec2.Wav2Vec2Model


class HuBERTPretrainModel(Accelerated, hubert.HuBERTPretrainModel, models.HuBERTPretrainModel):
    runs_as = hubert.HuBERTPretrainModel


def kinds() -> dict[type[nn.Module], type[nn.Module]]:
    """The accelerated class for each of torchaudio's."""
    return accelerated_classes(globals())
