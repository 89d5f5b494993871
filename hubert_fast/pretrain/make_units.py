"""Make units: cluster features of a part of the training utterances, then name the nearest cluster of every frame of all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hubert_fast.pretrain.atomic import write_text
from hubert_fast.pretrain.audio import load_audio
from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.codebook import Codebook, fit_codebook
from hubert_fast.pretrain.config import UnitsConfig
from hubert_fast.pretrain.features import FeatureSource
from hubert_fast.pretrain.forget import not_forgotten
from hubert_fast.pretrain.frames import SAMPLE_RATE, num_frames
from hubert_fast.pretrain.left_out import LeftOut, write_left_out
from hubert_fast.pretrain.manifest import SPLITS, Manifest, load_manifest
from hubert_fast.pretrain.progress import audio_progress, say
from hubert_fast.pretrain.run_summary import read_json
from hubert_fast.pretrain.unit_usage import require_variety, unit_usage, weakness_of
from hubert_fast.pretrain.units import new_units

# Calls of the source whose audio is read ahead and handed over at once, so that it can batch utterances of like length.
_CALLS_AHEAD = 4


@dataclasses.dataclass
class _Reading:
    """How audio is read, and what is done about what cannot be."""

    left_out: LeftOut
    workers: int
    progress: bool


def make_units(
    manifest_dir: Path,
    source: FeatureSource,
    config: UnitsConfig,
    out: Path,
    *,
    seed: int,
    max_bad_utterances: float = 0.0,
    forgotten: Collection[str] = (),
    trained: bool = False,
    workers: int = 2,
    progress: bool = True,
) -> None:
    """Fit a codebook on a random part of the training utterances and write the units of all: codebook.safetensors,
    train.safetensors, valid.safetensors, left_out.jsonl and, last, summary.json into ``out``.

    Units that are there, made with the same settings from the same utterances, are kept. At no time are more features
    in memory than the ``config.fit_frames`` that k-means needs, and some minutes of audio.

    Args:
        seed: decides the utterances that k-means sees, and its start.
        max_bad_utterances: share of the utterances whose audio may be unreadable; they have no units.
        forgotten: paths of recordings that get no units.
        trained: a model was trained on the units that are there, which are kept though the manifest was made anew.
        workers: threads that read audio ahead.

    Raises:
        ValueError: there are fewer frames than clusters.
        DegenerateUnitsError: nearly all frames have the same unit.
        TooManyBadUtterancesError: too much audio changed or vanished since the scan, or is not finite.
    """
    out = Path(out)
    manifests = {split: load_manifest(manifest_dir, split) for split in SPLITS}
    of_settings = {**dataclasses.asdict(config), **source.settings, "seed": seed}
    settings = {**of_settings, **{f"{split}_sha256": manifest.sha256 for split, manifest in manifests.items()}}
    names = ["codebook.safetensors", *(f"{split}.safetensors" for split in SPLITS)]
    done = read_json(out / "summary.json")
    if done is not None and all((out / name).is_file() for name in names):
        if done["settings"] == settings or (trained and done["settings"].items() >= of_settings.items()):
            return
    (out / "summary.json").unlink(missing_ok=True)

    total = sum(map(len, manifests.values()))
    reading = _Reading(LeftOut(total, max_bad_utterances), workers, progress)
    wanted = {split: not_forgotten(manifest, forgotten) for split, manifest in manifests.items()}
    chosen = choose_utterances(manifests["train"].samples, wanted["train"], config.fit_frames, seed)
    data, fitted = _features_together(manifests["train"], chosen, source, reading)
    codebook = fit_codebook(data, config.clusters, seed=seed, init_attempts=config.init_attempts)
    inertia, fit_frames = codebook.inertia(data), len(data)
    made_of = {"source": source.name, "layer": config.layer, "clusters": config.clusters}
    codebook.save(out / "codebook.safetensors", **made_of, seed=seed, inertia=inertia)
    done_already = {index: codebook.assign(features) for index, features in fitted.items()}
    del data, fitted
    counted = np.bincount(np.concatenate([*done_already.values()]), minlength=config.clusters)
    require_variety(unit_usage(counted, config.clusters), config.min_perplexity)

    frames, counts = {}, {}
    for split, manifest in manifests.items():
        with new_units(out / f"{split}.safetensors", manifest, config.clusters) as units:
            for index, found in done_already.items() if split == "train" else ():
                units.put(index, found)
            rest = np.setdiff1d(wanted[split], chosen) if split == "train" else wanted[split]
            for index, found in _made(manifest, rest, source, reading, codebook):
                units.put(index, found)
            frames[split], counts[split] = int(units.counts.sum()), units.counts
    usage = unit_usage(counts["train"], config.clusters)
    require_variety(usage, config.min_perplexity)
    if (weakness := weakness_of(usage)) is not None:
        say(f"warning: {weakness}")
    write_left_out(out, reading.left_out)
    summary = {
        "settings": settings,
        "source": source.name,
        "dim": source.dim,
        "frames": frames,
        "fit_frames": fit_frames,
        "inertia": inertia,
        **usage,
    }
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")


def choose_utterances(samples: np.ndarray, wanted: np.ndarray, frames: int, seed: int) -> np.ndarray:
    """Random utterances of ``wanted``, in its order, with ``frames`` frames or (the last is taken whole) a few more.

    Args:
        samples: of each utterance of the split, at 16 kHz.
        wanted: int64, indices into ``samples``.
    """
    if not len(wanted):
        raise ValueError("the manifest holds no training utterance to make units from")
    order = np.random.default_rng(seed).permutation(len(wanted))
    before = np.cumsum(num_frames(samples[wanted[order]])) - num_frames(samples[wanted[order]])
    return wanted[np.sort(order[before < frames])]


def _features_together(
    manifest: Manifest, indices: np.ndarray, source: FeatureSource, reading: _Reading
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Features of all utterances that can be read in one array, float32 ``[frames of all, dim]``, and each one's rows of it by
    index (views).
    """
    data = np.empty((int(num_frames(manifest.samples[indices]).sum()), source.dim), dtype=np.float32)
    views: dict[int, np.ndarray] = {}
    first = 0
    for index, features in _made(manifest, indices, source, reading):
        views[index] = data[first : first + len(features)]
        views[index][:] = features
        first += len(features)
    return data[:first], views


def _made(
    manifest: Manifest, indices: np.ndarray, source: FeatureSource, reading: _Reading, codebook: Codebook | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Index and features ``[frames, dim]`` of every utterance that can be read or, with a codebook, its units ``[frames]``."""
    what, width, title = "features", (source.dim,), "features for k-means"
    if codebook is not None:
        what, width, title = "units", (), f"units of {manifest.path.stem}"
    with audio_progress(manifest.samples[indices].sum() / SAMPLE_RATE, title, enabled=reading.progress) as bar:
        for group, waveforms in _read_ahead(manifest, indices, _CALLS_AHEAD * source.call_seconds, reading):
            made = source(waveforms) if codebook is None else source.assign(waveforms, codebook)
            for index, waveform, each in zip(group, waveforms, made, strict=True):
                frames = num_frames(len(waveform))
                if each.shape != (frames, *width):
                    raise ValueError(
                        f"source {source.name!r} made {what} of shape {each.shape} for utterance {manifest.id(index)!r}, "
                        f"whose audio has {frames} frames: {(frames, *width)} is accepted"
                    )
                yield index, each
            bar.update(sum(map(len, waveforms)) / SAMPLE_RATE)


def _read_ahead(
    manifest: Manifest, indices: np.ndarray, seconds: float, reading: _Reading
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Groups of utterances, ``seconds`` each, with the waveforms of those that can be read; the next group is read while the
    caller works on this one.
    """

    def begin(group: list[int]) -> list[tuple[int, Future[np.ndarray]]]:
        return [(index, pool.submit(load_audio, manifest[index])) for index in group]

    with ThreadPoolExecutor(max(1, reading.workers)) as pool:
        begun = (begin(group) for group in _groups(manifest.samples, indices, seconds))
        ahead = next(begun, None)
        while ahead is not None:
            current, ahead = ahead, next(begun, None)
            read: dict[int, np.ndarray] = {}
            bad: dict[str, str] = {}
            for index, future in current:
                try:
                    read[index] = future.result()
                except AudioError as error:
                    bad[manifest.id(index)] = error.reason
            reading.left_out.add(bad)
            if read:
                yield list(read), list(read.values())


def _groups(samples: np.ndarray, indices: np.ndarray, seconds: float) -> Iterator[list[int]]:
    group, total = [], 0
    for index in indices.tolist():
        group.append(index)
        total += int(samples[index])
        if total >= seconds * SAMPLE_RATE:
            yield group
            group, total = [], 0
    if group:
        yield group
