"""With ``padding_invariant=True`` an utterance's features do not depend on the padding of its batch."""

import pytest
import torch

import hubert_fast
from tests.models import configurations
from tests.models.twins import LENGTHS, batch, num_frames, relative_error, valid_frames


def _model(**settings):
    torch.manual_seed(0)
    return hubert_fast.hubert_pretrain_model(**configurations.base(), **settings).double().eval()


def _alone_and_padded(model, row):
    waveforms, _, lengths = batch(torch.float64, LENGTHS)
    samples = int(lengths[row])
    padded, frames = model.wav2vec2.extract_features(waveforms, lengths)
    utterance = waveforms[row : row + 1, :samples]
    alone, _ = model.wav2vec2.extract_features(utterance, lengths[row : row + 1])
    without_lengths, _ = model.wav2vec2.extract_features(utterance)
    assert int(frames[row]) == num_frames(samples)
    return (
        [each[row, : frames[row]] for each in padded],
        [each[0] for each in alone],
        [each[0] for each in without_lengths],
    )


@pytest.mark.parametrize("row", range(3))
def test_features_are_the_same_alone_and_padded(row):
    for padded, alone, without_lengths in zip(*_alone_and_padded(_model(padding_invariant=True), row)):
        assert relative_error(padded, alone) <= 1e-10
        assert relative_error(alone, without_lengths) <= 1e-10
    by_default = _alone_and_padded(_model(), row)[1]
    for alone, default in zip(_alone_and_padded(_model(padding_invariant=True), row)[1], by_default):
        assert relative_error(alone, default) <= 1e-10  # without padding the option changes nothing


def test_by_default_they_are_not_as_in_torchaudio():
    """torchaudio's group norm sees the padding; parity comes first, so the option is off unless asked for."""
    padded, alone, _ = _alone_and_padded(_model(), 1)
    assert relative_error(padded[0], alone[0]) > 1e-3


def test_the_loss_of_a_batch_is_the_sum_of_its_rows_losses():
    model = _model(padding_invariant=True)
    objective = hubert_fast.PretrainingObjective(model, feature_weight=0.0, unmasked_weight=0.3)
    waveforms, labels, lengths = batch(torch.float64, LENGTHS)
    mask = valid_frames(lengths) & (torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    together = objective(waveforms, labels, lengths, mask=mask)
    total = 0.0
    for row, samples in enumerate(lengths.tolist()):
        frames = num_frames(samples)
        arguments = waveforms[row, :samples][None], labels[row, :frames][None]
        total += objective(*arguments, mask=mask[row, :frames][None]).loss
    assert relative_error(together.loss, total) <= 1e-10


def test_it_can_be_asked_of_every_factory():
    for factory in ("base", "large", "xlarge"):
        with torch.device("meta"):
            model = getattr(hubert_fast, f"hubert_pretrain_{factory}")(padding_invariant=True)
        assert model.wav2vec2.feature_extractor.padding_invariant
        with torch.device("meta"):
            encoder = getattr(hubert_fast, f"hubert_{factory}")(padding_invariant=True)
        assert encoder.feature_extractor.padding_invariant
