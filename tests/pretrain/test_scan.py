import json

import numpy as np
import pytest
import soundfile

from hubert_fast.pretrain.audio import load_audio
from hubert_fast.pretrain.audio_folder import find_audio
from hubert_fast.pretrain.manifest import load_manifest
from tests.pretrain.speech_folder import scan_folder, write_audio


def ids(folder, split):
    return list(load_manifest(folder / "manifest", split).ids())


def skipped(folder):
    lines = (folder / "manifest" / "skipped.jsonl").read_text().splitlines()
    return {line["path"].removeprefix(str(folder / "audio") + "/"): line["reason"] for line in map(json.loads, lines)}


@pytest.fixture
def folder(tmp_path):
    for index in range(4):
        write_audio(tmp_path / "audio" / "speaker" / f"{index}.wav", 0.5, seed=index)
    return tmp_path


def cut_off(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize("share", [0.95, 0.5])
@pytest.mark.parametrize(
    "name",
    ["pcm.wav", "float.wav", "a.flac", "vorbis.ogg", "a.opus", pytest.param("a.mp3", id="mp3 with a Xing header")],
)
def test_truncated_files_are_skipped_with_the_reason(folder, name, share):
    path = folder / "audio" / name
    write_audio(path, 2.0, rate=48_000, subtype={"float.wav": "FLOAT", "a.opus": "OPUS"}.get(name))
    assert scan_folder(folder)["skipped"] == 0
    cut_off(path, share)
    summary = scan_folder(folder, seed=1)
    assert summary["skipped"] == 1 and "truncated" in skipped(folder)[name]
    assert sum(summary["utterances"].values()) == 4


def test_unusable_files_are_skipped_counted_and_listed(folder):
    audio = folder / "audio"
    (audio / "empty.wav").touch()
    (audio / "text.mp3").write_text("not audio")
    (audio / "damaged.flac").write_bytes(np.random.default_rng(0).bytes(5000))
    soundfile.write(audio / "no_samples.wav", np.zeros(0), 16_000)
    write_audio(audio / "short.wav", 0.05)
    broken = write_audio(audio / "nan.wav", 0.5, subtype="FLOAT")
    broken[7] = np.nan
    soundfile.write(audio / "nan.wav", broken, 16_000, subtype="FLOAT")
    (audio / "secret.wav").symlink_to(audio / "nowhere.wav")
    summary = scan_folder(folder, workers=2)
    reasons = skipped(folder)
    assert summary["skipped"] == 7 == len(reasons)
    assert "empty" in reasons["empty.wav"] and "zero-length" in reasons["no_samples.wav"]
    assert all("unreadable" in reasons[name] for name in ("text.mp3", "damaged.flac", "secret.wav"))
    assert reasons["short.wav"] == "too short: 0.050 s, min_seconds is 0.1" and "NaN" in reasons["nan.wav"]


def test_audio_shorter_than_a_frame_is_too_short_whatever_min_seconds(folder):
    write_audio(folder / "audio" / "short.wav", 0.02)
    assert scan_folder(folder, min_seconds=0.0)["skipped"] == 1
    assert "one frame" in skipped(folder)["short.wav"]


def test_a_wav_that_was_written_into_a_pipe_is_not_truncated(folder):
    path = folder / "audio" / "piped.wav"
    write_audio(path, 0.5)
    content = bytearray(path.read_bytes())
    for field in (4, content.index(b"data") + 4):
        content[field : field + 4] = b"\xff" * 4
    path.write_bytes(content)
    assert scan_folder(folder)["skipped"] == 0


def test_an_mp3_without_a_header_for_its_length_is_not_truncated(folder):
    path = folder / "audio" / "a.mp3"
    time = np.arange(3 * 44_100) / 44_100
    options = {"format": "MP3", "bitrate_mode": "CONSTANT", "compression_level": 0.5}
    soundfile.write(path, 0.3 * np.sin(1000 * time), 44_100, **options)
    content = path.read_bytes()
    tagged = b"ID3\x03\0\0\0\0\x07\x76" + bytes(1014) + content
    bare = content[content.index(b"\xff\xfb", content.index(b"Info")) :]
    for content in (tagged, bare):
        path.write_bytes(content)
        (folder / "manifest" / "summary.json").unlink(missing_ok=True)
        assert scan_folder(folder, valid_fraction=0.0)["skipped"] == 0
        (found,) = (each for each in load_manifest(folder / "manifest", "train") if each.id == "a.mp3")
        assert found.samples == pytest.approx(3.0 * 16_000, abs=800) and len(load_audio(found)) == found.samples
    path.write_bytes(tagged[: len(tagged) // 2])
    assert scan_folder(folder, valid_fraction=0.1)["skipped"] == 1


def test_ids_are_relative_paths_with_suffix_whatever_the_order_and_number_of_workers(folder):
    write_audio(folder / "audio" / "speaker" / "0.flac", 0.5)
    scan_folder(folder)
    expected = ids(folder, "train"), ids(folder, "valid")
    assert sorted(expected[0] + expected[1]) == ["speaker/0.flac", *(f"speaker/{index}.wav" for index in range(4))]
    (folder / "manifest" / "summary.json").unlink()
    scan_folder(folder, workers=3)
    assert (ids(folder, "train"), ids(folder, "valid")) == expected


def test_links_to_folders_are_followed_once_and_hidden_files_are_not(folder):
    elsewhere = folder / "elsewhere"
    write_audio(elsewhere / "x.WAV", 0.5)
    write_audio(folder / "audio" / "._0.wav", 0.5)
    (folder / "audio" / "link").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(folder / "audio")
    assert find_audio(folder / "audio").files == ["link/x.WAV", *(f"speaker/{index}.wav" for index in range(4))]


def test_the_split_depends_on_names_and_seed_only_and_is_never_empty(folder):
    scan_folder(folder, valid_fraction=0.001)
    first = ids(folder, "valid")
    assert len(first) == 1
    write_audio(folder / "audio" / "speaker" / "a_new_one.wav", 0.5)
    scan_folder(folder, valid_fraction=0.999)
    assert len(ids(folder, "train")) == 1
    scan_folder(folder, valid_fraction=0.0)
    assert ids(folder, "valid") == [] and len(ids(folder, "train")) == 5
    valid = []
    for seed in range(4):
        scan_folder(folder, seed=seed, valid_fraction=0.3)
        valid.append(ids(folder, "valid"))
    assert any(each != first for each in valid)


def test_a_split_that_the_corpus_names_is_used(folder):
    splits = folder / "audio" / "splits.json"
    splits.write_text(json.dumps({"valid": ["speaker/2.wav", "speaker/gone.wav"]}))
    scan_folder(folder)
    assert ids(folder, "valid") == ["speaker/2.wav"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected"),
        ('{"train": []}', "expected"),
        ('{"valid": "speaker/0.wav"}', "expected"),
        ('{"valid": ["other.wav"]}', "none of its 1 files .*other.wav"),
        (json.dumps({"valid": [f"speaker/{index}.wav" for index in range(4)]}), "leaves none to train on"),
    ],
)
def test_a_bad_split_is_an_error_that_names_the_file(folder, content, message):
    (folder / "audio" / "splits.json").write_text(content)
    with pytest.raises(ValueError, match=f"splits.json: .*{message}"):
        scan_folder(folder)


def test_summary_counts_what_was_found(folder):
    write_audio(folder / "audio" / "b.flac", 1.0, rate=8_000, channels=2)
    summary = scan_folder(folder)
    assert sum(summary["utterances"].values()) == 5
    assert sum(summary["seconds"].values()) == pytest.approx(3.0)
    assert sum(summary["hours"].values()) == pytest.approx(3.0 / 3600)
    assert summary["sampling_rates"] == {"8000": 1, "16000": 4}
    assert not summary["has_alignments"]
    assert json.loads((folder / "manifest" / "summary.json").read_text()) == summary


def test_what_is_taken_though_something_is_wrong_with_it_is_listed_and_counted(folder):
    audio = folder / "audio"
    soundfile.write(audio / "silent.wav", np.zeros(8_000), 16_000)
    soundfile.write(audio / "loud.wav", np.clip(9 * np.sin(np.arange(8_000)), -1, 1), 16_000)
    write_audio(audio / "joined.flac", 0.5)
    (audio / "joined.flac").write_bytes(2 * (audio / "joined.flac").read_bytes())
    summary = scan_folder(folder)
    assert summary["skipped"] == 0
    assert summary["notices"] == {"repaired": 1, "silent": 1, "constant": 0, "clipped": 1, "alignment": 0}
    lines = [json.loads(line) for line in (folder / "manifest" / "notices.jsonl").read_text().splitlines()]
    assert [(line["path"].removeprefix(f"{audio}/"), line["kind"]) for line in lines] == [
        ("joined.flac", "repaired"),
        ("loud.wav", "clipped"),
        ("silent.wav", "silent"),
    ]
    assert "joined" in lines[0]["note"]


def test_the_channel_that_is_taken_is_a_setting(folder):
    time = np.arange(16_000)
    channels = np.stack([0.5 * np.sin(time), -0.5 * np.sin(time)], axis=1)
    soundfile.write(folder / "audio" / "opposite.wav", channels, 16_000)
    assert scan_folder(folder)["skipped"] == 1
    assert "channels cancel" in skipped(folder)["opposite.wav"]
    assert scan_folder(folder, channel=2, valid_fraction=0.0)["skipped"] == 4
    (cut,) = load_manifest(folder / "manifest", "train")
    np.testing.assert_allclose(load_audio(cut), channels[:, 1], atol=1e-4)
    assert "it has 1 channel," in skipped(folder)["speaker/0.wav"]


def test_a_complete_manifest_is_kept_and_an_incomplete_one_made_anew(folder):
    summary = scan_folder(folder)
    train = folder / "manifest" / "train.safetensors"
    train.write_bytes(b"kept")
    assert scan_folder(folder) == summary and train.read_bytes() == b"kept"
    (folder / "manifest" / "summary.json").unlink()
    assert scan_folder(folder) == summary and train.read_bytes() != b"kept"
    assert scan_folder(folder, min_seconds=0.2) != summary


def test_long_recordings_become_parts_that_hold_every_sample_once(folder):
    audio = write_audio(folder / "audio" / "long.wav", 2.5, channels=2)
    (folder / "audio" / "long.phones.tsv").write_text("a\t0.0\t1.0\nb\t1.0\t1.5\n")
    scan_folder(folder, longest_seconds=1.0, valid_fraction=0.0)
    manifest = load_manifest(folder / "manifest", "train")
    parts = [index for index, each in enumerate(manifest) if each.id.startswith("long")]
    assert [manifest.id(part) for part in parts] == ["long.wav#0000", "long.wav#0001", "long.wav#0002"]
    waveform = np.concatenate([load_audio(manifest[part]) for part in parts])
    np.testing.assert_allclose(waveform, audio.mean(axis=1), atol=1e-4)
    phones = manifest.phones(parts[1])
    assert [phone.symbol for phone in phones] == ["a", "b"] and phones[0].start == 0.0
    assert phones[1][1:] == pytest.approx((1 - 2.5 / 3, 2 * 2.5 / 3 - 1), abs=1e-3)


def test_phone_alignments_are_found_in_the_list_and_beside_the_audio(folder):
    listed = {"path": "speaker/1.wav", "voice": "v", "phones": [["h", 0.0, 0.1], ["aI", 0.1, 0.3]]}
    # As other programs write it: with a byte-order mark, blank lines and separators of lines inside a text.
    line = json.dumps(listed | {"text": "hi\u2028there"}, ensure_ascii=False)
    (folder / "audio" / "alignments.jsonl").write_text(line + "\n\n", encoding="utf-8-sig")
    (folder / "audio" / "speaker" / "2.phones.tsv").write_text("x\t0.1\t0.2\n", encoding="utf-8-sig")
    (folder / "audio" / "speaker" / "3.wav.phones.tsv").write_text("y\t0.1\t0.2\n")
    assert scan_folder(folder, valid_fraction=0.0)["has_alignments"]
    manifest = load_manifest(folder / "manifest", "train")
    phones = {manifest.id(index): manifest.phones(index) for index in range(len(manifest))}
    assert phones["speaker/1.wav"] == [("h", 0.0, 0.1), ("aI", 0.1, pytest.approx(0.3))]
    assert [phones[f"speaker/{n}.wav"][0].symbol for n in (2, 3)] == ["x", "y"]
    assert phones["speaker/0.wav"] == [] and manifest.has_phones.tolist() == [False, True, True, True]


def test_alignments_that_belong_to_nothing_are_said_and_listed(folder, capsys):
    lines = [{"path": f"speaker/{name}", "phones": []} for name in ("0.wav", "gone.wav")]
    (folder / "audio" / "alignments.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("1.phones.tsv", "2.wav.phones.tsv", "3.flac.phones.tsv", "5.phones.tsv"):
        (folder / "audio" / "speaker" / name).write_text("a\t0.1\t0.2\n")
    (folder / "audio" / "speaker" / "notes.tsv").touch()
    assert scan_folder(folder)["notices"]["alignment"] == 3
    listed = [json.loads(line) for line in (folder / "manifest" / "notices.jsonl").read_text().splitlines()]
    paths = [line["path"].removeprefix(str(folder / "audio") + "/") for line in listed]
    assert paths == ["speaker/3.flac.phones.tsv", "speaker/5.phones.tsv", "alignments.jsonl: speaker/gone.wav"]
    assert "warning: phone alignments that belong to no audio file: 3, the first is" in capsys.readouterr().err


OK = '{"path": "ok.wav", "phones": []}'


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("alignments.jsonl", OK, '{"phones": []}'),
        ("alignments.jsonl", OK, "["),
        ("alignments.jsonl", OK, '{"path": "a", "phones": [["x", -1, 1]]}'),
        ("alignments.jsonl", OK, '{"path": "a", "phones": [["x", 1]]}'),
        ("speaker/2.phones.tsv", "x\t0.1\t0.2", "x 0.3 0.2"),
    ],
)
def test_a_bad_alignment_is_an_error_that_names_the_line(folder, name, first, second):
    (folder / "audio" / name).write_text(f"{first}\n{second}\n")
    with pytest.raises(ValueError, match=f"{name}, line 2: expected"):
        scan_folder(folder)


def test_a_folder_without_usable_audio_is_an_error_that_gives_a_reason(tmp_path):
    write_audio(tmp_path / "audio" / "a.wav", 0.05)
    with pytest.raises(ValueError, match="none of its 1 audio files is usable; .*a.wav: too short"):
        scan_folder(tmp_path)
    assert skipped(tmp_path)
