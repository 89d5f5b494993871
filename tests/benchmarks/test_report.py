"""The result file holds what was measured, whole, and refuses what is none."""

import json
from pathlib import Path

import pytest

from benchmarks.report import Seconds, load, save
from tests.benchmarks import fabricated


def test_a_report_comes_back_as_it_was_saved(tmp_path):
    report = fabricated.report(
        fabricated.row(stages={"loss": 0.1}, check={"loss": 1e-6}, first_seconds=3.0, limits=fabricated.LIMITS),
        fabricated.row(
            kind="operator", bytes=1e6, audio_seconds=8.0, flops=3.7e10, peak_bytes=2 << 30, step_bytes=1 << 30
        ),
        left_out=[("a case", "a peer", "not installed", False), ("a case", "another", "other work", True)],
    )
    save(report, tmp_path / "bench.json")
    assert load(tmp_path / "bench.json") == report


def test_the_file_says_what_follows_from_the_rest(tmp_path):
    row = fabricated.row(2.0, audio_seconds=8.0, flops=4e10, bytes=6e9, limits=fabricated.LIMITS)
    save(fabricated.report(row), tmp_path / "bench.json")
    written = json.loads((tmp_path / "bench.json").read_text())["rows"][0]
    assert written["throughput"] == 4.0  # 8 s of audio in 2 s
    assert written["flops_per_second"] == 2e10 and written["bytes_per_second"] == 3e9
    assert written["floor_seconds"] == pytest.approx(0.6)  # 6 GB at 10 GB/s, longer than 40 GFLOP at 100 GFLOP/s
    assert written["share_of_limit"] == pytest.approx(0.3)


def test_seconds_are_the_median_and_the_20th_and_80th_percentile():
    assert Seconds.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == Seconds(3.5, 2.0, 5.0, 6)
    assert Seconds.of([2.0]) == Seconds(2.0, 2.0, 2.0, 1)


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (None, "cannot be read: .*No such file or directory"),
        ("", "cannot be read: Expecting value"),
        ("\xff", "cannot be read: 'utf-8' codec"),
        ("[]", "is no result file of schema 1: its schema is not said"),
        ("{}", "is no result file of schema 1: its schema is not said"),
        ('{"schema": 0}', "is no result file of schema 1: its schema is 0"),
        ('{"schema": 1}', "is no result file of schema 1: it lacks 'machine'"),
        (
            '{"schema": 1, "machine": {}, "settings": {}, "limits": {}, "rows": [{}]}',
            "is no result file of schema 1: it lacks 'kind'",
        ),
        ('{"schema": 1, "machine": {}, "settings": {}, "limits": []}', "is no result file of schema 1: 'list' object"),
    ],
)
def test_what_is_no_result_file_is_refused_by_name_and_in_words(tmp_path, contents, said):
    path = tmp_path / "other.json"
    if contents is not None:
        path.write_bytes(contents.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"other\.json {said}"):
        load(path)


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch):
    def full(path, text, **_):
        path.write_bytes(text[:100].encode())
        raise OSError("No space left on device")

    path = tmp_path / "bench.json"
    save(fabricated.report(fabricated.row()), path)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        save(fabricated.report(), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
