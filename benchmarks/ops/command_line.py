"""``python -m benchmarks.ops.bench_<operator>``: one operator, as a table and on request as a result file."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import machine, operators, table
from ..lost_device import DeviceLost
from ..report import Report, save
from ..sizes import SIZES


def main(operator: str) -> None:
    """Measure ``operator`` as the command line says.

    Raises:
        SystemExit: where an implementation computes something else or loses the device, or ours fails.
    """
    arguments = _arguments(operator)
    device = torch.device(arguments.device)
    report = Report(machine.describe(device), {"operator": operator, "size": arguments.size})
    lost = None
    torch.backends.cudnn.benchmark = True  # shapes repeat; implementations that use cuDNN are to have its fastest
    try:
        for dtype in arguments.dtype:
            operators.measure(
                report,
                device=device,
                dtype=getattr(torch, dtype),
                size=arguments.size,
                seconds_left=lambda: float("inf"),
                progress=lambda text: print(text, flush=True),
                operators=[operator],
                compiled=arguments.compiled,
            )
    except DeviceLost as error:
        lost = error
    print(table.render(report))
    if arguments.json:
        save(report, arguments.json)
    rejected = [each for each in report.left_out if each.rejected]
    if lost is not None:
        raise SystemExit(str(lost))
    if rejected:
        raise SystemExit(f"{rejected[0].implementation} failed in {len(rejected)} cases: {rejected[0].reason}")


def _arguments(operator: str) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=f"Measure {operator} beside its alternatives and its floor.")
    parser.add_argument("--size", choices=sorted(SIZES), default="base", help="model whose shapes are taken")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], nargs="+", default=["bfloat16"])
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, help="torch.compile; else on a GPU only")
    parser.add_argument("--json", type=Path, help="result file to write")
    return parser.parse_args()
