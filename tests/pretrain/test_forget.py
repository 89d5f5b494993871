import pytest

from hubert_fast import cli
from hubert_fast.pretrain.forget import forget, forgotten, forgotten_ids, not_forgotten
from hubert_fast.pretrain.manifest import load_manifest, recording_of
from hubert_fast.pretrain.units import new_units
from tests.pretrain.speech_folder import scan_folder, write_audio


@pytest.fixture
def run(tmp_path):
    for name in ("ann/1.wav", "ann/2.wav", "bob/1.wav", "bobby.wav"):
        write_audio(tmp_path / "audio" / name, 1.3)
    scan_folder(tmp_path, longest_seconds=0.5)
    return tmp_path


def test_files_and_folders_are_forgotten_once_and_need_not_be_there(run):
    (run / "audio" / "bob" / "1.wav").unlink()
    assert forgotten(run) == frozenset()
    assert forget(run, ["bob", str(run / "audio" / "ann" / "2.wav")]) == ["ann/2.wav", "bob/1.wav"]
    assert forget(run, ["ann/"]) == ["ann/1.wav"]
    assert forget(run, ["bob/1.wav"]) == []
    assert forgotten(run) == {"ann/1.wav", "ann/2.wav", "bob/1.wav"}


def test_all_parts_of_a_recording_are_forgotten(run):
    manifests = [load_manifest(run / "manifest", split) for split in ("train", "valid")]
    ids = [name for manifest in manifests for name in manifest.ids()]
    gone = ["ann/1.wav"]
    assert forgotten_ids(ids, gone) == [f"ann/1.wav#000{part}" for part in range(3)]
    kept = [manifest.id(index) for manifest in manifests for index in not_forgotten(manifest, gone)]
    assert kept == [name for name in ids if not name.startswith("ann/1.wav")]


def test_a_name_that_the_run_does_not_have_is_an_error_and_changes_nothing(run, capsys):
    with pytest.raises(
        ValueError, match=r"no recording 'an' and none in a folder of that name; .* such as '\w+/\d.wav'"
    ):
        forget(run, ["bob", "an"])
    assert not forgotten(run)
    (run / "config.toml").touch()
    assert cli.main(["forget", str(run), "ann/3.wav"]) == 1
    assert "file='ann/3.wav'" in capsys.readouterr().err
    assert cli.main(["forget", str(run), "ann/1.wav", "bob"]) == 0
    assert "forgotten: ann/1.wav, bob/1.wav" in capsys.readouterr().out
    assert cli.main(["forget", str(run / "nothing"), "ann/1.wav"]) == 1
    assert "holds no run" in capsys.readouterr().err


def test_what_only_units_or_an_earlier_call_know_can_be_forgotten_too(run, monkeypatch):
    with new_units(run / "iteration1" / "units" / "train.safetensors", load_manifest(run / "manifest", "train"), 4):
        pass
    names = {recording_of(name) for name in load_manifest(run / "manifest", "train").ids()}
    gone = sorted(names)[0]
    (run / "audio" / gone).unlink()
    scan_folder(run, longest_seconds=0.5, seed=1)
    monkeypatch.chdir(run)
    assert forget(run, [f"audio/{gone}"]) == [gone], "relative to the current folder"
    assert forget(run, [gone]) == []
    with pytest.raises(ValueError, match="name at least one recording"):
        forget(run, [])


def test_a_scan_made_anew_leaves_them_out(run):
    forget(run, ["ann"])
    for file in (run / "manifest").iterdir():
        file.unlink()
    summary = scan_folder(run, forgotten=forgotten(run))
    assert summary["skipped"] == 2
    assert "forgotten" in (run / "manifest" / "skipped.jsonl").read_text()
