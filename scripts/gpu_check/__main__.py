"""Checks hubert_fast on a GPU within minutes, the most telling first: is it right, how fast, and what fails.

    scripts/gpu-check OUT [STAGE ...]

Each stage is a process under a limit of its own, and each fact a JSON line in OUT/results.jsonl the moment it is known, so that
a crash, an overrun or a lost CUDA context costs its own stage and nothing else. OUT also gets summary.txt, log.txt, tests.jsonl,
profile-*.txt and bench-operators.json. Nothing is downloaded. The exit status is 1 where a stage did not end well.

A machine without a compiler, or with little time, brings what was built elsewhere: hubert_fast/_C.<its Python>.so, made there by
`HUBERT_FAST_CUDA=1 HUBERT_FAST_CUDA_ARCHS=90a pip install -e .` with the same version of Python, and wheels in .whl/ for what
its environment lacks (scripts/gpu_check/wheels.txt). Without the first the extension is compiled.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from scripts.gpu_check.facts import Facts
from scripts.gpu_check.running import Runner
from scripts.gpu_check.stages import PARTS, STAGES


def main() -> int:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    facts = Facts(options.out)
    names = [name for each in options.stage for name in PARTS.get(each, (each,))]
    # A check that is stopped from outside ends its stage, and says what it has.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runner = Runner(facts, seconds=options.seconds, device=options.device)
    try:
        for name in dict.fromkeys(names):
            runner.run(STAGES[name])
    finally:
        runner.finish()
    return 0 if runner.all_well else 1


def _options() -> argparse.Namespace:
    parts = "; ".join(f"{name} = {' '.join(stages)}" for name, stages in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/gpu-check",
        description=__doc__.splitlines()[0],
        epilog="\n".join(f"  {each.name:12} {each.says}" for each in STAGES.values()) + f"\n\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", type=_folder, help="folder for the results")
    parser.add_argument("stage", metavar="STAGE", nargs="*", help="which, in this order (default: a b)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=float(os.environ.get("GPU_CHECK_SECONDS", 560)),
        help="for all of it (or GPU_CHECK_SECONDS; 560)",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default=os.environ.get("GPU_CHECK_DEVICE", "cuda"),
        help="cpu tries the script at tiny sizes where there is no GPU (or GPU_CHECK_DEVICE)",
    )
    options = parser.parse_intermixed_args()
    options.stage = options.stage or ["a", "b"]
    unknown = [each for each in options.stage if each not in STAGES and each not in PARTS]
    if unknown:
        parser.error(f"STAGE must be among {[*PARTS, *STAGES]}; got {unknown}")
    return options


def _folder(text: str) -> Path:
    return Path(os.environ.get("GPU_CHECK_FROM", "."), text).resolve()


if __name__ == "__main__":
    sys.exit(main())
