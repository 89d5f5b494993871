import os

import numpy as np
import pytest

from hubert_fast.pretrain import decoding
from hubert_fast.pretrain.audio import (
    AudioError,
    load_audio,
    normalized,
    resample,
    resampled_length,
)
from hubert_fast.pretrain.manifest import load_manifest
from tests.pretrain.speech_folder import scan_folder, write_audio


def only_utterance(folder):
    return next(iter(load_manifest(folder / "manifest", "train")))


@pytest.mark.parametrize(
    ("suffix", "rate"),
    [
        *(("wav", rate) for rate in (16_000, 11_025, 44_100, 7_919)),
        ("flac", 48_000),
        ("ogg", 22_050),
        ("mp3", 44_100),
        ("opus", 24_000),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_any_format_rate_and_channel_count_becomes_16_khz_mono_of_the_scanned_length(tmp_path, suffix, rate, channels):
    audio = write_audio(tmp_path / "audio" / f"a.{suffix}", 1.237, rate=rate, channels=channels)
    scan_folder(tmp_path)
    utterance = only_utterance(tmp_path)
    waveform = load_audio(utterance)
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert len(waveform) == utterance.samples
    assert len(waveform) == pytest.approx(1.237 * 16_000, abs=1200 if suffix == "mp3" else 2)
    if suffix in ("wav", "flac") and rate == 16_000:
        np.testing.assert_allclose(waveform, audio.mean(axis=1), atol=1e-4)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 48_000, 7_919])
def test_resampled_length_is_what_the_resampler_gives(rate):
    for samples in (1, 2, 399, 400, 1001, 4410):
        assert len(resample(np.ones(samples, dtype=np.float32), rate)) == resampled_length(samples, rate)


def test_a_tone_survives_resampling():
    rate, seconds, pitch = 44_100, 0.5, 440
    tone = np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate).astype(np.float32)
    resampled = resample(tone, rate)
    expected = np.sin(2 * np.pi * pitch * np.arange(len(resampled)) / 16_000)
    inside = slice(200, -200)  # the filter meets the tone's ends elsewhere
    np.testing.assert_allclose(resampled[inside], expected[inside], atol=1e-2)


def test_a_file_that_changed_or_vanished_since_the_scan_is_named(tmp_path):
    path = tmp_path / "audio" / "a.wav"
    write_audio(path, 0.5)
    scan_folder(tmp_path)
    original, state = path.read_bytes(), path.stat()
    for other in (original[:-100], original[:-1] + b"x", original + b"x"):
        path.write_bytes(other)
        with pytest.raises(AudioError, match="a.wav: the file changed since the scan"):
            load_audio(only_utterance(tmp_path))
    path.write_bytes(b"no audio".ljust(len(original)))  # decay that leaves no trace but in the bytes
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(AudioError, match="unreadable"):
        load_audio(only_utterance(tmp_path))
    path.unlink()
    with pytest.raises(AudioError, match="no such file"):
        load_audio(only_utterance(tmp_path))


def test_a_file_that_was_copied_or_touched_is_the_same_file(tmp_path):
    path = tmp_path / "audio" / "a.wav"
    write_audio(path, 0.5)
    scan_folder(tmp_path)
    before = load_audio(only_utterance(tmp_path))
    os.utime(path, ns=(0, 0))
    np.testing.assert_array_equal(load_audio(only_utterance(tmp_path)), before)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "opus", "mp3"])
def test_parts_of_long_files_are_read_without_a_search_and_to_the_same_bits(tmp_path, suffix, monkeypatch):
    write_audio(tmp_path / "audio" / f"a.{suffix}", 12.0, rate=48_000, subtype="OPUS" if suffix == "opus" else None)
    scan_folder(tmp_path, longest_seconds=2.5, valid_fraction=0.0)
    parts = list(load_manifest(tmp_path / "manifest", "train"))
    whole = [load_audio(part._replace(plain=0)) for part in parts]
    if suffix != "mp3":  # whose frames must be counted to find one
        monkeypatch.setattr(decoding, "read_layout", lambda path: pytest.fail("it was searched"))
    assert len(parts) == 5
    for part, expected in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(load_audio(part), expected)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "opus"])
def test_decay_gives_other_samples_or_an_error_of_audio_and_nothing_else(tmp_path, suffix):
    path = tmp_path / "audio" / f"a.{suffix}"
    write_audio(path, 0.6, rate=48_000, channels=2, subtype="OPUS" if suffix == "opus" else None)
    scan_folder(tmp_path)
    good, state, utterance = path.read_bytes(), path.stat(), only_utterance(tmp_path)
    rng, failed = np.random.default_rng(0), 0
    for number in range(24):
        data = bytearray(good)
        for place in rng.integers(0, 200 if number % 2 else len(good), 9):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        try:
            assert len(load_audio(utterance)) == utterance.samples
        except AudioError:
            failed += 1
    assert failed or suffix == "mp3", "of its frames the decoder passes over those that it cannot read"


def test_normalized_has_zero_mean_and_unit_variance_and_leaves_silence():
    waveform = normalized(np.random.default_rng(0).normal(3, 2, 10_000).astype(np.float32))
    assert waveform.dtype == np.float32
    assert waveform.mean() == pytest.approx(0, abs=1e-5) and waveform.std() == pytest.approx(1, abs=1e-4)
    assert not normalized(np.zeros(1000, dtype=np.float32)).any()
