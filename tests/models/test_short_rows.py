"""Rows of length 0, and rows shorter than a frame, do no harm to themselves or to others."""

import pytest
import torch

import hubert_fast
from tests.models import configurations
from tests.models.twins import (
    assert_gradients_match,
    assert_outputs_match,
    batch,
    gradients,
    recipe_loss,
    seeded,
    twins,
    valid_frames,
)

SHORT = [torch.tensor([12400, 0, 7000]), torch.tensor([12400, 399, 400]), torch.tensor([1, 0, 2])]


@pytest.mark.parametrize("lengths", SHORT, ids=str)
@pytest.mark.parametrize("name", ["base", "large"])
def test_no_nan_in_outputs_loss_or_gradients(name, lengths):
    _, ours = twins(configurations.ALL[name])
    data = batch(lengths=lengths)
    mask = torch.ones(data.labels.shape, dtype=torch.bool)  # masks drawn inside would mask no frame of any row
    for weight in (0.0, 0.5):
        ours.zero_grad()
        result = hubert_fast.PretrainingObjective(ours, unmasked_weight=weight)(*data, mask=mask)
        result.loss.backward()
        assert result.loss.isfinite()
        assert all(grad is None or grad.isfinite().all() for grad in gradients(ours).values())
    outputs, _ = ours.wav2vec2(data.waveforms, lengths)
    layers, _ = ours.wav2vec2.extract_features(data.waveforms, lengths)
    assert all(each.isfinite().all() and (each[~valid_frames(lengths)] == 0).all() for each in (outputs, *layers))


@pytest.mark.parametrize("lengths", SHORT[:2], ids=str)
def test_the_other_rows_are_as_in_torchaudio(lengths):
    """torchaudio masks as few frames in every row as the shortest has: none here, so unmasked frames are compared."""
    theirs, ours = twins(configurations.base(), torch.float64)
    data = batch(torch.float64, lengths)
    expected = seeded(theirs, data)
    assert_outputs_match(seeded(ours, data), expected, 1e-10)
    recipe_loss(expected, unmasked_weight=1.0).backward()
    seeded(hubert_fast.PretrainingObjective(ours, unmasked_weight=1.0), data).loss.backward()
    expected = {name: grad for name, grad in gradients(theirs).items() if grad is not None}
    assert_gradients_match({name: gradients(ours)[name] for name in expected}, expected, 1e-10)


def test_a_batch_without_a_masked_frame_has_a_loss_of_zero_and_can_be_differentiated():
    _, ours = twins(configurations.base())
    data = batch(lengths=torch.tensor([300, 0, 12400]))
    result = hubert_fast.PretrainingObjective(ours)(*data)
    result.loss.backward()
    assert result.masked_count == 0 and result.loss == 0
    assert all((grad == 0).all() for grad in gradients(ours).values())


@pytest.mark.parametrize("name", ["auto", "torch", "reference"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("hooked", [False, True], ids=["", "masks by a module that is called"])
def test_every_parameter_has_a_finite_gradient_of_the_mean_where_nothing_is_masked(name, weight, hooked):
    """Ranks sum the gradients of all parameters: one that this batch alone had no use for must not be missing."""
    _, ours = twins(configurations.base())
    if hooked:
        ours.mask_generator.register_forward_hook(lambda *call: None)
    data = batch(lengths=torch.tensor([12400, 7000, 9876]))
    with hubert_fast.backend.using(name):
        result = hubert_fast.PretrainingObjective(ours, unmasked_weight=weight)(
            *data, mask=torch.zeros(data.labels.shape, dtype=torch.bool)
        )
        result.mean.backward()
    assert result.masked_count == 0 and result.mean == result.loss and (result.loss == 0) == (weight == 0)
    for name, grad in gradients(ours).items():
        assert grad is not None and grad.isfinite().all() and (weight or (grad == 0).all()), name


@pytest.mark.parametrize("skipped", [None, "skip_masked", "skip_nomask"])
def test_every_parameter_has_a_gradient_of_the_logits_where_nothing_is_masked(skipped):
    _, ours = twins(configurations.base())
    if skipped is not None:
        setattr(ours.logit_generator, skipped, True)
    data = batch()
    outputs = ours(*data, mask=torch.zeros(data.labels.shape, dtype=torch.bool))
    sum(each.clamp(min=-100).sum() for each in outputs if each is not None).backward()
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(ours).values())
