"""The projection to several GPUs: its counts against the real model, its limits, and what it says."""

from dataclasses import replace

import pytest
import torch

from benchmarks.architecture import ARCHITECTURES
from benchmarks.multi_gpu import Assumptions, all_reduce_seconds, main, parameters, project
from benchmarks.report import save
from hubert_fast import hubert_pretrain_model
from tests.benchmarks.fabricated import report, row

BASE = ARCHITECTURES["base"]
EASY = Assumptions(length_spread=0.0, compute_lost=0.0, hop_seconds=0.0)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_parameters_are_those_of_the_model(name):
    with torch.device("meta"):
        model = hubert_pretrain_model(**ARCHITECTURES[name].factory_arguments(123))
    assert parameters(ARCHITECTURES[name], 123) == sum(each.numel() for each in model.parameters())


def test_an_all_reduce_moves_each_byte_almost_twice():
    fast = replace(EASY, nvlink_bytes_per_second=100.0, network_bytes_per_second=10.0, reached_bandwidth=0.5)
    assert all_reduce_seconds(1000, 1, fast) == 0
    assert all_reduce_seconds(1000, 2, fast) == pytest.approx(1000 / 50)
    assert all_reduce_seconds(1000, 8, fast) == pytest.approx(1.75 * 1000 / 50)
    assert all_reduce_seconds(1000, 16, fast) == pytest.approx(1.875 * 1000 / 5)  # over the network
    assert all_reduce_seconds(1000, 8, replace(fast, hop_seconds=1.0)) == pytest.approx(35 + 6)


def test_one_gpu_takes_what_was_measured():
    alone = project(0.02, BASE, 1)
    assert alone.step_seconds == 0.02 and alone.efficiency == 1.0 and alone.exposed_seconds == 0.0


def test_communication_hides_behind_a_long_backward_but_for_the_last_bucket():
    long = project(100.0, BASE, 8, EASY)
    assert 0 < long.exposed_seconds < 0.2 * long.all_reduce_seconds
    # The front end comes last, and its convolutions take so long that all other buckets are done by then.
    assert long.step_seconds == pytest.approx(100.0 + long.exposed_seconds)


def test_a_network_slower_than_the_backward_is_exposed():
    slow = replace(EASY, nvlink_bytes_per_second=1e9)
    found = project(0.02, BASE, 8, slow)
    assert found.exposed_seconds > found.all_reduce_seconds - 0.02 * slow.backward_share
    assert found.all_reduce_seconds == pytest.approx(1.75 * 4 * parameters(BASE, 500) / 0.75e9)
    assert found.step_seconds == pytest.approx(0.02 + found.exposed_seconds)
    assert found.efficiency == pytest.approx(0.02 / found.step_seconds)


def test_communication_takes_compute_from_what_it_runs_beside():
    greedy = project(1.0, BASE, 8, replace(EASY, compute_lost=0.5))
    hidden = greedy.all_reduce_seconds - greedy.exposed_seconds
    assert greedy.step_seconds == pytest.approx(1.0 + greedy.exposed_seconds + 0.5 * hidden)


def test_every_step_waits_for_the_slowest_rank():
    uneven = replace(EASY, length_spread=0.1)
    waits = [project(1.0, BASE, gpus, uneven).waiting_seconds for gpus in (1, 2, 8, 64)]
    torch.manual_seed(0)
    expected = [0.1 * float(torch.randn(20_000, gpus).amax(1).mean()) for gpus in (1, 2, 8, 64)]
    assert waits == pytest.approx(expected, abs=0.004)


def test_more_gpus_are_never_more_efficient():
    efficiencies = [project(0.0224, BASE, gpus).efficiency for gpus in (1, 2, 4, 8, 16, 32, 64)]
    assert efficiencies == sorted(efficiencies, reverse=True) and efficiencies[-1] > 0.5


@pytest.mark.parametrize("seconds, gpus", [(0.0, 1), (1.0, 0)])
def test_what_cannot_be_is_refused(seconds, gpus):
    with pytest.raises(ValueError, match="at least 1 and step_seconds positive"):
        project(seconds, BASE, gpus)


def test_a_what_if_is_labelled_as_one(capsys):
    assert main(["--step-ms", "22.4", "--audio", "175", "--gpus", "1", "8"]) == 0
    out = capsys.readouterr().out
    assert "Projected, not measured" in out and "took 22.4 ms, which is an assumption too" in out
    alone = next(line for line in out.splitlines() if line.split()[:1] == ["1"])
    assert alone.split()[-2:] == ["100.0%", "7,812"]


def test_assumptions_can_be_others(capsys):
    what_if = ["--step-ms", "10", "--gpus", "8", "--assume"]
    assert main([*what_if, "length-spread=0", "compute_lost=0", "nvlink_bytes_per_second=1e15", "hop_seconds=0"]) == 0
    assert "100.0%" in capsys.readouterr().out
    for wrong, message in (("speed=1", "'speed' is no assumption"), ("hop_seconds=x", "must be a number; got 'x'")):
        with pytest.raises(SystemExit):
            main([*what_if, wrong])
        assert message in capsys.readouterr().err


def test_only_steps_of_ours_on_a_gpu_are_projected(tmp_path, capsys):
    ours = row(0.02, case="on the GPU", device="cuda", shape={"model": "large", "classes": 500}, audio_seconds=87.0)
    path = tmp_path / "result.json"
    save(report(row(case="on the CPU"), ours, replace(ours, implementation="torchaudio")), path)
    assert main([str(path), "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert "hubert_fast, on the GPU, float32, from a step of 20.0 ms; 1.18 GiB of gradients" in out
    assert "torchaudio" not in out and "on the CPU" not in out
    save(report(row(case="on the CPU")), path)
    assert main([str(path)]) == 1
    assert "no training step of hubert_fast on a GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "named"),
    [(["--step-ms", "0"], "step_seconds"), (["/no/such.json"], "no/such.json"),
     (["--step-ms", "20", "--assume", "reached_bandwidth=0"], "reached_bandwidth must be positive")],
)  # fmt: skip
def test_what_cannot_be_projected_from_is_said_without_a_traceback(given, named, capsys):
    assert main(given) == 2
    assert named in capsys.readouterr().err
