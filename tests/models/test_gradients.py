"""Every parameter's gradient is torchaudio's, in every configuration, through the logits."""

import pytest
import torch

from tests.models import configurations
from tests.models.twins import (
    LENGTHS,
    assert_gradients_match,
    batch,
    gradients,
    recipe_loss,
    relative_error,
    seeded,
    twins,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all-valid", "lengths"])
@pytest.mark.parametrize("name", configurations.ALL)
def test_gradients_equal_torchaudios(name, lengths, dtype):
    theirs, ours = twins(configurations.ALL[name], dtype)
    for model in (theirs, ours):
        recipe_loss(seeded(model, batch(dtype, lengths)), unmasked_weight=0.5).backward()
    assert_gradients_match(gradients(ours), gradients(theirs), TOLERANCE[dtype])


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


@pytest.mark.parametrize("factor", [None, 0.25])
def test_feature_grad_mult_scales_the_extractors_gradients_and_nothing_else(factor):
    _, plain = twins(configurations.base(feature_grad_mult=None), torch.float64)
    _, scaled = twins(configurations.base(feature_grad_mult=factor), torch.float64)
    results = []
    for model in (plain, scaled):
        loss = recipe_loss(seeded(model, batch(torch.float64)))
        loss.backward()
        results.append((loss, gradients(model)))
    (loss, grads), (scaled_loss, scaled_grads) = results
    assert torch.equal(loss, scaled_loss)
    for name, grad in grads.items():
        expected = grad * (factor or 1.0) if "feature_extractor" in name else grad
        torch.testing.assert_close(scaled_grads[name], expected, rtol=1e-10, atol=1e-12)
