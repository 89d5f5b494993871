"""Writes the README's part about performance from the committed results, so that no number in it is typed by hand.

python -m benchmarks.readme             # after a change in benchmarks/results/
"""

from __future__ import annotations

from pathlib import Path

from hubert_fast.pretrain.atomic import write_text

from .markdown import LEGEND, section
from .report import load

BEGIN = "<!-- performance: written by python -m benchmarks.readme from benchmarks/results/*.json -->"
END = "<!-- end of performance -->"

_ROOT = Path(__file__).resolve().parents[1]
README = _ROOT / "README.md"
RESULTS = _ROOT / "benchmarks" / "results"

_NO_GPU = """\
No figure from a GPU yet: the CUDA kernels compile, and run on a simulated device in the tests; the Triton kernels compile for
sm_80, 90 and 100 and run in Triton's interpreter. Neither has run on a real GPU."""


def performance(results: Path) -> str:
    """Markdown of the result files in the folder ``results``: those with training steps, GPUs first.

    Raises:
        ValueError: for a file that is not a result file.
    """
    reports = {path.name: load(path) for path in sorted(results.glob("*.json"))}
    shown = {name: each for name, each in reports.items() if any(row.kind == "step" for row in each.rows)}
    on_gpu = {name: each for name, each in shown.items() if each.rows[0].device != "cpu"}
    sections = [section(each, name) for name, each in (on_gpu | shown).items()]
    return "\n\n".join([LEGEND, *([] if on_gpu else [_NO_GPU]), *sections])


def split(readme: str) -> tuple[str, str, str]:
    """(before, between, behind) the two marks.

    Raises:
        ValueError: where they are not there, once each and in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    between, end, behind = rest.partition(END)
    if not begin or not end or BEGIN in between + behind or END in before + behind:
        raise ValueError(f"the README must have the lines {BEGIN} and {END}, once each and in order")
    return before, between, behind


def rewritten(readme: str, results: Path) -> str:
    """``readme`` with what lies between the marks made from ``results``."""
    before, _, behind = split(readme)
    return f"{before}{BEGIN}\n\n{performance(results)}\n\n{END}{behind}"


if __name__ == "__main__":
    write_text(README, rewritten(README.read_text(encoding="utf-8"), RESULTS))
