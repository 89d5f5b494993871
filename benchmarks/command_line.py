"""``hubert-fast bench``: measure this machine, or compare two measurements."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

import hubert_fast
from hubert_fast import tf32

from .architecture import ARCHITECTURES
from .budget import Budget
from .cases import GPU, cpu_scale, plan
from .compare import main_compare
from .limits import measure_limits
from .lost_device import ALL, DeviceLost, works_here
from .machine import describe, processor_flags
from .peers import PEERS
from .plots import draw
from .report import LeftOut, Report, dtype_name, load, save
from .suite import Suite
from .table import render

_KINDS = ("step", "inference", "operators", "scaling")
_SETTINGS = (
    "HUBERT_FAST_BACKEND",
    "HUBERT_FAST_AUTOTUNE",
    "HUBERT_FAST_INSTRUCTION_SET",
    "HUBERT_FAST_OVERLAPPING_MAPS",
)
_DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 where an implementation was rejected, or ``--fail-above`` says so; 3 where one
    made the device unusable; 130 where it was interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    if options.compare:
        return main_compare(*options.compare, options.fail_above)
    # PyTorch lets convolutions use TF32 and products not: implementations that compute one by the other would not be comparable.
    with tf32.allowed(True):
        return _measure(options, arguments)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "hubert-fast bench",
        description="Time and memory of HuBERT's pre-training beside torchaudio, transformers and others: "
        "the same loss from the same weights and masks, checked before anything is timed.",
    )
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="how long it may take; more time, more cases (default: 5)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("hubert-fast-bench"), help="folder of bench.json and the plots"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--models", nargs="+", choices=sorted(ARCHITECTURES), metavar="MODEL", help="base, large, xlarge, tiny"
    )
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, help="the first is the main one")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=PEERS,
        metavar="NAME",
        help="only these implementations; an unknown name lists all",
    )
    parser.add_argument("--cases", nargs="+", choices=_KINDS, default=list(_KINDS))
    parser.add_argument(
        "--batch",
        nargs=2,
        type=float,
        metavar=("UTTERANCES", "SECONDS"),
        help="of the main cases (default: by device and time)",
    )
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="what moved from A to B; measures nothing"
    )
    parser.add_argument(
        "--fail-above", type=float, metavar="PERCENT", help="with --compare: exit 1 where something got slower by more"
    )
    # The moment (time.monotonic) at which the run began that goes on in this process, from the bench.json that it left.
    parser.add_argument("--go-on-since", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive; got {options.minutes}")
    if options.batch is not None and not (
        options.batch[0] >= 1 and options.batch[0] % 1 == 0 and 0.5 <= options.batch[1]
    ):
        parser.error(f"--batch must be a whole number of utterances and seconds, at least 0.5; got {options.batch}")
    if options.fail_above is not None and not (options.compare and options.fail_above >= 0):
        parser.error("--fail-above goes with --compare, and must be at least 0")
    if options.go_on_since is not None:
        return options  # all that follows was true when the run began
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if not options.compare:
        if not options.no_plots and find_spec("matplotlib") is None:
            parser.error("drawing needs what `pip install 'hubert-fast[bench]'` installs; --no-plots goes without")
        if (options.out / "bench.json").exists():
            parser.error(f"--out: {options.out} has a bench.json already, which would be lost; name another folder")
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out: {options.out} cannot be used: {error.strerror}")
    return options


def _measure(options: argparse.Namespace, arguments: list[str]) -> int:
    since = options.go_on_since
    budget = Budget(60 * options.minutes) if since is None else Budget(60 * options.minutes, since)
    device = _device(options.device)
    dtypes = [getattr(torch, name) for name in options.dtypes or _default_dtypes(device)]
    models = options.models or (["base", "large", "xlarge"] if device.type == "cuda" else ["base"])
    peers = [PEERS[name] for name in options.peers or PEERS]
    torch.backends.cudnn.benchmark = True  # shapes repeat; peers that use cuDNN are to have its fastest
    path = options.out / "bench.json"
    report = (
        Report(describe(device), _settings(options, models, [*map(dtype_name, dtypes)]))
        if since is None
        else load(path)
    )
    interrupted, lost = False, None
    budget.say("limits")
    for dtype in [each for each in dtypes if dtype_name(each) not in report.limits]:
        report.limits[dtype_name(dtype)] = measure_limits(device, dtype)
    rate = report.limits[dtype_name(dtypes[0])].flops_per_second
    scale = GPU if device.type == "cuda" else cpu_scale(options.minutes, rate)
    if options.batch is not None:
        scale = replace(scale, utterances=int(options.batch[0]), utterance_seconds=options.batch[1])
    suite = Suite(report, device, peers, budget, save=lambda: save(report, path))
    cases = plan(device, scale, models, dtypes, options.cases)
    try:
        if since is None or works_here(device):
            suite.run(cases)
        else:
            reason = "the device does not answer in a fresh process either"
            report.left_out.append(LeftOut("what was not measured yet", ALL, f"not run: {reason}"))
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: what was measured is kept", file=sys.stderr)
    except DeviceLost as error:
        lost = error  # and with it whatever lies on the device, which cannot be freed
    finally:
        report.settings["seconds_taken"] = budget.spent()
        save(report, path)
    if lost is not None:
        print(f"{lost}\nwhat is left is measured in a fresh process", file=sys.stderr)
        return _replace_process([*arguments, "--device", device.type, "--go-on-since", repr(budget.started)])
    return _show(report, path, interrupted=interrupted, plots=not options.no_plots)


def _replace_process(arguments: list[str]) -> int:
    """Start again as ``arguments`` say. Beside this process there would be no memory on the device for another."""
    sys.stdout.flush()
    sys.stderr.flush()
    flags = subprocess._args_from_interpreter_flags()  # as multiprocessing passes them on
    os.execv(sys.executable, [sys.executable, *flags, "-m", __package__, *arguments])


def _show(report: Report, path: Path, *, interrupted: bool, plots: bool) -> int:
    """Print the table and draw the pictures; returns the exit status."""
    print(render(report))
    print(f"\n{path}")
    if plots:
        for plot in draw(report, path.parent):
            print(plot)
    if interrupted:
        return 130
    if any(each.lost_device for each in report.left_out):
        return 3
    return 1 if any(each.rejected for each in report.left_out) else 0


def _device(chosen: str) -> torch.device:
    found = torch.cuda.is_available()
    if chosen == "auto":
        chosen = "cuda" if found else "cpu"
    return torch.device(chosen, torch.cuda.current_device()) if chosen == "cuda" and found else torch.device(chosen)


def _default_dtypes(device: torch.device) -> list[str]:
    """bfloat16 is what training uses, where the device computes in it."""
    fast = device.type == "cuda" or bool({"avx512_bf16", "amx_bf16"} & processor_flags())
    return ["bfloat16", "float32"] if fast else ["float32"]


def _settings(options: argparse.Namespace, models: list[str], dtypes: list[str]) -> dict[str, object]:
    return {
        "minutes": options.minutes,
        "models": models,
        "dtypes": dtypes,
        "cases": options.cases,
        "batch": options.batch,
        "peers": options.peers,
        "allow_tf32_in_products": tf32.in_products(),
        "allow_tf32_in_convolutions": tf32.in_convolutions(),
        "environment": {key: os.environ[key] for key in _SETTINGS if key in os.environ},
        "backends": {each.operator: each.runs for each in hubert_fast.backend.report()},
    }
