"""Evaluate an iteration: how much do units made from MFCC and from every layer of its model know about phones?

For each representation k-means is fitted on the training part and its units are scored on the held-out part against the
phone alignments (`phone_metrics`). Every representation gets the same number of clusters and the same frames, because
PNMI rises with the number of clusters and is comparable only at equal numbers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from hubert_fast.pretrain import atomic
from hubert_fast.pretrain.audio import load_audio
from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.codebook import Codebook, fit_codebook
from hubert_fast.pretrain.config import EvaluationConfig, IterationConfig, PretrainConfig
from hubert_fast.pretrain.features import MfccFeatures, ModelLayers, file_sha256
from hubert_fast.pretrain.forget import not_forgotten
from hubert_fast.pretrain.frames import FRAMES_PER_SECOND, SAMPLE_RATE, num_frames, num_samples
from hubert_fast.pretrain.left_out import LeftOut
from hubert_fast.pretrain.like_length import batches_of_like_length
from hubert_fast.pretrain.manifest import SPLITS, Manifest, load_manifest
from hubert_fast.pretrain.phone_metrics import chance_pnmi, frame_phones, score_units
from hubert_fast.pretrain.progress import audio_progress
from hubert_fast.pretrain.run_summary import read_json, training_metrics
from hubert_fast.pretrain.units import Units

_FIT_BYTES = 2 * 1024**3
_MIN_FRAMES_PER_CLUSTER = 20
_OVERSAMPLING = 4
_UNKNOWN = "so phone purity, cluster purity and PNMI are unknown."
_NO_ALIGNMENTS = f"The held-out part has no phone alignments, {_UNKNOWN}"
_NO_AUDIO = f"Of the training or the held-out part no utterance that counts could be read, {_UNKNOWN}"


class Representation(NamedTuple):
    """Features that units are made from: MFCC or a layer of the model; or the units that the model was trained on."""

    name: str
    layer: int | None  # 0: MFCC; None: the training units


MFCC = Representation("mfcc", 0)
TRAINING_UNITS = Representation("training_units", None)


class Encoder:
    """MFCC and every layer of a model."""

    def __init__(self, layers: ModelLayers) -> None:
        self._layers, self._mfcc = layers, MfccFeatures()
        self.call_seconds = layers.call_seconds

    def features(self, waveforms: list[np.ndarray]) -> dict[Representation, list[np.ndarray]]:
        """float32 ``[frames, dim]`` of each utterance."""
        layers = enumerate(self._layers(waveforms), start=1)
        return {MFCC: self._mfcc(waveforms)} | {_of_layer(n): utterances for n, utterances in layers}

    def units(
        self, waveforms: list[np.ndarray], codebooks: Mapping[Representation, Codebook]
    ) -> dict[Representation, list[np.ndarray]]:
        """int32 ``[frames]`` of each utterance: the nearest centroids of its features."""
        of_layers = {each.layer: codebook for each, codebook in codebooks.items() if each != MFCC}
        layers = self._layers.assign(waveforms, of_layers)
        mfcc = self._mfcc.assign(waveforms, codebooks[MFCC])
        return {MFCC: mfcc} | {_of_layer(n): utterances for n, utterances in layers.items()}


def _of_layer(number: int) -> Representation:
    return Representation(f"layer{number}", number)


def evaluate(
    iteration_dir: Path,
    manifest_dir: Path,
    config: PretrainConfig,
    iteration: IterationConfig,  # of config
    *,
    device: str | torch.device = "cpu",
    forgotten: Collection[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Score an iteration on the held-out part and write ``iteration_dir/evaluation.json``.

    An evaluation that is there, made with the same settings of the same weights and utterances, is kept.

    Args:
        iteration_dir: ``RUN/iterationN``, trained: holds train/model.safetensors, train/metrics.jsonl and units/.
        manifest_dir: ``RUN/manifest``.
        config: ``config.evaluation`` says how every representation is clustered (the training units keep their own
            clusters). k-means is fitted on fewer frames where all layers of them would fill more than 2 GiB.
        device: where the model runs.
        forgotten: paths of recordings that take no part.
        progress: show progress bars.

    Returns:
        the content of evaluation.json: ``training`` (`Metrics.outcome`) and, where the held-out part has alignments,
        ``representations``: one object per representation with ``name`` ("mfcc", "layer1", ..., "training_units"),
        ``layer`` (0 for MFCC, None for the training units), ``clusters``, ``chance_pnmi`` and the fields of
        `PhoneScores`. Where it has none, ``representations`` is empty and ``note`` says why. ``left_out``: ids and reasons of
        utterances whose audio could not be read.

    Raises:
        TooManyBadUtterancesError: too much audio changed or vanished since the scan.
    """
    iteration_dir = Path(iteration_dir)
    target, weights = iteration_dir / "evaluation.json", iteration_dir / "train" / "model.safetensors"
    manifests = {split: load_manifest(manifest_dir, split) for split in SPLITS}
    model = {"autocast": config.autocast, "normalize_audio": config.data_of(iteration).normalize_audio}
    settings = {
        **dataclasses.asdict(config.evaluation),
        "seed": config.seed,
        **model,
        "weights_sha256": file_sha256(weights),
        **{f"{split}_sha256": manifest.sha256 for split, manifest in manifests.items()},
        "forgotten": sorted(forgotten),
    }
    done = read_json(target)
    if done is not None and done["settings"] == settings:
        return done
    training = training_metrics(iteration_dir / "train").outcome()
    left_out = LeftOut(sum(map(len, manifests.values())), config.data.max_bad_utterances, may_be_empty=True)
    result: dict[str, Any] = {"settings": settings, "training": training, "representations": []}
    audio = {
        split: _Audio(manifest, not_forgotten(manifest, forgotten), left_out, progress)
        for split, manifest in manifests.items()
    }
    scored = audio["valid"].where(manifests["valid"].has_phones)
    if len(scored.indices):
        encoder = Encoder(ModelLayers(weights, device=device, **model))
        codebooks, fitted = _fit_codebooks(audio["train"], encoder, config.evaluation, seed=config.seed)
        training_units = Units(iteration_dir / "units" / "valid.safetensors")
        result |= {"clusters": config.evaluation.clusters, "fit_frames": fitted}
        result |= _held_out_scores(scored, encoder, codebooks, training_units, seed=config.seed) if codebooks else {}
    if not result["representations"]:
        result["note"] = _NO_AUDIO if len(scored.indices) else _NO_ALIGNMENTS
    result["left_out"] = {utterance: bad.reason for utterance, bad in left_out.bad.items()}
    atomic.write_text(target, json.dumps(result, indent=2) + "\n")
    return result


@dataclasses.dataclass(frozen=True)
class _Audio:
    """Utterances of a split, and how they are read."""

    manifest: Manifest
    indices: np.ndarray  # int64
    left_out: LeftOut
    progress: bool

    def where(self, wanted: np.ndarray) -> _Audio:
        """Those for which ``wanted``, bool for each of the manifest, is true."""
        return dataclasses.replace(self, indices=self.indices[wanted[self.indices]])

    def batches(self, seconds: float, title: str) -> Iterator[tuple[list[int], list[np.ndarray]]]:
        """Utterances that can be read, by index, and their audio; those of like length together, ``seconds`` at a time."""
        samples = self.manifest.samples[self.indices]
        with audio_progress(samples.sum() / SAMPLE_RATE, title, enabled=self.progress) as bar:
            for rows in batches_of_like_length(samples, seconds * SAMPLE_RATE):
                read, bad = {}, {}
                for index in self.indices[rows].tolist():
                    try:
                        read[index] = load_audio(self.manifest[index])
                    except AudioError as error:
                        bad[self.manifest.id(index)] = error.reason
                self.left_out.add(bad)
                if read:
                    yield list(read), list(read.values())
                bar.update(samples[rows].sum() / SAMPLE_RATE)


def _fit_codebooks(
    audio: _Audio, encoder: Encoder, config: EvaluationConfig, *, seed: int
) -> tuple[dict[Representation, Codebook], int]:
    """A codebook per representation, none where nothing can be read, and on how many frames each was fitted."""
    rng = np.random.default_rng(seed)
    fit_frames = _affordable_frames(config.fit_frames, encoder, config.clusters)
    chosen, share = _choose_utterances(audio, fit_frames, rng)
    kept: dict[Representation, list[np.ndarray]] = {}
    for _, waveforms in chosen.batches(encoder.call_seconds, "features for k-means"):
        features = encoder.features(waveforms)
        rows = [_choose_rows(len(utterance), share, rng) for utterance in features[MFCC]]
        for each, utterances in features.items():
            kept.setdefault(each, []).extend(utterance[row] for utterance, row in zip(utterances, rows, strict=True))
    fitted = sum(map(len, kept.get(MFCC, ())))
    codebooks = {}
    for each in tqdm(list(kept), desc="k-means", unit=" representations", disable=not audio.progress):
        # Popped, so that the memory of a representation is free once it is clustered.
        features = np.concatenate(kept.pop(each))
        codebooks[each] = fit_codebook(features, config.clusters, seed=seed, init_attempts=config.init_attempts)
    return codebooks, fitted


def _affordable_frames(fit_frames: int, encoder: Encoder, clusters: int) -> int:
    one_frame = encoder.features([np.zeros(num_samples(1), dtype=np.float32)])
    bytes_per_frame = sum(utterances[0].nbytes for utterances in one_frame.values())
    return min(fit_frames, max(_FIT_BYTES // bytes_per_frame, _MIN_FRAMES_PER_CLUSTER * clusters))


def _choose_utterances(audio: _Audio, fit_frames: int, rng: np.random.Generator) -> tuple[_Audio, float]:
    """Random utterances with about four times the frames asked for, and the share of their frames to keep.

    Frames of one utterance resemble each other: a few from many utterances make a better codebook than all from a few.
    """
    order = audio.indices[rng.permutation(len(audio.indices))]
    frames = audio.manifest.samples[order] / SAMPLE_RATE * FRAMES_PER_SECOND
    chosen = np.cumsum(frames) - frames < _OVERSAMPLING * fit_frames
    share = min(1.0, fit_frames / max(float(frames[chosen].sum()), 1.0))
    return dataclasses.replace(audio, indices=order[chosen]), share


def _choose_rows(frames: int, share: float, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.choice(frames, size=min(frames, int(np.ceil(frames * share))), replace=False))


def _held_out_scores(
    audio: _Audio, encoder: Encoder, codebooks: dict[Representation, Codebook], training_units: Units, *, seed: int
) -> dict[str, Any]:
    """The held-out part of the result: how many frames there are, their phones, and how the units of each score.

    Nothing where none can be read.
    """
    phones: list[np.ndarray] = []
    units: dict[Representation, list[np.ndarray]] = {each: [] for each in [*codebooks, TRAINING_UNITS]}
    of_training = dict(_training_units(audio, training_units))
    scored = dataclasses.replace(audio, indices=np.array(sorted(of_training), dtype=np.int64))
    utterances = 0
    for indices, waveforms in scored.batches(encoder.call_seconds, "held-out units"):
        utterances += len(indices)
        for each, found in encoder.units(waveforms, codebooks).items():
            units[each].extend(found)
        for index, waveform in zip(indices, waveforms, strict=True):
            phones.append(frame_phones(audio.manifest.phones(index), num_frames(len(waveform))))
            units[TRAINING_UNITS].append(of_training[index])
    if not phones:
        return {}
    spoken = np.concatenate(phones)
    symbols, counts = np.unique(spoken, return_counts=True)
    frequencies = {str(symbols[index]): int(counts[index]) for index in np.argsort(-counts, kind="stable")}
    clusters = {each: len(codebook.centroids) for each, codebook in codebooks.items()}
    clusters[TRAINING_UNITS] = training_units.num_classes
    representations = []
    for each, found in units.items():
        heard = np.concatenate(found)
        scores = dataclasses.asdict(score_units(spoken, heard)) | {"chance_pnmi": chance_pnmi(spoken, heard, seed=seed)}
        representations.append({**each._asdict(), "clusters": clusters[each]} | scores)
    return {
        "utterances": utterances,
        "frames": len(spoken),
        "phone_frames": frequencies,
        "representations": representations,
    }


def _training_units(audio: _Audio, units: Units) -> Iterator[tuple[int, np.ndarray]]:
    """The utterances of ``audio`` that the model was validated on, with their units."""
    places = units.places_in(audio.manifest)
    rows = np.flatnonzero(units.known & (places >= 0))
    of_place = dict(zip(places[rows].tolist(), rows.tolist()))
    for index in audio.indices.tolist():
        if index in of_place:
            yield index, units[of_place[index]]
