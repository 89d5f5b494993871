"""Batches are what their lengths say, and hold what a training step draws."""

import pytest
import torch

import hubert_fast
from benchmarks.architecture import ARCHITECTURES
from benchmarks.batches import SAMPLE_RATE, even, librispeech_like, make

TINY = ARCHITECTURES["tiny"]


def test_the_mask_is_the_one_that_the_model_draws_from_the_batchs_seed():
    model = hubert_fast.hubert_pretrain_model(**TINY.factory_arguments(7))
    batch = make([32_000, 20_000], TINY, 7, seed=3)
    torch.manual_seed(batch.seed)
    lengths = torch.tensor([TINY.frames_of(32_000), TINY.frames_of(20_000)])
    assert torch.equal(batch.mask, model.mask_generator.draw(2, batch.labels.shape[1], lengths))
    assert not batch.mask[1, lengths[1] :].any()


def test_making_a_batch_leaves_torchs_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    make([16_000], TINY, 7)
    assert torch.equal(torch.rand(3), expected)


def test_the_same_seed_makes_the_same_batch_and_another_another():
    one, again, other = (make([16_000, 9_000], TINY, 7, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.waveforms, again.waveforms) and torch.equal(one.labels, again.labels)
    assert not torch.equal(one.waveforms, other.waveforms)


def test_padding_is_silent_counted_in_lengths_and_not_in_seconds():
    batch = make([16_000, 8_000], TINY, 7)
    assert batch.lengths.tolist() == [16_000, 8_000] and batch.samples == [16_000, 8_000]
    assert batch.waveforms[1, 8_000:].count_nonzero() == 0 and batch.waveforms[1, :8_000].count_nonzero() > 7_000
    assert batch.audio_seconds == 1.5
    assert batch.labels.shape == batch.mask.shape == (2, TINY.frames_of(16_000))
    assert int(batch.labels.min()) >= 0 and int(batch.labels.max()) <= 6


def test_without_padding_there_are_no_lengths():
    batch = make(even(3, 0.5), TINY, 7)
    assert batch.lengths is None and batch.samples == [8_000] * 3 and batch.audio_seconds == 1.5


def test_librispeech_like_batches_fit_and_lie_between_2_and_15_6_seconds():
    batches = librispeech_like(175.0, batches=4)
    for lengths in batches:
        assert len(lengths) * max(lengths) <= 175 * SAMPLE_RATE
        assert (len(lengths) + 1) * 15.6 > 100  # filled, not a single utterance
        assert 2 * SAMPLE_RATE <= min(lengths) and max(lengths) <= 15.6 * SAMPLE_RATE
    means = [sum(lengths) / len(lengths) for lengths in batches]
    assert means == sorted(means) and means[0] < 0.8 * means[-1]  # from short to long
    assert librispeech_like(175.0, batches=4) == batches


def test_the_mean_duration_is_librispeechs_and_bucketing_leaves_little_padding():
    """960.9 hours in 281,241 utterances; a batch from each of the buckets stands for all."""
    batches = librispeech_like(2000.0, batches=10)
    means = [sum(lengths) / len(lengths) for lengths in batches]
    assert sum(means) / len(means) / SAMPLE_RATE == pytest.approx(12.3, rel=0.05)
    assert sum(len(each) * max(each) for each in batches) < 1.11 * sum(map(sum, batches))
