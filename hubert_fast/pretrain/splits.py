"""Which files are held out: those that the corpus names, else a share of them chosen by a hash of their names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SPLITS_FILE = "splits.json"


def held_out_files(audio: Path, files: Sequence[str], valid_fraction: float, seed: int) -> np.ndarray:
    """Which of ``files`` (usable, relative to ``audio``) are held out, bool ``[files]``: never all, and at least one of two
    or more where ``valid_fraction`` is above 0.

    Raises:
        ValueError: ``audio/splits.json`` is malformed, or names no usable file or every one.
    """
    path = audio / SPLITS_FILE
    if path.is_file():
        return _listed_split(path, files)
    if valid_fraction == 0 or len(files) < 2:
        return np.zeros(len(files), dtype=bool)
    shares = np.fromiter((_hash_share(file, seed) for file in files), dtype=np.float64, count=len(files))
    held_out = shares < valid_fraction
    if held_out.all():
        held_out[shares.argmax()] = False
    elif not held_out.any():
        held_out[shares.argmin()] = True
    return held_out


def _listed_split(path: Path, files: Sequence[str]) -> np.ndarray:
    try:
        listed = json.loads(path.read_text(encoding="utf-8-sig"))["valid"]
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise TypeError(f'"valid" is {listed!r}')
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected {{"valid": ["relative/path.wav", ...]}} ({error})') from error
    wanted = set(listed)
    held_out = np.fromiter((file in wanted for file in files), dtype=bool, count=len(files))
    if listed and not held_out.any():
        raise ValueError(
            f"{path}: none of its {len(listed)} files (the first: {listed[0]!r}) is a usable audio file of the folder"
        )
    if held_out.all():
        raise ValueError(f"{path}: it holds out every usable file, which leaves none to train on")
    return held_out


def _hash_share(file: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the name and the seed, so new files do not move the old ones."""
    digest = hashlib.blake2b(f"{seed}:{file}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
