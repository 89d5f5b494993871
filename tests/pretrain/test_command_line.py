import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hubert_fast import cli
from hubert_fast.pretrain import command_line
from hubert_fast.pretrain.config_file import read_config, write_config
from hubert_fast.pretrain.pipeline import EMBEDDED_CORPUS
from hubert_fast.pretrain.presets import PRESETS
from tests.pretrain.small_run import small_config, small_folder

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "small.toml", small_config())
    return small_folder(tmp_path / "speech")


def hubert_fast(line: str) -> int:
    return cli.main(line.split())


def settings(line: str):
    command, *arguments = line.split()
    return command_line._parse(command, arguments)[1]


def test_stages_one_by_one_do_what_is_left_to_do(folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert hubert_fast("scan --audio speech --config small.toml --out run --no-progress") == 0
    for stage in ("units", "train", "evaluate"):
        assert hubert_fast(f"{stage} --out run --iteration 1 --no-progress") == 0
    finished = {path: path.stat().st_mtime_ns for path in run.glob("iteration1/**/*") if path.suffix != ".json"}
    for stage in ("units", "train", "evaluate"):
        assert hubert_fast(f"{stage} --out run --no-progress") == 0
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    assert hubert_fast("report --out run") == 0
    assert "report.html" in capsys.readouterr().out and (run / "report.html").is_file()
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [start["command"].split()[1] for start in starts] == ["train", "train"]


def test_without_audio_a_new_run_is_tiny_on_the_embedded_corpus(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line.Run, "everything", lambda self, *, resume: self.audio)
    for resume in ("", " --resume"):
        assert hubert_fast(f"pretrain --out {tmp_path / 'run'}{resume}") == 0
        assert str(EMBEDDED_CORPUS) in capsys.readouterr().out
    assert read_config(tmp_path / "run" / "config.toml", PRESETS["base"]) == PRESETS["tiny"]


def test_resuming_takes_the_audio_and_settings_of_the_run(folder, monkeypatch, capsys):
    monkeypatch.setattr(command_line.Run, "everything", lambda self, *, resume: self.audio)
    assert hubert_fast("pretrain --audio speech --config small.toml --out run") == 0
    assert hubert_fast("pretrain --audio speech --out run") == 1
    assert "--resume" in capsys.readouterr().err
    for given in ("", f"--audio {folder}"):
        assert hubert_fast(f"pretrain --resume --out run {given}") == 0
        assert str(folder) in capsys.readouterr().out
    assert settings("pretrain --resume --out run") == small_config()
    assert hubert_fast(f"pretrain --resume --out run --audio {EMBEDDED_CORPUS}") == 1
    error = capsys.readouterr().err
    assert str(folder) in error and str(EMBEDDED_CORPUS) in error


def test_command_line_goes_before_file_and_file_before_preset(tmp_path):
    (tmp_path / "mine.toml").write_text("seed = 3\n[first.optimizer]\nsteps = 10\n")
    given = settings(f"pretrain --preset large --config {tmp_path / 'mine.toml'} --first.optimizer.steps 20")
    assert (given.seed, given.first.optimizer.steps, given.third) == (3, 20, PRESETS["large"].third)
    assert settings("pretrain --audio x") == PRESETS["base"]
    assert settings("pretrain --data.micro-batch-seconds 175").data.micro_batch_seconds == 175.0
    assert settings("pretrain --first.optimizer.accumulate 4").first.optimizer.accumulate == 4
    assert settings("pretrain") == PRESETS["tiny"]


@pytest.mark.parametrize(
    "line",
    [
        "report --audio x",
        "report --iteration 1",
        "report --seed 1",
        "units --audio x",
        "units --resume",
        "evaluate --preset base",
        "train --config x.toml",
        "pretrain --iteration 1",
        "scan --iteration 2",
        "pretrain --no-such-setting 1",
        "pretrain --preset huge",
    ],
)
def test_an_option_that_a_command_does_not_read_is_refused(line, capsys):
    with pytest.raises(SystemExit) as exit_:
        hubert_fast(line)
    assert exit_.value.code == 2 and line.split()[1] in capsys.readouterr().err


@pytest.mark.parametrize("command", ["units", "train", "evaluate", "report", "pretrain --resume"])
def test_stages_of_a_run_that_is_not_there_say_how_to_begin(tmp_path, capsys, command):
    assert hubert_fast(f"{command} --out {tmp_path / 'nowhere'}") == 1
    assert "holds no run; `hubert-fast pretrain` or `scan`, without --resume, begins one" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_what_a_terminal_cannot_show_is_no_reason_to_fail(monkeypatch):
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, encoding="ascii"))
    monkeypatch.setattr(command_line, "run_stage", lambda *_: print("report: /läufe/\udcff.html") or 0)
    assert cli.main(["report"]) == 0
    sys.stdout.flush()
    assert said.getvalue() == b"report: /l\\xe4ufe/\\udcff.html\n"


def test_a_reader_that_has_gone_is_no_reason_to_fail(folder, tmp_path):
    assert hubert_fast("scan --audio speech --config small.toml --out run --no-progress") == 0
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "hubert_fast.cli", "report", "--out", str(tmp_path / "run")]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    os.close(writer)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "report.html").is_file()
