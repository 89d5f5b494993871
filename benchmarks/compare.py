"""What changed between two result files, biggest changes first.

    hubert-fast bench --compare before.json after.json --fail-above 5

A row of one file belongs to the row of the other with the same case, implementation, device and dtype. Whether a difference means
anything is said by the spreads: where the middle three fifths of the two overlap, it does not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import quantities
from .report import Report, Row, load
from .table import columns, written

SLOWER, FASTER, WITHIN = "slower", "faster", "within the spread"
ONLY_BEFORE, ONLY_AFTER = "only in A", "only in B"

# Facts about a file that may differ: what is compared.
_THE_CODE = ("date", "commit", "hubert_fast")

# Of the measured limits of the devices: more than that, and the device itself was not the same.
_SAME_LIMITS = 0.1


@dataclass(frozen=True)
class Change:
    """One case and implementation in the files A (before) and B (after); None where a file lacks it, never both."""

    before: Row | None
    after: Row | None

    @property
    def row(self) -> Row:
        """Either of them, for what they have in common."""
        row = self.before or self.after
        assert row is not None
        return row

    @property
    def ratio(self) -> float | None:
        """Time after over time before, of the medians: above 1 is slower."""
        if self.before is None or self.after is None:
            return None
        return self.after.seconds.median / self.before.seconds.median

    @property
    def memory_ratio(self) -> float | None:
        """Of what a call takes beyond what is held between calls; of the peak where that is not known."""
        if self.before is None or self.after is None:
            return None
        for name in ("step_bytes", "peak_bytes"):
            before, after = getattr(self.before, name), getattr(self.after, name)
            if before and after is not None:
                return after / before
        return None

    @property
    def verdict(self) -> str:
        if self.after is None:
            return ONLY_BEFORE
        if self.before is None:
            return ONLY_AFTER
        before, after = self.before.seconds, self.after.seconds
        if before.p20 <= after.p80 and after.p20 <= before.p80:
            return WITHIN
        return SLOWER if after.median > before.median else FASTER


def compare(a: Report, b: Report) -> list[Change]:
    """Every row of ``a`` and ``b``: changes outside the spread first, the biggest of them on top; what only one has, last."""
    before, after = _by_key(a), _by_key(b)
    changes = [Change(before.get(key), after.get(key)) for key in dict.fromkeys([*before, *after])]
    return sorted(changes, key=_prominence)


def _by_key(report: Report) -> dict[tuple[str, ...], Row]:
    return {(row.kind, row.case, row.implementation, row.device, row.dtype): row for row in report.rows}


def _prominence(change: Change) -> tuple[int, float]:
    if change.ratio is None:
        return 2, 0.0
    return int(change.verdict == WITHIN), -max(change.ratio, 1 / change.ratio)


def differences(a: Report, b: Report) -> list[str]:
    """Sentences about what else than the code differs, and so may be behind a change."""
    keys = [key for key in dict.fromkeys([*a.machine, *b.machine]) if key not in _THE_CODE]
    sentences = [
        f"{key}: {a.machine.get(key, 'not said')} in A, {b.machine.get(key, 'not said')} in B"
        for key in keys
        if a.machine.get(key) != b.machine.get(key)
    ]
    for dtype in a.limits.keys() & b.limits.keys():
        for name, what in (("flops_per_second", "matrix products"), ("bytes_per_second", "copies")):
            ratio = getattr(b.limits[dtype], name) / getattr(a.limits[dtype], name)
            if max(ratio, 1 / ratio) > 1 + _SAME_LIMITS:
                sentences.append(
                    f"plain {what} in {dtype} ran {quantities.digits(ratio)} times as fast in B as in A: the device itself "
                    "was not equally fast"
                )
    return sorted(sentences)


def render(changes: Sequence[Change]) -> str:
    """A table of text, a line a change."""
    lines = [("", "time B/A", "A", "B", "memory B/A", "case", "implementation")]
    for change in changes:
        row = change.row
        lines.append(
            (
                change.verdict,
                written(change.ratio, "{:.2f}".format),
                *(written(each and each.seconds.median, quantities.seconds) for each in (change.before, change.after)),
                written(change.memory_ratio, "{:.2f}".format),
                f"{row.kind}: {row.case}, {row.device}, {row.dtype}",
                row.implementation,
            )
        )
    return columns(lines, left=(0, 5, 6))


def main_compare(a: Path, b: Path, fail_above: float | None = None) -> int:
    """Print the changes from file ``a`` to file ``b``.

    Args:
        fail_above: percent; rows that got slower by more than this, outside the spread, are a failure. So is having no row
            in common, which would let everything pass, and an implementation that B rejects because it does other work.
            None: nothing of this is.

    Returns:
        an exit status: 0, 1 for a failure, 2 where a file cannot be read.
    """
    try:
        before, after = load(a), load(b)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    changes = compare(before, after)
    print(f"A: {a}\nB: {b}")
    for sentence in differences(before, after):
        print(f"not the code alone: {sentence}")
    print(render(changes))
    if fail_above is None:
        return 0
    failures = _failures(changes, after, fail_above)
    for sentence in failures:
        print(f"failed: {sentence}")
    return 1 if failures else 0


def _failures(changes: Sequence[Change], after: Report, fail_above: float) -> list[str]:
    failures = [
        f"{each.row.implementation} in {each.row.case}, {each.row.dtype} takes {100 * (each.ratio - 1):.1f}% longer"
        for each in changes
        if each.ratio is not None and each.verdict == SLOWER and 100 * (each.ratio - 1) > fail_above
    ]
    failures += [
        f"{each.row.implementation} in {each.row.case}, {each.row.dtype} is not in B"
        for each in changes
        if each.verdict == ONLY_BEFORE and each.row.implementation.startswith("hubert_fast")
    ]
    failures += [
        f"{each.implementation} in {each.case} is rejected in B: {each.reason}"
        for each in after.left_out
        if each.rejected
    ]
    if all(each.ratio is None for each in changes):
        failures.append("the files have no row in common")
    return failures
