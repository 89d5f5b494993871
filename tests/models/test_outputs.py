"""Outputs, gradients, masks and the random numbers that follow are torchaudio's, in every configuration."""

import pytest
import torch

from tests import torchaudio_peer
from tests.models import configurations
from tests.models.twins import (
    LENGTHS,
    assert_gradients_match,
    assert_outputs_match,
    batch,
    gradients,
    num_frames,
    recipe_loss,
    relative_error,
    seeded,
    twins,
    valid_frames,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
ALMOST_FULL = torch.tensor([12400, 12300, 12100])  # 38, 38 and 37 frames


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", [None, LENGTHS, ALMOST_FULL], ids=["all-valid", "lengths", "almost-full"])
@pytest.mark.parametrize("name", configurations.ALL)
def test_logits_penalty_and_gradients_equal_torchaudios(name, lengths, dtype):
    theirs, ours = twins(configurations.ALL[name], dtype)
    data = batch(dtype, lengths)
    expected, expected_next = seeded(theirs, data), torch.rand(3)
    outputs, drawn_next = seeded(ours, data), torch.rand(3)
    assert_outputs_match(outputs, expected, TOLERANCE[dtype])
    assert torch.equal(drawn_next, expected_next), "the random stream went another way"
    for each in (expected, outputs):
        recipe_loss(each, unmasked_weight=0.5).backward()
    assert_gradients_match(gradients(ours), gradients(theirs), GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all-valid", "lengths"])
@pytest.mark.parametrize("name", ["base", "large-bias"])
def test_gradient_of_the_waveforms_equals_torchaudios(name, lengths):
    theirs, ours = twins(configurations.ALL[name], torch.float64)
    expected, given = batch(torch.float64, lengths), batch(torch.float64, lengths)
    for model, data in ((theirs, expected), (ours, given)):
        data.waveforms.requires_grad_()
        recipe_loss(seeded(model, data)).backward()
    assert relative_error(given.waveforms.grad, expected.waveforms.grad) <= 1e-10
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", [None, LENGTHS, ALMOST_FULL], ids=["all-valid", "lengths", "almost-full"])
@pytest.mark.parametrize("name", ["base", "xlarge-bias"])
def test_encoder_and_its_layers_equal_torchaudios(name, lengths, dtype):
    theirs, ours = (model.wav2vec2 for model in twins(configurations.ALL[name], dtype))
    waveforms = batch(dtype).waveforms
    with torchaudio_peer.precise(dtype), torch.no_grad():
        expected, expected_frames = theirs(waveforms, lengths)
        expected_layers, _ = theirs.extract_features(waveforms, lengths)
    with torch.no_grad():
        output, frames = ours(waveforms, lengths)
        layers, layers_frames = ours.extract_features(waveforms, lengths)
        first, _ = ours.extract_features(waveforms, lengths, num_layers=1)
    assert len(first) == 1 and torch.equal(first[0], layers[0])
    if lengths is None:
        assert_outputs_match([output, *layers], [expected, *expected_layers], TOLERANCE[dtype])
        assert frames is None and expected_frames is None
    else:
        valid = valid_frames(lengths)
        for given, wanted in zip([output, *layers], [expected, *expected_layers], strict=True):
            assert_outputs_match([given[valid]], [wanted[valid]], TOLERANCE[dtype])
            assert given.shape == wanted.shape and (given[~valid] == 0).all()
        assert torch.equal(frames, expected_frames) and torch.equal(layers_frames, expected_frames)
        assert frames.tolist() == [num_frames(int(samples)) for samples in lengths]


@pytest.mark.parametrize(("skip_masked", "skip_nomask"), [(True, False), (False, True), (True, True)])
def test_skipped_logits_are_none_and_the_others_torchaudios(skip_masked, skip_nomask):
    theirs, ours = twins(configurations.base(skip_masked=skip_masked, skip_nomask=skip_nomask), torch.float64)
    data = batch(torch.float64, LENGTHS)
    masked, unmasked, penalty = seeded(ours, data)
    assert (masked is None) == skip_masked
    assert (unmasked is None) == skip_nomask
    assert_outputs_match([masked, unmasked, penalty], seeded(theirs, data), 1e-10)
