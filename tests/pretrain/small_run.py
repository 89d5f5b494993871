"""A configuration and a folder of audio with which the whole job takes seconds."""

from __future__ import annotations

from pathlib import Path

from hubert_fast.pretrain.config import (
    DataConfig,
    EvaluationConfig,
    IterationConfig,
    LoggingConfig,
    OptimizerConfig,
    PretrainConfig,
    UnitsConfig,
)
from tests.pretrain.speech_folder import write_audio
from tests.pretrain.train_tiny import MODEL


def small_config(*, layer: int = 1, steps: int = 2) -> PretrainConfig:
    """Two iterations of a model with two layers."""

    def iteration(layer: int) -> IterationConfig:
        units = UnitsConfig(clusters=4, layer=layer, init_attempts=1)
        return IterationConfig(units=units, model=MODEL, optimizer=OptimizerConfig(steps=steps))

    return PretrainConfig(
        device="cpu",
        data=DataConfig(batch_seconds=4.0, max_seconds=1.0, min_seconds=0.1, valid_fraction=0.2, workers=0),
        logging=LoggingConfig(log_every=1, valid_every=2, save_every=1),
        first=iteration(0),
        second=iteration(layer),
        evaluation=EvaluationConfig(clusters=4, fit_frames=1000, init_attempts=1),
    )


def small_folder(folder: Path) -> Path:
    """Eight tones of 0.6 s."""
    for index in range(8):
        write_audio(folder / f"{index}.wav", 0.6, seed=index)
    return folder
