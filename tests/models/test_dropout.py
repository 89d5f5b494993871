"""Dropout: on in training and off in eval, repeatable, and the same on both backends."""

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
    with backend.using(name):
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
