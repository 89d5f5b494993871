"""The table says what the report says."""

from dataclasses import replace

import torch

from benchmarks.operators import OPERATORS, cases_of
from benchmarks.sizes import SIZES
from benchmarks.table import columns, render, speedup, speedup_over_others
from tests.benchmarks import fabricated


def test_the_table_has_each_row_with_its_ratio_to_torchaudio():
    measured = {"audio_seconds": 8.0, "flops": 3.7e10, "limits": fabricated.LIMITS, "peak_bytes": 2 << 30}
    rows = [fabricated.row(1.0, **measured), fabricated.row(2.5, implementation="torchaudio", **measured)]
    other = fabricated.row(4.0, case="another case")
    lines = render(fabricated.report(*rows, other)).splitlines()
    ours = next(line for line in lines if line.startswith("base"))
    # Seconds, seconds of audio per second, ratio, GiB, utilisation.
    assert {"hubert_fast", "1.00", "8.00", "2.50", "2.00", "37%"} <= set(ours.split())
    theirs = next(line for line in lines if "torchaudio" in line and "2.50 s" in line)
    assert "1.00" in theirs.split()
    assert speedup(other, [*rows, other]) is None  # torchaudio was not measured in that case
    assert "\n".join(lines).encode("latin-1")  # a terminal may know no more


def test_what_was_left_out_is_said_once_for_each_reason():
    left_out = [(case, "flash", "not installed") for case in ("case 1", "case 2")]
    left_out.append(("case 1", "other", "no time: needs 5 s"))
    text = render(fabricated.report(fabricated.row(), left_out=left_out))
    assert "- flash: not installed (2 cases)" in text and "- other: no time (case 1)" in text


def test_operators_stand_in_a_table_with_their_floors():
    medians = {"hubert_fast": 2e-3, "hubert_fast torch": 4e-3, "PyTorch": 6e-3, "PyTorch, compiled": 5e-3}
    fields = {"kind": "operator", "case": "mask_fill: forward", "bytes": 1e7, "limits": fabricated.LIMITS}
    rows = [fabricated.row(median, implementation=name, **fields) for name, median in medians.items()]
    lines = render(fabricated.report(*rows)).splitlines()
    ours, torch_backend, plain, compiled = lines[lines.index("mask_fill: forward") + 1 :][:4]
    assert lines[-2].startswith("error: ")
    assert " ".join(ours.split()) == "hubert_fast float32 2.00 ms 1.80 ms 2.20 ms 1.00 ms 50% 2.50 -"
    assert torch_backend.split()[-2:] == ["1.25", "-"]
    assert plain.split()[-3:] == ["17%", "-", "-"] and compiled.split()[-3:] == ["20%", "-", "-"]


def test_an_implementation_that_errs_more_is_shown_and_does_not_count():
    sides = {"hubert_fast": (4e-3, 2e-3), "PyTorch": (6e-3, 2.9e-3), "PyTorch, 16-bit product": (1e-3, 3.1e-3)}
    fields = {"kind": "operator", "case": "case", "dtype": "bfloat16", "limits": fabricated.LIMITS}
    rows = [
        fabricated.row(median, implementation=name, check={"results": error}, **fields)
        for name, (median, error) in sides.items()
    ]
    lines = render(fabricated.report(*rows)).splitlines()
    ours, plain, narrow = (line.split() for line in lines[lines.index("case") + 1 :][:3])
    assert ours[-2:] == ["1.50", "2.0e-03"] and plain[-1] == "2.9e-03" and narrow[-1] == "3.1e-03"
    # Nor is anything as exact as what is rounded once too inexact.
    exact = [replace(row, check={"results": 0.0}) if row.implementation == "hubert_fast" else row for row in rows]
    assert speedup_over_others(exact[0], exact) is None
    close = [replace(row, check={"results": 0.001}) for row in rows[2:]]
    assert speedup_over_others(exact[0], [exact[0], *close]) == 0.25


def test_lines_of_a_gpus_operators_fit_a_terminal():
    """However long the names of cases are: they have lines of their own."""
    shown = []
    for operator in OPERATORS:
        for case in cases_of(operator, SIZES["xlarge"], torch.bfloat16, "cuda"):
            shown += [
                fabricated.row(
                    12.3e-6, kind="operator", case=case.name, implementation=name, device="cuda",
                    dtype="bfloat16", flops=case.least.flops, bytes=case.least.bytes, limits=fabricated.LIMITS,
                )
                for name in case.sides
            ]  # fmt: skip
    lines = render(fabricated.report(*shown)).splitlines()
    assert all(len(line) <= 120 for line in lines), max(lines, key=len)
    assert len(lines) > len(shown) and all(len(line.split()) >= 8 for line in lines if line.startswith("  hubert_fast"))


def test_columns_are_as_wide_as_their_widest_cell():
    assert columns([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc   d"
