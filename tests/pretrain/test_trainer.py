"""Training on real batches of a small corpus with a small model; in processes that are killed, and under torchrun."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hubert_fast.pretrain.checkpoint import CheckpointMismatchError, list_checkpoints
from hubert_fast.pretrain.config import ModelConfig
from hubert_fast.pretrain.metrics_log import read_metrics
from tests.pretrain.test_training_loop import without_time
from tests.pretrain.train_tiny import MODEL, WITHOUT_DROPOUT, make_corpus, train_tiny

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the subprocesses, so that sums run in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run that nothing disturbed, with dropout and layer drop, in bfloat16 autocast."""
    out = tmp_path_factory.mktemp("finished")
    return out, train_tiny(corpus, out)


def start(corpus, out, *, processes=1, **options):
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"] if processes > 1 else []
    script = [sys.executable, *launcher, "-m", "tests.pretrain.train_tiny", str(corpus), str(out), json.dumps(options)]
    settings = {"cwd": REPOSITORY, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "start_new_session": True}
    return subprocess.Popen(script, stderr=subprocess.PIPE, text=True, **settings)


def wait_for_steps(process, out, steps):
    """Return soon after the run has saved that many steps."""
    deadline = time.monotonic() + 60
    while not any(int(path.stem.removeprefix("step-")) >= steps for path in list_checkpoints(out / "checkpoints")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_same_training(out, reference):
    ours, theirs = load_file(out / "model.safetensors"), load_file(reference / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert without_time(read_metrics(out)) == without_time(read_metrics(reference))


def test_learns_and_writes_weights_that_say_what_they_are(finished):
    out, outcome = finished
    assert outcome["last_step"] == 12
    assert outcome["last_loss"] < outcome["first_loss"] and 0 <= outcome["last_masked_accuracy"] <= 1
    assert outcome["valid_loss"] > 0 and outcome["audio_seconds"] > 12 and outcome["seconds"] > 0
    with safe_open(out / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert ModelConfig.from_json(metadata["model_config"]) == MODEL
    assert metadata["num_classes"] == "6"
    assert names == set(MODEL.build(6).state_dict())


def test_a_folder_with_a_training_is_refused_without_resume(finished, corpus):
    with pytest.raises(FileExistsError, match="holds an earlier training .*resume it or choose another"):
        train_tiny(corpus, finished[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"encoder_embed_dim": 64}}, "of another model .*encoder_embed_dim is 32 there and 64 here"),
        ({"learning_rate": 1e-3}, "other settings .*optimizer.learning_rate is 0.005 there and 0.001 here"),
        ({"seed": 5}, "other settings .*seed is 1 there and 5 here"),
    ],
)
@pytest.mark.parametrize("what_is_there", ["model.safetensors", "checkpoints"])
def test_resuming_with_another_model_or_settings_is_refused(finished, corpus, tmp_path, change, message, what_is_there):
    (tmp_path / what_is_there).symlink_to(finished[0] / what_is_there)
    with pytest.raises(CheckpointMismatchError, match=message):
        train_tiny(corpus, tmp_path, resume=True, **change)


def test_killed_at_a_random_moment_it_resumes_to_the_same_weights_and_metrics(finished, corpus, tmp_path):
    for least_steps in (0, 4):  # killed anywhere before the end of the first steps, then later once more
        process = start(corpus, tmp_path, resume=True)
        if least_steps:
            wait_for_steps(process, tmp_path, least_steps)
        else:
            time.sleep(random.uniform(1.0, 5.0))
        time.sleep(random.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    train_tiny(corpus, tmp_path, resume=True)
    assert_same_training(tmp_path, finished[0])
    assert not list(tmp_path.rglob(".tmp-*"))


def test_sigterm_to_it_and_its_workers_saves_and_leaves_quietly(corpus, tmp_path):
    process = start(corpus, tmp_path, save_every=1000, steps=100_000)
    deadline = time.monotonic() + 60
    while len(read_metrics(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped by SIGTERM after step" in errors and "Traceback" not in errors
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 1


def test_processes_micro_batches_and_graphs_change_the_weights_by_rounding_alone(corpus, tmp_path):
    options = {"model": WITHOUT_DROPOUT, "steps": 5, "autocast": False, "workers": 0}
    processes = [start(corpus, tmp_path / "two", processes=2, **options)]
    processes.append(start(corpus, tmp_path / "two in graphs", processes=2, graphs=True, **options))
    train_tiny(corpus, tmp_path / "one", **options)
    train_tiny(corpus, tmp_path / "accumulated", accumulate=2, **options)
    train_tiny(corpus, tmp_path / "graphs", accumulate=2, graphs=True, **options)
    for process in processes:
        _, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
    for name in ("accumulated", "graphs", "two", "two in graphs"):
        assert_like_training(tmp_path / name, tmp_path / "one")


def test_a_run_in_graphs_resumes_to_the_same_bits_and_without_graphs_to_the_same_but_rounding(corpus, tmp_path):
    options = {"steps": 12, "autocast": False, "save_every": 10}
    train_tiny(corpus, tmp_path / "graphs", graphs=True, **options)
    train_tiny(corpus, tmp_path / "eager", **options)
    for name, begun, graphs in (("both", "graphs", True), ("to eager", "graphs", False), ("from eager", "eager", True)):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        shutil.copy(tmp_path / begun / "checkpoints" / "step-00000010.pt", tmp_path / name / "checkpoints")
        shutil.copy(tmp_path / begun / "metrics.jsonl", tmp_path / name)
        train_tiny(corpus, tmp_path / name, resume=True, graphs=graphs, **options)
    assert_same_training(tmp_path / "both", tmp_path / "graphs")
    for name in ("to eager", "from eager", "graphs"):
        assert_like_training(tmp_path / name, tmp_path / "eager")


def assert_like_training(out, reference):
    """The same but for rounding."""
    ours, theirs = load_file(out / "model.safetensors"), load_file(reference / "model.safetensors")
    assert ours.keys() == theirs.keys()
    torch.manual_seed(1)
    initial = MODEL.build(6).state_dict()
    for name, weight in theirs.items():
        moved = (weight - initial[name]).abs().max()
        # Adam divides by the gradient's size, so it magnifies float32 rounding where a gradient is nearly 0.
        assert (ours[name] - weight).abs().max() <= 1e-5 + 1e-3 * moved, name
    for measure in ("loss", "grad_norm", "masked_accuracy", "valid_loss", "audio_seconds"):
        measured, expected = (
            [line[measure] for line in read_metrics(folder) if measure in line] for folder in (out, reference)
        )
        assert expected and measured == pytest.approx(expected, rel=1e-4), measure


@pytest.mark.parametrize("metrics", [None, "", "{cut"])
def test_weights_without_metrics_are_not_taken_for_a_training(finished, corpus, tmp_path, metrics):
    (tmp_path / "model.safetensors").symlink_to(finished[0] / "model.safetensors")
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    message = f"model.safetensors is there but its metrics.jsonl is missing or empty; remove {tmp_path} to train again"
    with pytest.raises(FileNotFoundError, match=message):
        train_tiny(corpus, tmp_path, resume=True)
