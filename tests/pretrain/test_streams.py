"""Files that are joined, cut, padded or said to be of another length than they are: what is taken of them, and which part.

`audio_campaign` holds lengths against another decoder; here it is known what was written.
"""

import struct

import numpy as np
import pytest
import soundfile

from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.decoding import decode
from hubert_fast.pretrain.probe import probe
from tests.pretrain.mutated_audio import FORMATS, without_end_mark, without_xing

RATE = 16_000
SECONDS = 2.0
EACH_FORMAT = ["wav-16", "wav-rf64", "flac", "vorbis", "opus", "mp3-constant", "mp3-variable", "mp3-bare"]


def write(path, kind, seconds=SECONDS, *, rate=RATE, channels=1, seed=0):
    """A tone in noise, loud and then faint, as bytes and a file."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    loudness = np.where(time < seconds / 2, 0.3, 0.003)[:, None]
    audio = loudness * (np.sin(2000 * time)[:, None] + rng.standard_normal((len(time), channels)))
    soundfile.write(path, audio, rate, **FORMATS[kind][1])
    if kind == "mp3-bare":
        path.write_bytes(without_xing(path.read_bytes()))
    return path.read_bytes()


def file_of(tmp_path, kind):
    return tmp_path / f"a.{FORMATS[kind][0]}"


def whole(path, samples):
    """All of a file, and that it is no longer."""
    rate, waveform = decode(path, 0, samples + 10_000)
    assert len(waveform) == samples
    return waveform


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", EACH_FORMAT)
def test_any_part_of_a_file_is_that_part_of_the_whole_to_the_bit(tmp_path, kind, channels):
    path = file_of(tmp_path, kind)
    write(path, kind, 8.0, channels=channels)
    samples = probe(path).samples
    waveform = whole(path, samples)
    rng = np.random.default_rng(0)
    for start in [*rng.integers(0, samples - 1, 12), 1, samples - 1]:
        part = decode(path, int(start), 2000)[1]
        np.testing.assert_array_equal(part, waveform[start : start + 2000])


@pytest.mark.parametrize("kind", EACH_FORMAT)
def test_files_that_were_joined_are_taken_whole_and_listed(tmp_path, kind):
    first, second, joined = (tmp_path / f"{name}.{FORMATS[kind][0]}" for name in ("first", "second", "joined"))
    joined.write_bytes(write(first, kind, 1.0) + write(second, kind, 1.5, seed=1))
    lengths = probe(first).samples, probe(second).samples
    info = probe(joined)
    assert info.samples == sum(lengths)
    # An MP3 without a header has no beginning: joined, two of them are one.
    assert ("joined" in info.repair) is (kind != "mp3-bare")
    waveform = whole(joined, info.samples)
    np.testing.assert_array_equal(waveform[: lengths[0] - 2000], whole(first, lengths[0])[:-2000])
    np.testing.assert_allclose(waveform[lengths[0] + 2000 :], whole(second, lengths[1])[2000:], atol=1e-6)
    border = decode(joined, lengths[0] - 100, 200)[1]
    np.testing.assert_array_equal(border, waveform[lengths[0] - 100 : lengths[0] + 100])


@pytest.mark.parametrize("kind", ["wav-16", "flac", "vorbis", "opus", "mp3-constant"])
def test_joined_files_of_different_rates_or_channels_are_left_out(tmp_path, kind):
    path = file_of(tmp_path, kind)
    first = write(path, kind)
    others = [{"channels": 2}] if kind == "opus" else [{"rate": 24_000}, {"channels": 2}]
    for change in others:
        path.write_bytes(first + write(path, kind, **change))
        with pytest.raises(AudioError, match="different sampling rates|another sampling rate"):
            probe(path)


def test_an_mp3_of_varying_bit_rate_without_a_header_is_taken_whole(tmp_path):
    path = tmp_path / "a.mp3"
    write(path, "mp3-bare", 20.0, rate=44_100)
    with soundfile.SoundFile(path) as file:
        assert file.frames < 0.7 * 20 * 44_100, "the decoder guesses right: this tests nothing"
    assert probe(path).samples == pytest.approx(20 * 44_100, abs=3000)


def test_an_mp3_whose_header_says_too_few_frames_is_taken_whole_and_listed(tmp_path):
    path = tmp_path / "a.mp3"
    content = bytearray(write(path, "mp3-variable"))
    at = content.index(b"Xing") + 8
    content[at : at + 4] = struct.pack(">I", 10)
    path.write_bytes(content)
    info = probe(path)
    assert info.samples == SECONDS * RATE and "says 10 frames" in info.repair


def wav_of_size(content, size):
    at = content.index(b"data") + 4
    return content[:at] + struct.pack("<I", size) + content[at + 4 :]


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0xFFFFFFFF - 36])
def test_a_wav_whose_size_is_a_placeholder_is_taken_whole_and_listed(tmp_path, size):
    path = tmp_path / "a.wav"
    path.write_bytes(wav_of_size(write(path, "wav-16"), size))
    info = probe(path)
    assert info.samples == SECONDS * RATE and "header" in info.repair


def test_a_wav_that_lacks_less_than_50_ms_of_its_promise_is_taken_and_one_that_lacks_more_is_truncated(tmp_path):
    path = tmp_path / "a.wav"
    content = write(path, "wav-16")
    for missing, taken in ((0.049, True), (0.051, False)):
        size = int((SECONDS + missing) * RATE) * 2
        path.write_bytes(wav_of_size(content, size))
        if taken:
            info = probe(path)
            assert info.samples == SECONDS * RATE and f"its header says {size} bytes" in info.repair
        else:
            with pytest.raises(AudioError, match=f"truncated: its header says {size} bytes"):
                probe(path)


def test_of_two_sizes_of_a_long_wav_the_longer_field_counts(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav_of_size(write(path, "wav-rf64"), 5000))
    info = probe(path)
    assert info.samples == SECONDS * RATE and "two sizes differ" in info.repair


def test_chunks_behind_the_audio_of_a_wav_are_no_audio_and_nothing_to_speak_of(tmp_path):
    path = tmp_path / "a.wav"
    content = write(path, "wav-16")
    for chunks in (b"LIST\x04\0\0\0INFO", b"junk\x03\0\0\0abc\0" + b"LIST\x04\0\0\0INFO", b"TAG" + bytes(125)):
        path.write_bytes(content + chunks)
        assert (probe(path).samples, probe(path).repair) == (SECONDS * RATE, "")


def test_a_wav_with_two_data_chunks_is_left_out(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(write(path, "wav-16") + b"data\x04\0\0\0abcd")
    with pytest.raises(AudioError, match="several data chunks"):
        probe(path)


@pytest.mark.parametrize("kind", ["wav-16", "vorbis", "mp3-bare"])
def test_a_tenth_of_foreign_bytes_is_passed_over_and_listed_and_more_is_left_out(tmp_path, kind):
    path = file_of(tmp_path, kind)
    content = write(path, kind)
    samples = probe(path).samples
    for share, taken in ((0.09, True), (0.13, False)):
        garbage = np.random.default_rng(0).bytes(int(share * len(content)))
        path.write_bytes(content + garbage)
        if taken:
            assert probe(path).samples == samples and "bytes behind its audio" in probe(path).repair
        else:
            with pytest.raises(AudioError, match="behind its audio, are no audio"):
                probe(path)
    path.write_bytes(content + bytes(len(content)))
    assert probe(path).samples == samples and "zeros behind its audio" in probe(path).repair


def flac_of_length(content, samples):
    packed = int.from_bytes(content[18:26], "big")
    return content[:18] + (packed >> 36 << 36 | samples).to_bytes(8, "big") + content[26:]


@pytest.mark.parametrize("says", [0, 5000])
def test_a_flac_that_says_no_length_or_too_little_is_taken_whole_in_parts_too(tmp_path, says):
    path = tmp_path / "a.flac"
    content = write(path, "flac")
    expected = whole(path, int(SECONDS * RATE))
    path.write_bytes(flac_of_length(content, says))
    info = probe(path)
    assert info.samples == SECONDS * RATE and "its header" in info.repair
    np.testing.assert_array_equal(decode(path, 20_000, 3000)[1], expected[20_000:23_000])


def test_a_flac_of_unknown_length_that_breaks_off_is_taken_to_its_last_whole_frame(tmp_path):
    path = tmp_path / "a.flac"
    content = write(path, "flac")
    expected = whole(path, int(SECONDS * RATE))
    path.write_bytes(flac_of_length(content, 0)[: len(content) // 3])
    info = probe(path)
    assert 4096 <= info.samples < SECONDS * RATE and info.samples % 4096 == 0
    np.testing.assert_array_equal(whole(path, info.samples), expected[: info.samples])


@pytest.mark.parametrize("kind", ["vorbis", "opus"])
def test_an_ogg_without_its_end_mark_is_taken_and_one_that_ends_within_a_page_is_truncated(tmp_path, kind):
    path = file_of(tmp_path, kind)
    content = write(path, kind)
    path.write_bytes(without_end_mark(content))
    info = probe(path)
    assert info.samples == SECONDS * RATE and "not marked as the end" in info.repair
    path.write_bytes(content[:-1])
    with pytest.raises(AudioError, match="truncated: its last page"):
        probe(path)


@pytest.mark.parametrize("kind", ["vorbis", "opus", "flac"])
def test_damage_that_a_checksum_shows_is_left_out(tmp_path, kind):
    path = file_of(tmp_path, kind)
    content = bytearray(write(path, kind))
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(AudioError, match="damaged"):
        probe(path)


def test_missing_pages_of_an_ogg_are_noticed(tmp_path):
    path = tmp_path / "a.ogg"
    content = write(path, "vorbis", 6.0)
    pages = [at for at in range(len(content)) if content[at : at + 4] == b"OggS"]
    assert len(pages) > 5
    path.write_bytes(content[: pages[3]] + content[pages[4] :])
    with pytest.raises(AudioError, match="pages are missing"):
        probe(path)


@pytest.mark.parametrize("kind", EACH_FORMAT)
def test_tags_before_and_behind_are_passed_over_without_a_word(tmp_path, kind):
    path = file_of(tmp_path, kind)
    content = write(path, kind)
    expected = whole(path, probe(path).samples)
    path.write_bytes(b"ID3\x03\0\0\0\0\x60\x10" + bytes(96 * 128 + 16) + content + b"TAG" + bytes(125))
    info = probe(path)
    assert (info.samples, info.repair) == (len(expected), "")
    np.testing.assert_array_equal(whole(path, info.samples), expected)


def test_other_formats_under_the_name_of_a_wav_are_taken_or_found_truncated(tmp_path):
    path = tmp_path / "a.wav"
    for name in ("AIFF", "W64", "NIST", "AU"):
        soundfile.write(path, np.full(20_000, 0.1), RATE, format=name)
        assert probe(path).samples == 20_000
        path.write_bytes(path.read_bytes()[:-10_000])
        with pytest.raises(AudioError, match="truncated"):
            probe(path)


def test_what_is_no_audio_at_all_says_so(tmp_path):
    path = tmp_path / "a.wav"
    for content in (b"not audio", b"RIFF\0\0\0\0WAVE", np.random.default_rng(0).bytes(50_000)):
        path.write_bytes(content)
        with pytest.raises(AudioError, match="unreadable"):
            probe(path)
