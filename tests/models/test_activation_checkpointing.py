"""Recomputing activations gives the same gradients, with dropout and LayerDrop on too."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hubert_fast
from tests.models import configurations
from tests.models.test_dropout import DROPOUTS
from tests.models.twins import LENGTHS, batch, step, twins


def recompute(module):
    """Replaces a module's forward by its recomputed self."""
    forward = module.forward
    module.forward = lambda *arguments, **keywords: checkpoint(forward, *arguments, use_reentrant=False, **keywords)


def leave(module):
    """Replaces a module's forward by itself: a layer is then given a grid, and draws its own dropout."""
    forward = module.forward
    module.forward = lambda *arguments, **keywords: forward(*arguments, **keywords)


def _run(change, recomputed, lengths, settings):
    _, model = twins(configurations.base(**settings))
    objective = hubert_fast.PretrainingObjective(model, unmasked_weight=0.2)
    modules = {
        "layers": model.wav2vec2.encoder.transformer.layers,
        "extractor and head": [model.wav2vec2.feature_extractor, model.logit_generator.final_proj],
        "everything": [objective],
    }
    for module in modules[recomputed]:
        change(module)
    result, grads = step(objective, batch(lengths=lengths))
    return result.loss, grads, torch.rand(1)


@pytest.mark.parametrize("settings", [{}, DROPOUTS], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all-valid", "lengths"])
@pytest.mark.parametrize("recomputed", ["layers", "extractor and head", "everything"])
def test_recomputed_activations_give_the_same_gradients(recomputed, lengths, settings):
    loss, grads, next_number = _run(leave, recomputed, lengths, settings)
    loss_again, grads_again, next_again = _run(recompute, recomputed, lengths, settings)
    assert torch.equal(loss, loss_again) and torch.equal(next_number, next_again)
    assert grads.keys() == grads_again.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, grads_again[name]), name
