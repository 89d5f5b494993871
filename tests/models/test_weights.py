"""Initial weights, names, shapes and signatures are torchaudio's."""

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
    drawn = []
    for module in (torchaudio_peer.models, hubert_fast):
        torch.manual_seed(11)
        model = module.hubert_pretrain_model(**configurations.ALL[name])
        drawn.append({**model.state_dict(), "drawn next": torch.rand(3)})
    theirs, ours = drawn
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("factory", FACTORIES[1:])
def test_published_sizes_have_torchaudios_parameters_and_settings(factory):
    """Settings are numbers that no parameter shows: dropouts, masking, heads, LayerDrop, the gradient's factor."""
    models = _published(factory)
    theirs, ours = ([(name, tuple(each.shape)) for name, each in model.named_parameters()] for model in models)
    assert ours == theirs
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    names = {"p", "dropout", "num_heads", "layer_drop", "layer_norm_first", "feature_grad_mult"}
    names |= {"skip_masked", "skip_nomask"}
    theirs, ours = (
        {
            (module, name): value
            for module, each in model.named_modules()
            for name, value in vars(each).items()
            if name in names or name.startswith(("mask_", "no_mask"))
        }
        for model in models
    )
    assert names <= {name for _, name in theirs} and ours == theirs


@pytest.mark.parametrize("factory", FACTORIES)
def test_signatures_are_torchaudios_with_keywords_added(factory):
    theirs = inspect.signature(getattr(torchaudio_peer.models, factory)).parameters
    ours = inspect.signature(getattr(hubert_fast, factory)).parameters
    shared = list(ours.values())[: len(theirs)]
    assert [(p.name, p.default, p.kind) for p in shared] == [(p.name, p.default, p.kind) for p in theirs.values()]
    added = list(ours.values())[len(theirs) :]
    assert [p.name for p in added] == ["padding_invariant"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is False for p in added)


METHODS = {"HuBERTPretrainModel": ["__init__", "forward"], "Wav2Vec2Model": ["__init__", "forward", "extract_features"]}


@pytest.mark.parametrize(("name", "method"), [(name, each) for name, methods in METHODS.items() for each in methods])
def test_methods_take_torchaudios_arguments(name, method):
    theirs, given = (
        inspect.signature(getattr(getattr(module, name), method)).parameters.values()
        for module in (torchaudio_peer.models, hubert_fast)
    )
    expected = [(p.name, p.default) for p in theirs]
    assert [(p.name, p.default) for p in given if p.kind is not p.KEYWORD_ONLY] == expected
