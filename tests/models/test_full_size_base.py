"""HuBERT Base at its published size, once, on short audio."""

import torch

import hubert_fast
from tests import torchaudio_peer
from tests.models.twins import (
    Batch,
    assert_gradients_match,
    assert_outputs_match,
    gradients,
    num_frames,
    recipe_correct,
    recipe_loss,
    relative_error,
    seeded,
)

NO_DROPOUT = dict(
    encoder_projection_dropout=0.0, encoder_attention_dropout=0.0, encoder_dropout=0.0, encoder_layer_drop=0.0
)


def test_full_size_base_has_torchaudios_weights_outputs_and_gradients():
    torch.manual_seed(0)
    theirs = torchaudio_peer.models.hubert_pretrain_base(**NO_DROPOUT)
    torch.manual_seed(0)
    ours = hubert_fast.hubert_pretrain_base(**NO_DROPOUT)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())

    labels = torch.randint(0, 100, (2, num_frames(7000)))
    data = Batch(torch.randn(2, 7000), labels, torch.tensor([7000, 5200]))
    expected = seeded(theirs, data)
    with torch.no_grad():
        # Without AVX-512 torchaudio is 1.8e-6 from float64, and this 0.9e-6.
        assert_outputs_match(seeded(ours, data), expected, 5e-6)

    loss = recipe_loss(expected)
    loss.backward()
    result = seeded(hubert_fast.PretrainingObjective(ours), data)
    result.loss.backward()
    assert relative_error(result.loss, loss) <= 5e-6
    assert int(result.masked_correct) == recipe_correct(expected[0])
    assert_gradients_match(gradients(ours), gradients(theirs), 2e-5)
