"""The embedded corpus keeps its promises: size, format, alignments, split."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest

from hubert_fast.pretrain.embedded import embedded_corpus

soundfile = pytest.importorskip("soundfile")

CORPUS = embedded_corpus()
TOLERANCE = 0.020  # seconds, one frame
MAX_BYTES = 4 * 2**20


@pytest.fixture(scope="module")
def utterances() -> list[dict]:
    with open(CORPUS / "alignments.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def valid_paths() -> set[str]:
    return set(json.loads((CORPUS / "splits.json").read_text(encoding="utf-8"))["valid"])


@pytest.fixture(scope="module")
def seconds(utterances: list[dict]) -> dict[str, float]:
    return {utterance["path"]: soundfile.info(CORPUS / utterance["path"]).duration for utterance in utterances}


def by_split(utterances: list[dict], valid_paths: set[str]) -> tuple[list[dict], list[dict]]:
    train = [utterance for utterance in utterances if utterance["path"] not in valid_paths]
    valid = [utterance for utterance in utterances if utterance["path"] in valid_paths]
    return train, valid


def test_is_a_folder_of_at_most_four_megabytes_with_a_readme() -> None:
    assert isinstance(CORPUS, Path) and (CORPUS / "README.md").is_file()
    assert sum(file.stat().st_size for file in CORPUS.iterdir()) <= MAX_BYTES


def test_alignments_name_each_audio_file_once(utterances: list[dict]) -> None:
    paths = [utterance["path"] for utterance in utterances]
    assert sorted(paths) == sorted(file.name for file in CORPUS.glob("*.ogg"))


def test_holds_about_ten_minutes_in_utterances_of_3_to_14_seconds(seconds: dict[str, float]) -> None:
    assert 9.5 * 60 <= sum(seconds.values()) <= 11 * 60
    assert all(3.0 <= duration <= 14.0 for duration in seconds.values())


def test_every_file_decodes_to_16_khz_mono_audio_that_is_neither_silent_nor_clipped(utterances: list[dict]) -> None:
    for utterance in utterances:
        waveform, rate = soundfile.read(CORPUS / utterance["path"], dtype="float32")
        assert (rate, waveform.ndim) == (16000, 1), utterance["path"]
        assert len(waveform) == soundfile.info(CORPUS / utterance["path"]).frames, utterance["path"]
        assert 0.1 < abs(waveform).max() < 1.0, utterance["path"]


def test_phones_tile_each_utterance_without_gap_or_overlap(utterances: list[dict], seconds: dict[str, float]) -> None:
    for utterance in utterances:
        end = 0.0
        for symbol, start, duration in utterance["phones"]:
            assert symbol and duration > 0, (utterance["path"], symbol, start)
            assert abs(start - end) < 1e-3, (utterance["path"], symbol, start)
            end = start + duration
        assert abs(end - seconds[utterance["path"]]) < TOLERANCE, utterance["path"]


def test_utterances_begin_and_end_in_silence_that_is_quieter_than_speech(utterances: list[dict]) -> None:
    for utterance in utterances:
        waveform, rate = soundfile.read(CORPUS / utterance["path"], dtype="float32")
        (first, _, lead), (last, tail, _) = utterance["phones"][0], utterance["phones"][-1]
        assert first == last == "sil"
        speech = waveform[round(lead * rate) : round(tail * rate)].std()
        # 10 ms short of the speech, because the codec smears it a little
        assert waveform[: round((lead - 0.01) * rate)].std() < 0.1 * speech, utterance["path"]
        assert waveform[round((tail + 0.01) * rate) :].std() < 0.1 * speech, utterance["path"]


def test_inventory_is_of_moderate_size(utterances: list[dict]) -> None:
    inventory = {symbol for utterance in utterances for symbol, *_ in utterance["phones"]}
    assert 40 <= len(inventory) < 90


def test_valid_is_about_a_tenth_of_the_audio(seconds: dict[str, float], valid_paths: set[str]) -> None:
    assert valid_paths <= set(seconds)
    assert 0.08 <= sum(seconds[path] for path in valid_paths) / sum(seconds.values()) <= 0.12


def test_splits_share_no_text_and_no_audio(utterances: list[dict], valid_paths: set[str]) -> None:
    train, valid = by_split(utterances, valid_paths)
    assert not {utterance["text"] for utterance in train} & {utterance["text"] for utterance in valid}
    checksums = [zlib.crc32((CORPUS / utterance["path"]).read_bytes()) for utterance in utterances]
    assert len(set(checksums)) == len(checksums)


def test_each_phone_of_valid_is_seen_in_train(utterances: list[dict], valid_paths: set[str]) -> None:
    train, valid = ({phone[0] for u in part for phone in u["phones"]} for part in by_split(utterances, valid_paths))
    assert valid <= train


@pytest.mark.parametrize(("field", "at_least"), [("voice", 12), ("language", 6)])
def test_both_splits_hold_every_voice_and_language(
    utterances: list[dict], valid_paths: set[str], field: str, at_least: int
) -> None:
    train, valid = ({utterance[field] for utterance in part} for part in by_split(utterances, valid_paths))
    assert train == valid and len(train) >= at_least
