"""torchaudio's models, accelerated where they stand, give their own numbers."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

import hubert_fast
from tests import torchaudio_peer
from tests.models import configurations
from tests.models.twins import (
    LENGTHS,
    assert_gradients_match,
    assert_outputs_match,
    batch,
    gradients,
    recipe_loss,
    relative_error,
    seeded,
    twins,
    valid_frames,
)

models = torchaudio_peer.models
VALID = valid_frames(LENGTHS)


def _theirs(dtype=torch.float64, **settings):
    """torchaudio's model, and how many times one of its layers ran on our rows."""
    return twins(configurations.base(**settings), dtype)[0]


def _step(model, data):
    model.zero_grad()
    outputs = seeded(model, data)
    recipe_loss(outputs, unmasked_weight=0.5).backward()
    return outputs, {name: each.clone() for name, each in gradients(model).items() if each is not None}


@pytest.mark.parametrize("name", configurations.ALL)
def test_outputs_and_gradients_are_those_of_before(name, rows):
    theirs = twins(configurations.ALL[name], torch.float64)[0]
    data = batch(torch.float64, LENGTHS)
    wanted = _step(theirs, data)
    assert not rows
    result = hubert_fast.accelerate(theirs)
    outputs = _step(theirs, data)
    assert rows == [int(VALID.sum())] * 2 and not result.left
    assert (
        {"", "wav2vec2.encoder.transformer.layers.1.attention"}
        < {*result.fused}
        < {name for name, _ in theirs.named_modules()}
    )
    assert_outputs_match(outputs[0], wanted[0], 1e-10)
    assert_gradients_match(outputs[1], wanted[1], 1e-8)


def test_it_is_what_it_was_to_whoever_holds_it():
    model = _theirs()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    state, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    _step(model, batch(torch.float64, LENGTHS))
    optimizer.step()
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    hubert_fast.accelerate(model)
    assert all(map(lambda mine, theirs: mine is theirs, model.parameters(), parameters))
    assert state.keys() == model.state_dict().keys() and all(
        torch.equal(model.state_dict()[key], weights[key]) for key in state
    )
    assert repr(optimizer.state_dict()) == repr(optimizer_state)
    assert isinstance(model, models.HuBERTPretrainModel) and isinstance(model, hubert_fast.HuBERTPretrainModel)
    layer = model.wav2vec2.encoder.transformer.layers[0]
    assert isinstance(layer, torchaudio_peer.components.EncoderLayer) and type(layer).__name__ == "EncoderLayer"


def test_it_is_undone():
    model = _theirs()
    classes, attributes = [type(each) for each in model.modules()], [set(vars(each)) for each in model.modules()]
    for _ in range(2):
        hubert_fast.accelerate(model)
        assert [type(each) for each in model.modules()] != classes
    hubert_fast.unaccelerate(model)
    assert [type(each) for each in model.modules()] == classes
    assert [set(vars(each)) for each in model.modules()] == attributes


def test_a_model_of_ours_is_left_as_it_is():
    ours = twins(configurations.base())[1]
    assert hubert_fast.accelerate(ours) == ([], {}) and type(ours) is hubert_fast.HuBERTPretrainModel


def test_accelerating_twice_is_accelerating_once():
    model = _theirs()
    first, second = (hubert_fast.accelerate(model) for _ in range(2))
    assert first == second


def test_a_copy_is_accelerated_too(rows):
    model, data = _theirs(), batch(torch.float64, LENGTHS)
    wanted = seeded(model, data)
    hubert_fast.accelerate(model)
    assert_outputs_match(seeded(copy.deepcopy(model), data), wanted, 1e-10)
    assert len(rows) == 2
    layer = model.wav2vec2.encoder.transformer.layers[0]
    assert type(pickle.loads(pickle.dumps(layer))) is type(
        layer
    )  # of the whole, PyTorch pickles no parametrized module


def test_the_objective_and_its_graphed_step_take_it():
    theirs, ours = twins(configurations.base(), torch.float64)
    hubert_fast.accelerate(theirs)
    data = batch(torch.float64, LENGTHS)
    losses = [seeded(hubert_fast.PretrainingObjective(each), data).loss for each in (theirs, ours)]
    assert torch.equal(*losses)
    objective = hubert_fast.PretrainingObjective(theirs)
    step = hubert_fast.GraphedStep(objective, torch.optim.SGD(objective.parameters(), 0.0))
    torch.manual_seed(0)
    result = step([step.planner(*data)])
    assert relative_error(result.loss, losses[1]) <= 1e-10


def test_features_and_a_head_on_them_are_those_of_before():
    torch.manual_seed(0)
    shape = {key: value for key, value in configurations.base().items() if key.startswith(("extractor", "encoder"))}
    model = models.wav2vec2_model(**shape, aux_num_out=11).double().eval()
    waveforms, _, lengths = batch(torch.float64, LENGTHS)
    wanted = model(waveforms, lengths), model.extract_features(waveforms, lengths)
    assert not hubert_fast.accelerate(model).left
    (output, frames), (layers, more) = model(waveforms, lengths), model.extract_features(waveforms, lengths)
    assert torch.equal(frames, wanted[0][1]) and torch.equal(more, wanted[1][1])
    for mine, their in zip([output, *layers], [wanted[0][0], *wanted[1][0]], strict=True):
        assert relative_error(mine[VALID], their[VALID]) <= 1e-10


class _Adapter(nn.Module):
    """A low-rank update beside a Linear, as LoRA's."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(128, 2, bias=False), nn.Linear(2, 128, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def _hook(model):
    model.wav2vec2.encoder.transformer.layers[1].register_forward_hook(
        lambda module, given, output: (0.9 * output[0], None)
    )


def _adapt(model):
    torch.manual_seed(7)
    for layer in model.wav2vec2.encoder.transformer.layers:
        layer.attention.q_proj = _Adapter(layer.attention.q_proj).double()


def _patch(model):
    layer = model.wav2vec2.encoder.transformer.layers[0]
    forward = layer.feed_forward.forward
    layer.feed_forward.forward = lambda x: 0.9 * forward(x)


def _block(model):
    model.wav2vec2.feature_extractor.conv_layers[2].register_forward_hook(
        lambda module, given, output: (0.9 * output[0], output[1])
    )


CHANGES = {
    "hook": (_hook, "wav2vec2.encoder.transformer.layers.1", "it has hooks"),
    "adapter": (
        _adapt,
        "wav2vec2.encoder.transformer.layers.0.attention.q_proj",
        "_Adapter is no module that is fused",
    ),
    "forward": (_patch, "wav2vec2.encoder.transformer.layers.0.feed_forward", "its forward was replaced"),
    "convolution": (_block, "wav2vec2.feature_extractor.conv_layers.2", "it has hooks"),
}


@pytest.mark.parametrize("first", ["changed", "accelerated"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_before_or_after_is_honoured_and_listed(change, first, rows):
    change, name, why = CHANGES[change]
    data, plain, wanted, model = batch(torch.float64, LENGTHS), _theirs(), _theirs(), _theirs()
    change(wanted)
    wanted = _step(wanted, data)
    for each in (change, hubert_fast.accelerate) if first == "changed" else (hubert_fast.accelerate, change):
        each(model)
    left = hubert_fast.accelerate(model).left
    assert why in left[name]
    if first == "changed" and change is not _patch:  # a patched forward is a bound method of the class that it was
        hubert_fast.unaccelerate(model)
        hubert_fast.accelerate(model)
    outputs = _step(model, data)
    assert len(rows) == 2
    assert_outputs_match(outputs[0], wanted[0], 1e-10)
    assert_gradients_match(outputs[1], wanted[1], 1e-8)
    assert relative_error(outputs[0][0], seeded(plain, data)[0]) > 1e-6


def test_what_computes_something_else_stays_and_is_listed():
    data, model = batch(torch.float64, LENGTHS), _theirs()
    model.wav2vec2.feature_extractor.conv_layers[0].layer_norm.eps = 0.1
    wanted = seeded(model, data)
    left = hubert_fast.accelerate(model).left
    assert list(left) == ["wav2vec2.feature_extractor"] and "eps" in left["wav2vec2.feature_extractor"]
    assert_outputs_match(seeded(model, data), wanted, 1e-10)
    assert (
        str(hubert_fast.accelerate(model)).splitlines()[1].startswith("wav2vec2.feature_extractor is called as it is: ")
    )


def test_other_models_are_refused_and_left_alone():
    wavlm = models.wavlm_model(
        **{key: value for key, value in configurations.base().items() if key.startswith(("extractor", "encoder"))},
        encoder_num_buckets=8, encoder_max_distance=16, aux_num_out=None,
    )  # fmt: skip
    classes = [type(each) for each in wavlm.modules()]
    with pytest.raises(TypeError, match="WavLM"):
        hubert_fast.accelerate(wavlm)
    assert [type(each) for each in wavlm.modules()] == classes
    with pytest.raises(TypeError, match="WavLM"):
        hubert_fast.accelerate(wavlm.encoder.transformer.layers[0])
    with pytest.raises(TypeError, match="model must be or hold a HuBERT or wav2vec 2.0 .*got Linear"):
        hubert_fast.accelerate(nn.Linear(2, 2))
    for wrong, given in (
        ("facebook/hubert-base-ls960", "str"),
        (None, "NoneType"),
        (models.Wav2Vec2Model, "Wav2Vec2Model"),
    ):
        with pytest.raises(TypeError, match=f"model must be a module, such as .*; got {given}$"):
            hubert_fast.accelerate(wrong)


def test_a_part_that_was_replaced_since_does_not_keep_it_from_being_undone():
    model = _theirs()
    hubert_fast.accelerate(model)
    model.wav2vec2.feature_extractor.conv_layers[0] = nn.Sequential()
    model.mask_generator.mask_embedding = None
    hubert_fast.unaccelerate(model)
    assert not any(isinstance(each, hubert_fast.HuBERTPretrainModel) for each in model.modules())
    assert not any("_added" in vars(each) for each in model.modules())


def test_parts_alone_are_accelerated_and_undone():
    data, model = batch(torch.float64, LENGTHS), _theirs()
    wanted = seeded(model, data)
    for part in ("wav2vec2.encoder", "wav2vec2.encoder.transformer.layers", "mask_generator"):
        assert hubert_fast.accelerate(model.get_submodule(part)).fused
        assert_outputs_match(seeded(model, data), wanted, 1e-10)
    hubert_fast.accelerate(model)
    for part in ("wav2vec2.encoder", "logit_generator"):
        hubert_fast.unaccelerate(model.get_submodule(part))
        assert_outputs_match(seeded(model, data), wanted, 1e-10)


def test_a_version_that_is_unknown_is_named(monkeypatch):
    model, name = _theirs(), "transformers.models.hubert.modeling_hubert"
    monkeypatch.setitem(sys.modules, name, sys)
    monkeypatch.setitem(sys.modules, "hubert_fast.interop.transformers_modules", None)
    assert hubert_fast.accelerate(model).fused  # torchaudio's do not need it
    with pytest.raises(TypeError, match=rf"got Linear; {name} of version .* has other modules than those known here"):
        hubert_fast.accelerate(nn.Linear(2, 2))


def test_layer_drop_leaves_out_what_torchaudio_leaves_out():
    data, model = batch(torch.float64, LENGTHS), _theirs(encoder_layer_drop=0.5, encoder_num_layers=4)
    wanted = _step(model, data)[1]
    hubert_fast.accelerate(model)
    assert _step(model, data)[1].keys() == wanted.keys() < dict(model.named_parameters()).keys()


def test_factories_of_torchaudio_return_ours_until_it_is_undone():
    original = models.hubert_pretrain_model
    torch.manual_seed(0)
    expected = original(**configurations.base()).state_dict()
    with hubert_fast.patch_torchaudio():
        hubert_fast.patch_torchaudio()  # a second time is nothing
        torch.manual_seed(0)
        model = models.hubert_pretrain_model(**configurations.base())
        assert isinstance(model, hubert_fast.HuBERTPretrainModel) and isinstance(model, models.HuBERTPretrainModel)
        assert type(models.wav2vec2.model.hubert_pretrain_model(**configurations.base())) is type(model)
        assert all(torch.equal(each, expected[name]) for name, each in model.state_dict().items())
        assert not isinstance(models.wavlm_base, type(models.hubert_base)) or "wavlm" in models.wavlm_base.__name__
    assert models.hubert_pretrain_model is original
    assert not isinstance(models.hubert_pretrain_model(**configurations.base()), hubert_fast.HuBERTPretrainModel)
