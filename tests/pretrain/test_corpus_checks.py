import dataclasses
import json

import numpy as np
import pytest

from hubert_fast.pretrain.batches import batch_budget
from hubert_fast.pretrain.corpus_checks import check_corpus
from tests.pretrain.many_utterances import Measured, choose, make, resume
from tests.pretrain.small_run import small_config, small_folder
from tests.pretrain.speech_folder import scan_folder
from tests.pretrain.test_config_checks import changed
from tests.pretrain.test_pipeline import opened


@pytest.fixture
def folder(tmp_path):
    small_folder(tmp_path / "audio")
    (tmp_path / "audio" / "splits.json").write_text(json.dumps({"valid": ["0.wav"]}), encoding="utf-8-sig")
    scan_folder(tmp_path)
    return tmp_path


def check(folder, config, world_size=1):
    return check_corpus(config, folder / "manifest", world_size)


def test_a_corpus_that_will_do_is_not_spoken_of(folder):
    assert check(folder, small_config()) == []


@pytest.mark.parametrize(
    ("name", "value", "world_size", "message"),
    [
        ("first.units.clusters", 204, 1, r"iteration 1: units.clusters=204 must be at most .* training part, 203$"),
        ("second.units.clusters", 500, 1, r"iteration 2: units.clusters=500 must be at most .* training part, 203$"),
        ("second.optimizer.accumulate", 8, 1, "iteration 2: 7 utterances cannot fill world_size x accumulate = 8"),
        ("data.batch_seconds", 1.0, 2, "iteration 1: batch_seconds=1.0 holds 1 of the longest utterances"),
    ],
)
def test_what_cannot_be_made_of_a_corpus_is_said_before_anything_is_made(folder, name, value, world_size, message):
    with pytest.raises(ValueError, match=message):
        check(folder, changed(small_config(), name, value), world_size)


def test_the_evaluation_counts_where_there_is_something_to_score(folder):
    config = changed(small_config(), "evaluation.clusters", 300)
    assert check(folder, config) == []
    (folder / "audio" / "0.phones.tsv").write_text("a\t0.1\t0.2\n")
    scan_folder(folder, seed=1)
    with pytest.raises(ValueError, match="evaluation.clusters=300 must be at most"):
        check(folder, config)


def test_few_frames_and_nothing_held_out_are_warned_of_by_the_scan(folder, tmp_path, capsys):
    config = dataclasses.replace(changed(small_config(), "first.units.clusters", 20), second=small_config().third)
    config = changed(config, "data.valid_fraction", 0.0)
    (folder / "audio" / "splits.json").unlink()
    opened(tmp_path / "run", config, audio=folder / "audio").scan()
    said = capsys.readouterr().err
    assert "warning: iteration 1: units.clusters=20, of 232 frames to train on: 11 for each cluster are few" in said
    assert "warning: no utterance is held out: nothing will be validated or evaluated" in said


def test_many_utterances_take_little_memory_and_time(tmp_path):
    """The short form of `many_utterances`, whose own takes 4 million."""
    measured = Measured()
    make(tmp_path, 20_000, measured)
    files = [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]
    for path in files:
        assert int.from_bytes(path.read_bytes()[:8], "little") < 2000, "the header does not grow with the utterances"
    batches = resume(tmp_path, measured)
    choose(tmp_path, measured)
    plan = batches.epoch_plan(3)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(batches._utterances.samples)))
    assert batch_budget(batches._utterances.samples, 2800.0, 64) == 2800 * 16_000
    assert sum(measured.seconds.values()) < 60
