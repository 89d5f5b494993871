"""Dropout: on in training and off in eval, repeatable, and the same on both backends."""

import pytest
import torch

import hubert_fast
from hubert_fast import backend
from tests.models import configurations
from tests.models.twins import LENGTHS, assert_gradients_match, batch, gradients, relative_error, twins

DROPOUTS = dict(
    encoder_projection_dropout=0.1, encoder_attention_dropout=0.2, encoder_ff_interm_dropout=0.1, encoder_dropout=0.1,
    encoder_layer_drop=0.3,
)  # fmt: skip


def _run(model, seed=0, name="auto"):
    model.zero_grad()
    torch.manual_seed(seed)
    with (
        backend.using(name, "conv_frontend"),
        backend.using(name, "masked_attention"),
        backend.using(name, "cosine_cross_entropy"),
    ):
        result = hubert_fast.PretrainingObjective(model, unmasked_weight=0.3)(*batch(torch.float64, LENGTHS))
        result.loss.backward()
    return result.loss.detach(), {key: grad.clone() for key, grad in gradients(model).items() if grad is not None}


@pytest.mark.parametrize("size", [configurations.base, configurations.xlarge])
def test_same_seed_same_loss_and_gradients_on_every_backend(size):
    _, model = twins(size(**DROPOUTS), torch.float64)
    loss, grads = _run(model, name="torch")
    again, grads_again = _run(model, name="torch")
    assert torch.equal(loss, again) and all(torch.equal(grads[key], grads_again[key]) for key in grads)
    reference_loss, reference_grads = _run(model, name="reference")
    assert relative_error(loss, reference_loss) <= 1e-10
    assert_gradients_match(grads, reference_grads, 1e-10)
    assert relative_error(_run(model, seed=1)[0], loss) > 1e-6


@pytest.mark.parametrize("dropout", [each for each in DROPOUTS if each != "encoder_layer_drop"])
def test_each_dropout_acts_in_training_and_not_in_eval(dropout):
    _, plain = twins(configurations.base(), torch.float64)
    _, dropping = twins(configurations.base(**{dropout: 0.3}), torch.float64)
    assert relative_error(_run(dropping)[0], _run(plain)[0]) > 1e-6
    plain.eval(), dropping.eval()
    assert torch.equal(_run(dropping)[0], _run(plain)[0])


def test_gradients_with_dropout_are_those_of_the_loss():
    """Central differences in one random direction of the parameters, the same seed each time."""
    _, model = twins(configurations.base(**DROPOUTS, encoder_num_layers=3), torch.float64)
    loss, grads = _run(model)
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(p.shape, dtype=p.dtype, generator=generator) for name, p in model.named_parameters()}
    # The extractor's gradient is scaled by feature_grad_mult, on purpose, and so is not that of the loss.
    direction = {name: each for name, each in direction.items() if name in grads and "feature_extractor" not in name}
    expected = sum((grads[name] * each).sum() for name, each in direction.items())
    losses = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in direction:
                    parameter.add_(direction[name], alpha=step)
        losses.append(_run(model)[0])
    assert abs((losses[0] - losses[1]) / 2e-6 - expected) <= 1e-5 * abs(expected)
    assert loss.isfinite()
