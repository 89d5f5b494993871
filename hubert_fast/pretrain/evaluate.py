"""Evaluate an iteration: how much do units made from MFCC and from every layer of its model know about phones?

For each representation k-means is fitted on the training part and its units are scored on the held-out part against the
phone alignments (`phone_metrics`). Every representation gets the same number of clusters and the same frames, because
PNMI rises with the number of clusters and is comparable only at equal numbers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from hubert_fast.pretrain import atomic
from hubert_fast.pretrain.audio import load_audio, utterance_samples
from hubert_fast.pretrain.codebook import Codebook, fit_codebook
from hubert_fast.pretrain.config import EvaluationConfig, IterationConfig, PretrainConfig
from hubert_fast.pretrain.features import MfccFeatures, ModelLayers, file_sha256
from hubert_fast.pretrain.frames import FRAMES_PER_SECOND, SAMPLE_RATE, num_frames, num_samples
from hubert_fast.pretrain.like_length import batches_of_like_length
from hubert_fast.pretrain.manifest import SPLITS, fingerprint, load_manifest
from hubert_fast.pretrain.phone_metrics import chance_pnmi, frame_phones, score_units
from hubert_fast.pretrain.progress import audio_progress
from hubert_fast.pretrain.run_summary import read_json, training_metrics
from hubert_fast.pretrain.units import Units

if TYPE_CHECKING:
    from lhotse.cut import Cut

_FIT_BYTES = 2 * 1024**3
_MIN_FRAMES_PER_CLUSTER = 20
_OVERSAMPLING = 4
_NO_ALIGNMENTS = "The held-out part has no phone alignments, so phone purity, cluster purity and PNMI are unknown."


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
    model = {"autocast": config.autocast, "normalize_audio": config.data_of(iteration).normalize_audio}
    settings = {
        **dataclasses.asdict(config.evaluation),
        "seed": config.seed,
        **model,
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
        options = {"seed": config.seed, "progress": progress}
        encoder = Encoder(ModelLayers(weights, device=device, **model))
        codebooks, fitted = _fit_codebooks(cuts["train"], encoder, config.evaluation, **options)
        training_units = Units(iteration_dir / "units" / "valid.safetensors")
        result |= {"clusters": config.evaluation.clusters, "fit_frames": fitted}
        result |= _held_out_scores(scored, encoder, codebooks, training_units, **options)
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


def _batches(
    cuts: Sequence[Cut], seconds: float, title: str, progress: bool
) -> Iterator[tuple[list[Cut], list[np.ndarray]]]:
    """Cuts with their audio, utterances of like length together, ``seconds`` at a time."""
    with audio_progress(sum(map(_seconds, cuts)), title, enabled=progress) as bar:
        samples = [utterance_samples(cut) for cut in cuts]
        for indices in batches_of_like_length(samples, seconds * SAMPLE_RATE):
            batch = [cuts[index] for index in indices]
            yield batch, [load_audio(cut) for cut in batch]
            bar.update(sum(map(_seconds, batch)))


def _seconds(cut: Cut) -> float:
    return utterance_samples(cut) / SAMPLE_RATE


def _fit_codebooks(
    cuts: list[Cut], encoder: Encoder, config: EvaluationConfig, *, seed: int, progress: bool
) -> tuple[dict[Representation, Codebook], int]:
    """A codebook per representation, and on how many frames each was fitted."""
    rng = np.random.default_rng(seed)
    fit_frames = _affordable_frames(config.fit_frames, encoder, config.clusters)
    chosen, share = _choose_utterances(cuts, fit_frames, rng)
    kept: dict[Representation, list[np.ndarray]] = {}
    for _, waveforms in _batches(chosen, encoder.call_seconds, "features for k-means", progress):
        features = encoder.features(waveforms)
        rows = [_choose_rows(len(utterance), share, rng) for utterance in features[MFCC]]
        for each, utterances in features.items():
            kept.setdefault(each, []).extend(utterance[row] for utterance, row in zip(utterances, rows, strict=True))
    fitted = sum(map(len, kept[MFCC]))
    codebooks = {}
    for each in tqdm(list(kept), desc="k-means", unit=" representations", disable=not progress):
        # Popped, so that the memory of a representation is free once it is clustered.
        features = np.concatenate(kept.pop(each))
        codebooks[each] = fit_codebook(features, config.clusters, seed=seed, init_attempts=config.init_attempts)
    return codebooks, fitted


def _affordable_frames(fit_frames: int, encoder: Encoder, clusters: int) -> int:
    one_frame = encoder.features([np.zeros(num_samples(1), dtype=np.float32)])
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
    encoder: Encoder,
    codebooks: dict[Representation, Codebook],
    training_units: Units,
    *,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """What the result says of the held-out frames: how many there are, their phones, and how each one's units score."""
    phones: list[np.ndarray] = []
    units: dict[Representation, list[np.ndarray]] = {each: [] for each in [*codebooks, TRAINING_UNITS]}
    for batch, waveforms in _batches(cuts, encoder.call_seconds, "held-out units", progress):
        for each, utterances in encoder.units(waveforms, codebooks).items():
            units[each].extend(utterances)
        for cut, waveform in zip(batch, waveforms, strict=True):
            frames = num_frames(len(waveform))
            phones.append(frame_phones(phone_alignment(cut), frames))
            units[TRAINING_UNITS].append(_units_of(training_units, cut.id, frames))
    spoken = np.concatenate(phones)
    symbols, counts = np.unique(spoken, return_counts=True)
    frequencies = {str(symbols[index]): int(counts[index]) for index in np.argsort(-counts, kind="stable")}
    clusters = {each: len(codebook.centroids) for each, codebook in codebooks.items()}
    clusters[TRAINING_UNITS] = training_units.num_classes
    representations = []
    for each, utterances in units.items():
        heard = np.concatenate(utterances)
        scores = dataclasses.asdict(score_units(spoken, heard)) | {"chance_pnmi": chance_pnmi(spoken, heard, seed=seed)}
        representations.append({**each._asdict(), "clusters": clusters[each]} | scores)
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
