"""LayerDrop leaves out the layers that torchaudio leaves out."""

import pytest
import torch

import hubert_fast
from tests.models import configurations
from tests.models.twins import LENGTHS, assert_outputs_match, batch, seeded, twins


def _layers_run(model, data, seed):
    ran = []
    layers = model.wav2vec2.encoder.transformer.layers
    hooks = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    with torch.no_grad():
        outputs = seeded(model, data, seed)
    drawn_next = torch.rand(1)
    for hook in hooks:
        hook.remove()
    return ran, outputs, drawn_next


@pytest.mark.parametrize("layer_drop", [0.0, 0.5, 0.9])
def test_training_runs_the_same_layers(layer_drop):
    theirs, ours = twins(configurations.base(encoder_layer_drop=layer_drop, encoder_num_layers=4), torch.float64)
    data = batch(torch.float64, LENGTHS)
    counts = set()
    for seed in range(6):
        expected_ran, expected, expected_next = _layers_run(theirs, data, seed)
        ran, outputs, drawn_next = _layers_run(ours, data, seed)
        assert ran == expected_ran and torch.equal(drawn_next, expected_next)
        assert_outputs_match(outputs, expected, 1e-10)
        counts.add(len(ran))
    assert counts == {4} if layer_drop == 0.0 else len(counts) > 1


def test_a_process_by_itself_has_no_gradient_for_a_dropped_layer():
    """So its optimizer leaves that layer alone, as in torchaudio's loop."""
    _, ours = twins(configurations.base(encoder_layer_drop=1.0))
    seeded(hubert_fast.PretrainingObjective(ours), batch(lengths=LENGTHS)).loss.backward()
    assert all((each.grad is None) == (".layers." in name) for name, each in ours.named_parameters())


def test_eval_masks_too_but_runs_every_layer_and_draws_nothing_for_them():
    theirs, ours = twins(configurations.base(encoder_layer_drop=0.9), torch.float64)
    theirs.eval(), ours.eval()
    data = batch(torch.float64, LENGTHS)
    expected_ran, expected, expected_next = _layers_run(theirs, data, 0)
    ran, outputs, drawn_next = _layers_run(ours, data, 0)
    assert ran == expected_ran == [0, 1] and torch.equal(drawn_next, expected_next)
    assert_outputs_match(outputs, expected, 1e-10)
