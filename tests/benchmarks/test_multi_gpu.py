"""The projection to several GPUs: its limits, and what it says."""

from dataclasses import replace

import pytest
import torch

from benchmarks.architecture import ARCHITECTURES
from benchmarks.multi_gpu import Assumptions, all_reduce_seconds, main, parts, project
from benchmarks.report import save
from hubert_fast import hubert_pretrain_model
from tests.benchmarks.fabricated import report, row

BASE = parts(ARCHITECTURES["base"])
EASY = Assumptions(length_spread=0.0, compute_lost=0.0, hop_seconds=0.0)


def test_gradients_are_those_of_the_model():
    with torch.device("meta"):
        model = hubert_pretrain_model(**ARCHITECTURES["base"].factory_arguments(500))
    elsewhere = 3 * 768  # the mask embedding, and the norm before the layers
    assert sum(size for _, size in BASE) == 4 * (sum(each.numel() for each in model.parameters()) - elsewhere)


def test_an_all_reduce_moves_each_byte_almost_twice():
    fast = EASY._replace(nvlink_bytes_per_second=100.0, network_bytes_per_second=10.0, reached_bandwidth=0.5)
    found = [all_reduce_seconds(1000, gpus, fast) for gpus in (1, 2, 8, 16)]
    assert found == pytest.approx([0, 1000 / 50, 1.75 * 1000 / 50, 1.875 * 1000 / 5])  # the last over the network
    assert all_reduce_seconds(1000, 8, fast._replace(hop_seconds=1.0)) == pytest.approx(35 + 6)


def test_communication_hides_behind_a_long_backward_but_for_the_last_part_and_takes_compute_from_it():
    long = project(100.0, BASE, 8, EASY)
    # The front end comes last, and its convolutions take so long that all other parts are done by then.
    assert long.exposed_seconds == pytest.approx(all_reduce_seconds(BASE[-1][1], 8, EASY))
    assert long.step_seconds == pytest.approx(100.0 + long.exposed_seconds)
    greedy = project(100.0, BASE, 8, EASY._replace(compute_lost=0.5))
    hidden = greedy.all_reduce_seconds - greedy.exposed_seconds
    assert greedy.step_seconds == pytest.approx(long.step_seconds + 0.5 * hidden)


def test_a_network_slower_than_the_backward_is_exposed():
    slow = EASY._replace(nvlink_bytes_per_second=1e9)
    found = project(0.02, BASE, 8, slow)
    assert found.exposed_seconds > found.all_reduce_seconds - 0.02 * slow.backward_share
    assert found.step_seconds == pytest.approx(0.02 + found.exposed_seconds)
    assert found.efficiency == pytest.approx(0.02 / found.step_seconds)


def test_every_step_waits_for_the_slowest_rank():
    waits = [project(1.0, BASE, gpus, EASY._replace(length_spread=0.1)).waiting_seconds for gpus in (1, 2, 8, 64)]
    torch.manual_seed(0)
    expected = [0.1 * float(torch.randn(20_000, gpus).amax(1).mean()) for gpus in (1, 2, 8, 64)]
    assert waits == pytest.approx(expected, abs=0.004)


def test_only_steps_of_ours_on_a_gpu_are_projected(tmp_path, capsys):
    ours = row(0.02, case="on the GPU", device="cuda", shape={"model": "large", "classes": 500}, audio_seconds=87.0)
    save(report(row(case="on the CPU"), ours, replace(ours, implementation="torchaudio")), tmp_path / "result.json")
    main([str(tmp_path / "result.json")])
    out = capsys.readouterr().out
    assert "Projected, not measured" in out and "torchaudio" not in out and "on the CPU" not in out
    assert "hubert_fast, on the GPU, float32, from a step of 20.0 ms; 1.18 GiB of gradients" in out
    lines = [line.split() for line in out.splitlines() if line[:4].strip().isdigit()]
    assert lines[0][-2:] == ["100.0%", "4,350"]  # one GPU takes what was measured
    efficiencies = [float(line[-2][:-1]) for line in lines]
    assert efficiencies == sorted(efficiencies, reverse=True) and efficiencies[-1] > 50


def test_what_cannot_be_projected_from_is_said_without_a_traceback(tmp_path, capsys):
    save(report(row()), tmp_path / "cpu.json")
    for given, named in (("none.json", "none.json"), ("cpu.json", "no training step of hubert_fast on a GPU")):
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path / given)])
        assert named in capsys.readouterr().err
