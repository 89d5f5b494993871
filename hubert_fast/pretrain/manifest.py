"""From a folder of audio to a manifest: lhotse cuts of the utterances to train on and of those held out.

``summary.json`` is written last: a manifest directory with it is complete, one without it is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path
from typing import Any

from lhotse import AudioSource, CutSet, MonoCut, MultiCut, Recording
from lhotse.cut import Cut
from tqdm import tqdm

from hubert_fast.pretrain.alignments import Alignments
from hubert_fast.pretrain.atomic import write_text, write_with
from hubert_fast.pretrain.audio import resampled_length, utterance_samples
from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.audio_folder import find_audio
from hubert_fast.pretrain.config import DataConfig
from hubert_fast.pretrain.frames import SAMPLE_RATE, num_frames
from hubert_fast.pretrain.notices import not_looked_into, notice_counts, notices, printable
from hubert_fast.pretrain.probe import AudioInfo, probe
from hubert_fast.pretrain.run_summary import read_json
from hubert_fast.pretrain.splits import held_out_files

SPLITS = ("train", "valid")
LONGEST_SECONDS = 60.0
"""longer recordings become several cuts"""


def scan(
    audio: Path,
    out: Path,
    config: DataConfig,
    *,
    seed: int,
    longest_seconds: float = LONGEST_SECONDS,
    progress: bool = True,
) -> dict[str, Any]:
    """Decode every audio file below ``audio`` once and write the manifest of the usable ones to ``out``; returns its summary.

    Files that are unreadable, truncated, empty, shorter than ``min_seconds``, hold a NaN or an infinity or have channels
    that cancel are left out, counted, and listed with the reason in ``out/skipped.jsonl``, and so are folders that cannot
    be entered. Those that are taken though something is wrong with them are listed in ``out/notices.jsonl``. A recording
    longer than ``longest_seconds`` becomes several cuts of equal length. A cut's id is the file's path relative to
    ``audio``, suffix included, with ``#<number>`` for such a part.

    Held out are the files that ``audio/splits.json`` names (``{"valid": [relative path, ...]}``); without that file,
    those whose path hashes below ``valid_fraction``, and at least one file where there are two. A complete manifest
    made with the same settings is kept as it is (remove ``out`` to scan again).

    Args:
        config: its ``min_seconds``, ``channel`` and ``valid_fraction`` decide; as many threads decode as it has
            ``workers``, one where it has none.
        seed: varies which files are held out.

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
    done = read_json(out / "summary.json")
    if done is not None and done["settings"] == settings:
        return done
    (out / "summary.json").unlink(missing_ok=True)

    found = find_audio(audio)
    not_looked = not_looked_into(audio, found)
    usable, unusable = _probe_all(audio, found.files, config, progress)
    skipped, noticed = not_looked + unusable, notices(audio, usable)
    for name, lines in {"skipped": skipped, "notices": noticed}.items():
        write_text(out / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    if not usable:
        raise ValueError(
            f"audio={str(audio)!r}: none of its {len(found.files)} audio files is usable; the first, "
            f"{unusable[0]['path']}: {unusable[0]['reason']}. {out / 'skipped.jsonl'} lists all."
        )
    held_out = held_out_files(audio, list(usable), config.valid_fraction, seed)
    alignments = Alignments(audio)
    cuts: dict[str, list[Cut]] = {split: [] for split in SPLITS}
    for relative, info in usable.items():
        split = "valid" if relative in held_out else "train"
        cuts[split].extend(_cuts(audio, relative, info, alignments, longest_seconds))
    for split in SPLITS:
        write_with(out / f"{split}.jsonl.gz", CutSet.from_cuts(cuts[split]).to_file)
    summary = _summary(settings, cuts, usable.values(), len(skipped))
    summary |= {"closed_folders": len(found.closed), "notices": notice_counts(noticed)}
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def load_manifest(directory: Path, split: str) -> CutSet:
    """The cuts of ``split`` ("train" or "valid") of a manifest directory; it may have none.

    Raises:
        FileNotFoundError: there is no such manifest.
    """
    path = Path(directory) / f"{split}.jsonl.gz"
    if not path.is_file():
        raise FileNotFoundError(f"directory={str(directory)!r} holds no {path.name}: `hubert-fast scan` makes it")
    # An empty file tells lhotse nothing about the type of manifest it holds.
    return CutSet.from_cuts(CutSet.from_jsonl_lazy(path))


def fingerprint(cuts: Iterable[Cut]) -> str:
    """A hash of the utterances (ids, order and samples) and of their files as they are now (size and time of the last
    change): equal where units and features of one fit the other.

    A file that is gone has a state of its own: whoever reads the audio will say so.
    """
    digest = hashlib.sha256()
    states: dict[str, str] = {}  # several cuts may be of one file
    for cut in cuts:
        for source in cut.recording.sources:
            if source.source not in states:
                states[source.source] = _state(source.source)
            digest.update(f"{cut.id}\t{utterance_samples(cut)}\t{states[source.source]}\n".encode())
    return digest.hexdigest()


def _state(path: str) -> str:
    try:
        file = os.stat(path)
    except FileNotFoundError:
        return "gone"
    return f"{file.st_size} {file.st_mtime_ns}"


def _probe_all(
    audio: Path, files: list[str], config: DataConfig, progress: bool
) -> tuple[dict[str, AudioInfo], list[dict[str, str]]]:
    """What each usable file holds, and the others with the reason; both in the order of ``files``."""
    usable: dict[str, AudioInfo] = {}
    skipped: list[dict[str, str]] = []
    seconds, began = 0.0, time.monotonic()

    def examine(relative: str) -> AudioInfo | str:
        return _examine(audio / relative, config)

    bar = tqdm(total=len(files), desc="scan", unit=" files", disable=not progress)
    # libsndfile decodes without Python's lock, so threads are enough.
    with bar, ThreadPoolExecutor(max(1, config.workers)) as pool:
        for relative, result in zip(files, pool.map(examine, files), strict=True):
            if isinstance(result, str):
                skipped.append({"path": printable(audio / relative), "reason": result})
            else:
                usable[relative] = result
                seconds += result.seconds
            bar.update()
            rate = seconds / (time.monotonic() - began)
            bar.set_postfix_str(f"{rate:.0f} audio-s/s, {len(skipped)} skipped", refresh=False)
    return usable, skipped


def _examine(path: Path, config: DataConfig) -> AudioInfo | str:
    if printable(path) != str(path):
        return "the name of the file is not UTF-8"
    try:
        info = probe(path, config.channel)
    except AudioError as error:
        return error.reason
    if info.seconds < config.min_seconds:
        return f"too short: {info.seconds:.3f} s, min_seconds is {config.min_seconds}"
    if num_frames(resampled_length(info.samples, info.rate)) == 0:
        return f"too short: {info.seconds:.3f} s is less than one frame of 0.025 s"
    return info


def _cuts(audio: Path, relative: str, info: AudioInfo, alignments: Alignments, longest_seconds: float) -> Iterator[Cut]:
    channels = list(range(info.channels))
    taken = channels if info.channel is None else [info.channel]
    # Not Recording.from_file: it may ask another decoder for the number of samples.
    recording = Recording(
        id=relative,
        sources=[AudioSource(type="file", channels=channels, source=str(audio / relative))],
        sampling_rate=info.rate,
        num_samples=info.samples,
        duration=info.seconds,
    )
    parts = ceil(info.seconds / longest_seconds)
    for part in range(parts):
        first, last = info.samples * part // parts, info.samples * (part + 1) // parts
        start, duration = first / info.rate, (last - first) / info.rate
        cut_id = relative if parts == 1 else f"{relative}#{part:04d}"
        supervision = alignments.supervision(relative, cut_id=cut_id, start=start, duration=duration)
        kind = MonoCut if len(taken) == 1 else MultiCut
        yield kind(
            id=cut_id,
            start=start,
            duration=duration,
            channel=taken[0] if len(taken) == 1 else taken,
            recording=recording,
            supervisions=[] if supervision is None else [supervision],
            custom={"samples_16k": resampled_length(last - first, info.rate)},
        )


def _summary(
    settings: dict[str, Any], cuts: dict[str, list[Cut]], infos: Iterable[AudioInfo], skipped: int
) -> dict[str, Any]:
    """Summary of a scan: counts and seconds of audio by split, counts by sampling rate (Hz)."""
    seconds = {split: sum(map(utterance_samples, part)) / SAMPLE_RATE for split, part in cuts.items()}
    rates = Counter(info.rate for info in infos)
    supervisions = (supervision for part in cuts.values() for cut in part for supervision in cut.supervisions)
    return {
        "settings": settings,
        "utterances": {split: len(part) for split, part in cuts.items()},
        "seconds": seconds,
        "hours": {split: value / 3600 for split, value in seconds.items()},
        "sampling_rates": {str(rate): rates[rate] for rate in sorted(rates)},
        "skipped": skipped,
        "has_alignments": any(supervision.alignment for supervision in supervisions),
    }
