"""``hubert-fast``: the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    import torch

_USAGE = """\
usage: hubert-fast COMMAND ...

  pretrain   a folder of speech in, a pre-trained HuBERT and a report out
  scan       its stages, one by one: list the usable audio
  units      make the units that an iteration predicts
  train      train an iteration's model
  evaluate   score an iteration's representations on the held-out part
  report     write RUN/report.html
  forget     take recordings out of a run, and keep its units and checkpoints
  bench      time and memory on this machine beside torchaudio and others, or what moved between two results
  info       versions, devices, and which backend each operator uses and why; with --batch and --seconds, for that size

`hubert-fast COMMAND --help` lists a command's options. `hubert-fast pretrain` alone pre-trains a tiny model on the speech
that comes with this package."""

_STAGES = ("pretrain", "scan", "units", "train", "evaluate", "report", "forget")


def main(arguments: Optional[list[str]] = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that a terminal cannot show is no reason to fail
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        from hubert_fast import __version__

        print(__version__)
        return 0
    if command == "info":
        return _info(rest)
    if command != "bench" and command not in _STAGES:
        print(f"hubert-fast: unknown command {command!r}\n\n{_USAGE}", file=sys.stderr)
        return 2
    try:
        if command == "bench":
            from hubert_fast.benchmarks.command_line import main as bench

            return bench(rest)
        from hubert_fast.pretrain.command_line import run_stage

        return run_stage(command, rest)
    except ModuleNotFoundError as error:
        extra = "bench" if command == "bench" else "pretrain"
        message = f"{error}; `hubert-fast {command}` needs what `pip install 'hubert-fast[{extra}]'` installs"
    except (ValueError, OSError, RuntimeError) as error:
        # Bad input and full disks: the message is all that a user needs.
        if os.environ.get("HUBERT_FAST_TRACEBACK"):
            raise
        message = f"{error}\n(HUBERT_FAST_TRACEBACK=1 shows where this was raised)"
    print(f"hubert-fast {command}: {message}", file=sys.stderr)
    return 1


def run() -> int:
    """`main` on this process' own command line, with threads that sleep while they wait.

    OpenMP's threads spin for a while at the end of each parallel region. Beside another program that uses all cores the one that
    is waited for is not running, and a step of the tiny preset took 5.5 times as long as alone; sleeping, it takes 1.9 times as
    long (2 cores; benchmarks/NOTES.md, "Beside another program"). libgomp reads its settings as it is loaded, so the process
    begins again. Who set them is left alone.
    """
    spins = not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & {*os.environ}
    if sys.argv[1:2] and sys.argv[1] in _STAGES and spins and os.name == "posix":
        import torch

        if not torch.cuda.is_available():
            os.environ["OMP_WAIT_POLICY"] = "passive"
            sys.stdout.flush()
            sys.stderr.flush()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return main()


def _info(arguments: list[str]) -> int:
    import argparse
    import platform

    import torch

    import hubert_fast

    parser = argparse.ArgumentParser(
        prog="hubert-fast info", description="Versions, devices, and what would run and why."
    )
    parser.add_argument("--batch", type=int, help="utterances, with --seconds (default: 1)")
    parser.add_argument(
        "--seconds", type=float, help="of each utterance: what a layer of HuBERT Base runs for that size"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="with --seconds (default: float32)")
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # which has said why
        return int(stop.code or 0)
    if options.seconds is not None:
        batch = 1 if options.batch is None else options.batch
        return _what_runs(batch, options.seconds, getattr(torch, options.dtype or "float32"))
    if options.batch is not None or options.dtype is not None:
        print("hubert-fast info: --batch and --dtype go with --seconds", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    versions = f"torch {torch.__version__}, Triton {_triton_version()}, Python {platform.python_version()}"
    print(f"hubert_fast {hubert_fast.__version__} in {Path(hubert_fast.__file__).parent}, {versions}")
    print(f"GPU: {gpu}; CPU threads: {torch.get_num_threads()}")
    print("\n".join(_extension_lines()) + "\n")
    choices = hubert_fast.backend.report()
    rows = [("operator", "backend", "why", "available")]
    _print_columns([*rows, *((c.operator, c.runs, c.why, ", ".join(c.available)) for c in choices)])
    print("".join(f"\n{c.operator} on {name} cannot run: {why}" for c in choices for name, why in c.reasons.items()))
    return 0


def _what_runs(batch: int, seconds: float, dtype: torch.dtype) -> int:
    import torch

    from hubert_fast.what_runs import what_runs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        lines = what_runs(batch, seconds, device=device, dtype=dtype)
    except ValueError as error:
        print(f"hubert-fast info: {error}", file=sys.stderr)
        return 2
    _print_columns([("operator", "inference", "training", "why"), *lines])
    print(
        "\n-: not called. Another operator does its work, or, on a CPU where nothing is dropped, PyTorch's own functions do,\n"
        "of which a layer is composed because that is fastest. Training is the objective's; a model that is called itself,\n"
        "with labels, makes logits there as in inference, by cosine_logits."
    )
    return 0


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + "  " + row[-1])


def _triton_version() -> str:
    for name in ("triton", "pytorch-triton"):
        with suppress(PackageNotFoundError):
            return version(name)
    return "none"


def _extension_lines() -> list[str]:
    """What was compiled, and why what was not was not."""
    from hubert_fast import extension

    facts = extension.facts()
    if facts is None:
        return [f"extension: none, {extension.why_not('cpu')}"]
    cpu_variants = ", ".join(facts["cpu_variants"])
    lines = [
        f"extension: built by {facts['compiler']} ({facts['build_type']})",
        f"CPU kernels: {cpu_variants}; in use: {extension.cpu().instruction_set()}, threads: {extension.cpu().threading()}",
    ]
    if extension.cuda() is None:
        return [*lines, f"CUDA kernels: none, {extension.why_not('cuda')}"]
    newer = f", PTX of {facts['cuda_ptx']} for newer GPUs" if facts["cuda_ptx"] else ""
    archs = ", ".join(facts["cuda_archs"])
    lines.append(f"CUDA kernels: {archs}{newer}; CUDA {facts['cuda']}, CUTLASS {facts['cutlass']}")
    return [*lines, *_overlapping_maps_lines()]


def _overlapping_maps_lines() -> list[str]:
    """How products read windows on GPUs with tensor maps (csrc/cuda/overlapping_maps.h)."""
    import torch

    from hubert_fast import extension

    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9:
        return []
    try:
        return [f"tensor maps of the GPU may overlap: {'yes' if extension.cuda().overlapping_maps() else 'no'}"]
    except (ValueError, RuntimeError) as error:
        return [f"tensor maps of the GPU: {error}"]


if __name__ == "__main__":
    sys.exit(run())
