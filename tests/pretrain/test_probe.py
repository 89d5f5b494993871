import os
from contextlib import suppress

import numpy as np
import pytest
import soundfile

from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.probe import probe
from tests.pretrain.speech_folder import write_audio

RATE = 16_000
NOISE = 0.1 * np.random.default_rng(0).standard_normal(RATE)


def probed(folder, audio, channel="mix", subtype="FLOAT"):
    path = folder / "a.wav"
    soundfile.write(path, audio, RATE, subtype=subtype)
    return probe(path, channel)


def flags(info):
    return {name for name in ("silent", "constant", "clipped") if getattr(info, name)}


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("audio", "expected"),
    [
        (NOISE, set()),
        (np.zeros(RATE), {"silent"}),
        (np.full(RATE, 0.99 / 2**15), {"silent"}),
        (np.full(RATE, 1.01 / 2**15), {"constant"}),
        (np.full(RATE, 1.0), {"constant"}),
        (np.full(RATE, -0.25) + np.where(np.arange(RATE) % 9 == 0, 1.01 / 2**15, 0), set()),
        (np.where(np.arange(RATE) % 999 == 0, 1.0, NOISE), {"clipped"}),
        (np.where(np.arange(RATE) % 999 == 0, -1.0, NOISE), {"clipped"}),
        (np.where(np.arange(RATE) % 1001 == 0, 1.0, 0.1), set()),
        (np.where(np.arange(RATE) % 9 == 0, 0.999, NOISE), set()),
    ],
)
def test_silent_constant_and_clipped_recordings_are_told(tmp_path, audio, expected, channels):
    assert flags(probed(tmp_path, np.stack([audio] * channels, axis=1))) == expected


def test_channels_that_cancel_in_the_mean_are_noticed_at_a_hundredth_of_their_energy(tmp_path):
    for kept, taken in ((0.105, True), (0.095, False)):
        # Mean and half difference of the channels are independent; the mean has kept^2 of the energy.
        other = 0.1 * np.random.default_rng(1).standard_normal(RATE)
        mean, half = kept * other, np.sqrt(1 - kept**2) * NOISE
        audio = np.stack([mean + half, mean - half], axis=1)
        if taken:
            assert probed(tmp_path, audio).channel is None
        else:
            with pytest.raises(AudioError, match="channels cancel: their mean has 0.9.* data.channel takes one"):
                probed(tmp_path, audio)
        assert probed(tmp_path, audio, channel=2).channel == 1


def test_an_offset_does_not_hide_that_channels_cancel_and_one_empty_channel_is_nothing(tmp_path):
    with pytest.raises(AudioError, match="channels cancel"):
        probed(tmp_path, np.stack([0.4 + NOISE, 0.4 - NOISE], axis=1))
    assert not flags(probed(tmp_path, np.stack([NOISE, np.zeros(RATE)], axis=1)))
    assert not flags(probed(tmp_path, np.stack([NOISE] * 6, axis=1)))


def test_of_the_channel_that_is_taken_alone_it_is_told_whether_it_is_silent(tmp_path):
    audio = np.stack([NOISE, np.zeros(RATE)], axis=1)
    assert flags(probed(tmp_path, audio, channel=2)) == {"silent"}
    assert not flags(probed(tmp_path, audio, channel=1))
    with pytest.raises(AudioError, match="it has 2 channels, and data.channel is 3"):
        probed(tmp_path, audio, channel=3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_found_in_any_channel(tmp_path, value):
    audio = np.stack([NOISE, NOISE], axis=1)
    audio[77, 1] = value
    for channel in ("mix", 1):
        with pytest.raises(AudioError, match="NaN"):
            probed(tmp_path, audio, channel)


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "null.wav").symlink_to("/dev/null")
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
    for name, reason in {
        "folder": "not a file",
        "pipe": "not a file",
        "null": "not a file",
        "loop": "symbolic",
    }.items():
        with pytest.raises(AudioError, match=f"unreadable.*{reason}"):
            probe(tmp_path / f"{name}.wav")


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.wav").write_bytes(b"RIFF")
    monkeypatch.setattr("hubert_fast.pretrain.probe.read_layout", refuse)
    with pytest.raises(AudioError, match="no permission"):
        probe(tmp_path / "a.wav")


def test_a_wav_header_that_ends_or_lies_anywhere_is_an_error_of_audio(tmp_path):
    path = tmp_path / "a.wav"
    write_audio(path, 0.5)
    good = path.read_bytes()
    rf64 = b"RF64" + 4 * b"\xff" + b"WAVE"
    data = b"data" + 4 * b"\xff" + bytes(1000)
    for stub in [*(good[:size] for size in range(1, 80)), rf64 + data, rf64 + good[12:36] + data]:
        path.write_bytes(stub)
        with suppress(AudioError):
            probe(path)
