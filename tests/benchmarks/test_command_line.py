"""``hubert-fast bench`` and ``python -m benchmarks``."""

import sys

import pytest
import torch

import hubert_fast.cli
from benchmarks import command_line
from benchmarks import suite as suite_module
from benchmarks.cases import plan
from benchmarks.command_line import main
from benchmarks.peers.ours import HubertFast
from benchmarks.report import load, save
from tests.benchmarks import fabricated
from tests.benchmarks.test_suite import Wrong

TINY = ["--models", "tiny", "--device", "cpu", "--dtypes", "float32", "--minutes", "3", "--cases"]

pytestmark = pytest.mark.usefixtures("quick")


def test_it_writes_a_report_and_plots_and_prints_the_table(tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert main([*TINY, "step", "--peers", "hubert_fast", "--batch", "3", "1", "--out", str(folder)]) == 0
    report = load(folder / "bench.json")
    assert {row.implementation for row in report.rows} == {"hubert_fast"} and len(report.rows) >= 2
    assert report.machine["torch"] == torch.__version__ and report.machine["threads"] == torch.get_num_threads()
    assert report.settings["models"] == ["tiny"] and 0 < report.settings["seconds_taken"] < 180
    shown = capsys.readouterr().out
    assert "tiny, 500 classes, 3 x 1 s" in shown and "bench.json" in shown
    assert (folder / "throughput.png").stat().st_size > 10_000


def test_a_rejected_peer_makes_the_exit_status_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "plan", lambda *arguments: plan(*arguments)[:1])
    monkeypatch.setattr(command_line, "PEERS", {each.name: each for each in (HubertFast(), Wrong())})
    assert main([*TINY, "step", "--no-plots", "--out", str(tmp_path)]) == 1
    assert "rejected: wrong does other work" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_an_interrupted_run_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    measure, calls = suite_module.Suite.measure, []

    def interrupted(self, case):
        calls.append(case)
        if len(calls) > 1:
            raise KeyboardInterrupt
        measure(self, case)

    monkeypatch.setattr(suite_module.Suite, "measure", interrupted)
    assert main([*TINY, "inference", "step", "--peers", "hubert_fast", "--no-plots", "--out", str(tmp_path)]) == 130
    assert len(load(tmp_path / "bench.json").rows) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--minutes", "0"], "--minutes must be positive"),
        (["--batch", "1.5", "3"], "--batch must be a whole number"),
        (["--fail-above", "5"], "--fail-above goes with --compare"),
        (["--models", "huge"], "invalid choice: 'huge'"),
        (["--peers", "nobody"], "hubert_fast swapped in"),  # the names that there are
        (["--compare", "one.json"], "expected 2 arguments"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "torch finds no GPU")]),
    ],
)
def test_wrong_options_are_said_before_anything_is_measured(wrong, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(wrong)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_plots_without_matplotlib_are_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    monkeypatch.setattr(command_line, "plan", lambda *arguments: [])
    folder = tmp_path / "new"
    with pytest.raises(SystemExit) as stopped:
        main([*TINY, "step", "--out", str(folder)])
    assert stopped.value.code == 2 and not folder.exists()
    assert "needs what `pip install 'hubert-fast[bench]'` installs" in capsys.readouterr().err
    assert main([*TINY, "step", "--no-plots", "--out", str(folder)]) == 0


def test_nothing_is_measured_into_a_folder_that_cannot_take_it_or_has_results(tmp_path, capsys):
    save(fabricated.report(fabricated.row()), tmp_path / "bench.json")
    before = (tmp_path / "bench.json").read_bytes()
    for folder, said in ((tmp_path, "has a bench.json already"), (tmp_path / "bench.json", "cannot be used")):
        with pytest.raises(SystemExit) as stopped:
            main([*TINY, "step", "--out", str(folder)])
        assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert (tmp_path / "bench.json").read_bytes() == before


def test_it_is_a_command_of_hubert_fast(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        hubert_fast.cli.main(["bench", "--help"])
    assert stopped.value.code == 0 and "hubert-fast bench" in capsys.readouterr().out
    assert hubert_fast.cli.main(["bench", "--compare", str(tmp_path / "none.json"), str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
