"""Evaluate an iteration: how much do units made from MFCC and from every layer of its model know about phones?

For each representation k-means is fitted on the training part and its units are scored on the held-out part against the
phone alignments (`phone_metrics`). Every representation gets the same number of clusters and the same frames, because
PNMI rises with the number of clusters and is comparable only at equal numbers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from hubert_fast.pretrain import atomic
from hubert_fast.pretrain.audio import load_audio, normalized, utterance_samples
from hubert_fast.pretrain.codebook import Codebook, fit_codebook
from hubert_fast.pretrain.config import EvaluationConfig
from hubert_fast.pretrain.features import MfccFeatures, all_layers, file_sha256, load_model
from hubert_fast.pretrain.frames import FRAMES_PER_SECOND, SAMPLE_RATE, num_frames, num_samples
from hubert_fast.pretrain.like_length import batches_of_like_length
from hubert_fast.pretrain.manifest import SPLITS, fingerprint, load_manifest
from hubert_fast.pretrain.phone_metrics import chance_pnmi, frame_phones, score_units
from hubert_fast.pretrain.progress import audio_progress
from hubert_fast.pretrain.run_summary import read_json, training_metrics
from hubert_fast.pretrain.units import Units

if TYPE_CHECKING:
    from lhotse.cut import Cut

MFCC = "mfcc"
TRAINING_UNITS = "training_units"
_BATCH_SECONDS = 60.0  # of a model call
_FIT_BYTES = 2 * 1024**3
_MIN_FRAMES_PER_CLUSTER = 20
_OVERSAMPLING = 4
_NO_ALIGNMENTS = "The held-out part has no phone alignments, so phone purity, cluster purity and PNMI are unknown."


def evaluate(
    iteration_dir: Path,
    manifest_dir: Path,
    config: EvaluationConfig,
    *,
    seed: int,
    device: str = "cpu",
    autocast: bool = True,
    normalize_audio: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Score an iteration on the held-out part and write ``iteration_dir/evaluation.json``.

    An evaluation that is there, made with the same settings of the same weights and utterances, is kept.

    Args:
        iteration_dir: ``RUN/iterationN``, trained: holds train/model.safetensors, train/metrics.jsonl and units/.
        manifest_dir: ``RUN/manifest``.
        config: how every representation is clustered (the training units keep their own clusters). k-means is fitted on
            fewer frames where all layers of them would fill more than 2 GiB.
        seed: of the choice of frames, of k-means and of the chance level.
        device: where the model runs.
        autocast: bfloat16 in the model.
        normalize_audio: the model was trained on utterances of zero mean and unit variance.
        progress: show progress bars.

    Returns:
        the content of evaluation.json: ``training`` (`Metrics.outcome`) and, where the held-out part has alignments,
        ``representations``: one object per representation with ``name`` ("mfcc", "layer1", ..., "training_units"),
        ``layer`` (0 for MFCC, None for the training units), ``clusters``, ``chance_pnmi`` and the fields of
        `PhoneScores`. Where it has none, ``representations`` is empty and ``note`` says why.
    """
    iteration_dir = Path(iteration_dir)
    target, weights = iteration_dir / "evaluation.json", iteration_dir / "train" / "model.safetensors"
    cuts = {split: list(load_manifest(manifest_dir, split)) for split in SPLITS}
    settings = {
        **dataclasses.asdict(config),
        "seed": seed,
        "autocast": autocast,
        "normalize_audio": normalize_audio,
        "weights_sha256": file_sha256(weights),
        "utterances_sha256": fingerprint([*cuts["train"], *cuts["valid"]]),
    }
    done = read_json(target)
    if done is not None and done["settings"] == settings:
        return done
    training = training_metrics(iteration_dir / "train").outcome()
    result: dict[str, Any] = {"settings": settings, "training": training, "representations": []}
    scored = [cut for cut in cuts["valid"] if phone_alignment(cut)]
    if scored:
        encode = _Encoder(weights, device=device, autocast=autocast, normalize_audio=normalize_audio)
        codebooks, fitted = _fit_codebooks(cuts["train"], encode, config, seed=seed, progress=progress)
        training_units = Units.load(iteration_dir / "units" / "valid.safetensors")
        result |= {"clusters": config.clusters, "fit_frames": fitted}
        result |= _held_out_scores(scored, encode, codebooks, training_units, seed=seed, progress=progress)
    else:
        result["note"] = _NO_ALIGNMENTS
    atomic.write_text(target, json.dumps(result, indent=2) + "\n")
    return result


def phone_alignment(cut: Cut) -> list[tuple]:
    """The phone items of a cut's supervisions, times in seconds from the start of the cut; empty without alignments."""
    return [
        (item.symbol, item.start, item.duration)
        for supervision in cut.supervisions
        for item in (supervision.alignment or {}).get("phone", [])
    ]


class _Encoder:
    """MFCC and every transformer layer of a batch of utterances."""

    def __init__(self, weights: Path, *, device: str, autocast: bool, normalize_audio: bool) -> None:
        self._model = load_model(weights).to(device).eval()
        self._mfcc = MfccFeatures()
        self._device, self._autocast, self._normalize = torch.device(device), autocast, normalize_audio

    def __call__(self, waveforms: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
        """float32 ``[frames, dim]`` per utterance, for each representation by name."""
        features = {MFCC: self._mfcc(waveforms)}
        if self._normalize:
            waveforms = [normalized(waveform) for waveform in waveforms]
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._autocast):
            layers = all_layers(self._model, waveforms, self._device)
        return features | {f"layer{number}": layer for number, layer in enumerate(layers, start=1)}


def _batches(cuts: Sequence[Cut], title: str, progress: bool) -> Iterator[tuple[list[Cut], list[np.ndarray]]]:
    """Cuts with their audio, utterances of like length together."""
    with audio_progress(sum(map(_seconds, cuts)), title, enabled=progress) as bar:
        samples = [utterance_samples(cut) for cut in cuts]
        for indices in batches_of_like_length(samples, _BATCH_SECONDS * SAMPLE_RATE):
            batch = [cuts[index] for index in indices]
            yield batch, [load_audio(cut) for cut in batch]
            bar.update(sum(map(_seconds, batch)))


def _seconds(cut: Cut) -> float:
    return utterance_samples(cut) / SAMPLE_RATE


def _fit_codebooks(
    cuts: list[Cut], encode: _Encoder, config: EvaluationConfig, *, seed: int, progress: bool
) -> tuple[dict[str, Codebook], int]:
    """A codebook per representation, and on how many frames each was fitted."""
    rng = np.random.default_rng(seed)
    fit_frames = _affordable_frames(config.fit_frames, encode, config.clusters)
    chosen, share = _choose_utterances(cuts, fit_frames, rng)
    kept: dict[str, list[np.ndarray]] = {}
    for _, waveforms in _batches(chosen, "features for k-means", progress):
        features = encode(waveforms)
        rows = [_choose_rows(len(utterance), share, rng) for utterance in features[MFCC]]
        for name, utterances in features.items():
            kept.setdefault(name, []).extend(utterance[row] for utterance, row in zip(utterances, rows, strict=True))
    fitted = sum(len(rows) for rows in kept.get(MFCC, []))
    codebooks = {}
    for name in tqdm(list(kept), desc="k-means", unit=" representations", disable=not progress):
        # Popped, so that the memory of a representation is free once it is clustered.
        features = np.concatenate(kept.pop(name))
        codebooks[name] = fit_codebook([features], config.clusters, seed=seed, init_attempts=config.init_attempts)
    return codebooks, fitted


def _affordable_frames(fit_frames: int, encode: _Encoder, clusters: int) -> int:
    one_frame = encode([np.zeros(num_samples(1), dtype=np.float32)])
    bytes_per_frame = sum(utterances[0].nbytes for utterances in one_frame.values())
    return min(fit_frames, max(_FIT_BYTES // bytes_per_frame, _MIN_FRAMES_PER_CLUSTER * clusters))


def _choose_utterances(cuts: list[Cut], fit_frames: int, rng: np.random.Generator) -> tuple[list[Cut], float]:
    """Random utterances with about four times the frames asked for, and the share of their frames to keep.

    Frames of one utterance resemble each other: a few from many utterances make a better codebook than all from a few.
    """
    chosen, frames = [], 0.0
    for index in rng.permutation(len(cuts)):
        if frames >= _OVERSAMPLING * fit_frames:
            break
        chosen.append(cuts[index])
        frames += _seconds(cuts[index]) * FRAMES_PER_SECOND
    return chosen, min(1.0, fit_frames / max(frames, 1.0))


def _choose_rows(frames: int, share: float, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.choice(frames, size=min(frames, int(np.ceil(frames * share))), replace=False))


def _held_out_scores(
    cuts: list[Cut],
    encode: _Encoder,
    codebooks: dict[str, Codebook],
    training_units: Units,
    *,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """What the result says of the held-out frames: how many there are, their phones, and how each one's units score."""
    phones: list[np.ndarray] = []
    units: dict[str, list[np.ndarray]] = {name: [] for name in [*codebooks, TRAINING_UNITS]}
    for batch, waveforms in _batches(cuts, "held-out units", progress):
        for name, utterances in encode(waveforms).items():
            units[name].extend(codebooks[name].assign(utterance) for utterance in utterances)
        for cut, waveform in zip(batch, waveforms, strict=True):
            frames = num_frames(len(waveform))
            phones.append(frame_phones(phone_alignment(cut), frames))
            units[TRAINING_UNITS].append(_units_of(training_units, cut.id, frames))
    spoken = np.concatenate(phones)
    symbols, counts = np.unique(spoken, return_counts=True)
    frequencies = {str(symbols[index]): int(counts[index]) for index in np.argsort(-counts, kind="stable")}
    clusters = {name: len(codebook.centroids) for name, codebook in codebooks.items()}
    clusters[TRAINING_UNITS] = training_units.num_classes
    representations = []
    for name, utterances in units.items():
        heard = np.concatenate(utterances)
        scores = dataclasses.asdict(score_units(spoken, heard)) | {"chance_pnmi": chance_pnmi(spoken, heard, seed=seed)}
        representations.append({"name": name, "layer": _layer_number(name), "clusters": clusters[name]} | scores)
    return {
        "utterances": len(cuts),
        "frames": len(spoken),
        "phone_frames": frequencies,
        "representations": representations,
    }


def _units_of(units: Units, cut_id: str, frames: int) -> np.ndarray:
    found = units[cut_id]
    if len(found) != frames:
        raise ValueError(
            f"the units of utterance {cut_id!r} have {len(found)} frames, its audio has {frames}: "
            "units/valid.safetensors was made from another version of the audio; delete it to have it made anew"
        )
    return found


def _layer_number(name: str) -> int | None:
    if name == TRAINING_UNITS:
        return None
    return 0 if name == MFCC else int(name.removeprefix("layer"))
