"""From a folder of audio to the manifests of the utterances to train on and of those held out.

``summary.json`` is written last: a manifest directory with it is complete, one without it is made anew.
"""

from __future__ import annotations

import json
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
from hubert_fast.pretrain.audio import resampled_length
from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.audio_folder import find_audio
from hubert_fast.pretrain.config import DataConfig
from hubert_fast.pretrain.file_state import FileState, file_state
from hubert_fast.pretrain.frames import SAMPLE_RATE, num_frames
from hubert_fast.pretrain.manifest import SPLITS, Manifest, Recordings, manifest_path, write_manifest
from hubert_fast.pretrain.notices import not_looked_into, notice_counts, notices_of, printable, unused_alignments
from hubert_fast.pretrain.probe import AudioInfo, probe
from hubert_fast.pretrain.progress import say
from hubert_fast.pretrain.run_summary import read_json
from hubert_fast.pretrain.splits import held_out_files

_FILES_AHEAD = 256
LONGEST_SECONDS = 60.0
"""longer recordings become several utterances"""


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
    """Decode every audio file below ``audio`` once, and write the manifest of the usable ones to ``out``; return its summary.

    Files that are unreadable, truncated, empty, shorter than ``min_seconds``, hold a NaN or an infinity or have channels
    that cancel are left out, counted, and listed with the reason in ``out/skipped.jsonl``, and so are folders that cannot
    be entered. Those that are taken though something is wrong with them, and alignments of no file, are listed in
    ``out/notices.jsonl``. A recording longer than ``longest_seconds`` becomes several utterances (see `manifest`).

    Held out are the files that ``audio/splits.json`` names (``{"valid": [relative path, ...]}``); without that file,
    those whose path hashes below ``valid_fraction``, and at least one file where there are two. A complete manifest
    made with the same settings is kept as it is (remove ``out`` to scan again).

    Args:
        config: its ``min_seconds``, ``channel`` and ``valid_fraction`` decide; as many threads decode as it has
            ``workers``, one where it has none.
        seed: varies which files are held out.
        forgotten: relative paths of files that are left out too.

    Raises:
        ValueError: no file is usable, or an alignment or ``splits.json`` is malformed.
    """
    audio, out = Path(audio).resolve(), Path(out)
    settings = {
        "audio": str(audio),
        "min_seconds": config.min_seconds,
        "channel": config.channel,
        "valid_fraction": config.valid_fraction,
        "seed": seed,
        "longest_seconds": longest_seconds,
    }
    done, tables = read_json(out / "summary.json"), [manifest_path(out, split) for split in SPLITS]
    if done is not None and done["settings"] == settings and all(path.is_file() for path in tables):
        return done
    (out / "summary.json").unlink(missing_ok=True)

    found, alignments = find_audio(audio), Alignments(audio)
    alignments.check(found.alignments)  # not after hours of decoding
    skipped = not_looked_into(audio, found)
    noticed = unused_alignments(audio, alignments.unused(found.alignments, found.files))
    usable = _probe_all(audio, found.files, config, forgotten, skipped, noticed, progress)
    for name, lines in {"skipped": skipped, "notices": noticed}.items():
        write_text(out / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    if not usable.paths:
        first = skipped[len(found.closed) + len(found.unread)]
        raise ValueError(
            f"audio={str(audio)!r}: none of its {len(found.files)} audio files is usable; the first, {first['path']}: "
            f"{first['reason']}. {out / 'skipped.jsonl'} lists all."
        )
    held_out = held_out_files(audio, usable.paths, config.valid_fraction, seed)
    manifests = {}
    options = {"longest_seconds": longest_seconds}
    for split, path, chosen in zip(SPLITS, tables, (~held_out, held_out)):
        manifests[split] = write_manifest(path, audio, usable, chosen, alignments.phones, **options)
    summary = _summary(settings, manifests, usable.numbers()[:, 0], len(skipped))
    summary |= {"closed_folders": len(found.closed), "notices": notice_counts(noticed)}
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    say(_said(summary, len({line["path"] for line in noticed})))
    return summary


def _said(summary: Mapping[str, Any], noticed: int) -> str:
    hours = sum(summary["hours"].values())
    length = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
    said = f"scan: {sum(summary['utterances'].values())} utterances, {length}; {summary['skipped']} files skipped"
    said += f", {noticed} with a notice (skipped.jsonl, notices.jsonl)" if noticed or summary["skipped"] else ""
    silent = summary["notices"]["silent"]
    return said + (f"; {silent} recordings are silent" if silent else "")


def _probe_all(
    audio: Path,
    files: list[str],
    config: DataConfig,
    forgotten: Collection[str],
    skipped: list[dict[str, str]],
    noticed: list[dict[str, str]],
    progress: bool,
) -> Recordings:
    """The recordings of usable files, in the order of ``files``; others go to ``skipped``, and remarks to ``noticed``."""
    usable = Recordings()
    seconds, began = 0.0, time.monotonic()

    def examine(relative: str) -> tuple[AudioInfo, FileState] | str:
        return "forgotten" if relative in forgotten else _examine(audio / relative, config)

    with tqdm(total=len(files), desc="scan", unit=" files", disable=not progress) as bar:
        for relative, result in _mapped(examine, files, config.workers):
            if isinstance(result, str):
                skipped.append({"path": printable(audio / relative), "reason": result})
            else:
                info, state = result
                options = {"state": state, "channel": info.channel, "plain": info.plain}
                usable.add(relative, rate=info.rate, samples=info.samples, **options)
                noticed.extend(notices_of(audio / relative, info))
                seconds += info.seconds
            bar.update()
            rate = seconds / (time.monotonic() - began)
            bar.set_postfix_str(f"{rate:.0f} audio-s/s, {len(skipped)} skipped", refresh=False)
    return usable


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


def _examine(path: Path, config: DataConfig) -> tuple[AudioInfo, FileState] | str:
    if printable(path) != str(path):
        return "the name of the file is not UTF-8"
    try:
        info, state = probe(path, config.channel), file_state(path)
    except AudioError as error:
        return error.reason
    except OSError as error:
        return f"unreadable ({error})"
    if info.seconds < config.min_seconds:
        return f"too short: {info.seconds:.3f} s, min_seconds is {config.min_seconds}"
    if num_frames(resampled_length(info.samples, info.rate)) == 0:
        return f"too short: {info.seconds:.3f} s is less than one frame of 0.025 s"
    return info, state


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
