"""Pictures of a report: which are drawn, and that bars and lines are as long as the numbers say."""

import pytest

from benchmarks import plots
from benchmarks.report import Report
from tests.benchmarks.fabricated import report, row

pytest.importorskip("matplotlib")

STAGES = {"attention": 0.3, "loss": 0.7}


def scaling_rows() -> list:
    return [
        row(1.0 + value, kind="scaling", case=f"{value}", implementation=name, audio_seconds=10.0, shape=shape)
        for name in ("hubert_fast", "torchaudio")
        for value in (16, 1, 4)
        for shape in ({"axis": "classes", "value": value},)
    ]


def full() -> Report:
    steps = [
        row(seconds, implementation=name, dtype=dtype, audio_seconds=8.0, step_bytes=2**30, peak_bytes=3 * 2**30, stages=STAGES)
        for dtype in ("float32", "bfloat16")
        for name, seconds in (("hubert_fast", 1.0), ("torchaudio", 4.0))
    ]  # fmt: skip
    return report(*steps, *scaling_rows(), device="A processor")


def test_every_picture_with_data_is_drawn_and_the_others_are_removed(tmp_path):
    drawn = plots.draw(full(), tmp_path)
    assert [path.name for path in drawn] == ["throughput.png", "memory.png", "stages.png", "scaling.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in drawn)
    assert [path.name for path in plots.draw(report(*scaling_rows()), tmp_path)] == ["scaling.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["scaling.png"]
    assert plots.draw(report(), tmp_path) == [] and not list(tmp_path.iterdir())


def test_bars_are_as_long_as_the_throughput_and_the_spread_is_that_of_the_times():
    figure = plots.throughput(full())
    assert len(figure.axes) == 2
    axes = figure.axes[1]
    assert axes.get_title(loc="left") == "base, bfloat16"
    assert [bar.get_width() for bar in axes.patches] == [8.0, 2.0]
    spread = axes.collections[1].get_segments()[0][:, 0]
    assert spread.tolist() == pytest.approx([8 / (4.0 * 1.1), 8 / (4.0 * 0.9)])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["hubert_fast", "torchaudio"]
    assert [tick.get_weight() for tick in axes.get_yticklabels()] == ["bold", "normal"]


def test_memory_is_the_steps_own_and_what_is_held_beside_it():
    axes = plots.memory(full()).axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches[:2]] == [(0, 1), (1, 2)]


def test_stages_are_stacked_and_have_one_colour_in_all_panels():
    first, second = plots.stages(full()).axes[:2]
    assert [(bar.get_x(), bar.get_width()) for bar in first.patches[:2]] == [(0, 0.3), (0.3, 0.7)]
    colours = [bar.get_facecolor() for bar in first.patches]
    assert colours == [bar.get_facecolor() for bar in second.patches] and colours[0] != colours[1] == colours[3]


def test_lines_go_through_the_throughput_along_the_axis():
    (axes,) = plots.scaling(full()).axes
    line = axes.lines[0]
    assert line.get_xdata().tolist() == [1, 4, 16]
    assert line.get_ydata() == pytest.approx([10 / 2, 10 / 5, 10 / 17])
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "classes"


def test_a_case_without_one_dtype_leaves_its_panel_empty(tmp_path):
    mixed = report(row(audio_seconds=1.0), row(audio_seconds=1.0, case="large", dtype="bfloat16"))
    assert [axes.axison for axes in plots.throughput(mixed).axes] == [True, False, False, True]
    assert len(plots.draw(mixed, tmp_path)) == 1


def test_the_caption_says_device_versions_and_date_once():
    caption = plots._caption(report(row(), row(implementation="hubert_fast graph"), device="A processor", threads=2))
    assert caption.replace("\xa0", " ") == "A processor · 2 threads · torch 2.13.0 · hubert_fast 1.0 · 2026-01-01"
