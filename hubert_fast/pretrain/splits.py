"""Which files are held out: those that the corpus names, else a share of them chosen by a hash of their names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

SPLITS_FILE = "splits.json"


def held_out_files(audio: Path, files: list[str], valid_fraction: float, seed: int) -> set[str]:
    """Which of ``files`` (usable, relative to ``audio``) are held out: never all, and at least one of two or more
    where ``valid_fraction`` is above 0.

    Raises:
        ValueError: ``audio/splits.json`` is malformed, or names no usable file or every one.
    """
    path = audio / SPLITS_FILE
    if path.is_file():
        return _listed_split(path, files)
    if valid_fraction == 0 or len(files) < 2:
        return set()
    shares = {file: _hash_share(file, seed) for file in files}
    held_out = {file for file, share in shares.items() if share < valid_fraction}
    by_share = sorted(files, key=shares.__getitem__)
    return (held_out or {by_share[0]}) - ({by_share[-1]} if len(held_out) == len(files) else set())


def _listed_split(path: Path, files: list[str]) -> set[str]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["valid"]
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise TypeError(f'"valid" is {listed!r}')
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected {{"valid": ["relative/path.wav", ...]}} ({error})') from error
    held_out = set(listed) & set(files)
    if listed and not held_out:
        raise ValueError(
            f"{path}: none of its {len(listed)} files (the first: {listed[0]!r}) is a usable audio file of the folder"
        )
    if len(held_out) == len(files):
        raise ValueError(f"{path}: it holds out every usable file, which leaves none to train on")
    return held_out


def _hash_share(file: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the name and the seed, so new files do not move the old ones."""
    digest = hashlib.blake2b(f"{seed}:{file}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
