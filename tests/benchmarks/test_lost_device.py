"""A device that one implementation made unusable costs that implementation its figures, and nobody else."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import command_line, fitting, models, operators
from benchmarks import suite as suite_module
from benchmarks.lost_device import DeviceLost, answers
from benchmarks.ops import turns
from benchmarks.ops.case import OURS
from benchmarks.peers.ours import HubertFast, ObjectiveModel
from benchmarks.report import load
from tests.benchmarks import fabricated
from tests.benchmarks.test_command_line import TINY as TINY_OPTIONS
from tests.benchmarks.test_suite import CPU, Broken, Other, case, suite_of

TINY_STEP = [*TINY_OPTIONS, "step"]
SAID = "it made the device unusable: RuntimeError: CUDA error: an illegal memory access was encountered"


@pytest.fixture(autouse=True)
def quicker(quick, monkeypatch):
    monkeypatch.setattr(suite_module, "_MOST", {"cpu": 4})
    monkeypatch.setattr(fitting, "_PREPARING", {"cpu": 0.0})
    monkeypatch.setattr(suite_module, "peak_of", lambda call, device: call())
    monkeypatch.setattr(models, "check", lambda peer, setting: getattr(peer, "count", lambda: {})())
    monkeypatch.setattr(models.gc, "collect", lambda: None)


@pytest.fixture
def losing(losable):
    """A peer whose n-th call loses the device: the first checks it, two come before it is timed."""

    class Losing(Other):
        name = "losing"
        at = 1
        calls = 0

        @classmethod
        def count(cls):
            cls.calls += 1
            if cls.calls == cls.at:
                losable.lose()
            return {}

        class model(ObjectiveModel):
            def loss(self, batch):
                Losing.count()
                return super().loss(batch)

    return Losing


def finish(report, *peers, cases, losable):
    """Run ``cases`` as a process does, and where it loses the device as another that goes on; returns how many there were."""
    for processes in range(1, 5):
        losable.is_lost = False
        try:
            suite_of(report, *peers).run(cases)
        except DeviceLost:
            continue
        return processes


@pytest.mark.parametrize("at", [1, 2, 3, 5], ids=["in the check", "first call", "second call", "second turn"])
def test_the_others_are_measured_and_the_one_that_broke_it_is_named(losing, losable, at):
    losing.at, report = at, fabricated.report()
    cases = [case(), case(kind="inference"), case(num_classes=9)]
    assert finish(report, HubertFast(), losing(), Other(), cases=cases, losable=losable) == 2
    for each in cases:
        rows = [row for row in report.rows if (row.kind, row.case) == (each.kind, each.name)]
        assert [row.implementation for row in rows] == ["hubert_fast", "other"]
        assert all(row.seconds.count >= 3 for row in rows)
    first, *others = report.left_out
    assert (first.case, first.implementation, first.reason) == (f"{cases[0].name}, float32", "losing", SAID)
    assert first.lost_device and not first.rejected
    assert [(each.implementation, each.lost_device) for each in others] == [("losing", False)] * 2
    assert all(each.reason == f"not run: it made the device unusable in another case ({first.case})" for each in others)


def test_whoever_had_its_turns_keeps_them(losing, losable):
    losing.at, report = 7, fabricated.report()  # in the last of four turns
    with pytest.raises(DeviceLost, match="losing: it made the device unusable"):
        suite_of(report, HubertFast(), losing()).run([case()])
    (row,) = report.rows
    assert row.implementation == "hubert_fast" and row.seconds.count == 4


def test_running_out_of_memory_is_no_lost_device(losable):
    class Hungry(Other):
        name = "hungry"

        class model(ObjectiveModel):
            def forward_backward(self, batch, dtype):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    report = fabricated.report()
    assert finish(report, Hungry(), Broken(), HubertFast(), cases=[case()], losable=losable) == 1
    assert [row.implementation for row in report.rows] == ["hubert_fast"]
    assert [each.implementation for each in report.left_out] == ["hungry", "broken"]
    assert not any(each.lost_device for each in report.left_out)
    assert answers(CPU)


def test_a_device_that_is_lost_beside_any_implementation_costs_one_case(losing, losable, monkeypatch):
    first, second = case(), case(num_classes=9)
    make = suite_module.make

    def losing_make(lengths, architecture, num_classes, *, seed):
        return losable.lose() if num_classes == 9 else make(lengths, architecture, num_classes, seed=seed)

    monkeypatch.setattr(suite_module, "make", losing_make)
    report = fabricated.report()
    assert finish(report, HubertFast(), cases=[first, second], losable=losable) == 2
    assert [row.case for row in report.rows] == [first.name]
    lost, not_run = report.left_out
    assert (lost.case, lost.implementation) == (not_run.case, "all") == (f"{second.name}, float32", "all")
    reason = "not run: the device was lost in this case, by no implementation in particular"
    assert (not_run.implementation, not_run.reason, not_run.lost_device) == ("hubert_fast", reason, False)


def test_an_error_that_is_no_implementations_and_leaves_the_device_alone_is_raised(losable, monkeypatch):
    monkeypatch.setattr(suite_module, "make", lambda *arguments, **settings: [][0])
    with pytest.raises(IndexError):
        suite_of(fabricated.report(), HubertFast()).run([case()])


@pytest.mark.parametrize("at", [1, 3, 10], ids=["in the check", "memory", "timed"])
def test_an_operators_implementation_that_loses_the_device_runs_no_more_and_the_others_do(losable, monkeypatch, at):
    calls = []
    cases_of = operators.cases_of

    def with_a_loss(operator, *arguments):
        cases = cases_of(operator, *arguments)[:2]
        function = cases[0].sides["PyTorch"].function

        def lossy(*arguments):
            calls.append(1)
            return losable.lose() if len(calls) == at else function(*arguments)

        for each in cases if operator == "mask_fill" else ():
            each.sides["PyTorch"] = replace(each.sides["PyTorch"], function=lossy)
        return cases

    monkeypatch.setattr(operators, "cases_of", with_a_loss)
    monkeypatch.setattr(operators, "OPERATORS", ("mask_fill", "bias_gelu_dropout"))
    report = fabricated.report()
    assert finish(report, HubertFast(), cases=[case(kind="operators")], losable=losable) == 2
    found = {(row.case.split(": ")[0], row.implementation) for row in report.rows}
    assert found == {("mask_fill", OURS), ("bias_gelu_dropout", OURS), ("bias_gelu_dropout", "PyTorch")}
    assert len(report.rows) == 2 + 4 and all(row.seconds.count >= 3 for row in report.rows)
    assert [each.reason for each in report.left_out][0] == SAID
    assert [each.implementation for each in report.left_out] == ["PyTorch"] * 2


def test_what_was_not_run_is_named_where_a_fresh_process_finds_no_device(losing, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command_line, "PEERS", {each.name: each for each in (HubertFast(), losing())})
    monkeypatch.setattr(command_line, "_replace_process", command_line.main)  # in which it stays lost
    assert command_line.main([*TINY_STEP, "--no-plots", "--out", str(tmp_path)]) == 3
    report = load(tmp_path / "bench.json")
    reason = "not run: the device does not answer in a fresh process either"
    assert [each.reason for each in report.left_out if each.implementation == "all"] == [reason]
    assert reason in capsys.readouterr().out and report.rows == []


_SCRIPT = """
import sys
import torch
from benchmarks import command_line, peers
from benchmarks.peers.ours import HubertFastSwappedIn

def synchronize(device=None):
    if lost:
        raise RuntimeError("CUDA error: unspecified launch failure")

def build(self, setting, weights):
    lost.append(1)
    synchronize()

lost = []
torch.cpu.synchronize = synchronize
HubertFastSwappedIn.build = build
sys.exit(command_line.main(sys.argv[1:]))
"""


def _run(*arguments):
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=600)


def test_the_fresh_process_is_one(tmp_path):
    """Nothing of what the first one replaced is in it, and it knows the cases that are left."""
    options = ["--minutes", "30", "--peers", "hubert_fast", "hubert_fast swapped in", "--batch", "1", "1"]
    done = _run("-c", _SCRIPT, *TINY_STEP, *options, "--out", str(tmp_path))
    assert done.returncode == 3, done.stdout + done.stderr
    report = load(tmp_path / "bench.json")
    assert {row.implementation for row in report.rows} == {"hubert_fast"}
    assert report.left_out[0].lost_device and "unspecified launch failure" in report.left_out[0].reason
    assert f"- hubert_fast swapped in: {report.left_out[0].reason}" in done.stdout
    assert done.stderr.count("measured in a fresh process") == 1 and (tmp_path / "throughput.png").exists()
    assert json.loads((tmp_path / "bench.json").read_text())["settings"]["seconds_taken"] > 0


def test_the_fresh_process_has_the_interpreters_flags():
    script = "import os; from benchmarks import command_line; os.execv = print; command_line._replace_process(['--out', 'x'])"
    done = _run("-B", "-X", "dev", "-W", "ignore", "-c", script)
    assert done.stdout.endswith("'-m', 'benchmarks', '--out', 'x']\n"), done.stderr
    assert all(f"'{flag}'" in done.stdout for flag in ("-B", "-Wignore", "dev")), done.stdout


def test_turns_end_where_the_device_does_not_answer(losable):
    def losing_in(turn):
        return {"a": lambda i: None, "b": lambda i: losable.lose() if i == turn else None}

    taken, errors = turns.in_turn(losing_in(4), "cpu", repeats=20, seconds=60.0)
    assert list(taken) == ["a"] and len(taken["a"]) == 4 and list(errors) == ["b"]
    losable.is_lost = False
    taken, errors = turns.in_turn(losing_in(3), "cpu", repeats=20, seconds=60.0)
    assert taken == {} and list(errors) == ["b"]  # another process times it anew


def test_limits_that_were_not_measured_again_are_lost_once(losable, monkeypatch):
    monkeypatch.setattr(suite_module, "measure_limits", lambda device, dtype: losable.lose())
    report = fabricated.report()
    assert finish(report, HubertFast(), cases=[case()], losable=losable) == 2
    assert [(each.case, each.implementation) for each in report.left_out] == [("limits", "all")]
    assert [row.implementation for row in report.rows] == ["hubert_fast"]
