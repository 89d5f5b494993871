import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from hubert_fast.pretrain import plots
from hubert_fast.pretrain.run_summary import iterations
from tests.pretrain.fabricated_run import evaluation, fabricate_run, write_json, write_json_lines


def test_a_whole_run_gives_four_pictures_of_one_size(tmp_path):
    written = plots.write_plots(fabricate_run(tmp_path))
    assert list(written) == ["loss", "masked_accuracy", "pnmi", "speed"]
    assert {path.parent for path in written.values()} == {tmp_path / "plots"}
    shapes = {imread(path).shape for path in written.values()}
    assert len(shapes) == 1 and shapes.pop()[1] >= 1000


def test_an_empty_run_gives_no_picture_and_an_outdated_one_goes(tmp_path):
    fabricate_run(tmp_path, iterations=1, steps=8)
    assert len(plots.write_plots(tmp_path)) == 4
    (tmp_path / "iteration1" / "evaluation.json").unlink()
    assert "pnmi" not in plots.write_plots(tmp_path)
    assert not (tmp_path / "plots" / "pnmi.png").exists()
    assert plots.write_plots(tmp_path / "nothing") == {}
    assert not (tmp_path / "nothing").exists()


def test_training_and_validation_of_each_iteration_are_drawn_and_named(tmp_path):
    fabricate_run(tmp_path, steps=40)
    axes = Figure().add_subplot()
    assert plots.draw_masked_accuracy(axes, iterations(tmp_path))
    labels = [line.get_label() for line in axes.lines]
    assert labels == [f"iteration {n}, {part}" for n in (1, 2) for part in ("training", "held-out")]
    line = axes.lines[0]
    expected = [entry["masked_accuracy"] * 100 for entry in iterations(tmp_path)[0].metrics.training]
    assert line.get_xdata().tolist() == list(range(1, 41)) and line.get_ydata() == pytest.approx(expected)
    assert "step" in axes.get_xlabel() and axes.get_ylabel()


def test_the_running_mean_of_a_long_curve_stays_on_the_curve(tmp_path):
    lines = [{"step": step, "loss": 6.0, "masked_loss": 5.0 - step / 100} for step in range(1, 401)]
    write_json_lines(tmp_path / "iteration1" / "train" / "metrics.jsonl", lines)
    axes = Figure().add_subplot()
    assert plots.draw_loss(axes, iterations(tmp_path))
    steps, smooth = axes.lines[-1].get_data()
    assert smooth == pytest.approx(5.0 - steps / 100, abs=0.01)


def test_values_that_are_not_finite_are_left_out(tmp_path):
    lines = [{"step": step, "loss": 1.0, "masked_loss": loss} for step, loss in ((1, 4.0), (2, float("nan")), (3, 3.0))]
    write_json_lines(tmp_path / "iteration1" / "train" / "metrics.jsonl", lines)
    axes = Figure().add_subplot()
    plots.draw_loss(axes, iterations(tmp_path))
    assert axes.lines[0].get_xdata().tolist() == [1, 3]


def test_mfcc_is_one_reference_line_where_iterations_agree_and_two_where_not(tmp_path):
    fabricate_run(tmp_path)
    axes = Figure().add_subplot()
    assert plots.draw_pnmi(axes, iterations(tmp_path))
    assert [line.get_label() for line in axes.lines if "MFCC" in line.get_label()] == ["MFCC, 100 clusters"]
    other = evaluation(2, 6)
    for row in other["representations"]:
        row["clusters"] = 500
    write_json(tmp_path / "iteration2" / "evaluation.json", other)
    axes = Figure().add_subplot()
    plots.draw_pnmi(axes, iterations(tmp_path))
    labels = [line.get_label() for line in axes.lines]
    assert "MFCC, 100 clusters" in labels and "MFCC, 500 clusters" in labels
    assert labels.count("iteration 2, 500 clusters") == 1
