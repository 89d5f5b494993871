"""Small folders of audio for the tests of the data stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from hubert_fast.pretrain.config import DataConfig
from hubert_fast.pretrain.frames import FRAME_SHIFT, num_frames
from hubert_fast.pretrain.manifest import load_manifest
from hubert_fast.pretrain.scan import scan
from hubert_fast.pretrain.units import new_units


def write_audio(
    path: Path, seconds: float, *, rate: int = 16_000, channels: int = 1, seed: int = 0, subtype: str | None = None
) -> np.ndarray:
    """A tone in noise as ``[samples, channels]``; the format follows the suffix."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * (200 + 50 * seed) * time)
    audio = tone[:, None] + 0.05 * rng.standard_normal((len(time), channels))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate, subtype=subtype, format="OGG" if path.suffix == ".opus" else None)
    return audio


def numbered_folder(folder: Path, lengths: list[int]) -> None:
    """A folder of 16 kHz files of ``lengths`` samples, all for training, that say where they are: sample n has the 16-bit
    value 1 + n // 320, the number of the frame that begins there. Its manifest, and units that are those numbers less 1.
    """
    (folder / "audio").mkdir(parents=True)
    for index, samples in enumerate(lengths):
        numbers = (1 + np.arange(samples) // FRAME_SHIFT).astype(np.int16)
        soundfile.write(folder / "audio" / f"{index:03d}.wav", numbers, 16_000, subtype="PCM_16")
    scan_folder(folder, valid_fraction=0.0)
    number_units(folder)


def number_units(folder: Path) -> None:
    """Write the units of `numbered_folder` for the manifest that is there now."""
    manifest = load_manifest(folder / "manifest", "train")
    with new_units(folder / "units.safetensors", manifest, 1000) as units:
        for index, frames in enumerate(num_frames(manifest.samples)):
            units.put(index, np.arange(frames))


def scan_folder(folder: Path, *, seed: int = 0, longest_seconds: float = 60.0, forgotten=(), **changes) -> dict:
    """Scan ``folder/audio`` into ``folder/manifest``."""
    config = DataConfig(**{"min_seconds": 0.1, "valid_fraction": 0.2, "workers": 0} | changes)
    options = {"seed": seed, "longest_seconds": longest_seconds, "forgotten": forgotten, "progress": False}
    return scan(folder / "audio", folder / "manifest", config, **options)
