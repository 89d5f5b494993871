"""Audio files of all formats, and what happens to them on disks and in pipes; everything is drawn from a seed."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
import soundfile

from hubert_fast.pretrain.ogg_layout import page_checksum

FORMATS = {
    "wav-16": ("wav", {"format": "WAV", "subtype": "PCM_16"}),
    "wav-24": ("wav", {"format": "WAV", "subtype": "PCM_24"}),
    "wav-float": ("wav", {"format": "WAV", "subtype": "FLOAT"}),
    "wav-mu-law": ("wav", {"format": "WAV", "subtype": "ULAW"}),
    "wav-extensible": ("wav", {"format": "WAVEX", "subtype": "PCM_16"}),
    "wav-rf64": ("wav", {"format": "RF64", "subtype": "PCM_16"}),
    "flac": ("flac", {"format": "FLAC", "subtype": "PCM_16"}),
    "flac-24": ("flac", {"format": "FLAC", "subtype": "PCM_24"}),
    "vorbis": ("ogg", {"format": "OGG", "subtype": "VORBIS"}),
    "opus": ("opus", {"format": "OGG", "subtype": "OPUS"}),
    "mp3-constant": ("mp3", {"format": "MP3", "bitrate_mode": "CONSTANT"}),
    "mp3-variable": ("mp3", {"format": "MP3", "bitrate_mode": "VARIABLE"}),
    "mp3-bare": ("mp3", {"format": "MP3", "bitrate_mode": "VARIABLE"}),
}
RATES = (8_000, 16_000, 24_000, 48_000)
OTHER_RATES = (11_025, 22_050, 32_000, 44_100)


@dataclass(frozen=True)
class Mutated:
    """A file that something happened to."""

    name: str
    suffix: str
    content: bytes
    parts: tuple[bytes, ...]
    """what another decoder, which may know nothing of joined files, is to decode one by one"""
    samples: int
    """what was encoded, before anything happened"""
    damaged: bool
    """whether it happened to the audio itself"""


def encode(rng: np.random.Generator, kind: str, rate: int, channels: int) -> tuple[bytes, int]:
    """Between 0.3 and 3 s of a tone that comes and goes in noise, and the number of its samples."""
    suffix, options = FORMATS[kind]
    time = np.arange(int(rng.uniform(0.3, 3) * rate)) / rate
    tone = 0.4 * np.sin(2 * np.pi * rng.uniform(100, 1000) * time) * np.sin(2 * np.pi * rng.uniform(0.3, 3) * time)
    audio = tone[:, None] + rng.uniform(0, 0.05) * rng.standard_normal((len(time), channels))
    if suffix == "mp3":
        options = options | {"compression_level": rng.uniform(0.2, 0.8)}
    target = io.BytesIO()
    soundfile.write(target, audio, rate, **options)
    content = target.getvalue()
    return without_xing(content) if kind == "mp3-bare" else content, len(audio)


def without_xing(content: bytes) -> bytes:
    """An MP3 less its first frame, which says how long it is."""
    sync = content[:2]
    first = max(content.find(b"Xing"), content.find(b"Info"))
    return content[content.index(sync, first) :]


def mutate(rng: np.random.Generator) -> Mutated:
    """A file of a random format that a random thing happened to."""
    kind = str(rng.choice(list(FORMATS)))
    suffix = FORMATS[kind][0]
    rates = RATES if kind == "opus" else RATES + OTHER_RATES
    rate, channels = int(rng.choice(rates)), int(rng.integers(1, 3))
    content, samples = encode(rng, kind, rate, channels)
    mutation = str(rng.choice(list(_MUTATIONS)))
    name = f"{kind}, {mutation}"
    if mutation.startswith("joined"):
        other, more = (content, samples) if mutation == "joined with itself" else encode(rng, kind, rate, channels)
        return Mutated(name, suffix, content + other, (content, other), samples + more, False)
    mutated = _MUTATIONS[mutation](rng, suffix, content)
    harmless = mutation in _HARMLESS
    damaged = not harmless and mutated != content
    return Mutated(name, suffix, mutated, (content if harmless else mutated,), samples, damaged)


def _unchanged(rng: np.random.Generator, suffix: str, content: bytes) -> bytes:
    return content


def _cut_off(rng: np.random.Generator, suffix: str, content: bytes) -> bytes:
    return content[: int(rng.uniform(0.01, 1) * len(content))]


def _cut_off_at_the_end(rng: np.random.Generator, suffix: str, content: bytes) -> bytes:
    return content[: -int(rng.integers(1, 200))]


def _cut_off_in_front(rng: np.random.Generator, suffix: str, content: bytes) -> bytes:
    return content[int(rng.uniform(0, 0.5) * len(content)) :]


def _flipped(rng: np.random.Generator, suffix: str, content: bytes) -> bytes:
    damaged = bytearray(content)
    for position in rng.integers(0, len(content), rng.integers(1, 10)):
        damaged[position] ^= int(rng.integers(1, 256))
    return bytes(damaged)


def _flipped_in_the_header(rng: np.random.Generator, suffix: str, content: bytes) -> bytes:
    damaged = bytearray(content)
    for position in rng.integers(0, min(100, len(content)), rng.integers(1, 4)):
        damaged[position] ^= int(rng.integers(1, 256))
    return bytes(damaged)


def _zeroed(rng: np.random.Generator, suffix: str, content: bytes) -> bytes:
    start = int(rng.integers(0, len(content)))
    length = min(int(rng.integers(1, 2000)), len(content) - start)
    return content[:start] + bytes(length) + content[start + length :]


def _hole(rng: np.random.Generator, suffix: str, content: bytes) -> bytes:
    start = int(rng.integers(0, len(content)))
    return content[:start] + content[start + int(rng.integers(1, 2000)) :]


def _garbage_before(rng: np.random.Generator, suffix: str, content: bytes) -> bytes:
    return rng.bytes(int(rng.integers(1, 3000))) + content


def _garbage_behind(rng: np.random.Generator, suffix: str, content: bytes) -> bytes:
    return content + rng.bytes(int(rng.integers(1, 3000)))


def _zeros_behind(rng: np.random.Generator, suffix: str, content: bytes) -> bytes:
    return content + bytes(int(rng.integers(1, 3000)))


def _tag_before(rng: np.random.Generator, suffix: str, content: bytes) -> bytes:
    size = int(rng.integers(10, 3000))
    return b"ID3\x03\0\0" + bytes([0, 0, size >> 7, size & 127]) + rng.bytes(size) + content


def _tag_behind(rng: np.random.Generator, suffix: str, content: bytes) -> bytes:
    return content + b"TAG" + b"x" * 125


def _wrong_length(rng: np.random.Generator, suffix: str, content: bytes) -> bytes:
    """What the header says of the length: nothing, something a little wrong, or something quite wrong."""
    return {"wav": _wrong_wav, "flac": _wrong_flac, "mp3": _wrong_mp3}.get(suffix, _wrong_ogg)(rng, content)


def _drawn_length(rng: np.random.Generator, right: int, nothing: tuple[int, ...]) -> int:
    near, far = right + int(rng.integers(-20, 21)), int(right * rng.uniform(0.1, 2))
    return max(0, int(rng.choice([*nothing, near, far])))


def _wrong_wav(rng: np.random.Generator, content: bytes) -> bytes:
    at = content.index(b"data") + 4
    size = _drawn_length(rng, len(content) - at - 4, (0, 0xFFFFFFFF, 0x7FFFFFFF))
    riff = int(rng.choice([0, 0xFFFFFFFF, size + at - 4])) & 0xFFFFFFFF
    return content[:4] + struct.pack("<I", riff) + content[8:at] + struct.pack("<I", size) + content[at + 4 :]


def _wrong_flac(rng: np.random.Generator, content: bytes) -> bytes:
    packed = int.from_bytes(content[18:26], "big")
    samples = _drawn_length(rng, packed & (1 << 36) - 1, (0,))
    return content[:18] + (packed >> 36 << 36 | samples).to_bytes(8, "big") + content[26:]


def _wrong_mp3(rng: np.random.Generator, content: bytes) -> bytes:
    at = max(content.find(b"Xing", 0, 200), content.find(b"Info", 0, 200))
    if at < 0:
        return content
    frames = _drawn_length(rng, int.from_bytes(content[at + 8 : at + 12], "big"), (0,))
    return content[: at + 8] + struct.pack(">I", frames) + content[at + 12 :]


def _wrong_ogg(rng: np.random.Generator, content: bytes) -> bytes:
    return without_end_mark(content)


def without_end_mark(content: bytes) -> bytes:
    """An Ogg as a live encoder leaves it that was stopped."""
    last = content.rfind(b"OggS")
    page = bytearray(content[last:])
    page[5] &= ~4
    page[22:26] = bytes(4)
    page[22:26] = struct.pack("<I", page_checksum(bytes(page)))
    return content[:last] + bytes(page)


# What leaves the audio whole: another decoder, which may not find it then, is given it without.
_HARMLESS = ("garbage before", "garbage behind", "zeros behind", "a tag before", "a tag behind")
_MUTATIONS = {
    "unchanged": _unchanged,
    "cut off": _cut_off,
    "cut off at the end": _cut_off_at_the_end,
    "cut off in front": _cut_off_in_front,
    "flipped bytes": _flipped,
    "flipped bytes in the header": _flipped_in_the_header,
    "zeroed": _zeroed,
    "with a hole": _hole,
    "garbage before": _garbage_before,
    "garbage behind": _garbage_behind,
    "zeros behind": _zeros_behind,
    "a tag before": _tag_before,
    "a tag behind": _tag_behind,
    "wrong length": _wrong_length,
    "joined with itself": None,
    "joined with another": None,
}
