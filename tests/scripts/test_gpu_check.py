"""scripts/gpu-check without a GPU: on stand-ins of its stages, at tiny sizes on a CPU, and on what only a GPU would show."""

import dataclasses
import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import hubert_fast
from benchmarks import predictions
from hubert_fast.models.stage_pass import StagePass
from hubert_fast.pretrain.distributed import Process
from hubert_fast.pretrain.pipeline import open_run
from hubert_fast.switches import Switches
from scripts.gpu_check import environment as environment_stage
from scripts.gpu_check import gpu_tests, graphs, isolated, models, pretrain, profile, sanitize, show, smoke, stages
from scripts.gpu_check.facts import Facts
from scripts.gpu_check.running import Runner, Stage
from tests.pretrain.small_run import small_config, small_folder
from tools.aot import __main__ as aot

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tiny sizes are done sooner by one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def facts(tmp_path):
    return Facts(tmp_path)


def stage(name, code, *, limit=30, **settings):
    return Stage(name, name, limit, lambda out, device: [sys.executable, "-c", code, str(out)], **settings)


def note(name):
    return f"import pathlib, sys; pathlib.Path(sys.argv[1], {name!r}).touch()"


def statuses(facts):
    return {each["name"]: each["status"] for each in facts.of("stage")}


# The stages, whatever they are


def test_a_stage_that_dies_and_one_that_overruns_cost_nothing_else(facts):
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    overruns = (
        f"import pathlib, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', {stubborn!r}]);"
        "pathlib.Path(sys.argv[1], 'child').write_text(str(child.pid)); time.sleep(60)"
    )
    runner = Runner(facts, seconds=60, device="cuda")
    for each in (
        stage("first", note("first")),
        stage("dies", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        stage("raises", "raise ValueError('what was wrong')"),
        stage("overruns", overruns, limit=3),
        stage("last", note("last")),
    ):
        runner.run(each)
    runner.finish()
    found = statuses(facts)
    assert found["first"] == found["last"] == "ok"
    assert found["dies"].startswith("failed (-11)")
    assert found["raises"] == "failed (1): ValueError: what was wrong"
    assert found["overruns"] == "stopped after 3 s"
    assert not runner.all_well
    assert (facts.out / "first").exists() and (facts.out / "last").exists()
    assert _gone(int((facts.out / "child").read_text()))
    summary = (facts.out / "summary.txt").read_text()
    assert all(name in summary and status in summary for name, status in found.items())
    log = (facts.out / "log.txt").read_text()
    assert "ValueError: what was wrong" in log


def _gone(process, seconds=5.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_no_stage_begins_without_time_and_that_is_said(facts):
    runner = Runner(facts, seconds=1, device="cuda")
    runner.run(stage("late", note("late")))
    assert statuses(facts) == {"late": "no time was left"}
    assert not (facts.out / "late").exists()


def test_a_stage_beside_others_ends_before_the_one_after_the_next(facts):
    wait = f"import time; time.sleep(1); {note('beside')}"
    look = "import pathlib, sys; raise SystemExit(pathlib.Path(sys.argv[1], 'beside').exists() is {there})"
    runner = Runner(facts, seconds=60, device="cuda")
    runner.run(stage("beside", wait, beside=True))
    runner.run(stage("next", look.format(there=True)))
    runner.run(stage("after", look.format(there=False)))
    assert statuses(facts) == {"next": "ok", "beside": "ok", "after": "ok"}


def test_an_item_that_ends_its_process_is_named_and_the_others_are_done(facts):
    assert isolated.run(facts, "items", "tests.scripts.broken_stages", "items", first_seconds=120, item_seconds=2) == 0
    found = {each["item"]: each.get("failed", "done") for each in facts.of("items")}
    assert found == {
        "first": "done",
        "lost": "its process ended with 3",
        "killed": "its process ended with -9",
        "hangs": "hung: it was not done within 2 s",
        "last": "done",
    }


def test_what_was_running_when_the_time_was_over_is_named(facts):
    code = (
        "import pathlib, sys; from scripts.gpu_check import facts, isolated; out = facts.Facts(pathlib.Path(sys.argv[1]));"
        "isolated.run(out, 'items', 'tests.scripts.broken_stages', 'items', first_seconds=60, item_seconds=60)"
    )
    Runner(facts, seconds=60, device="cuda").run(stage("items", code, limit=6))
    assert statuses(facts) == {"items": "stopped after 6 s"}
    assert [each["item"] for each in facts.of("items") if "interrupted" in each.get("failed", "")] == ["hangs"]


def test_a_process_that_cannot_begin_is_not_begun_again(facts):
    assert isolated.run(facts, "items", "tests.scripts.no_such_module", first_seconds=120, item_seconds=2) == 1


def test_a_lost_device_costs_smoke_one_check(facts):
    assert isolated.run(facts, "smoke", "tests.scripts.broken_stages", "smoke", first_seconds=120, item_seconds=60) == 0
    found = {each["item"]: each["ok"] for each in facts.of("smoke") if "ok" in each}
    assert found == {each.name: each.name != "all, float32" for each in smoke.checks()}


def test_a_lost_device_costs_the_step_one_implementation(facts):
    assert isolated.run(facts, "step", "tests.scripts.broken_stages", "step", first_seconds=120, item_seconds=60) == 0
    failed = {each["item"]: each["failed"] for each in facts.of("step") if "failed" in each}
    assert failed.pop("torchaudio").startswith("RuntimeError: CUDA error: an illegal memory access")
    assert failed == {"hubert_fast graph": "CUDA graphs need a GPU"}
    assert [each["rounds"] for each in facts.of("step") if each.get("peer") == "hubert_fast" and "ms" in each][-1] == 2
    assert facts.of("part") and facts.of("profile")


def test_a_line_that_was_cut_off_is_left_out(facts):
    facts.note("smoke", item="a", ok=True)
    with facts.path.open("a") as file:
        file.write('{"part": "smoke", "item": "b"')
    assert [each["item"] for each in facts.of("smoke")] == ["a"]


# The whole script


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run on the CPU of every stage that has something of its own there: not the main job, which tests/pretrain runs."""
    out = tmp_path_factory.mktemp("gpu-check") / "out"
    names = [name for name in stages.STAGES if name not in ("kernels", "large", "racecheck", "pretrain", "suite")]
    done = subprocess.run(
        [ROOT / "scripts" / "gpu-check", str(out), *names, "--device", "cpu", "--seconds", "560"],
        env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=590,
    )  # fmt: skip
    return SimpleNamespace(done=done, facts=Facts(out), names=names)


def test_every_stage_ends_well_on_a_cpu(whole):
    expected = {name: "ok" for name in whole.names if name != "warm"}  # Triton compiles for GPUs alone
    assert statuses(whole.facts) == expected, whole.done.stdout + (whole.facts.out / "log.txt").read_text()[-4000:]
    assert whole.done.returncode == 0


def test_every_part_leaves_its_facts(whole):
    parts = {each["part"] for each in whole.facts.all()}
    assert parts >= {"environment", "extension", "backends", "smoke", "step", "profile", "part", "kernel", "stages",
                     "graphs", "determinism", "tests", "step peers", "converge", "sanitize"}  # fmt: skip
    checks = whole.facts.of("smoke")
    assert {each["item"] for each in checks} == {each.name for each in smoke.checks()}
    assert all(each["ok"] for each in checks), checks
    assert {each["item"] for each in whole.facts.of("graphs") if each.get("ok", True)} == set(graphs.ITEMS)
    turned = {each["item"] for each in whole.facts.of("switches") if each["ok"]}
    assert turned == {each.name for each in dataclasses.fields(Switches)} == set(predictions.SWITCHES)
    assert whole.facts.of("determinism")[0]["equal"]
    assert whole.facts.of("converge")[-1]["ok"]
    assert {"hubert_fast", "torchaudio"} <= {each["peer"] for each in whole.facts.of("step") if "ms" in each}


def test_few_files_are_left_and_all_of_them_at_the_top(whole):
    names = sorted(path.relative_to(whole.facts.out).as_posix() for path in whole.facts.out.rglob("*"))
    assert names == [
        "bench-operators.json",
        "log.txt",
        "profile-tiny-float32.txt",
        "results.jsonl",
        "summary.txt",
        "tests.jsonl",
    ]


def test_what_is_printed_fits_the_end_of_a_terminal(whole):
    assert len(whole.done.stdout) < 40_000 and max(map(len, whole.done.stdout.splitlines())) <= 2_000
    assert "x ours" in whole.done.stdout


def test_an_unknown_stage_is_refused_by_name(tmp_path):
    done = subprocess.run(
        [ROOT / "scripts" / "gpu-check", str(tmp_path), "smokes"], env={**os.environ, "PYTHON": sys.executable},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "'smokes'" in done.stderr and "smoke" in done.stderr


# What it names exists


def test_every_module_test_and_option_that_the_stages_name_exists(tmp_path):
    assert {name for part in stages.PARTS.values() for name in part} <= set(stages.STAGES)
    for each in stages.STAGES.values():
        assert importlib.util.find_spec(each.command(tmp_path, "cuda")[2])
    assert all((ROOT / folder).exists() for folders in gpu_tests.FOLDERS.values() for folder in folders)
    shown = {part for each in stages.STAGES.values() for part in each.shows}
    sources = "".join(path.read_text() for path in (ROOT / "scripts" / "gpu_check").glob("*.py"))
    assert [part for part in shown if f'"{part}"' not in sources] == []


def test_the_ahead_of_time_compiler_takes_the_options(tmp_path, monkeypatch):
    command = stages.STAGES["warm"].command(tmp_path, "cuda")
    monkeypatch.setattr(sys, "argv", command[2:])
    options = aot._arguments()
    assert options.arch == [90] and "base" in options.size


def test_the_large_tests_are_there_by_name_and_run_alone():
    for which, expected in (("large", set(gpu_tests.LARGE)), ("most", set())):
        command = [each for each in gpu_tests.arguments(which) if each not in ("-n", "--dist", "worksteal")]
        command = [each for each in command if not each.isdigit()]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", *command], cwd=ROOT, capture_output=True, text=True
        )
        found = {line for line in done.stdout.splitlines() if "::" in line}
        assert found & set(gpu_tests.LARGE) == expected, done.stdout


def test_every_operator_of_a_step_is_checked_alone_in_both_dtypes():
    alone = {(each.operators[0], each.dtype) for each in smoke.checks() if len(each.operators) == 1}
    operators = {each.operator for each in hubert_fast.backend.report()} - {"span_mask"}
    assert alone == {(operator, dtype) for operator in operators for dtype in ("float32", "bfloat16")}


# What it finds


@pytest.mark.parametrize("scale", [1.05, float("nan")])
def test_a_wrong_gradient_of_one_operator_is_found_and_named(monkeypatch, scale):
    from hubert_fast.torch_backend import bias_gelu_dropout as module

    backward = module.backward

    def wrong(*arguments):
        first, *others = backward(*arguments)
        return first * scale, *others

    monkeypatch.setattr(module, "backward", wrong)
    checks = {each.name: each for each in smoke.checks()}
    broken = smoke._compare(checks["bias_gelu_dropout, float32"])
    assert not broken["ok"]
    assert scale != scale or "intermediate_dense" in broken["wrong"][0]
    assert smoke._compare(checks["mask_fill, float32"])["ok"]


def test_a_wrong_gradient_of_a_stage_in_graphs_is_found_and_named(monkeypatch):
    backward = StagePass._backward

    def wrong(self, i):
        backward(self, i)
        self._gradients.flat[i].mul_(1.05 if i == 1 else 1.0)

    monkeypatch.setattr(StagePass, "_backward", wrong)
    found = graphs._gradients(0.0)
    assert not found["ok"]
    assert {
        item: [name for name, error in errors.items() if error > 0.01] for item, errors in found["wrong"].items()
    } == (dict.fromkeys(("as it runs", "captured", "another capacity", "another batch"), ["layer 0"]))


def test_an_item_in_graphs_that_fails_on_a_gpu_leaves_the_others_to_a_new_process(facts, monkeypatch):
    def fail():
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "ITEMS", {"first": fail, "second": lambda: {"ok": True}})
    monkeypatch.setattr(graphs, "ON_GPU", True)
    monkeypatch.setattr(sys, "argv", ["graphs", str(facts.out), "here"])
    assert (graphs.main(), graphs.main()) == (isolated.LOST, 0)
    first, second = facts.of("graphs")
    assert first["failed"] == "RuntimeError: operation not permitted when stream is capturing"
    assert second["item"] == "second" and second["done"]


def test_operators_that_are_broken_run_by_pytorch_from_then_on(facts):
    facts.note("smoke", item="all, bfloat16", done=True, ok=False)
    facts.note("smoke", item="masked_attention, bfloat16", done=True, ok=False)
    facts.note("smoke", item="mask_fill, bfloat16", done=True, ok=True)
    facts.note("smoke", item="positional_conv, float32", failed="its process ended with -6")
    facts.note("smoke", item="conv_frontend, float32", done=True, ok=False)  # not what is measured
    with hubert_fast.backend.using("auto"):
        assert models.leave_out_broken(facts) == ["masked_attention", "positional_conv"]
        chosen = {each.operator: each.chosen for each in hubert_fast.backend.report()}
    assert [name for name, backend in chosen.items() if backend == "torch"] == ["masked_attention", "positional_conv"]
    facts.note("step", peer="hubert_fast", rounds=1, audio_s=175.0, ms=50.0, host_ms=48.0)
    assert show.render(facts)[0].startswith("LEFT OUT: ['masked_attention', 'positional_conv']")


def event(name, start=0.0, end=0.0, *, parent=None, kernels=(), device=DeviceType.CPU):
    return SimpleNamespace(
        name=name, cpu_parent=parent, device_type=device, time_range=SimpleNamespace(start=start, end=end),
        kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
    )  # fmt: skip


def test_the_gpus_gaps_are_found():
    spans = [("a", 0, 100), ("b", 100, 200), ("c", 150, 180), ("d", 250, 300), ("e", 310, 400)]
    found = profile.busy([event(*span, device=DeviceType.CUDA) for span in spans] + [event("host", 0, 900)])
    assert found == {
        "kernels": 5,
        "busy_ms": 0.34,
        "whole_ms": 0.4,
        "busy_share": 0.85,
        "gaps_over_20_us": 1,
        "largest_gap_us": 50,
    }


def test_kernels_are_told_apart_by_the_operators_around_them():
    scope = event("hubert_fast::conv_frontend_backward")
    optimizer = event("Optimizer.step#AdamW.step")
    linear = event("aten::linear")
    found = profile.by_part([
        event("aten::mm", parent=event("aten::matmul", parent=scope), kernels=[("gemm", 3000)]),
        event("aten::addmm", parent=linear, kernels=[("gemm", 500), ("gemm", 500)]),
        event("aten::copy_", parent=linear, kernels=[("cast", 250)]),
        event("aten::_fused_adamw_", parent=optimizer, kernels=[("adam", 1000)]),
        event("hubert_fast::masked_attention", kernels=[("_forward", 2000), ("hubert_fast::masked_attention", 9000)]),
        event("aten::add_", kernels=[("add", 100)]),
    ])  # fmt: skip
    assert {name: each for name, each in found.items() if each[0]} == {
        "conv front end": (1, 3.0),
        "linear products": (2, 1.0),
        "casts, adds, concatenations, sums": (2, 0.35),
        "AdamW, clipping": (1, 1.0),
        "attention": (1, 2.0),
    }


def test_the_predicted_parts_are_the_predicted_step():
    for number, field in enumerate(("predicted_ms", "improved_ms")):
        total = sum(getattr(each, field) for each in predictions.PARTS) + predictions.GAPS_MS[number]
        assert total == pytest.approx(predictions.STEP_MS[number], rel=0.02)
    assert all(each.floor_ms <= each.improved_ms <= each.predicted_ms for each in predictions.PARTS)


def test_every_operator_belongs_to_a_part():
    for each in hubert_fast.backend.report():
        if each.operator != "span_mask":
            for name in (f"hubert_fast::{each.operator}", f"hubert_fast::{each.operator}_backward"):
                assert predictions.part_of(["aten::mm", name]).operators, name


def test_measured_stands_beside_predicted(facts):
    facts.note("gpu", name="NVIDIA H100")
    facts.note("limits", tflops_bf16=800.0, copy_tb_per_s=3.1)
    facts.note("step", peer="hubert_fast", rounds=1, audio_s=175.0, ms=99.0, host_ms=99.0)
    facts.note("step", peer="hubert_fast", rounds=12, audio_s=175.0, ms=50.0, host_ms=48.0)
    facts.note("step", peer="torchaudio", rounds=12, audio_s=175.0, ms=200.0, host_ms=60.0)
    facts.note("part", name="attention", launches=48, ms=3.25)
    text = "\n".join(show.render(facts))
    assert re.search(
        r"^hubert_fast +50\.00 +48\.00 +3,500 +1\.00\ntorchaudio +200\.00 +60\.00 +875 +4\.00$", text, re.MULTILINE
    )
    assert re.search(r"^attention +48 +48 +0\.90 +2\.90 +2\.30 +3\.25$", text, re.MULTILINE)


def test_an_update_in_graphs_stands_beside_its_prediction(facts):
    facts.note("step", peer="hubert_fast", rounds=12, audio_s=175.0, ms=50.0, host_ms=48.0)
    memory = {"allocated": 6.0, "reserved": 7.0, "device": 7.5}
    facts.note(
        "graphs", item="time, LayerDrop", audio_s=175.0, ms=25.0, host_ms=4.0, eager_ms=50.0, eager_host_ms=49.0,
        launches=27.5, graphs=51, capture_s=1.0, optimizer_graphs=4, optimizer_capture_s=0.5, predicted_gib=6.57,
        memory_gib=memory, eager_memory_gib=memory,
    )  # fmt: skip
    text = "\n".join(show.render(facts))
    predicted = predictions.UPDATES["time, LayerDrop"]
    row = rf"^graphs, LayerDrop +25\.00 +7,000 +4\.00 +{predicted.host_ms:.2f} +27\.5 +{predicted.launches} +55 +1\.50$"
    assert re.search(row, text, re.MULTILINE)
    assert re.search(r"^eager, LayerDrop +50\.00 +3,500 +49\.00 +45\.00$", text, re.MULTILINE)
    assert "GiB: predicted 6.57; eager 6.00 allocated, 7.00 reserved, 7.50 device; graphs 6.00" in text


_SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "========= Invalid __global__ read of size 4 bytes"
echo "=========     at _forward+0x110"
echo "========= ERROR SUMMARY: 3 errors"
exit 9
"""


def test_what_the_sanitizer_finds_is_noted(facts, monkeypatch, tmp_path):
    program = tmp_path / "compute-sanitizer"
    program.write_text(_SANITIZER)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sanitize, "ON_GPU", True)
    monkeypatch.setattr(sys, "argv", ["sanitize", str(facts.out), "memcheck"])
    assert sanitize.main() == 9
    (found,) = facts.of("sanitize")
    assert (
        found["code"] == 9
        and found["summary"] == "ERROR SUMMARY: 3 errors"
        and "Invalid __global__ read" in found["errors"][0]
    )


def test_racecheck_watches_our_kernels_alone():
    options = sanitize._our_kernels()
    assert set(options[::2]) == {"--kernel-name"}
    assert {"kernel_substring=hubert_fast", "kernel_name=_key_backward", "kernel_name=_convolve"} <= set(options[1::2])


def test_the_card_is_described_where_nvidia_smi_fails(facts, monkeypatch):
    monkeypatch.setenv("PATH", "")
    cuda = SimpleNamespace(
        get_device_properties=lambda index: SimpleNamespace(
            name="NVIDIA H100", multi_processor_count=132, total_memory=80 << 30
        ),
        get_device_capability=lambda: (9, 0),
    )
    environment_stage._gpu(facts, SimpleNamespace(cuda=cuda, zeros=lambda *_, **__: None))
    (found,) = facts.of("gpu")
    assert found["name"] == "NVIDIA H100" and "FileNotFoundError" in found["card"]


def test_each_test_result_is_on_disk_when_it_is_there(tmp_path):
    path = tmp_path / "test_two.py"
    path.write_text("def test_right(): pass\n\ndef test_wrong():\n    assert 1 == 2\n")
    recorded = tmp_path / "tests.jsonl"
    code = (
        "import pathlib, pytest, sys; from scripts.gpu_check.gpu_tests import Recorder;"
        "pytest.main([sys.argv[1], '-q', '-p', 'no:cacheprovider'], plugins=[Recorder(pathlib.Path(sys.argv[2]))])"
    )
    subprocess.run([sys.executable, "-c", code, str(path), str(recorded)], cwd=ROOT, capture_output=True, check=True)
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert [each["outcome"] for each in lines] == ["passed", "failed"]
    assert "assert 1 == 2" in lines[1]["why"]


def test_a_run_that_was_stopped_tells_what_it_has(facts, tmp_path):
    from scripts.gpu_check.pretrain import note_run

    train = tmp_path / "run" / "iteration1" / "train"
    train.mkdir(parents=True)
    line = {"step": 20, "loss": 4.0, "masked_accuracy": 0.1, "audio_seconds": 400.0, "seconds": 10.0}
    (train / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    note_run(facts, tmp_path / "run")
    (found,) = facts.of("pretrain")
    assert found["last_loss"] == 4.0 and found["audio_seconds_per_second"] == 40.0


def test_the_trainer_in_graphs_and_without_is_compared(facts, tmp_path):
    run = open_run(
        tmp_path / "run",
        small_config(),
        Process(),
        audio=small_folder(tmp_path / "speech"),
        resume=False,
        progress=False,
    )
    run.scan()
    run.units(1)
    assert pretrain.compare(facts, run)
    auto, off, verdict = facts.of("pretrain")
    assert (auto["graphs"], off["graphs"]) == ("auto", "off")
    assert auto["steps"] == off["steps"] == 2 and auto["audio_seconds_per_second"] > 0
    assert verdict["ok"] and len(verdict["auto"]) == len(verdict["off"]) == 2


def test_what_the_trainer_says_of_memory_is_read():
    said = [
        "micro-batches of up to 175.0 s, 1 of each of 1 process: 6.6 of 138.0 GiB by prediction",
        "micro-batches of 175.0 s took 6.1 GiB in a trial",
    ]
    assert pretrain._gib(said) == {"predicted_gib": 6.6, "trial_gib": 6.1}


def test_smoke_compares_with_the_reference_in_float64():
    check = smoke.checks()[1]
    truth = smoke._reference(smoke.replace(smoke._setting(check), dtype=torch.float64), False)
    assert all(each.dtype == torch.float64 for each in truth.values())
    assert smoke._errors(truth, truth)["loss"] == 0.0
