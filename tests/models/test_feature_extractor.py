"""The extractor's blocks and norms can be called, hooked and replaced as torchaudio's can, and lengths are taken as it does."""

import copy
import warnings
from unittest import mock

import pytest
import torch
from torch import nn

import hubert_fast
from hubert_fast.models import checks
from hubert_fast.models import feature_extractor as module
from tests import torchaudio_peer
from tests.models import configurations
from tests.models.twins import LENGTHS, SAMPLES, assert_gradients_match, batch, gradients, relative_error, twins

NAMES = ["base", "base-bias", "large", "large-bias"]


def _encoders(name="base", **settings):
    """torchaudio's `Wav2Vec2Model` and ours with the same weights, in float64."""
    return [model.wav2vec2 for model in twins({**configurations.ALL[name], **settings}, torch.float64)]


def _extractors(name):
    return [encoder.feature_extractor for encoder in _encoders(name)]


def _assert_same(theirs, ours, lengths=LENGTHS):
    """Features, frames and gradients of two extractors."""
    results = []
    for extractor in (theirs, ours):
        features, frames = extractor(batch(torch.float64).waveforms, lengths)
        features.square().sum().backward()
        results.append((features, frames))
    (expected, expected_frames), (features, frames) = results
    assert relative_error(features, expected) <= 1e-10
    assert torch.equal(frames, expected_frames) and frames.dtype == expected_frames.dtype
    assert_gradients_match(gradients(ours), gradients(theirs), 1e-10)


def _fused(extractor):
    """Whether a call runs the one operator."""
    with mock.patch.object(module, "conv_frontend", wraps=module.conv_frontend) as operator:
        extractor(batch(torch.float64).waveforms, LENGTHS)
    return operator.call_count == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_blocks_called_one_by_one_give_torchaudios_numbers(name, dtype):
    theirs, ours = _extractors(name)
    x = wanted = batch(torch.float64).waveforms[:, None]
    length = wanted_length = LENGTHS.to(dtype)
    for block, their_block in zip(ours.conv_layers, theirs.conv_layers):
        if block.layer_norm is not None:
            norm, their_norm = block.layer_norm(block.conv(x)), their_block.layer_norm(their_block.conv(wanted))
            assert relative_error(norm, their_norm) <= 1e-10
        (x, length), (wanted, wanted_length) = block(x, length), their_block(wanted, wanted_length)
        assert relative_error(x, wanted) <= 1e-10
        assert torch.equal(length, wanted_length) and length.dtype == wanted_length.dtype
    assert ours.conv_layers[0](batch(torch.float64).waveforms[:, None], None)[1] is None
    assert relative_error(x.transpose(1, 2), ours(batch(torch.float64).waveforms, LENGTHS)[0]) <= 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_nobody_touched_run_as_one_operator(name):
    theirs, ours = _extractors(name)
    assert _fused(ours)
    _assert_same(theirs, ours)


class _Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments):
        return _double(self.inner(*arguments))


def _double(result):
    return (2 * result[0], result[1]) if isinstance(result, tuple) else 2 * result


def _hook(parent, name):
    getattr(parent, name).register_forward_hook(lambda module, given, result: _double(result))


def _hook_before(parent, name):
    getattr(parent, name).register_forward_pre_hook(lambda module, given: (2 * given[0], *given[1:]))


def _patch_forward(parent, name):
    part = getattr(parent, name)
    forward = part.forward
    part.forward = lambda *given: _double(forward(*given))


def _replace(parent, name):
    setattr(parent, name, _Doubled(getattr(parent, name)))


def _places(extractor):
    """Parents and names: blocks, convolutions and norms, first and later ones."""
    blocks = extractor.conv_layers
    places = [(blocks, "0"), (blocks, "3"), (blocks[0], "conv"), (blocks[6], "conv"), (blocks[0], "layer_norm")]
    return places + [(blocks[4], "layer_norm")] * (extractor.conv_layers[4].layer_norm is not None)


@pytest.mark.parametrize("change", [_hook, _hook_before, _patch_forward, _replace])
@pytest.mark.parametrize(("name", "place"), [("base", i) for i in range(5)] + [("large-bias", i) for i in range(6)])
def test_what_is_hooked_patched_or_replaced_changes_the_features_as_in_torchaudio(name, place, change):
    both = _extractors(name)
    for extractor in both:
        change(*_places(extractor)[place])
    assert not _fused(both[1])
    _assert_same(*both)


def _other_stride(block):
    block.conv.stride, block.conv.padding = (4,), (3,)


def _other_eps(block):
    block.layer_norm.eps = 0.1


def _no_norm(block):
    block.layer_norm = None


def _one_group(block):
    block.layer_norm = nn.GroupNorm(1, block.conv.out_channels, dtype=torch.float64)


@pytest.mark.parametrize("change", [_other_stride, _other_eps, _no_norm, _one_group])
def test_settings_that_the_operator_does_not_have_change_the_features_as_in_torchaudio(change):
    both = _extractors("base")
    for extractor in both:
        change(extractor.conv_layers[0])
    assert not _fused(both[1])
    _assert_same(*both)


def test_hooks_see_what_torchaudios_see():
    seen = []
    for extractor in _extractors("large"):
        for part in (*extractor.conv_layers, *(block.conv for block in extractor.conv_layers)):
            part.register_forward_hook(lambda module, given, result: seen.append(result))
        extractor(batch(torch.float64).waveforms, LENGTHS)
    theirs, ours = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(ours) == 14
    for wanted, given in zip(theirs, ours):
        if isinstance(wanted, tuple):
            assert torch.equal(given[1], wanted[1])
            wanted, given = wanted[0], given[0]
        assert relative_error(given, wanted) <= 1e-10


def test_a_model_pre_trains_through_a_hooked_block_as_torchaudios():
    both = twins(configurations.base(), torch.float64)
    penalties = []
    for model, precision in zip(both, (torchaudio_peer.precise(torch.float64), torchaudio_peer.precise(torch.float32))):
        _hook(model.wav2vec2.feature_extractor.conv_layers, "2")
        with precision:
            torch.manual_seed(0)
            penalties.append(model(*batch(torch.float64, LENGTHS))[2])
    assert relative_error(penalties[1], penalties[0]) <= 1e-10


@pytest.mark.parametrize("lengths", [None, LENGTHS, torch.tensor([SAMPLES, 9, 0])], ids=["all", "some", "none"])
def test_padding_is_left_out_of_the_statistics_of_hooked_blocks_too(lengths):
    torch.manual_seed(0)
    settings = configurations.base()
    extractor = (
        hubert_fast.hubert_pretrain_model(**settings, padding_invariant=True).double().wav2vec2.feature_extractor
    )
    hooked = copy.deepcopy(extractor)
    hooked.conv_layers[0].layer_norm.register_forward_hook(lambda *call: None)
    features = [each(batch(torch.float64).waveforms, lengths)[0] for each in (extractor, hooked)]
    assert _fused(extractor) and not _fused(hooked)
    assert relative_error(*features) <= 1e-10
    _replace(hooked.conv_layers[0], "layer_norm")
    if lengths is not None:
        with pytest.raises(ValueError, match="layer_norm must be the ChannelNorm .* got _Doubled"):
            hooked(batch(torch.float64).waveforms, lengths)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64], ids=str)
def test_lengths_of_any_number_type_give_torchaudios_output_and_frames_of_their_type(dtype):
    theirs, ours = _encoders()
    waveforms, lengths = batch(torch.float64).waveforms, LENGTHS.to(dtype)
    with torch.no_grad():
        for method in ("forward", "extract_features"):
            expected, expected_frames = getattr(theirs, method)(waveforms, lengths)
            given, frames = getattr(ours, method)(waveforms, lengths)
            assert torch.equal(frames, expected_frames) and frames.dtype == expected_frames.dtype == dtype
            if method == "extract_features":
                expected, given = expected[-1], given[-1]
            for row, valid in enumerate(frames.long().tolist()):
                assert relative_error(given[row, :valid], expected[row, :valid]) <= 1e-10
        expected, expected_frames = theirs.feature_extractor(waveforms, lengths)
        features, frames = ours.feature_extractor(waveforms, lengths)
        assert relative_error(features, expected) <= 1e-10
        assert torch.equal(frames, expected_frames) and frames.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("padding_invariant", [False, True])
def test_lengths_beyond_the_audio_count_as_all_of_it_and_that_is_said_once(monkeypatch, padding_invariant, dtype):
    monkeypatch.setattr(checks, "_said", False)
    torch.manual_seed(0)
    model = hubert_fast.hubert_pretrain_model(**configurations.base(), padding_invariant=padding_invariant).wav2vec2
    waveforms = batch().waveforms
    beyond, within = (torch.tensor([longest, 7000, 9876]).to(dtype) for longest in (SAMPLES + 900, SAMPLES))
    calls = (model, model.extract_features, model.feature_extractor)
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        results = [call(waveforms, beyond) for call in calls]
    assert [each.category for each in said] == [UserWarning]
    assert "lengths beyond the 12400 samples" in str(said[0].message) and "13300" in str(said[0].message)
    with torch.no_grad():
        for (given, frames), call in zip(results, calls):
            expected, expected_frames = call(waveforms, within)
            assert torch.equal(frames, expected_frames) and frames.dtype == dtype
            for each, wanted in zip(given, expected):
                assert torch.equal(each, wanted)


def test_lengths_beyond_the_audio_give_torchaudios_output(monkeypatch):
    monkeypatch.setattr(checks, "_said", True)
    theirs, ours = _encoders()
    waveforms, lengths = batch(torch.float64).waveforms, torch.tensor([SAMPLES + 5000, 7000, 9876])
    with torch.no_grad():
        expected, frames = theirs(waveforms, lengths)[0], ours(waveforms, lengths)[1]
        given = ours(waveforms, lengths)[0]
    for row, valid in enumerate(frames.tolist()):
        assert relative_error(given[row, :valid], expected[row, :valid]) <= 1e-10


def test_numbers_that_may_not_be_looked_at_are_taken_into_the_range():
    model = _encoders()[1]
    waveforms, lengths = batch(torch.float64).waveforms, torch.tensor([SAMPLES + 1, 7000.0, 9876.0])
    compiled = torch.compile(model.feature_extractor, backend="eager", fullgraph=True)
    frames = compiled(waveforms, lengths)[1]
    assert frames.dtype == torch.float32 and frames.tolist() == [38, 21, 30]
    torch._dynamo.reset()
    on_meta = checks.usable_lengths(waveforms.to("meta"), lengths.to("meta"))
    assert on_meta.shape == (3,) and on_meta.dtype == torch.float32
