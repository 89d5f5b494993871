"""Units: the cluster of every frame of every utterance, which an iteration learns to predict."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from lhotse.cut import Cut
from safetensors import safe_open
from safetensors.numpy import save_file

from hubert_fast.pretrain.atomic import write_text, write_with
from hubert_fast.pretrain.audio import load_audio, utterance_samples
from hubert_fast.pretrain.codebook import Codebook, fit_codebook
from hubert_fast.pretrain.config import UnitsConfig
from hubert_fast.pretrain.features import FeatureSource
from hubert_fast.pretrain.frames import SAMPLE_RATE, num_frames
from hubert_fast.pretrain.manifest import SPLITS, fingerprint, load_manifest
from hubert_fast.pretrain.progress import audio_progress
from hubert_fast.pretrain.run_summary import read_json
from hubert_fast.pretrain.tensor_files import naming

# Calls of the source whose audio is read ahead and handed over at once, so that it can batch utterances of like length.
_CALLS_AHEAD = 4


class Units:
    """The units of a split, ``units/<split>.safetensors``.

    They are read from disk when they are asked for: workers share the pages of one mapped file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self._file: Any = None
        self._file_owner = 0
        if not self._path.is_file():
            raise FileNotFoundError(f"there are no units at {str(path)!r}: `hubert-fast units` makes them")
        metadata = self._open().metadata() or {}
        if "num_classes" not in metadata:
            raise ValueError(f"path={str(path)!r} is no file of units: it lacks the metadata num_classes")
        self.num_classes = int(metadata["num_classes"])
        self.ids = list(self._open().keys())

    def __getitem__(self, cut_id: str) -> np.ndarray:
        """int32 ``[frames]`` of an utterance; KeyError names an utterance that has none."""
        try:
            return self._open().get_tensor(cut_id)
        except Exception as error:
            raise KeyError(f"{self._path} holds no units for utterance {cut_id!r}") from error

    def frames(self, cut_id: str) -> int:
        """Number of frames of an utterance, without reading them."""
        return self._open().get_slice(cut_id).get_shape()[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def _open(self) -> Any:
        # A forked worker must not share the parent's handle.
        if self._file is None or self._file_owner != os.getpid():
            with naming(self._path):
                self._file = safe_open(self._path, framework="numpy")
            self._file_owner = os.getpid()
        return self._file


def make_units(
    manifest_dir: Path,
    source: FeatureSource,
    config: UnitsConfig,
    out: Path,
    *,
    seed: int,
    workers: int = 2,
    progress: bool = True,
) -> None:
    """Fit a codebook on a random part of the training utterances and write the units of all: codebook.safetensors,
    train.safetensors, valid.safetensors and, last, summary.json into ``out``.

    Units that are there, made with the same settings from the same utterances, are kept. At no time are more features
    in memory than the ``config.fit_frames`` that k-means needs, and some minutes of audio.

    Args:
        seed: decides the utterances that k-means sees, and its start.
        workers: threads that read audio ahead.

    Raises:
        ValueError: there are fewer frames than clusters.
        AudioError: audio changed or vanished since the scan, or is not finite.
    """
    out = Path(out)
    cuts = {split: list(load_manifest(manifest_dir, split)) for split in SPLITS}
    settings = {
        **dataclasses.asdict(config),
        **source.settings,
        "seed": seed,
        "utterances_sha256": fingerprint([*cuts["train"], *cuts["valid"]]),
    }
    names = ["codebook.safetensors", *(f"{split}.safetensors" for split in SPLITS)]
    done = read_json(out / "summary.json")
    if done is not None and done["settings"] == settings and all((out / name).is_file() for name in names):
        return
    (out / "summary.json").unlink(missing_ok=True)

    chosen = choose_utterances(cuts["train"], config.fit_frames, seed)
    data, fitted = _features_together(chosen, source, workers, progress)
    codebook = fit_codebook(data, config.clusters, seed=seed, init_attempts=config.init_attempts)
    inertia, fit_frames = codebook.inertia(data), len(data)
    made_of = {"source": source.name, "layer": config.layer, "clusters": config.clusters}
    codebook.save(out / "codebook.safetensors", **made_of, seed=seed, inertia=inertia)

    units = {cut_id: codebook.assign(features) for cut_id, features in fitted.items()}
    del data, fitted
    rest = [cut for split in SPLITS for cut in cuts[split] if cut.id not in units]
    units |= _made(rest, source, workers, progress, codebook)
    for split in SPLITS:
        of_split, metadata = {cut.id: units[cut.id] for cut in cuts[split]}, {"num_classes": str(config.clusters)}
        write_with(out / f"{split}.safetensors", partial(save_file, of_split, metadata=metadata))
    train = np.concatenate([units[cut.id] for cut in cuts["train"]])
    summary = {
        "settings": settings,
        "source": source.name,
        "clusters": config.clusters,
        "dim": source.dim,
        "frames": {split: sum(len(units[cut.id]) for cut in cuts[split]) for split in SPLITS},
        "fit_frames": fit_frames,
        "inertia": inertia,
        **_usage(train, config.clusters),
    }
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")


def choose_utterances(cuts: Sequence[Cut], frames: int, seed: int) -> list[Cut]:
    """Random utterances, in the order of ``cuts``, with ``frames`` frames or (the last is taken whole) a few more."""
    if not cuts:
        raise ValueError("the manifest holds no training utterance to make units from")
    chosen, total = [], 0
    for index in np.random.default_rng(seed).permutation(len(cuts)):
        if total >= frames:
            break
        chosen.append(index)
        total += num_frames(utterance_samples(cuts[index]))
    return [cuts[index] for index in sorted(chosen)]


def _features_together(
    cuts: Sequence[Cut], source: FeatureSource, workers: int, progress: bool
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Features of all cuts in one array, float32 ``[frames of all, dim]``, and each cut's rows of it by id (views)."""
    data = np.empty((sum(num_frames(utterance_samples(cut)) for cut in cuts), source.dim), dtype=np.float32)
    views: dict[str, np.ndarray] = {}
    first = 0
    for cut_id, features in _made(cuts, source, workers, progress):
        views[cut_id] = data[first : first + len(features)]
        views[cut_id][:] = features
        first += len(features)
    return data, views


def _made(
    cuts: Sequence[Cut], source: FeatureSource, workers: int, progress: bool, codebook: Codebook | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Id and features ``[frames, dim]`` of every cut or, with a codebook, its units ``[frames]``."""
    what, width, title = "features", (source.dim,), "features for k-means"
    if codebook is not None:
        what, width, title = "units", (), "units"
    seconds = sum(utterance_samples(cut) for cut in cuts) / SAMPLE_RATE
    with audio_progress(seconds, title, enabled=progress) as bar:
        for group, waveforms in _read_ahead(cuts, _CALLS_AHEAD * source.call_seconds, workers):
            made = source(waveforms) if codebook is None else source.assign(waveforms, codebook)
            for cut, each in zip(group, made, strict=True):
                frames = num_frames(utterance_samples(cut))
                if each.shape != (frames, *width):
                    raise ValueError(
                        f"source {source.name!r} made {what} of shape {each.shape} for utterance {cut.id!r}, "
                        f"whose audio has {frames} frames: {(frames, *width)} is accepted"
                    )
                yield cut.id, each
            bar.update(sum(len(waveform) for waveform in waveforms) / SAMPLE_RATE)


def _read_ahead(cuts: Sequence[Cut], seconds: float, workers: int) -> Iterator[tuple[list[Cut], list[np.ndarray]]]:
    """Groups of cuts, ``seconds`` each, with their waveforms; the next group is read while the caller works on this one."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        reading = ((group, [pool.submit(load_audio, cut) for cut in group]) for group in _groups(cuts, seconds))
        ahead = next(reading, None)
        while ahead is not None:
            (group, futures), ahead = ahead, next(reading, None)
            yield group, [future.result() for future in futures]


def _groups(cuts: Sequence[Cut], seconds: float) -> Iterator[list[Cut]]:
    group, samples = [], 0
    for cut in cuts:
        group.append(cut)
        samples += utterance_samples(cut)
        if samples >= seconds * SAMPLE_RATE:
            yield group
            group, samples = [], 0
    if group:
        yield group


def _usage(units: np.ndarray, clusters: int) -> dict[str, float]:
    """How evenly the clusters are used: perplexity is 2 to the entropy, at most ``clusters``; and the most frequent one's
    share of the frames, which is the accuracy of always naming it.
    """
    shares = np.bincount(units, minlength=clusters) / len(units)
    entropy = float(scipy.stats.entropy(shares, base=2))
    return {
        "units_used": int((shares > 0).sum()),
        "entropy_bits": entropy,
        "perplexity": 2.0**entropy,
        "commonest_share": float(shares.max()),
    }
