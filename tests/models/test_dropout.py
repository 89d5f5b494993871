"""Dropout: on in training and off in eval, repeatable, and the same on both backends."""

import contextlib

import pytest
import torch

from hubert_fast import backend
from tests.models import configurations
from tests.models.twins import LENGTHS, assert_gradients_match, batch, objective_of, relative_error, step

DROPOUTS = dict(
    encoder_projection_dropout=0.1, encoder_attention_dropout=0.2, encoder_ff_interm_dropout=0.1, encoder_dropout=0.1,
    encoder_layer_drop=0.3,
)  # fmt: skip


def _run(objective, seed=0, name="auto"):
    with contextlib.ExitStack() as stack:
        for operator in ("conv_frontend", "masked_attention", "cosine_cross_entropy"):
            stack.enter_context(backend.using(name, operator))
        result, grads = step(objective, batch(torch.float64, LENGTHS), seed=seed)
    return result.loss.detach(), grads


@pytest.mark.parametrize("size", [configurations.base, configurations.xlarge])
def test_same_seed_same_loss_and_gradients_on_every_backend(size):
    objective = objective_of(size(**DROPOUTS), unmasked_weight=0.3)
    loss, grads = _run(objective, name="torch")
    again, grads_again = _run(objective, name="torch")
    assert torch.equal(loss, again) and all(torch.equal(grads[key], grads_again[key]) for key in grads)
    reference_loss, reference_grads = _run(objective, name="reference")
    assert relative_error(loss, reference_loss) <= 1e-10
    assert_gradients_match(grads, reference_grads, 1e-10)
    assert relative_error(_run(objective, seed=1)[0], loss) > 1e-6


@pytest.mark.parametrize("dropout", [each for each in DROPOUTS if each != "encoder_layer_drop"])
def test_each_dropout_acts_in_training_and_not_in_eval(dropout):
    plain, dropping = (objective_of(configurations.base(**each)) for each in ({}, {dropout: 0.3}))
    assert relative_error(_run(dropping)[0], _run(plain)[0]) > 1e-6
    plain.eval(), dropping.eval()
    assert torch.equal(_run(dropping)[0], _run(plain)[0])


def test_gradients_with_dropout_are_those_of_the_loss():
    """Central differences in one random direction of the parameters, the same seed each time."""
    objective = objective_of(configurations.base(**DROPOUTS, encoder_num_layers=3), unmasked_weight=0.3)
    parameters = dict(objective.named_parameters())
    loss, grads = _run(objective)
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(p.shape, dtype=p.dtype, generator=generator) for name, p in parameters.items()}
    # The extractor's gradient is scaled by feature_grad_mult, on purpose, and so is not that of the loss.
    direction = {name: each for name, each in direction.items() if name in grads and "feature_extractor" not in name}
    expected = sum((grads[name] * each).sum() for name, each in direction.items())
    losses = []
    for distance in (1e-6, -2e-6):
        with torch.no_grad():
            for name, each in direction.items():
                parameters[name].add_(each, alpha=distance)
        losses.append(_run(objective)[0])
    assert abs((losses[0] - losses[1]) / 2e-6 - expected) <= 1e-5 * abs(expected)
    assert loss.isfinite()
