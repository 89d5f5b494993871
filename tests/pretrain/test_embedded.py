"""The embedded corpus keeps its promises: size, format, alignments, split."""

import json
import zlib

import pytest
import soundfile

from hubert_fast.pretrain.pipeline import EMBEDDED_CORPUS as CORPUS

UTTERANCES = [json.loads(line) for line in (CORPUS / "alignments.jsonl").read_text(encoding="utf-8").splitlines()]
VALID = json.loads((CORPUS / "splits.json").read_text(encoding="utf-8"))["valid"]
BY_SPLIT = [[each for each in UTTERANCES if (each["path"] in VALID) == valid] for valid in (False, True)]
SECONDS = {each["path"]: soundfile.info(CORPUS / each["path"]).duration for each in UTTERANCES}
TOLERANCE = 0.020  # seconds, one frame
MAX_BYTES = 4 * 2**20


def test_is_a_folder_of_at_most_four_megabytes_with_a_readme():
    assert (CORPUS / "README.md").is_file()
    assert sum(file.stat().st_size for file in CORPUS.iterdir()) <= MAX_BYTES


def test_alignments_name_each_audio_file_once():
    paths = [utterance["path"] for utterance in UTTERANCES]
    assert sorted(paths) == sorted(file.name for file in CORPUS.glob("*.ogg"))


def test_holds_about_ten_minutes_in_utterances_of_3_to_14_seconds():
    assert 9.5 * 60 <= sum(SECONDS.values()) <= 11 * 60
    assert all(3.0 <= duration <= 14.0 for duration in SECONDS.values())


def test_every_file_decodes_to_16_khz_mono_audio_that_is_neither_silent_nor_clipped():
    for utterance in UTTERANCES:
        waveform, rate = soundfile.read(CORPUS / utterance["path"], dtype="float32")
        assert (rate, waveform.ndim) == (16000, 1), utterance["path"]
        assert len(waveform) == soundfile.info(CORPUS / utterance["path"]).frames, utterance["path"]
        assert 0.1 < abs(waveform).max() < 1.0, utterance["path"]


def test_phones_tile_each_utterance_without_gap_or_overlap():
    for utterance in UTTERANCES:
        end = 0.0
        for symbol, start, duration in utterance["phones"]:
            assert symbol and duration > 0, (utterance["path"], symbol, start)
            assert abs(start - end) < 1e-3, (utterance["path"], symbol, start)
            end = start + duration
        assert abs(end - SECONDS[utterance["path"]]) < TOLERANCE, utterance["path"]


def test_utterances_begin_and_end_in_silence_that_is_quieter_than_speech():
    for utterance in UTTERANCES:
        waveform, rate = soundfile.read(CORPUS / utterance["path"], dtype="float32")
        (first, _, lead), (last, tail, _) = utterance["phones"][0], utterance["phones"][-1]
        assert first == last == "sil"
        speech = waveform[round(lead * rate) : round(tail * rate)].std()
        # 10 ms short of the speech, because the codec smears it a little
        assert waveform[: round((lead - 0.01) * rate)].std() < 0.1 * speech, utterance["path"]
        assert waveform[round((tail + 0.01) * rate) :].std() < 0.1 * speech, utterance["path"]


def test_inventory_is_of_moderate_size():
    inventory = {symbol for utterance in UTTERANCES for symbol, *_ in utterance["phones"]}
    assert 40 <= len(inventory) < 90


def test_valid_is_about_a_tenth_of_the_audio():
    assert set(VALID) <= set(SECONDS)
    assert 0.08 <= sum(SECONDS[path] for path in VALID) / sum(SECONDS.values()) <= 0.12


def test_splits_share_no_text_and_no_audio():
    train, valid = BY_SPLIT
    assert not {utterance["text"] for utterance in train} & {utterance["text"] for utterance in valid}
    checksums = [zlib.crc32((CORPUS / utterance["path"]).read_bytes()) for utterance in UTTERANCES]
    assert len(set(checksums)) == len(checksums)


def test_each_phone_of_valid_is_seen_in_train():
    train, valid = ({phone[0] for u in part for phone in u["phones"]} for part in BY_SPLIT)
    assert valid <= train


@pytest.mark.parametrize(("field", "at_least"), [("voice", 12), ("language", 6)])
def test_both_splits_hold_every_voice_and_language(field, at_least):
    train, valid = ({utterance[field] for utterance in part} for part in BY_SPLIT)
    assert train == valid and len(train) >= at_least
