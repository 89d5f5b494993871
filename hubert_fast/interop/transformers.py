"""Weights to and from transformers' ``HubertModel``.

    config = transformers.HubertConfig()  # HuBERT Base; the larger ones have feat_extract_norm="layer", do_stable_layer_norm=True
    theirs = transformers.HubertModel(config)
    theirs.load_state_dict(to_transformers(model.state_dict()))
    model.wav2vec2.load_state_dict(from_transformers(theirs.state_dict(), config=theirs.config))

Tensors are handed on as they are, neither copied nor changed: there and back gives the same bits. Entries are renamed one by one,
and one that has no counterpart keeps its name: ``load_state_dict``, strict by default, names it and those that are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from torch import Tensor

_MODEL = "wav2vec2."
_HEAD = "logit_generator."
_MASK, _THEIR_MASK = "mask_generator.mask_embedding", "masked_spec_embed"

# (in a Wav2Vec2Model, in a HubertModel)
_PREFIXES = (
    ("encoder.feature_projection.", "feature_projection."),
    ("encoder.transformer.", "encoder."),
    ("feature_extractor.", "feature_extractor."),
)

# How published files of weights name the two parts of the weight-normalised convolution, and how modules do.
_GAIN_AND_DIRECTION = (
    (".conv.weight_g", ".conv.parametrizations.weight.original0"),
    (".conv.weight_v", ".conv.parametrizations.weight.original1"),
)

# Settings that change what a HubertModel computes and that no model here has; weights tell nothing of them.
_ONLY_VALUES = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "conv_pos_batch_norm": False,
    "feat_proj_layer_norm": True,
}


def to_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ``state_dict`` of a ``HubertModel`` of the same architecture.

    Args:
        state_dict: of a `HuBERTPretrainModel`, ours or torchaudio's, or of a `Wav2Vec2Model`. The head of the first
            (``logit_generator``) has no counterpart and is left out; the second has no mask embedding, which a HubertModel has
            unless ``mask_time_prob`` and ``mask_feature_prob`` are 0.

    Returns:
        The same tensors under transformers' names, all that ``load_state_dict(strict=True)`` asks for.
    """
    return {_theirs(name): tensor for name, tensor in state_dict.items() if not name.startswith(_HEAD)}


def from_transformers(
    state_dict: Mapping[str, Tensor], *, head: Optional[Mapping[str, Tensor]] = None, config: Any = None
) -> dict[str, Tensor]:
    """The ``state_dict`` of a `Wav2Vec2Model` or, with a ``head``, of a `HuBERTPretrainModel`; also torchaudio's.

    Args:
        state_dict: of a ``HubertModel``; of models with a head on it, such as ``HubertForCTC``, take that of ``.hubert``.
        head: where the entries of ``logit_generator`` come from, which a HubertModel has not: the ``state_dict`` of the
            `HuBERTPretrainModel` that is to be filled. Its other entries are not read.
        config: the ``HubertConfig`` of the weights. They fit a model that computes something else where it has settings that no
            model here has; those that one can have are in `encoder_arguments`.

    Returns:
        The same tensors under our names, all that ``load_state_dict(strict=True)`` asks for. Without ``head`` the mask
        embedding has no place and is left out.

    Raises:
        ValueError: for a ``config`` of another function than any model here computes.
    """
    if config is not None:
        _require_same_function(config)
    encoder = {_mine(name): tensor for name, tensor in state_dict.items() if name != _THEIR_MASK}
    if head is None:
        return encoder
    mask = {_MASK: state_dict[_THEIR_MASK]} if _THEIR_MASK in state_dict else {}
    given = {name: tensor for name, tensor in head.items() if name.startswith(_HEAD)}
    return {**mask, **{_MODEL + name: tensor for name, tensor in encoder.items()}, **given}


def encoder_arguments(config: Any) -> dict[str, Any]:
    """The arguments of `hubert_fast.hubert_pretrain_model` that a ``HubertConfig`` decides: the encoder's, less dropout.

    Raises:
        ValueError: for a ``config`` of another function than any model here computes.
    """
    _require_same_function(config)
    return {
        "extractor_mode": {"group": "group_norm", "layer": "layer_norm"}[config.feat_extract_norm],
        "extractor_conv_layer_config": list(zip(config.conv_dim, config.conv_kernel, config.conv_stride)),
        "extractor_conv_bias": config.conv_bias,
        "encoder_embed_dim": config.hidden_size,
        "encoder_pos_conv_kernel": config.num_conv_pos_embeddings,
        "encoder_pos_conv_groups": config.num_conv_pos_embedding_groups,
        "encoder_num_layers": config.num_hidden_layers,
        "encoder_num_heads": config.num_attention_heads,
        "encoder_ff_interm_features": config.intermediate_size,
        "encoder_layer_norm_first": config.do_stable_layer_norm,
    }


def _require_same_function(config: Any) -> None:
    for name, only in _ONLY_VALUES.items():
        given = getattr(config, name, only)
        if given != only:
            raise ValueError(f"config.{name}={given!r}: models here compute {only!r} alone")


def _theirs(name: str) -> str:
    """HubertModel's name of an entry of a `HuBERTPretrainModel` or a `Wav2Vec2Model`."""
    if name == _MASK:
        return _THEIR_MASK
    name = name.removeprefix(_MODEL)
    for mine, theirs in _PREFIXES:
        if name.startswith(mine):
            return theirs + name.removeprefix(mine)
    return name


def _mine(name: str) -> str:
    """A Wav2Vec2Model's name of a HubertModel's entry."""
    for old, new in _GAIN_AND_DIRECTION:
        if name.endswith(old):
            name = name.removesuffix(old) + new
    for mine, theirs in _PREFIXES:
        if name.startswith(theirs):
            return mine + name.removeprefix(theirs)
    return name
