"""What users hook, wrap or put in a module's place is called, and the numbers are those of torchaudio's way of running it."""

from unittest import mock

import pytest
import torch
from torch import nn

import hubert_fast
from hubert_fast.models import plain
from hubert_fast.models import transformer as transformer_module
from hubert_fast.models.encoder_layer import EncoderLayer
from tests.models import configurations
from tests.models.twins import LENGTHS, batch, float32_layer_norm, num_frames, relative_error, twins

FRAMES = num_frames(12400)


class _Doubled(nn.Module):
    def __init__(self, inner, factor=2.0):
        super().__init__()
        self.inner, self.factor = inner, factor

    def __getattr__(self, name):
        """As adapters do: the attributes of what is inside."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *arguments, **named):
        return _times(self.factor, self.inner(*arguments, **named))


def _times(factor, output):
    """A layer and an attention return a tuple, as torchaudio's do."""
    return (factor * output[0], *output[1:]) if isinstance(output, tuple) else factor * output


def _model(**settings):
    return twins(configurations.base(**settings), torch.float64)[1]


def _loss(model, **capacities):
    objective, data = hubert_fast.PretrainingObjective(model), batch(torch.float64, LENGTHS)
    torch.manual_seed(0)
    plan = objective.plan(data.labels, data.lengths, samples=12400, device=torch.device("cpu"), **capacities)
    result = objective(data.waveforms, audio_lengths=data.lengths, plan=plan)
    result.loss.backward()
    return result.loss.detach()


def _places(model):
    encoder, transformer = model.wav2vec2.encoder, model.wav2vec2.encoder.transformer
    layer = transformer.layers[0]
    return {
        "attention": (layer, "attention"),
        "out_proj": (layer.attention, "out_proj"),
        "dropout": (layer, "dropout"),
        "layer_norm": (layer, "layer_norm"),
        "feed_forward": (layer, "feed_forward"),
        "intermediate_dropout": (layer.feed_forward, "intermediate_dropout"),
        "output_dropout": (layer.feed_forward, "output_dropout"),
        "conv": (transformer.pos_conv_embed, "conv"),
        "pos_conv_embed": (transformer, "pos_conv_embed"),
        "transformer dropout": (transformer, "dropout"),
        "layer": (transformer.layers, "0"),
        "feature projection": (encoder, "feature_projection"),
        "projection dropout": (encoder.feature_projection, "dropout"),
    }


PLACES = list(_places(_model()))


def _replace(parent, name, factor):
    setattr(parent, name, _Doubled(getattr(parent, name), factor))


def _hook(parent, name, factor):
    getattr(parent, name).register_forward_hook(lambda module, inputs, output: _times(factor, output))


@pytest.mark.parametrize("change", [_replace, _hook])
@pytest.mark.parametrize("place", PLACES)
def test_a_module_in_anothers_place_is_called_and_a_hook_changes_what_it_returns(place, change):
    plain = _loss(_model())
    for factor, same in ((1.0, True), (2.0, False)):
        model = _model()
        change(*_places(model)[place], factor)
        assert (relative_error(_loss(model), plain) < 1e-10) == same


class _Selected(nn.Module):
    """A transformer of somebody else's: no layers, and no attribute of ours."""

    def forward(self, x, attention_mask=None):
        assert x.ndim == 3 and attention_mask.shape == (len(x), 1, x.shape[1], x.shape[1])
        return x


def test_another_transformer_is_called_with_a_grid_and_a_mask_as_torchaudio_calls_it():
    model = _model(encoder_projection_dropout=0.1)
    model.wav2vec2.encoder.transformer = _Selected()
    assert _loss(model).isfinite()


@pytest.mark.parametrize("place", ["pos_conv_embed", "conv", "feature projection"])
def test_dead_rows_reach_no_valid_frame_through_a_module_that_is_called(place):
    model = _model()
    parent, name = _places(model)[place]
    getattr(parent, name).register_forward_hook(lambda *call: None)
    assert relative_error(_loss(model, rows=3 * FRAMES), _loss(_model())) < 1e-10


def test_dead_rows_reach_no_valid_frame_through_a_mask_generator_that_is_called():
    model = _model(mask_channel_prob=0.3)
    wanted = _loss(model)
    model.mask_generator.register_forward_hook(lambda *call: None)
    torch.manual_seed(0)
    assert relative_error(_loss(model, rows=3 * FRAMES), wanted) < 1e-10


def test_dropout_of_everything_is_zeros():
    model = _model(encoder_dropout=1.0, encoder_ff_interm_dropout=1.0)
    assert _loss(model).isfinite()


def test_a_layer_that_is_dropped_in_a_captured_step_is_not_used(monkeypatch):
    """Capture needs a GPU; which numbers it gives does not."""
    monkeypatch.setattr(transformer_module, "_is_capturing", lambda x: True)
    model = _model(encoder_layer_drop=0.5)
    captured = [_loss(model) for _ in range(2)]
    monkeypatch.undo()
    assert torch.equal(captured[0], captured[1]) and torch.equal(captured[0], _loss(model))


def test_a_hooked_layer_is_dropped_in_a_captured_step_whose_stream_has_a_copy(monkeypatch):
    monkeypatch.setattr(plain, "stream_dtype", lambda x: torch.float32)
    losses = []
    for capturing in (False, True):
        monkeypatch.setattr(transformer_module, "_is_capturing", lambda x, capturing=capturing: capturing)
        model = twins(configurations.base(encoder_layer_drop=0.5))[1]
        model.wav2vec2.encoder.transformer.layers[0].register_forward_hook(lambda *call: None)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(hubert_fast.PretrainingObjective(model)(*batch(lengths=LENGTHS)).loss)
    assert torch.equal(*losses)


def test_a_post_norm_stream_is_float32_where_autocast_has_layer_norm_give_float32(monkeypatch):
    """CUDA's autocast does; on a CPU it takes a patch. Twelve layers, as deep as base: bfloat16 streams lose twice as much."""
    settings = configurations.base(encoder_num_layers=12)
    theirs, ours = twins(settings, torch.float32)
    waveforms = batch(torch.float32).waveforms
    truth = ours.double().wav2vec2(waveforms.double())[0]
    ours.float()
    assert plain.stream_dtype(waveforms) is None
    monkeypatch.setattr(plain, "stream_dtype", lambda x: torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = ours.wav2vec2(waveforms)[0]
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "layer_norm", float32_layer_norm)
            expected = theirs.wav2vec2(waveforms)[0]
    assert output.dtype == expected.dtype == torch.float32
    assert relative_error(output, truth) <= 1.5 * relative_error(expected, truth)


def test_weight_normalisation_is_left_to_the_operator(monkeypatch):
    """Asking a parametrized convolution for its weight computes it, 4.7 million numbers for base, for nothing."""
    from torch.nn.utils import parametrizations

    model = _model()
    calls = []
    forward = parametrizations._WeightNorm.forward
    monkeypatch.setattr(parametrizations._WeightNorm, "forward", lambda *each: (calls.append(1), forward(*each))[1])
    _loss(model)
    assert not calls


def test_a_hook_of_all_modules_sees_tensors(monkeypatch):
    """Under CUDA's autocast layers hand each other a stream and its 16-bit copy: not to somebody who looks."""
    monkeypatch.setattr(plain, "stream_dtype", lambda x: torch.float32)
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, given, result: seen.append((module, result))
    )
    model = hubert_fast.hubert_pretrain_model(**configurations.base())
    try:
        with torch.autocast("cpu", torch.bfloat16):
            model.wav2vec2(batch(torch.float32).waveforms)
    finally:
        hook.remove()
    layers = [result for module, result in seen if isinstance(module, EncoderLayer)]
    assert layers and all(isinstance(each, torch.Tensor) for each in layers)


def _hook_of_all_modules(called):
    def note(module, given):
        if isinstance(module, transformer_module.Transformer):
            called.append(module)

    return torch.nn.modules.module.register_module_forward_pre_hook(note).remove


def _compiled_in_place(called):
    compiled = mock.patch.object(
        transformer_module.Transformer,
        "_compiled_call_impl",
        lambda self, *arguments, **named: called.append(self) or self._call_impl(*arguments, **named),
    )
    compiled.start()
    return compiled.stop


@pytest.mark.parametrize("watch", [_hook_of_all_modules, _compiled_in_place], ids=["hook of all modules", "compile()"])
def test_the_objective_calls_a_transformer_that_somebody_looks_at(watch):
    model, called = _model(), []
    stop = watch(called)
    try:
        _loss(model)
    finally:
        stop()
    assert called == [model.wav2vec2.encoder.transformer]
