"""HuBERT Base at its published size, once, on short audio."""

import torch

import hubert_fast
from tests import torchaudio_peer
from tests.models.twins import (
    assert_gradients_match,
    gradients,
    num_frames,
    recipe_correct,
    recipe_loss,
    relative_error,
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

    samples, lengths = 7000, torch.tensor([7000, 5200])
    waveforms = torch.randn(2, samples)
    labels = torch.randint(0, 100, (2, num_frames(samples)))
    with torch.no_grad():
        torch.manual_seed(1)
        expected = theirs(waveforms, labels, lengths)
        torch.manual_seed(1)
        outputs = ours(waveforms, labels, lengths)
    for given, wanted in zip(outputs, expected, strict=True):
        assert relative_error(given, wanted) <= 2e-6

    torch.manual_seed(1)
    expected = theirs(waveforms, labels, lengths)
    loss = recipe_loss(expected)
    loss.backward()
    torch.manual_seed(1)
    result = hubert_fast.PretrainingObjective(ours)(waveforms, labels, lengths)
    result.loss.backward()
    assert relative_error(result.loss, loss) <= 2e-6
    assert int(result.masked_correct) == recipe_correct(expected[0])
    assert_gradients_match(gradients(ours), gradients(theirs), 2e-5)
