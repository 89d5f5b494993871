"""Two result files beside each other: what counts as a change, and what fails."""

from dataclasses import replace

import pytest

from benchmarks.command_line import main
from benchmarks.compare import FASTER, ONLY_AFTER, ONLY_BEFORE, SLOWER, WITHIN, compare, differences, render
from benchmarks.report import Limits, save
from tests.benchmarks.fabricated import report, row


@pytest.mark.parametrize(
    "after, verdict", [(1.15, WITHIN), (1.3, SLOWER), (0.85, WITHIN), (0.7, FASTER), (1.0, WITHIN)]
)
def test_a_change_is_one_only_outside_the_spreads(after, verdict):
    (change,) = compare(report(row(1.0)), report(row(after)))
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(after)


def test_rows_are_matched_by_kind_case_implementation_device_and_dtype():
    kept = row(1.0)
    others = [replace(kept, **{field: "another"}) for field in ("kind", "case", "implementation", "device", "dtype")]
    changes = compare(report(kept, *others[:3]), report(*others[3:], replace(kept, version="2.0")))
    assert [each.verdict for each in changes] == [WITHIN, *[ONLY_BEFORE] * 3, *[ONLY_AFTER] * 2]
    assert changes[0].after.version == "2.0"


def test_the_biggest_changes_come_first_and_those_within_the_spread_after_them():
    before = report(*(row(1.0, case=case) for case in ("twice", "third", "noise", "tenth", "gone")))
    noise = row(1.9, case="noise", spread=0.8)
    medians = {"twice": 2.0, "third": 1 / 3, "tenth": 1.4, "new": 9.0}
    after = report(noise, *(row(median, case=case) for case, median in medians.items()))
    assert [each.row.case for each in compare(before, after)] == ["third", "twice", "tenth", "noise", "gone", "new"]
    lines = render(compare(before, after)).splitlines()
    assert lines[1].split()[:4] == ["faster", "0.33", "1.00", "s"] and "step: third, cpu, float32" in lines[1]
    assert lines[-1].split()[:5] == ["only", "in", "B", "-", "-"]


def test_memory_is_that_of_the_step_where_both_know_it_and_else_the_peak():
    before = row(1.0, step_bytes=100, peak_bytes=1000)
    for memory, ratio in (({"step_bytes": 50, "peak_bytes": 1000}, 0.5), ({"peak_bytes": 2000}, 2.0), ({}, None)):
        (change,) = compare(report(before), report(row(1.0, **memory)))
        assert change.memory_ratio == ratio


def test_what_differs_besides_the_code_is_said():
    before = report(row(), threads=2)
    assert differences(before, report(row(), threads=2, date="2026-02-02", commit="abc")) == []
    after = report(row(), torch="2.11.0", device="H100", commit="abc")
    before.limits["float32"], after.limits["float32"] = Limits(1e9, 1e12), Limits(1.05e9, 0.5e12)
    assert differences(before, after) == [
        "device: Imagined CPU in A, H100 in B",
        "plain matrix products in float32 ran 0.500 times as fast in B as in A: the device itself was not equally fast",
        "threads: 2 in A, not said in B",
        "torch: 2.13.0 in A, 2.11.0 in B",
    ]


def saved(tmp_path, name, contents):
    save(contents, tmp_path / name)
    return str(tmp_path / name)


def test_only_what_got_slower_by_more_than_asked_fails(tmp_path, capsys):
    before = saved(tmp_path, "a.json", report(row(1.0, spread=0.01), row(1.0, case="noisy", spread=0.5)))
    after = saved(tmp_path, "b.json", report(row(1.1, spread=0.01), row(1.4, case="noisy", spread=0.5)))
    assert main(["--compare", before, after]) == 0
    assert main(["--compare", before, after, "--fail-above", "12"]) == 0
    shown = capsys.readouterr().out
    assert "slower" in shown and "failed" not in shown
    assert main(["--compare", before, after, "--fail-above", "5"]) == 1
    assert "failed: hubert_fast in base, float32 takes 10.0% longer" in capsys.readouterr().out
    assert main(["--compare", after, before, "--fail-above", "5"]) == 0


def test_nothing_in_common_and_a_rejected_implementation_fail(tmp_path, capsys):
    before = saved(tmp_path, "a.json", report(row()))
    other = saved(tmp_path, "b.json", report(row(case="other")))
    assert main(["--compare", before, other, "--fail-above", "5"]) == 1
    assert "no row in common" in capsys.readouterr().out
    left_out = [("base", "torchaudio", "its loss is another", True), ("base", "x", "absent")]
    wrong = saved(tmp_path, "c.json", report(row(), left_out=left_out))
    assert main(["--compare", before, wrong, "--fail-above", "5"]) == 1
    out = capsys.readouterr().out
    assert "torchaudio in base is rejected in B: its loss is another" in out and "absent" not in out
