"""Whether a corpus can be trained on with a configuration, asked once it was scanned: hours of units must not come first."""

from __future__ import annotations

from pathlib import Path

from hubert_fast.pretrain.batches import batch_budget
from hubert_fast.pretrain.config import PretrainConfig
from hubert_fast.pretrain.frames import num_frames
from hubert_fast.pretrain.manifest import load_manifest
from hubert_fast.pretrain.utterances import cropped

_FEW_FRAMES = 20  # of a cluster


def check_corpus(config: PretrainConfig, manifest_dir: Path, world_size: int) -> list[str]:
    """Warnings about the corpus, in words; none where it will do.

    Raises:
        ValueError: units or batches cannot be made of it: there are fewer frames than clusters, or fewer utterances than
            micro-batches.
    """
    train, valid = (load_manifest(manifest_dir, split) for split in ("train", "valid"))
    frames = int(num_frames(train.samples).sum())
    clusters = {
        f"iteration {number}: units.clusters": iteration.units.clusters
        for number, iteration in enumerate(config.iterations(), start=1)
    }
    if valid.has_phones.any():
        clusters["evaluation.clusters"] = config.evaluation.clusters
    said = []
    for name, count in clusters.items():
        if frames < count:
            raise ValueError(f"{name}={count} must be at most the number of frames of the training part, {frames}")
        if frames < _FEW_FRAMES * count:
            said.append(f"{name}={count}, of {frames} frames to train on: {frames // count} for each cluster are few")
    for number, iteration in enumerate(config.iterations(), start=1):
        own = config.data_of(iteration)
        try:
            batch_budget(
                cropped(train.samples, own), own.batch_seconds, world_size * (iteration.optimizer.accumulate or 1)
            )
        except ValueError as error:
            raise ValueError(f"iteration {number}: {error}") from error
    if not len(valid):
        said.append("no utterance is held out: nothing will be validated or evaluated")
    return said
