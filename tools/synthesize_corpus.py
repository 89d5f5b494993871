"""Synthesise the embedded speech corpus of hubert_fast, with phone alignments, from ``corpus_text.json``.

    python tools/synthesize_corpus.py [--out DIR] [--seed N]

Needs the espeak-ng 1.51 shared library and its data (Debian and Ubuntu: ``libespeak-ng1``, ``espeak-ng-data``), and
the Python packages numpy, scipy and soundfile. The same seed and library versions give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from espeak import Espeak
from espeak_alignment import SILENCE, align
from scipy.signal import lfilter, resample_poly

SAMPLE_RATE = 16000
VORBIS_COMPRESSION = 0.9  # libsndfile's scale: 0 is the best quality, 1 the smallest file
REPOSITORY = Path(__file__).resolve().parent.parent
TEXT = Path(__file__).with_name("corpus_text.json")
CORPUS = REPOSITORY / "hubert_fast" / "pretrain" / "embedded_corpus"


def render(samples: np.ndarray, rate: int, lead: int, tail: int, random: np.random.Generator) -> np.ndarray:
    """Float32 [samples] at 16 kHz: resampled without delay, ``lead`` and ``tail`` samples of quiet around it, a random
    level, and the faint brown-tinted noise of a quiet room, so that no pause is a run of zeros."""
    divisor = np.gcd(SAMPLE_RATE, rate)
    speech = resample_poly(samples.astype(np.float64), SAMPLE_RATE // divisor, rate // divisor)
    speech = np.pad(speech / np.abs(speech).max(), (lead, tail))
    peak = 10 ** (random.uniform(-9, -2) / 20)
    noise = lfilter([1.0], [1.0, -0.8], random.standard_normal(len(speech)))
    noise *= 10 ** (random.uniform(-66, -54) / 20) / noise.std()
    return (peak * speech + noise).astype(np.float32)


def write_vorbis(path: Path, waveform: np.ndarray, serial: int) -> None:
    soundfile.write(path, waveform, SAMPLE_RATE, format="OGG", subtype="VORBIS", compression_level=VORBIS_COMPRESSION)
    path.write_bytes(_with_serial(path.read_bytes(), serial))


def _with_serial(stream: bytes, serial: int) -> bytes:
    """An Ogg stream with its serial number, which libsndfile draws from the clock, replaced (and checksums redone)."""
    result = bytearray()
    position = 0
    while position < len(stream):
        segments = stream[position + 26]
        header = 27 + segments
        size = header + sum(stream[position + 27 : position + header])
        page = bytearray(stream[position : position + size])
        page[14:18] = struct.pack("<I", serial)
        page[22:26] = bytes(4)
        page[22:26] = struct.pack("<I", _ogg_checksum(page))
        result += page
        position += size
    return bytes(result)


def _ogg_checksum(page: bytes) -> int:
    """Ogg's CRC-32 (RFC 3533): polynomial 0x04c11db7, not reflected, starts from 0, not inverted."""
    remainder = 0
    for byte in page:
        remainder ^= byte << 24
        for _ in range(8):
            remainder = (remainder << 1) ^ (0x104C11DB7 if remainder & 0x80000000 else 0)
    return remainder


def utterances(voices: list[dict]) -> Iterator[tuple[dict, str, str, bool]]:
    """(voice, file name, text, held out) of each utterance, in order."""
    for voice in voices:
        texts = [(text, True) for text in voice["held_out"]] + [(text, False) for text in voice["train"]]
        for number, (text, held_out) in enumerate(texts, start=1):
            yield voice, f"{voice['language']}_{voice['variant'].lower()}_{number:03d}.ogg", text, held_out


def synthesize(espeak: Espeak, voice: dict, name: str, text: str, out: Path, seed: int) -> dict:
    """Write ``out / name`` and return its line of alignments.jsonl."""
    serial = zlib.crc32(name.encode())
    random = np.random.default_rng((seed, serial))
    rate = int(np.clip(voice["rate"] + random.integers(-12, 13), 130, 190))
    pitch = int(voice["pitch"] + random.integers(-6, 7))
    lead, tail = (int(count) for count in random.integers(SAMPLE_RATE // 20, SAMPLE_RATE // 4, size=2))
    language, variant = voice["language"], voice["variant"]
    samples, events = espeak.speak(
        text, language=language, variant=variant, rate=rate, pitch=pitch, seed=int(random.integers(2**31))
    )
    waveform = render(samples, espeak.sample_rate, lead, tail, random)
    write_vorbis(out / name, waveform, serial)
    phones = _pad(align(samples, events, espeak.sample_rate, language), lead / SAMPLE_RATE, len(waveform) / SAMPLE_RATE)
    return {"path": name, "voice": variant.lower(), "language": language, "text": text, "phones": phones}


def _pad(aligned: list[tuple[str, float, float]], lead: float, duration: float) -> list[list]:
    """[phone, start, duration] in seconds, shifted by ``lead``; neighbouring silences joined, the ends silent."""
    phones: list[list] = [[SILENCE, 0.0]]
    for phone, start, _ in aligned:
        if not (phone == SILENCE and phones[-1][0] == SILENCE):
            phones.append([phone, round(start + lead, 4)])
    if phones[-1][0] != SILENCE:
        phones.append([SILENCE, round(aligned[-1][2] + lead, 4)])
    starts = [start for _, start in phones] + [round(duration, 4)]
    return [[phone, start, round(end - start, 4)] for (phone, start), end in zip(phones, starts[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=CORPUS, help="folder to write; its .ogg files are replaced")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.ogg"):
        old.unlink()
    espeak = Espeak()
    lines, valid = [], []
    for voice, name, text, held_out in utterances(json.loads(TEXT.read_text(encoding="utf-8"))):
        lines.append(synthesize(espeak, voice, name, text, out, arguments.seed))
        valid += [name] if held_out else []
    alignments = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    (out / "alignments.jsonl").write_text(alignments, encoding="utf-8")
    (out / "splits.json").write_text(json.dumps({"valid": valid}, indent=1) + "\n", encoding="utf-8")
    seconds = sum(line["phones"][-1][1] + line["phones"][-1][2] for line in lines)
    inventory = {phone for line in lines for phone, *_ in line["phones"]}
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"espeak-ng {espeak.version}: {len(lines)} utterances, {seconds / 60:.2f} min, {len(inventory)} phones")
    print(f"{out}: {size / 2**20:.2f} MiB, {len(valid)} utterances held out")


if __name__ == "__main__":
    main()
