"""From a folder of audio to the manifests of the utterances to train on and of those held out.

``summary.json`` is written last: a manifest directory with it is complete, one without it is made anew.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hubert_fast.pretrain.alignments import Alignments
from hubert_fast.pretrain.atomic import write_text
from hubert_fast.pretrain.audio import AudioError, resampled_length
from hubert_fast.pretrain.config import DataConfig
from hubert_fast.pretrain.file_state import FileState, file_state
from hubert_fast.pretrain.frames import SAMPLE_RATE, num_frames
from hubert_fast.pretrain.manifest import SPLITS, Manifest, Recordings, manifest_path, write_manifest
from hubert_fast.pretrain.probe import AudioInfo, probe
from hubert_fast.pretrain.run_summary import read_json
from hubert_fast.pretrain.splits import held_out_files

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3")
_FILES_AHEAD = 256
LONGEST_SECONDS = 60.0
"""longer recordings become several cuts"""


def scan(
    audio: Path,
    out: Path,
    config: DataConfig,
    *,
    seed: int,
    longest_seconds: float = LONGEST_SECONDS,
    forgotten: Collection[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Decode every audio file below ``audio`` once and write the manifest of the usable ones to ``out``; returns its summary.

    Files that are unreadable, truncated, empty, shorter than ``min_seconds`` or hold a NaN or an infinity are left out,
    counted, and listed with the reason in ``out/skipped.jsonl``. A recording longer than ``longest_seconds`` becomes
    several utterances (see `manifest`).

    Held out are the files that ``audio/splits.json`` names (``{"valid": [relative path, ...]}``); without that file,
    those whose path hashes below ``valid_fraction``, and at least one file where there are two. A complete manifest
    made with the same settings is kept as it is (remove ``out`` to scan again).

    Args:
        config: its ``min_seconds`` and ``valid_fraction`` decide; as many threads decode as it has ``workers``, one
            where it has none.
        seed: varies which files are held out.
        forgotten: relative paths of files that are left out too.

    Raises:
        ValueError: no file is usable, or an alignment or ``splits.json`` is malformed.
    """
    audio, out = Path(audio).resolve(), Path(out)
    settings = {
        "audio": str(audio),
        "min_seconds": config.min_seconds,
        "valid_fraction": config.valid_fraction,
        "seed": seed,
        "longest_seconds": longest_seconds,
    }
    done = read_json(out / "summary.json")
    if (
        done is not None
        and done["settings"] == settings
        and all(manifest_path(out, split).is_file() for split in SPLITS)
    ):
        return done
    (out / "summary.json").unlink(missing_ok=True)

    files = find_audio(audio)
    usable, skipped = _probe_all(audio, files, config, forgotten, progress)
    write_text(out / "skipped.jsonl", "".join(json.dumps(line) + "\n" for line in skipped))
    if not usable.paths:
        raise ValueError(
            f"audio={str(audio)!r}: none of its {len(files)} audio files is usable; the first, {skipped[0]['path']}: "
            f"{skipped[0]['reason']}. {out / 'skipped.jsonl'} lists all."
        )
    held_out = held_out_files(audio, usable.paths, config.valid_fraction, seed)
    phones_of = Alignments(audio).phones
    manifests = {}
    for split, chosen in zip(SPLITS, (~held_out, held_out)):
        path = manifest_path(out, split)
        manifests[split] = write_manifest(path, audio, usable, chosen, phones_of, longest_seconds=longest_seconds)
    summary = _summary(settings, manifests, usable.numbers()[:, 0], len(skipped))
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def find_audio(folder: Path) -> list[str]:
    """Audio files below ``folder``, as sorted relative paths. Links to folders are followed, hidden names are not.

    Raises:
        ValueError: ``folder`` is no folder or holds no audio.
    """
    if not folder.is_dir():
        raise ValueError(f"audio={str(folder)!r} is not a folder")
    found = []
    seen = set()
    for directory, subfolders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if name.lower().endswith(AUDIO_SUFFIXES) and not name.startswith("."):
                found.append((Path(directory) / name).relative_to(folder).as_posix())
    if not found:
        raise ValueError(
            f"audio={str(folder)!r} holds no audio: files ending in {', '.join(AUDIO_SUFFIXES)} are accepted"
        )
    return sorted(found)


def _probe_all(
    audio: Path, files: list[str], config: DataConfig, forgotten: Collection[str], progress: bool
) -> tuple[Recordings, list[dict[str, str]]]:
    """What each usable file holds, and the others with the reason; both in the order of ``files``."""
    usable = Recordings()
    skipped: list[dict[str, str]] = []
    seconds, began = 0.0, time.monotonic()

    def examine(relative: str) -> tuple[AudioInfo, FileState] | str:
        return "forgotten" if relative in forgotten else _examine(audio / relative, config.min_seconds)

    bar = tqdm(total=len(files), desc="scan", unit=" files", disable=not progress)
    with bar:
        for relative, result in _mapped(examine, files, config.workers):
            if isinstance(result, str):
                skipped.append({"path": _printable(audio / relative), "reason": result})
            else:
                info, state = result
                usable.add(relative, rate=info.rate, channels=info.channels, samples=info.samples, state=state)
                seconds += info.seconds
            bar.update()
            rate = seconds / (time.monotonic() - began)
            bar.set_postfix_str(f"{rate:.0f} audio-s/s, {len(skipped)} skipped", refresh=False)
    return usable, skipped


def _mapped(work: Callable[[str], Any], files: list[str], workers: int) -> Iterator[tuple[str, Any]]:
    """Each of ``files`` with what ``work`` makes of it, in their order; few are begun ahead, because there may be millions."""
    # libsndfile decodes without Python's lock, so threads are enough.
    with ThreadPoolExecutor(max(1, workers)) as pool:
        begun: deque[tuple[str, Future[Any]]] = deque()
        for file in files:
            begun.append((file, pool.submit(work, file)))
            if len(begun) > _FILES_AHEAD:
                first, made = begun.popleft()
                yield first, made.result()
        for first, made in begun:
            yield first, made.result()


def _examine(path: Path, min_seconds: float) -> tuple[AudioInfo, FileState] | str:
    if _printable(path) != str(path):
        return "the name of the file is not UTF-8"
    try:
        info, state = probe(path), file_state(path)
    except AudioError as error:
        return error.reason
    except OSError as error:
        return f"unreadable ({error})"
    if info.seconds < min_seconds:
        return f"too short: {info.seconds:.3f} s, min_seconds is {min_seconds}"
    if num_frames(resampled_length(info.samples, info.rate)) == 0:
        return f"too short: {info.seconds:.3f} s is less than one frame of 0.025 s"
    return info, state


def _printable(path: Path) -> str:
    return str(path).encode(errors="backslashreplace").decode()


def _summary(
    settings: dict[str, Any], manifests: Mapping[str, Manifest], rates: np.ndarray, skipped: int
) -> dict[str, Any]:
    """Summary of a scan: counts and seconds of audio by split, counts of files by sampling rate (Hz)."""
    seconds = {split: int(manifest.samples.sum()) / SAMPLE_RATE for split, manifest in manifests.items()}
    return {
        "settings": settings,
        "utterances": {split: len(manifest) for split, manifest in manifests.items()},
        "seconds": seconds,
        "hours": {split: value / 3600 for split, value in seconds.items()},
        "sampling_rates": {str(rate): int(count) for rate, count in zip(*np.unique(rates, return_counts=True))},
        "skipped": skipped,
        "has_alignments": any(manifest.has_phones.any() for manifest in manifests.values()),
    }
