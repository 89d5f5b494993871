"""Initial weights, names, shapes and signatures are torchaudio's."""

import inspect
from unittest import mock

import pytest
import torch

import hubert_fast
from hubert_fast import models
from tests import torchaudio_peer
from tests.models import configurations

PRETRAIN = ["hubert_pretrain_model", "hubert_pretrain_base", "hubert_pretrain_large", "hubert_pretrain_xlarge"]
ENCODERS = ["hubert_base", "hubert_large", "hubert_xlarge", "wav2vec2_base", "wav2vec2_large", "wav2vec2_large_lv60k"]
ENCODERS += ["wav2vec2_xlsr_300m", "wav2vec2_xlsr_1b", "wav2vec2_xlsr_2b"]
FACTORIES = [*PRETRAIN, "wav2vec2_model", *ENCODERS]


def _published(factory, **arguments):
    """torchaudio's model of a published size and ours, as shapes without memory or initial values."""
    with torch.device("meta"), mock.patch.object(torch.nn.Module, "apply", lambda self, function: self):
        return [getattr(module, factory)(**arguments) for module in (torchaudio_peer.models, models)]


def _assert_same_after_the_same_seed(factory, arguments):
    drawn = []
    for module in (torchaudio_peer.models, models):
        torch.manual_seed(11)
        model = getattr(module, factory)(**arguments)
        drawn.append({**model.state_dict(), "drawn next": torch.rand(3)})
    theirs, ours = drawn
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", configurations.ALL)
def test_same_seed_same_initial_weights_and_same_random_stream_afterwards(name):
    _assert_same_after_the_same_seed("hubert_pretrain_model", configurations.ALL[name])


@pytest.mark.parametrize("aux_num_out", [None, 29])
@pytest.mark.parametrize("name", ["base", "large-bias"])
def test_an_encoder_alone_has_torchaudios_initial_weights_too(name, aux_num_out):
    taken = inspect.signature(torchaudio_peer.models.wav2vec2_model).parameters
    arguments = {key: value for key, value in configurations.ALL[name].items() if key in taken}
    _assert_same_after_the_same_seed("wav2vec2_model", {**arguments, "aux_num_out": aux_num_out})


@pytest.mark.parametrize("factory", ["hubert_base", "wav2vec2_base"])
def test_a_published_size_has_torchaudios_initial_weights(factory):
    _assert_same_after_the_same_seed(factory, {"aux_num_out": 5})


@pytest.mark.parametrize("factory", [*PRETRAIN[1:], *ENCODERS])
def test_published_sizes_have_torchaudios_parameters_and_settings(factory):
    """Settings are numbers that no parameter shows: dropouts, masking, heads, LayerDrop, the gradient's factor."""
    both = _published(factory, **({"aux_num_out": 29} if factory in ENCODERS else {}))
    theirs, ours = ([(name, tuple(each.shape)) for name, each in model.named_parameters()] for model in both)
    assert ours == theirs
    assert list(both[0].state_dict()) == list(both[1].state_dict())
    names = {"p", "dropout", "num_heads", "layer_drop", "layer_norm_first"}
    if factory in PRETRAIN:
        names |= {"feature_grad_mult", "skip_masked", "skip_nomask"}
    theirs, ours = (
        {
            (module, name): value
            for module, each in model.named_modules()
            for name, value in vars(each).items()
            if name in names or name.startswith(("mask_", "no_mask"))
        }
        for model in both
    )
    assert names <= {name for _, name in theirs} and ours == theirs


@pytest.mark.parametrize("factory", FACTORIES)
def test_signatures_are_torchaudios_with_keywords_added(factory):
    theirs = inspect.signature(getattr(torchaudio_peer.models, factory)).parameters
    ours = inspect.signature(getattr(models, factory)).parameters
    shared = list(ours.values())[: len(theirs)]
    assert [(p.name, p.default, p.kind) for p in shared] == [(p.name, p.default, p.kind) for p in theirs.values()]
    added = list(ours.values())[len(theirs) :]
    assert [p.name for p in added] == ["padding_invariant"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is False for p in added)


def test_the_names_of_torchaudio_are_in_the_package_and_in_its_models():
    for name in ("HuBERTPretrainModel", "Wav2Vec2Model", *FACTORIES):
        assert hasattr(torchaudio_peer.models, name)
        assert getattr(hubert_fast, name) is getattr(models, name)
        assert name in hubert_fast.__all__ and name in models.__all__


METHODS = {"HuBERTPretrainModel": ["__init__", "forward"], "Wav2Vec2Model": ["__init__", "forward", "extract_features"]}


@pytest.mark.parametrize(("name", "method"), [(name, each) for name, methods in METHODS.items() for each in methods])
def test_methods_take_torchaudios_arguments(name, method):
    theirs, given = (
        inspect.signature(getattr(getattr(module, name), method)).parameters.values()
        for module in (torchaudio_peer.models, hubert_fast)
    )
    expected, given = [(p.name, p.default) for p in theirs], list(given)
    assert [(p.name, p.default) for p in given[: len(expected)]] == expected
    assert all(p.default is not p.empty for p in given[len(expected) :])
