"""Rows of operators: all of them within the time there is, and failures said."""

from dataclasses import replace

import pytest
import torch

from benchmarks import operators
from benchmarks.ops.case import OURS
from benchmarks.report import Limits, Report
from benchmarks.sizes import SIZES, size_on
from benchmarks.torchaudio_peer import installed
from hubert_fast.backend import BackendError

LIMITS = Limits(bytes_per_second=1e10, flops_per_second=1e12)


def _measure(names=None, seconds_left=lambda: 1.0, report=None, dtype=torch.float32, **settings):
    report, said = report or Report({}, {}, {"float32": LIMITS, "bfloat16": LIMITS}), []
    settings |= {"device": "cpu", "dtype": dtype, "size": "tiny", "seconds_left": seconds_left, "operators": names}
    operators.measure(report, progress=said.append, **settings)
    return report, said


@pytest.fixture
def one_call(monkeypatch):
    """Few calls: times do not matter here."""
    monkeypatch.setattr(operators, "_REPEATS", 1)


def test_every_operator_is_measured_in_16_bits(one_call):
    report, said = _measure(dtype=torch.bfloat16, compiled=False)
    assert report.left_out == []
    for operator in operators.OPERATORS:
        rows = [row for row in report.rows if row.case.startswith(f"{operator}: ")]
        assert OURS in {row.implementation for row in rows} and len(rows) >= 1
        assert {row.kind for row in rows} == {"operator"}
        if operator != "span_mask":
            assert all(row.floor_seconds > 0.0 and row.dtype == "bfloat16" and row.step_bytes > 0 for row in rows)
    first = [text.split(":")[0] for text in said[: len(operators.OPERATORS)]]
    assert first == list(operators.OPERATORS)  # the first case of each comes before any second one


def test_a_row_stands_beside_its_floor(one_call):
    report, _ = _measure(["bias_dropout_residual"])
    size, row = size_on("cpu", "tiny"), report.rows[0]
    assert row.implementation == OURS and row.limits == LIMITS and "forward and backward" in row.case
    assert row.floor_seconds == 5 * 4 * size.rows * size.dim / LIMITS.bytes_per_second
    assert row.share_of_limit == row.floor_seconds / row.seconds.median
    assert row.check["results"] < 1e-5 and row.shape["rows"] == size.rows


def test_limits_are_measured_where_the_report_has_none(one_call, monkeypatch):
    monkeypatch.setattr(operators, "measure_limits", lambda device, dtype: Limits(1.0, float(dtype.itemsize)))
    report = Report({}, {}, {"float32": LIMITS})
    for dtype in (torch.float32, torch.bfloat16):
        _measure(["span_mask"], report=report, dtype=dtype)
    assert report.limits == {"float32": LIMITS, "bfloat16": Limits(1.0, 2.0)}


def test_what_runs_on_the_host_is_measured_once(one_call):
    report, _ = _measure(["span_mask"])
    _measure(["span_mask"], report=report, dtype=torch.bfloat16)
    assert [row.implementation for row in report.rows].count(OURS) == 1
    assert report.rows[0].device == "cpu" and report.rows[0].floor_seconds is None


def test_what_time_was_left_for_is_said(one_call):
    left = iter([1.0, 1.0, *[0.0] * 100])
    report, said = _measure(["mask_fill", "span_mask"], seconds_left=lambda: next(left))
    assert len(said) == 2  # the first case of each
    assert [(each.case, each.reason, each.rejected) for each in report.left_out] == [
        ("mask_fill", "no time was left for 3 cases in float32", False)
    ]


def test_compiled_implementations_come_last_and_stand_beside_the_others(one_call, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    left = iter([1.0] * 5 + [0.0] * 100)
    report, said = _measure(["mask_fill"], seconds_left=lambda: next(left), compiled=True)
    assert [text.endswith("compiled, float32") for text in said] == [False] * 4 + [True]
    assert [row.implementation for row in report.rows[:4]] == [OURS, "PyTorch", "PyTorch, compiled", OURS]
    assert len({row.case for row in report.rows[:3]}) == 1
    assert [(each.implementation, each.reason) for each in report.left_out] == [
        ("torch.compile", "no time was left for 3 cases in float32")
    ]


@pytest.mark.parametrize(
    ("name", "failure", "rejected"),
    [
        (OURS, ValueError("a bug"), True),
        (OURS, BackendError("no kernels here"), False),
        ("PyTorch", RuntimeError("out of memory"), False),
        ("PyTorch", 1.1, True),  # another result
    ],
)
def test_an_implementation_that_fails_is_left_out_and_the_others_stay(one_call, monkeypatch, name, failure, rejected):
    (case,) = operators.cases_of("mask_fill", size_on("cpu", "tiny"), torch.float32, "cpu")[:1]
    right = case.sides[name].function

    def function(tensors, dropout_p):
        if isinstance(failure, Exception):
            raise failure
        return tuple(failure * each for each in right(tensors, dropout_p))

    wrong = replace(case, sides={**case.sides, name: replace(case.sides[name], function=function)})
    monkeypatch.setattr(operators, "cases_of", lambda *arguments: [wrong])
    report, _ = _measure(["mask_fill"])
    assert [(each.implementation, each.rejected) for each in report.left_out] == [(name, rejected)]
    expected = str(failure) if isinstance(failure, Exception) else f"{name} is wrong"
    assert expected in report.left_out[0].reason
    assert {row.implementation for row in report.rows} == {OURS, "PyTorch"} - {name}


@pytest.mark.skipif(not installed(), reason="torchaudio is not installed")
def test_torchaudio_is_left_out_where_its_logits_do_not_fit(one_call, monkeypatch):
    monkeypatch.setattr("benchmarks.ops.cosine.available_bytes", lambda device: 10_000_000)
    report, _ = _measure(["cosine_logits"])  # 500 classes x 21 frames x 32 need 13 MB, 100 classes 3 MB
    assert {each.implementation for each in report.left_out} == {"torchaudio"}
    assert all("500 classes" in each.case and "0.0 GB are free" in each.reason for each in report.left_out)
    assert any(row.implementation == "torchaudio" and "100 classes" in row.case for row in report.rows)


def test_a_cpu_gets_a_shorter_batch_of_the_same_model():
    small, full = size_on("cpu", "large"), size_on("cuda", "large")
    assert full == SIZES["large"] and small.kept < small.rows < small.batch * small.frames
    batch = {"batch": small.batch, "frames": small.frames, "rows": small.rows, "kept": small.kept}
    assert replace(full, **batch) == small and 16_000 * 14 <= 320 * small.rows + 80 * small.batch < 16_000 * 15
    assert all(value < getattr(full, name) for name, value in batch.items())
