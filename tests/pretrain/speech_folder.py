"""Small folders of audio for the tests of the data stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from safetensors.numpy import save_file

from hubert_fast.pretrain.frames import FRAME_SHIFT, num_frames
from hubert_fast.pretrain.manifest import ManifestSummary, scan


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


def write_numbered_frames(path: Path, samples: int) -> None:
    """16 kHz audio that says where it is: sample n has the 16-bit value 1 + n // 320, the number of the frame that
    begins there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, (1 + np.arange(samples) // FRAME_SHIFT).astype(np.int16), 16_000, subtype="PCM_16")


def numbered_folder(folder: Path, lengths: list[int]) -> tuple[Path, Path]:
    """A folder of `write_numbered_frames` files of ``lengths`` samples, all for training: its manifest, and units that
    are those very numbers (less 1).
    """
    for index, samples in enumerate(lengths):
        write_numbered_frames(folder / "audio" / f"{index:03d}.wav", samples)
    scan_folder(folder, valid_fraction=0.0)
    units = {
        f"{index:03d}.wav": np.arange(num_frames(samples), dtype=np.int32) for index, samples in enumerate(lengths)
    }
    write_units(folder / "units.safetensors", units)
    return folder / "manifest", folder / "units.safetensors"


def write_units(path: Path, units: dict[str, np.ndarray], num_classes: int = 1000) -> None:
    save_file(units, path, metadata={"num_classes": str(num_classes)})


def scan_folder(folder: Path, *, min_seconds: float = 0.1, valid_fraction: float = 0.2, **changes) -> ManifestSummary:
    """Scan ``folder/audio`` into ``folder/manifest``."""
    arguments = {"min_seconds": min_seconds, "valid_fraction": valid_fraction, "seed": 0, "progress": False, **changes}
    return scan(folder / "audio", folder / "manifest", **arguments)
