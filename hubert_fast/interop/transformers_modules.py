"""transformers' modules of HuBERT and wav2vec 2.0 on the code of ours; see `hubert_fast.interop.acceleration`.

They keep transformers' calling conventions. What a call asks for beside the usual (attention weights, another attention function,
a mask that hides more than padding) is computed by transformers' own forward.

The models, their heads and the blocks of the feature encoder keep their classes: transformers looks up what a model may record by
the name of its class, and the feature encoder runs its blocks as one operator.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.hubert import modeling_hubert as hubert
from transformers.models.wav2vec2 import modeling_wav2vec2 as wav2vec2
from transformers.utils.output_capturing import _active_collector

from hubert_fast.interop.acceleration import Accelerated, accelerated_classes
from hubert_fast.models import encoder, encoder_layer, feature_extractor, positional_embedding, transformer
from hubert_fast.models.encoder_layer import LayerSeeds, on_grid
from hubert_fast.models.plain import (
    Stream,
    add,
    before_dropout,
    is_fusable,
    is_plain,
    normalize,
    normalized_stream,
    product,
    projection,
    rate,
)
from hubert_fast.models.rows import Rows, rows_of, whole_grid
from hubert_fast.models.wrappers import takes_rows
from hubert_fast.ops.conv_frontend import conv_frontend
from hubert_fast.ops.host_tensors import may_decide_shapes
from hubert_fast.reference.conv_frontend import NORM_EPS

# Implementations of attention that compute one formula, so that ours may take their place.
_ATTENTIONS = {
    "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention",
}  # fmt: skip

# Arguments of an encoder or a layer that change nothing of what it computes: hooks collect hidden states.
_HARMLESS = ("output_attentions", "output_hidden_states", "return_dict")


class _FeatureEncoder(Accelerated, feature_extractor.FeatureExtractor):
    """``[batch, samples] -> [batch, channels, frames]``, all blocks as one operator unless somebody hooked or replaced a part."""

    @staticmethod
    def differs(module: nn.Module) -> Optional[str]:
        for block in module.conv_layers:
            activation = getattr(block, "activation", None)  # what was put in a block's place is called
            if isinstance(activation, nn.Module) and not isinstance(activation, GELUActivation):
                return f"its activation is {type(activation).__name__}, the operator's is GELU"
            eps = getattr(getattr(block, "layer_norm", None), "eps", NORM_EPS)
            if eps != NORM_EPS:
                return f"its norms have an eps of {eps}, the operator's have {NORM_EPS}"
        return None

    def forward(self, input_values: Tensor) -> Tensor:
        run = self._operator(input_values)
        if run is None:
            return super(feature_extractor.FeatureExtractor, self).forward(input_values)
        features = run(input_values)
        # transformers lets the audio require a gradient, so features do too where no parameter asks for one: checkpoints need it.
        if self._requires_grad and self.training and torch.is_grad_enabled() and not features.requires_grad:
            features.requires_grad_()
        return features.transpose(1, 2)

    def _operator(self, x: Tensor) -> Optional[partial[Tensor]]:
        """The operator with all its parameters; None where the blocks are not what it computes."""
        blocks = list(self.conv_layers)
        if x.ndim != 2 or not len(x) or x.requires_grad or not blocks:
            return None
        over_channels = isinstance(getattr(blocks[0], "layer_norm", None), nn.LayerNorm)
        checkpointed, strides, convs, norms = None, [], [], []
        for i, block in enumerate(blocks):
            if type(block) not in _BLOCKS or not is_plain(block, type(block)) or not _is_gelu(block.activation):
                return None
            conv, norm = block.conv, block._modules.get("layer_norm")
            if not is_plain(conv, nn.Conv1d) or not feature_extractor._is_plain_conv(conv, conv.stride[0]):
                return None
            if not _is_norm(norm, i, over_channels):
                return None
            strides.append(conv.stride[0])
            convs.append(conv)
            if norm is not None:
                norms.append(norm)
            if block.gradient_checkpointing and self.training:
                checkpointed = block._gradient_checkpointing_func
        biases = [conv.bias for conv in convs if conv.bias is not None]
        if len(biases) not in (0, len(convs)):
            return None
        run = partial(
            conv_frontend,
            weights=[each.weight for each in convs],
            biases=biases,
            norm_weights=[each.weight for each in norms],
            norm_biases=[each.bias for each in norms],
            strides=strides,
            norm="layer_norm" if over_channels else "group_norm",
        )
        if checkpointed is None:
            return run
        # A reentrant checkpoint needs an input that requires a gradient, which the audio is not.
        settings = getattr(checkpointed, "keywords", {})
        return partial(checkpointed, run) if settings.get("use_reentrant") is False else None


def _is_norm(norm: Optional[nn.Module], i: int, over_channels: bool) -> bool:
    """Whether ``norm`` is what the operator has after convolution ``i``."""
    if not over_channels and i > 0:
        return norm is None
    if norm is None or not is_plain(norm, nn.LayerNorm if over_channels else nn.GroupNorm):
        return False
    if norm.eps != NORM_EPS or norm.bias is None:
        return False
    return over_channels or norm.num_groups == norm.num_channels


class _FeatureProjection(Accelerated, encoder.FeatureProjection):
    """``[batch, frames, in] -> [batch, frames, out]``."""

    @staticmethod
    def differs(module: nn.Module) -> Optional[str]:
        return None if hasattr(module, "layer_norm") else "it has no layer norm"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self._projected(normalize(self.layer_norm, hidden_states.flatten(0, -2)), hidden_states)

    def _projected(self, x: Tensor, of: Tensor) -> Tensor:
        """``[rows, in] -> [batch, frames, out]``; a tensor of its own, into which SpecAugment writes."""
        if is_fusable(self.dropout) and rate(self.dropout) == 0.0:
            x = projection(self.projection, x)
        else:
            x = add(None, before_dropout(self.dropout, *product(self.projection, x)))
        return x.view(*of.shape[:-1], x.shape[-1])


class _PositionalConvEmbedding(Accelerated, positional_embedding.ConvolutionalPositionalEmbedding):
    @staticmethod
    def differs(module: nn.Module) -> Optional[str]:
        if getattr(module, "batch_norm", None) is not None:
            return "it has a batch norm"
        return None if isinstance(module.activation, GELUActivation) else "its activation is not GELU"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super(positional_embedding.ConvolutionalPositionalEmbedding, self).forward(hidden_states)

    def add_to(self, x: Tensor, layout: Rows) -> Tensor:
        """Rows plus their positional embedding: ``[rows, channels] -> [rows, channels]``."""
        usual = _is_gelu(self.activation) and getattr(self, "batch_norm", None) is None
        if usual and is_plain(self.padding, type(self.padding)) and type(self.padding) in _PADS:
            return super().add_to(x, layout)
        return x + layout.pack(self(layout.unpack(x)))


class _Attention(Accelerated, encoder_layer.SelfAttention):
    @staticmethod
    def differs(module: nn.Module) -> Optional[str]:
        if module.is_causal or module.is_decoder:
            return "it is causal"
        return None if module.scaling == module.head_dim**-0.5 else f"it scales scores by {module.scaling}"

    def forward(
        self,
        hidden_states: Tensor,  # [batch, frames, embed_dim]
        key_value_states: Optional[Tensor] = None,
        attention_mask: Any = None,
        output_attentions: Optional[bool] = False,
        *,
        layout: Optional[Rows] = None,
        keep: Optional[Tensor] = None,  # [kept] int64
        **kwargs: Any,
    ) -> Union[tuple[Tensor, Optional[Tensor]], Tensor]:
        """``([batch, frames, embed_dim], weights)``; with a ``layout`` rows, as of ours.

        The weights are None except with the implementation "eager", which is transformers' then.
        """
        if layout is not None:
            return super().forward(hidden_states, layout=layout, keep=keep)
        if key_value_states is None and self.config._attn_implementation != "eager":
            asked = kwargs | {"output_attentions": output_attentions}
            layout = _layout_of_call(hidden_states, attention_mask, asked, self.config)
        if layout is None:
            return super(encoder_layer.SelfAttention, self).forward(
                hidden_states, key_value_states, attention_mask, output_attentions, **kwargs
            )
        return layout.unpack(self.out_proj(self.heads(layout.pack(hidden_states), layout))), None


class _FeedForward(Accelerated, encoder_layer.FeedForward):
    """A feed-forward that calls an activation other than GELU."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)

    def update(self, x: Tensor, seed: Optional[Tensor] = None) -> tuple[Tensor, Optional[Tensor]]:
        """The second product less its bias, and the bias: ``[rows, io_features] -> [rows, io_features]``."""
        if _is_gelu(self.intermediate_act_fn):
            return super().update(x, seed)
        return product(self.output_dense, self._hidden(x, seed))

    def _hidden(self, x: Tensor, seed: Optional[Tensor] = None) -> Tensor:
        if _is_gelu(self.intermediate_act_fn):
            return super()._hidden(x, seed)
        return self.intermediate_dropout(self.intermediate_act_fn(self.intermediate_dense(x)))


class _EncoderLayer(Accelerated, encoder_layer.EncoderLayer):
    @staticmethod
    def attributes(module: nn.Module) -> dict[str, Any]:
        return {"_config": _config_of(module)}

    @staticmethod
    def differs(module: nn.Module) -> Optional[str]:
        if _has_adapter(module):
            return "it has an adapter"
        return "its attention has no config" if _config_of(module) is None else None

    def forward(
        self,
        hidden_states: Tensor,  # [batch, frames, dim]
        attention_mask: Any = None,
        *,
        layout: Optional[Rows] = None,
        keep: Optional[Tensor] = None,  # [kept] int64
        seeds: Optional[LayerSeeds] = None,
        **kwargs: Any,
    ) -> Tensor:
        """``[batch, frames, dim]``; with a ``layout`` the rows of `stream`."""
        if layout is not None:
            return self.stream(Stream(hidden_states), layout, keep, seeds).x
        layout = _layout_of_call(hidden_states, attention_mask, kwargs, self._config)
        if layout is None or _has_adapter(self):
            return super(encoder_layer.EncoderLayer, self).forward(hidden_states, attention_mask, **kwargs)
        return layout.unpack(self.stream(Stream(layout.pack(hidden_states)), layout).x)

    def _call_attention(self, grid: Tensor, layout: Rows) -> Tensor:
        """Call a hooked or replaced attention as transformers does: ``[batch, frames, dim] -> [batch, frames, dim]``."""
        return self.attention(grid, attention_mask=_mask_of_layout(layout, grid, self._config))[0]


class _PostNormLayer(_EncoderLayer):
    layer_norm_first = False


class _PreNormLayer(_EncoderLayer):
    layer_norm_first = True


class _Encoder(Accelerated, transformer.Transformer):
    @property
    def layer_drop(self) -> float:
        return self.config.layerdrop

    def forward(
        self,
        hidden_states: Tensor,  # [batch, frames, dim]
        attention_mask: Optional[Tensor] = None,  # [batch, frames] bool
        **kwargs: Any,
    ) -> BaseModelOutput:
        """The output is 0 in the padding, which layers leave out."""
        layout = self._layout(hidden_states, attention_mask, kwargs)
        if layout is None:
            return super(transformer.Transformer, self).forward(hidden_states, attention_mask, **kwargs)
        rows = self.stream(layout.pack(hidden_states), layout).x
        return BaseModelOutput(last_hidden_state=layout.unpack(rows))

    def _layout(self, x: Tensor, mask: Optional[Tensor], asked: dict[str, Any]) -> Optional[Rows]:
        if not _is_usual(asked, self.config) or "attentions" in (_active_collector.get() or ()):
            return None
        if mask is not None and getattr(self.config, "add_adapter", False):
            return None  # convolutions follow, which read the padding
        batch, frames = x.shape[:2]
        if mask is None:
            return whole_grid(batch, frames, None, x.device)
        if mask.dtype != torch.bool or mask.shape != (batch, frames) or not may_decide_shapes(mask):
            return None
        mask = mask.cpu()
        lengths = mask.sum(1)
        # Whatever hides more than the end of each row is no layout.
        if not torch.equal(mask, torch.arange(frames) < lengths[:, None]):
            return None
        return rows_of(batch, frames, lengths, x.device)

    def run_layer(
        self,
        layer: nn.Module,
        stream: Stream,
        layout: Rows,
        keep: Optional[Tensor] = None,
        seeds: Optional[LayerSeeds] = None,
    ) -> Stream:
        """The stream after ``layer``, which its own call may keep in a checkpoint."""
        if _has_adapter(layer):
            return Stream(on_grid(lambda grid: self._call_layer(layer, grid, layout), stream.x, layout, keep))
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            if takes_rows(layer, encoder_layer.EncoderLayer):
                return Stream(layer(stream.x, layout=layout, keep=keep, seeds=seeds))
        return super().run_layer(layer, stream, layout, keep, seeds)

    def _call_layer(self, layer: nn.Module, grid: Tensor, layout: Rows) -> Tensor:
        """Call a hooked or replaced layer as transformers does: ``[batch, frames, dim] -> [batch, frames, dim]``."""
        return layer(grid, attention_mask=_mask_of_layout(layout, grid, self.config))

    def _drop_or_run(
        self, layer: nn.Module, stream: Stream, layout: Rows, keep: Optional[Tensor], seeds: Optional[LayerSeeds]
    ) -> Stream:
        if self.training and self.layer_drop > 0.0 and not _gathers(self):
            return super()._drop_or_run(layer, stream, layout, keep, seeds)
        torch.rand([])  # as transformers draws, for the random numbers that follow
        return self.run_layer(layer, stream, layout, keep, seeds)

    def _is_dropped(self, draw: Any) -> Any:
        return draw < self.layer_drop


class _PostNormEncoder(_Encoder):
    layer_norm_first = True  # before the first layer


class _PreNormEncoder(_Encoder):
    layer_norm_first = False


def _has_adapter(layer: nn.Module) -> bool:
    """Whether a layer ends with a module that ours have not; it may be put there at any time."""
    return layer._modules.get("adapter_layer") is not None


def _config_of(layer: nn.Module) -> Any:
    """The config of a layer's attention; what was put in its place later may have none."""
    return vars(layer).get("_config", getattr(layer.attention, "config", None))


def _gathers(module: nn.Module) -> bool:
    """Whether processes gather weights together, where transformers drops no layer."""
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(module)


def _is_gelu(activation: Any) -> bool:
    return is_plain(activation, GELUActivation)


def _is_usual(asked: dict[str, Any], config: Any) -> bool:
    """Whether a call asks for nothing but the formula."""
    if asked and (
        asked.get("output_attentions") or any(asked[name] is not None for name in asked if name not in _HARMLESS)
    ):
        return False
    name = config._attn_implementation
    if name not in _ATTENTIONS:
        return False
    function = ALL_ATTENTION_FUNCTIONS.get(name)  # anybody may register another
    return function is None if name == "eager" else function.__module__.startswith("transformers.integrations.")


def _layout_of_call(x: Tensor, mask: Any, asked: dict[str, Any], config: Any) -> Optional[Rows]:
    """The rows of a grid that a layer or an attention was called with; None: transformers' forward is to compute it."""
    if x.ndim != 3 or not _is_usual(asked, config):
        return None
    batch, frames = x.shape[:2]
    if mask is None:
        return whole_grid(batch, frames, None, x.device)
    layout, version = getattr(mask, "_of_layout", (None, None))
    if layout is None or (layout.batch, layout.frames) != (batch, frames) or version != _version(mask):
        return None
    return layout


def _version(mask: Any) -> Optional[int]:
    return mask._version if isinstance(mask, Tensor) and not mask.is_inference() else None


def _mask_of_layout(layout: Rows, grid: Tensor, config: Any) -> Any:
    """transformers' attention mask of a layout, which knows the layout that it was made of; None: all keys."""
    padding = layout.padding_mask()
    if padding is None:
        return None
    mask = create_bidirectional_mask(config=config, inputs_embeds=grid, attention_mask=~padding)
    if mask is not None and not torch.compiler.is_compiling():
        mask._of_layout = layout, _version(mask)
    return mask


class HubertFeatureEncoder(_FeatureEncoder, hubert.HubertFeatureEncoder):
    runs_as = feature_extractor.FeatureExtractor


class HubertFeatureProjection(_FeatureProjection, hubert.HubertFeatureProjection):
    runs_as = encoder.FeatureProjection


class HubertPositionalConvEmbedding(_PositionalConvEmbedding, hubert.HubertPositionalConvEmbedding):
    runs_as = positional_embedding.ConvolutionalPositionalEmbedding


class HubertAttention(_Attention, hubert.HubertAttention):
    runs_as = encoder_layer.SelfAttention


class HubertFeedForward(_FeedForward, hubert.HubertFeedForward):
    runs_as = encoder_layer.FeedForward


class HubertEncoderLayer(_PostNormLayer, hubert.HubertEncoderLayer):
    runs_as = encoder_layer.EncoderLayer


class HubertEncoderLayerStableLayerNorm(_PreNormLayer, hubert.HubertEncoderLayerStableLayerNorm):
    runs_as = encoder_layer.EncoderLayer


class HubertEncoder(_PostNormEncoder, hubert.HubertEncoder):
    runs_as = transformer.Transformer


class HubertEncoderStableLayerNorm(_PreNormEncoder, hubert.HubertEncoderStableLayerNorm):
    runs_as = transformer.Transformer


class Wav2Vec2FeatureEncoder(_FeatureEncoder, wav2vec2.Wav2Vec2FeatureEncoder):
    runs_as = feature_extractor.FeatureExtractor


class Wav2Vec2FeatureProjection(_FeatureProjection, wav2vec2.Wav2Vec2FeatureProjection):
    runs_as = encoder.FeatureProjection

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The projected and the normalised features."""
        normed = normalized_stream(self.layer_norm, hidden_states.flatten(0, -2))
        return self._projected(normed.operand, hidden_states), normed.x.view(hidden_states.shape)


class Wav2Vec2PositionalConvEmbedding(_PositionalConvEmbedding, wav2vec2.Wav2Vec2PositionalConvEmbedding):
    runs_as = positional_embedding.ConvolutionalPositionalEmbedding


class Wav2Vec2Attention(_Attention, wav2vec2.Wav2Vec2Attention):
    runs_as = encoder_layer.SelfAttention


class Wav2Vec2FeedForward(_FeedForward, wav2vec2.Wav2Vec2FeedForward):
    runs_as = encoder_layer.FeedForward


class Wav2Vec2EncoderLayer(_PostNormLayer, wav2vec2.Wav2Vec2EncoderLayer):
    runs_as = encoder_layer.EncoderLayer


class Wav2Vec2EncoderLayerStableLayerNorm(_PreNormLayer, wav2vec2.Wav2Vec2EncoderLayerStableLayerNorm):
    runs_as = encoder_layer.EncoderLayer


class Wav2Vec2Encoder(_PostNormEncoder, wav2vec2.Wav2Vec2Encoder):
    runs_as = transformer.Transformer


class Wav2Vec2EncoderStableLayerNorm(_PreNormEncoder, wav2vec2.Wav2Vec2EncoderStableLayerNorm):
    runs_as = transformer.Transformer


_PADS = {hubert.HubertSamePadLayer, wav2vec2.Wav2Vec2SamePadLayer}
_BLOCKS = {
    hubert.HubertGroupNormConvLayer,
    hubert.HubertLayerNormConvLayer,
    hubert.HubertNoLayerNormConvLayer,
    wav2vec2.Wav2Vec2GroupNormConvLayer,
    wav2vec2.Wav2Vec2LayerNormConvLayer,
    wav2vec2.Wav2Vec2NoLayerNormConvLayer,
}


def kinds() -> dict[type[nn.Module], type[nn.Module]]:
    """The accelerated class for each of transformers'."""
    return accelerated_classes(globals())
