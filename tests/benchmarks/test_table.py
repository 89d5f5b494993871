"""The table says what the report says."""

from benchmarks.table import columns, render, speedup
from tests.benchmarks import fabricated


def test_the_table_has_each_row_with_its_ratio_to_torchaudio():
    rows = [fabricated.row("hubert_fast", 1.0), fabricated.row("torchaudio", 2.5)]
    other = fabricated.row("hubert_fast", 4.0, case="another case")
    lines = render(fabricated.report(*rows, other)).splitlines()
    ours = next(line for line in lines if line.startswith("base, 500 classes, 2 x 4 s"))
    # Seconds, seconds of audio per second, ratio, GiB, utilisation.
    assert {"hubert_fast", "1.00", "8.00", "2.50", "2.00", "37%"} <= set(ours.split())
    theirs = next(line for line in lines if "torchaudio" in line and "2.50 s" in line)
    assert "1.00" in theirs.split()
    assert speedup(other, [*rows, other]) is None  # torchaudio was not measured in that case


def test_what_was_left_out_is_said_once_for_each_reason():
    left_out = [
        ("case 1", "flash", "not installed"),
        ("case 2", "flash", "not installed"),
        ("case 1", "other", "no time"),
    ]
    text = render(fabricated.report(fabricated.row(), left_out=left_out))
    assert "flash (2 cases): not installed" in text and "other (case 1): no time (--minutes)" in text


def test_operators_stand_in_a_table_with_their_floors():
    operator = fabricated.row(
        kind="operator", case="mask_fill: forward", median=2e-3, flops=None, bytes=1e7, audio_seconds=None
    )
    line = next(line for line in render(fabricated.report(operator)).splitlines() if "mask_fill" in line)
    assert "2.00 ms" in line and "1.00 ms" in line and "50%" in line


def test_columns_are_as_wide_as_their_widest_cell():
    assert columns([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc   d"
