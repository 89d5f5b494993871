"""Initial weights, names, shapes and signatures are torchaudio's, and weights travel both ways."""

import inspect
from unittest import mock

import pytest
import torch

import hubert_fast
from tests import torchaudio_peer
from tests.models import configurations

FACTORIES = ["hubert_pretrain_model", "hubert_pretrain_base", "hubert_pretrain_large", "hubert_pretrain_xlarge"]


def _published(factory):
    """torchaudio's model of a published size and ours, as shapes without memory or initial values."""
    with torch.device("meta"), mock.patch.object(torch.nn.Module, "apply", lambda self, function: self):
        return getattr(torchaudio_peer.models, factory)(), getattr(hubert_fast, factory)()


@pytest.mark.parametrize("name", configurations.ALL)
def test_same_seed_same_initial_weights_and_same_random_stream_afterwards(name):
    torch.manual_seed(11)
    theirs = torchaudio_peer.models.hubert_pretrain_model(**configurations.ALL[name])
    expected_next = torch.rand(3)
    torch.manual_seed(11)
    ours = hubert_fast.hubert_pretrain_model(**configurations.ALL[name])
    assert torch.equal(torch.rand(3), expected_next)
    for (key, value), (their_key, their_value) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert key == their_key and torch.equal(value, their_value), key


@pytest.mark.parametrize("name", configurations.ALL)
def test_state_dict_loads_strictly_in_both_directions_bit_for_bit(name):
    theirs = torchaudio_peer.models.hubert_pretrain_model(**configurations.ALL[name])
    ours = hubert_fast.hubert_pretrain_model(**configurations.ALL[name])
    back = torchaudio_peer.models.hubert_pretrain_model(**configurations.ALL[name])
    ours.load_state_dict(theirs.state_dict(), strict=True)
    back.load_state_dict(ours.state_dict(), strict=True)
    for (key, value), travelled in zip(theirs.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(value, travelled), key


@pytest.mark.parametrize("factory", FACTORIES[1:])
def test_published_sizes_have_torchaudios_parameters(factory):
    theirs, ours = _published(factory)
    shapes = [[(name, tuple(each.shape)) for name, each in model.named_parameters()] for model in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert list(theirs.state_dict()) == list(ours.state_dict())


@pytest.mark.parametrize("factory", FACTORIES[1:])
def test_published_sizes_have_torchaudios_settings(factory):
    """Numbers that no parameter shows: dropouts, masking, heads, LayerDrop, the gradient's factor."""
    theirs, ours = _published(factory)
    keys = [each for each in vars(theirs.mask_generator) if each.startswith(("mask_", "no_mask"))]
    assert keys and all(getattr(ours.mask_generator, key) == getattr(theirs.mask_generator, key) for key in keys)
    assert ours.feature_grad_mult == theirs.feature_grad_mult
    assert ours.logit_generator.skip_masked == theirs.logit_generator.skip_masked
    assert ours.logit_generator.skip_nomask == theirs.logit_generator.skip_nomask
    pairs = [
        (model.wav2vec2.encoder.transformer, model.wav2vec2.encoder.feature_projection) for model in (ours, theirs)
    ]
    (transformer, projection), (their_transformer, their_projection) = pairs
    assert transformer.layer_drop == their_transformer.layer_drop
    assert transformer.layer_norm_first == their_transformer.layer_norm_first
    dropouts = [
        [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        for model in (transformer, their_transformer)
    ]
    assert dropouts[0] == dropouts[1] and projection.dropout.p == their_projection.dropout.p
    for layer, their_layer in zip(transformer.layers, their_transformer.layers, strict=True):
        assert layer.attention.num_heads == their_layer.attention.num_heads
        assert layer.attention.dropout == their_layer.attention.dropout
        assert layer.layer_norm_first == their_layer.layer_norm_first


@pytest.mark.parametrize("factory", FACTORIES)
def test_signatures_are_torchaudios_with_keywords_added(factory):
    theirs = inspect.signature(getattr(torchaudio_peer.models, factory)).parameters
    ours = inspect.signature(getattr(hubert_fast, factory)).parameters
    shared = list(ours.values())[: len(theirs)]
    assert [(p.name, p.default, p.kind) for p in shared] == [(p.name, p.default, p.kind) for p in theirs.values()]
    added = list(ours.values())[len(theirs) :]
    assert [p.name for p in added] == ["padding_invariant"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is False for p in added)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (hubert_fast.HuBERTPretrainModel.__init__, torchaudio_peer.models.HuBERTPretrainModel.__init__),
        (hubert_fast.HuBERTPretrainModel.forward, torchaudio_peer.models.HuBERTPretrainModel.forward),
        (hubert_fast.Wav2Vec2Model.__init__, torchaudio_peer.models.Wav2Vec2Model.__init__),
        (hubert_fast.Wav2Vec2Model.forward, torchaudio_peer.models.Wav2Vec2Model.forward),
        (hubert_fast.Wav2Vec2Model.extract_features, torchaudio_peer.models.Wav2Vec2Model.extract_features),
    ],
)
def test_methods_take_torchaudios_arguments(ours, theirs):
    expected = [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()]
    given = inspect.signature(ours).parameters.values()
    assert [(p.name, p.default) for p in given if p.kind is not p.KEYWORD_ONLY] == expected
