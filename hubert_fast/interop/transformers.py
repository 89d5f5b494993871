"""Weights to and from transformers' ``HubertModel``.

    config = transformers.HubertConfig()  # HuBERT Base; the larger ones have feat_extract_norm="layer", do_stable_layer_norm=True
    theirs = transformers.HubertModel(config)
    theirs.load_state_dict(to_transformers(model.state_dict()))
    model.wav2vec2.load_state_dict(from_transformers(theirs.state_dict()))

Tensors are handed on as they are, neither copied nor changed: there and back gives the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Optional

from torch import Tensor

_MODEL = "wav2vec2."
_HEAD = "logit_generator."
_MASK = ("mask_generator.mask_embedding", "masked_spec_embed")

# The head of `HuBERTPretrainModel`, for which HubertModel has no place.
_HEAD_NAMES = tuple(_HEAD + name for name in ("label_embeddings", "final_proj.weight", "final_proj.bias"))

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

_OF_A_LAYER = (
    *(f"attention.{name}_proj" for name in "kvq"),
    "attention.out_proj",
    "layer_norm",
    "feed_forward.intermediate_dense",
    "feed_forward.output_dense",
    "final_layer_norm",
)


def to_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ``state_dict`` of a ``HubertModel`` of the same architecture.

    Args:
        state_dict: of a `HuBERTPretrainModel`, ours or torchaudio's, or of a `Wav2Vec2Model`. The head of the first
            (``logit_generator``) has no counterpart and is left out; the second has no mask embedding, which a HubertModel has
            unless ``mask_time_prob`` and ``mask_feature_prob`` are 0.

    Returns:
        The same tensors under transformers' names, all that ``load_state_dict(strict=True)`` asks for.

    Raises:
        ValueError: naming the entries that are missing or have no counterpart.
    """
    pretraining = any(name.startswith(_MODEL) for name in state_dict)
    prefix = _MODEL if pretraining else ""
    mine = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
    names = {prefix + name: _theirs(name) for name in _expected(mine)}
    if pretraining:
        names[_MASK[0]] = _MASK[1]
    _check(state_dict, [*names, *(_HEAD_NAMES if pretraining else ())])
    return {theirs: state_dict[name] for name, theirs in names.items()}


def from_transformers(
    state_dict: Mapping[str, Tensor], *, head: Optional[Mapping[str, Tensor]] = None
) -> dict[str, Tensor]:
    """The ``state_dict`` of a `Wav2Vec2Model` or, with a ``head``, of a `HuBERTPretrainModel`; also torchaudio's.

    Args:
        state_dict: of a ``HubertModel``; of models with a head on it, such as ``HubertForCTC``, take that of ``.hubert``.
        head: where the entries of ``logit_generator`` come from, which a HubertModel has not: the ``state_dict`` of the
            `HuBERTPretrainModel` that is to be filled. Its other entries are not read.

    Returns:
        The same tensors under our names, all that ``load_state_dict(strict=True)`` asks for. Without ``head`` the mask
        embedding has no place and is left out.

    Raises:
        ValueError: naming the entries that are missing or have no counterpart.
    """
    state_dict = {_modern(name): tensor for name, tensor in state_dict.items()}
    mine = [_mine(name) for name in state_dict]
    names = {name: _theirs(name) for name in _expected(mine)}
    has_mask = _MASK[1] in state_dict or head is not None
    _check(state_dict, [*names.values(), *(_MASK[1:] if has_mask else ())])
    if head is None:
        return {name: state_dict[theirs] for name, theirs in names.items()}
    given = {name: tensor for name, tensor in head.items() if name.startswith(_HEAD)}
    _check(given, _HEAD_NAMES)
    return {_MASK[0]: state_dict[_MASK[1]], **{_MODEL + m: state_dict[t] for m, t in names.items()}, **given}


def _theirs(name: str) -> str:
    """HubertModel's name of a Wav2Vec2Model's entry."""
    for mine, theirs in _PREFIXES:
        if name.startswith(mine):
            return theirs + name.removeprefix(mine)
    return name


def _mine(name: str) -> str:
    """The reverse of `_theirs`."""
    for mine, theirs in _PREFIXES:
        if name.startswith(theirs):
            return mine + name.removeprefix(theirs)
    return name


def _modern(name: str) -> str:
    for old, new in _GAIN_AND_DIRECTION:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _expected(names: Iterable[str]) -> Iterator[str]:
    """All entries of a Wav2Vec2Model with as many layers, and convolutions with such norms and biases, as ``names`` tell of."""
    names = set(names)
    convolutions, layers = "feature_extractor.conv_layers.", "encoder.transformer.layers."
    bias = any(re.fullmatch(re.escape(convolutions) + r"\d+\.conv\.bias", name) for name in names)
    norms = {i for i in range(_count(names, convolutions)) if f"{convolutions}{i}.layer_norm.weight" in names}
    for i in range(_count(names, convolutions)):
        yield f"{convolutions}{i}.conv.weight"
        if bias:
            yield f"{convolutions}{i}.conv.bias"
        if i == 0 or norms - {0}:  # group_norm has one on the first, layer_norm on each
            yield from _with_bias(f"{convolutions}{i}.layer_norm")
    yield from _with_bias("encoder.feature_projection.layer_norm")
    yield from _with_bias("encoder.feature_projection.projection")
    positional = "encoder.transformer.pos_conv_embed"
    yield f"{positional}.conv.bias"
    yield from (positional + new for _, new in _GAIN_AND_DIRECTION)
    yield from _with_bias("encoder.transformer.layer_norm")
    for i in range(_count(names, layers)):
        for each in _OF_A_LAYER:
            yield from _with_bias(f"{layers}{i}.{each}")


def _with_bias(module: str) -> tuple[str, str]:
    return f"{module}.weight", f"{module}.bias"


def _count(names: Iterable[str], prefix: str) -> int:
    """How many modules of a list have entries: one more than the last index, and at least one."""
    indices = [re.match(re.escape(prefix) + r"(\d+)\.", name) for name in names]
    return 1 + max((int(match[1]) for match in indices if match), default=0)


def _check(given: Iterable[str], expected: Iterable[str]) -> None:
    given, expected = set(given), set(expected)
    problems = [
        f"{what} {', '.join(sorted(names)[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        for what, names in (("missing:", expected - given), ("without a counterpart:", given - expected))
        if names
    ]
    if problems:
        raise ValueError(f"state_dict cannot be converted; {'; '.join(problems)}")
