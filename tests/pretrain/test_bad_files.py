"""Audio that goes bad under a training: it goes on, to numbers that hang on what was missing from when on, on nothing else."""

import pytest
import torch

from hubert_fast.pretrain.batches import GlobalBatches
from hubert_fast.pretrain.left_out import TooManyBadUtterancesError, read_left_out
from hubert_fast.pretrain.metrics_log import read_metrics
from tests.pretrain import bad_file_campaign
from tests.pretrain.test_trainer import assert_like_training
from tests.pretrain.train_tiny import WITHOUT_DROPOUT, make_corpus, train_tiny

GONE = ["00.wav", "01.wav", "05.wav", "08.wav"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def corpus(tmp_path):
    """Without four of its twelve recordings for training, and one of the two that are held out."""
    corpus = make_corpus(tmp_path / "corpus")
    for name in [*GONE, "11.wav"]:
        (corpus / "audio" / name).unlink()
    return corpus


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_file_that_goes_bad_at_a_random_moment_ends_nothing(tmp_path, ranks):
    """The short form of `bad_file_campaign`."""
    said = bad_file_campaign.run(tmp_path, 5, ranks)
    assert "to the same bits" in said


def test_what_is_missing_changes_numbers_alike_however_batches_are_divided(corpus, tmp_path, monkeypatch):
    blank = []
    monkeypatch.setattr(GlobalBatches, "__iter__", _noting(blank, GlobalBatches.__iter__))
    options = {"model": WITHOUT_DROPOUT, "steps": 6, "autocast": False, "workers": 0, "max_bad_utterances": 0.5}
    processes = [bad_file_campaign.start(corpus, tmp_path / "two", 2, **options, keep=2)]
    train_tiny(corpus, tmp_path / "one", **options)
    assert not blank
    train_tiny(corpus, tmp_path / "accumulated", accumulate=4, **options)
    train_tiny(corpus, tmp_path / "graphs", accumulate=4, graphs=True, **options)
    assert blank, "a micro-batch of which nothing is left was among them"
    bad_file_campaign.finish(processes[0])
    for name in ("accumulated", "graphs", "two"):
        assert_like_training(tmp_path / name, tmp_path / "one")
    for name in ("one", "accumulated", "graphs", "two"):
        listed = {line["id"]: line["reason"] for line in read_left_out(tmp_path / name)}
        assert set(listed) == {*GONE, "11.wav"} and all("no such file" in reason for reason in listed.values())
        assert [line["left_out"] for line in read_metrics(tmp_path / name) if "loss" in line][-1] == len(GONE)


def test_more_than_the_settings_allow_stops_every_rank(corpus, tmp_path):
    with pytest.raises(TooManyBadUtterancesError, match="of 12 utterances cannot be used, more than"):
        train_tiny(corpus, tmp_path / "one", max_bad_utterances=0.1)
    process = bad_file_campaign.start(corpus, tmp_path / "two", 2, max_bad_utterances=0.1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and errors.count("TooManyBadUtterancesError: ") >= 2


def _noting(blank, iterate):
    def noting(batches):
        for update in iterate(batches):
            blank.extend(batch for batch in update if not batch.ids)
            yield update

    return noting
