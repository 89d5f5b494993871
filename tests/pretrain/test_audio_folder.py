import json
import os

import pytest

from hubert_fast.pretrain.audio_folder import find_audio
from tests.pretrain.speech_folder import scan_folder, write_audio


@pytest.fixture
def folder(tmp_path):
    for name in ("open/0.wav", "open/1.wav", "closed/0.wav", "vanishing/0.wav"):
        write_audio(tmp_path / "audio" / name, 0.5)
    return tmp_path


@pytest.fixture
def closing(monkeypatch):
    """Folders that cannot be entered, by name; the tests may run as root, to whom none is closed."""
    errors = {}
    scandir = os.scandir

    def refuse(path):
        error = errors.get(os.path.basename(path))
        if error is not None:
            raise error(
                *{PermissionError: (13, "Permission denied"), FileNotFoundError: (2, "No such file")}[error], path
            )
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    return errors


def skipped(folder):
    lines = map(json.loads, (folder / "manifest" / "skipped.jsonl").read_text().splitlines())
    return {os.path.relpath(line["path"], folder / "audio"): line["reason"] for line in lines}


def test_folders_that_cannot_be_entered_are_listed_counted_and_said_once(folder, closing, capsys):
    closing |= {"closed": PermissionError, "vanishing": FileNotFoundError}
    summary = scan_folder(folder)
    assert summary["closed_folders"] == 2 == summary["skipped"] and sum(summary["utterances"].values()) == 2
    reasons = skipped(folder)
    assert "cannot be entered (Permission denied)" in reasons["closed"] and "No such file" in reasons["vanishing"]
    assert capsys.readouterr().err.count("closed: the folder cannot be entered") == 1


def test_a_top_folder_that_cannot_be_read_is_an_error_that_says_so(folder, closing):
    closing["audio"] = PermissionError
    with pytest.raises(ValueError, match="audio=.*cannot be read: Permission denied"):
        find_audio(folder / "audio")


def test_where_nothing_is_left_the_closed_folder_is_named(folder, closing):
    closing |= {name: PermissionError for name in ("open", "closed", "vanishing")}
    with pytest.raises(ValueError, match="holds no audio: .*cannot be entered"):
        find_audio(folder / "audio")


def test_audio_of_other_formats_and_links_that_lead_nowhere_are_listed(folder):
    audio = folder / "audio"
    (audio / "open" / "a.M4A").touch()
    (audio / "notes.txt").touch()
    (audio / "speaker").symlink_to(folder / "gone")
    (audio / ".hidden").symlink_to(folder / "gone")
    summary = scan_folder(folder)
    reasons = skipped(folder)
    assert summary["skipped"] == 2 and summary["closed_folders"] == 0
    assert ".m4a are not read" in reasons["open/a.M4A"] and "leads nowhere" in reasons["speaker"]


def test_a_name_that_is_not_utf8_is_listed_and_hinders_nobody(folder):
    name = os.fsencode(folder / "audio" / "open") + b"/\xff.wav"
    with open(name, "wb") as file:
        file.write((folder / "audio" / "open" / "0.wav").read_bytes())
    scan_folder(folder)
    assert skipped(folder) == {"open/\\udcff.wav": "the name of the file is not UTF-8"}
