"""The README's figures come from the committed results, and no other figure stands in it."""

import re
from dataclasses import replace

import pytest

from benchmarks import readme
from benchmarks.report import LeftOut, Limits, Report, Row, Seconds, save

_WORDS = r"seconds?|minutes?|hours?|days?|times|fold|percent|[kmgt]?bytes"
_UNITS = rf"[mnuµ]?s|sec|min|h|x|×|%|[kmgt]i?b(?:/s)?|[mgt]flops?(?:/s)?|{_WORDS}"
_SPELLED = (
    "half an?|a quarter of an?|an?|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|a hundred"
)
_MEASUREMENT = re.compile(
    rf"(?<![\w.])(?:\d[\d,.]*[\s-]?(?:{_UNITS})|(?:{_SPELLED})[\s-](?:{_WORDS}))(?!\w)", re.IGNORECASE
)

# Settings and facts, which nobody measured. Each must stand in the README.
_NOT_MEASURED = (
    "eleven minutes of synthesised speech",  # the embedded corpus
    "The paper's are large (Base's 2,800 s)",
    "one every 20 ms",
    "in five minutes",  # the default of --minutes
)


def _typed_by_hand(readme_text):
    before, _, behind = readme.split(readme_text)
    text = before + behind
    for phrase in _NOT_MEASURED:
        assert phrase in text
        text = text.replace(phrase, "")
    return [match[0] for match in _MEASUREMENT.finditer(text)]


@pytest.fixture
def committed():
    return readme.README.read_text(encoding="utf-8")


def test_performance_is_what_the_committed_results_say(committed):
    assert committed == readme.rewritten(committed, readme.RESULTS), "run python -m benchmarks.readme"


def test_no_measured_number_is_typed_by_hand(committed):
    assert _typed_by_hand(committed) == []


@pytest.mark.parametrize(
    "claim",
    ["1.75x", "takes 14.4 s", "2,450 ms", "half a minute", "three times as fast", "38% of the limit", "1.4 GB", "two-fold",
     "in 11 minutes", "798 TFLOP/s", "17 µs", "saves 30 MiB"],
)  # fmt: skip
def test_a_number_typed_by_hand_is_found(committed, claim):
    assert _typed_by_hand(f"{committed}\nThe step {claim}.\n") != []


_STEP = Row(
    kind="step",
    case="base, 500 classes, 4 x 10 s",
    implementation="hubert_fast",
    version="0.1.0",
    device="cpu",
    dtype="float32",
    shape={},
    seconds=Seconds(4.0, 3.5, 5.0, 7),
    peak_bytes=3 << 30,
    audio_seconds=40.0,
    flops=400e9,
    limits=Limits(20e9, 200e9),
)
_THEIRS = replace(
    _STEP, implementation="torchaudio", version="2.11.0", seconds=Seconds(10.0, 9.0, 11.0, 7), peak_bytes=12 << 30
)


def _operator(implementation, median):
    return replace(
        _STEP, kind="operator", case="mask_fill: forward", implementation=implementation, flops=None, bytes=20e6,
        seconds=Seconds(median, median, median, 5),
    )  # fmt: skip


def _point(row, axis, value):
    return replace(row, kind="scaling", case=f"{axis} {value}", shape={"axis": axis, "value": value})


def _report(device="cpu", date="2026-11-24"):
    rows = [
        _STEP,
        _THEIRS,
        replace(_STEP, kind="inference", seconds=Seconds(1.6, 1.5, 1.7, 3)),
        _operator("hubert_fast", 0.002),
        _operator("hubert_fast torch", 0.0001),
        _operator("eager", 0.005),
        _operator("compiled", 0.003),
        _point(_THEIRS, "classes", 10000),
        _point(_STEP, "classes", 10000),
        _point(_STEP, "classes", 100),
    ]
    machine = {
        "date": date,
        "device": "A processor" if device == "cpu" else "A GPU",
        "threads": 2,
        "torch": "2.13.0",
        "python": "3.11.7",
        "hubert_fast": "0.1.0",
        "commit": "abc1234",
    }
    left_out = [
        LeftOut("one", "transformers flash", "there is no GPU"),
        LeftOut("two", "transformers flash", "there is no GPU"),
        LeftOut("one", "torchaudio compiled", "no time: needs about 200 s, and 3 s were left"),
        LeftOut("two", "torchaudio compiled", "no time: needs about 300 s, and 2 s were left"),
    ]
    limits = {"float32": Limits(20e9, 200e9)}
    return Report(machine, {}, limits, [replace(row, device=device) for row in rows], left_out)


@pytest.fixture
def written(tmp_path):
    save(_report(), tmp_path / "cpu.json")
    save(_report("cuda", "2026-11-25"), tmp_path / "h100.json")
    save(Report({}, {}, {}, [_operator("hubert_fast", 0.002)]), tmp_path / "one-operator.json")
    return readme.performance(tmp_path)


def test_a_section_names_device_versions_and_date(written):
    assert "### A processor, 2 threads, 2026-11-24\n" in written
    assert "torch 2.13.0, python 3.11.7, hubert_fast 0.1.0, torchaudio 2.11.0 (commit abc1234)" in written
    assert "float32: products 0.200 TFLOP/s, copies 20.0 GB/s" in written
    assert "(benchmarks/results/cpu.json)" in written


def test_rows_have_times_throughput_ratios_memory_and_utilisation(written):
    case = "base, 500 classes, 4 x 10 s | float32"
    step = f"| {case} | **hubert_fast** | 4.00 s | 3.50 s to 5.00 s | 10.0 | 2.50 | 2.50 | 3.00 GiB | 0.25 | 50% |"
    theirs = "|  |  | torchaudio | 10.0 s | 9.00 s to 11.0 s | 4.00 | 1.00 | – | 12.0 GiB | 1.00 | 20% |"
    assert f"{step}\n{theirs}\n" in written + "\n"


def test_operators_stand_beside_the_fastest_that_is_not_ours(written):
    assert "| mask_fill: forward | float32 | 2.00 ms | compiled | 3.00 ms | 1.50 | 1.00 ms | 50% |" in written


def test_scaling_is_in_order_of_its_axis_and_says_where_nothing_was_measured(written):
    assert (
        "| classes, float32 | torchaudio | hubert_fast | ratio |\n| ---: | ---: | ---: | ---: |\n"
        "| 100 | – | 10.0, 3.00 GiB | – |\n| 10,000 | 4.00, 12.0 GiB | 10.0, 3.00 GiB | 2.50 |"
    ) in written


def test_what_was_left_out_is_said_once_for_each_reason(written):
    assert written.count("- transformers flash: there is no GPU (2 cases)") == 2  # in each of the two sections
    assert written.count("- torchaudio compiled: no time (2 cases)") == 2


def test_gpus_come_first_and_files_without_steps_have_no_section(written):
    assert re.findall(r"^### (A \w+)", written, re.MULTILINE) == ["A GPU", "A processor"]


def test_without_a_gpus_results_it_says_that_there_are_none(written, tmp_path):
    sentence = "No figure from a GPU yet"
    assert sentence not in written
    (tmp_path / "h100.json").unlink()
    assert sentence in readme.performance(tmp_path)


def test_a_file_of_another_form_is_refused_by_name(tmp_path):
    (tmp_path / "old.json").write_text("{}")
    with pytest.raises(ValueError, match="old.json is no result file of schema"):
        readme.performance(tmp_path)


@pytest.mark.parametrize(
    "text", ["", readme.BEGIN, readme.END, readme.END + readme.BEGIN, readme.BEGIN + 2 * readme.END]
)
def test_marks_must_be_there_once_and_in_order(text, tmp_path):
    with pytest.raises(ValueError, match="once each and in order"):
        readme.rewritten(text, tmp_path)


def test_what_lies_between_the_marks_is_rewritten_and_nothing_else(written, tmp_path):
    before = f"before\n{readme.BEGIN}\nold\n{readme.END}\nbehind\n"
    wanted = f"before\n{readme.BEGIN}\n\n{written}\n\n{readme.END}\nbehind\n"
    assert readme.rewritten(before, tmp_path) == wanted
