"""Trains a tiny model on the corpus of `make_corpus`, in a process that a test may kill or `torchrun` may start:

python -m tests.pretrain.train_tiny CORPUS OUT '{"resume": true, ...}'
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from unittest import mock

import numpy as np
import soundfile

from hubert_fast.pretrain import trainer
from hubert_fast.pretrain.config import (
    STANDARD_CONV_LAYERS,
    DataConfig,
    IterationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    UnitsConfig,
)
from hubert_fast.pretrain.distributed import joined
from hubert_fast.pretrain.features import MfccFeatures
from hubert_fast.pretrain.make_units import make_units
from tests.pretrain.speech_folder import scan_folder

MODEL = ModelConfig(
    extractor_conv_layer_config=tuple((16, kernel, stride) for _, kernel, stride in STANDARD_CONV_LAYERS),
    encoder_embed_dim=32,
    encoder_pos_conv_kernel=8,
    encoder_pos_conv_groups=4,
    encoder_num_layers=2,
    encoder_num_heads=2,
    encoder_ff_interm_features=64,
    encoder_layer_drop=0.3,
    mask_length=4,
    final_dim=16,
)
WITHOUT_DROPOUT = {
    "encoder_projection_dropout": 0.0,
    "encoder_attention_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_drop": 0.0,
}


def make_corpus(root: Path, *, suffix: str = ".wav") -> Path:
    """14 utterances of 0.5 to 1.2 seconds of coloured noise, their manifest and 6 units; two are held out."""
    rng = np.random.default_rng(0)
    (root / "audio").mkdir(parents=True)
    for index in range(14):
        samples = 8000 + 800 * index
        loudness = np.repeat(rng.uniform(0.01, 0.3, 14), 1500)[:samples]
        noise = np.convolve(rng.standard_normal(samples) * loudness, rng.standard_normal(9) / 9, "same")
        soundfile.write(root / "audio" / f"{index:02d}{suffix}", noise, 16000)
    (root / "audio" / "splits.json").write_text(json.dumps({"valid": [f"03{suffix}", f"11{suffix}"]}))
    scan_folder(root)
    config = UnitsConfig(clusters=6, init_attempts=1)
    make_units(root / "manifest", MfccFeatures(), config, root / "units", seed=0, progress=False)
    return root


def train_tiny(
    corpus: Path,
    out: Path,
    *,
    model: Mapping[str, Any] = MappingProxyType({}),
    steps: int = 12,
    accumulate: int | None = 1,
    micro_batch_seconds: float | Literal["auto"] = "auto",
    workers: int = 1,
    save_every: int = 2,
    keep: int = 2,
    learning_rate: float = 5e-3,
    resume: bool = False,
    autocast: bool = True,
    seed: int = 1,
    max_bad_utterances: float = 0.01,
    graphs: bool = False,
) -> dict[str, Any]:
    """``graphs``: as on a GPU, but that nothing is captured."""
    optimizer = OptimizerConfig(steps=steps, learning_rate=learning_rate, accumulate=accumulate)
    iteration = IterationConfig(model=dataclasses.replace(MODEL, **model), optimizer=optimizer)
    config = PretrainConfig(
        seed=seed,
        autocast=autocast,
        data=DataConfig(
            batch_seconds=5.0,
            micro_batch_seconds=micro_batch_seconds,
            max_seconds=1.0,
            max_bad_utterances=max_bad_utterances,
            workers=workers,
        ),
        logging=LoggingConfig(log_every=3, valid_every=6, save_every=save_every, keep_checkpoints=keep),
        first=iteration,
    )
    folders = {"manifest_dir": corpus / "manifest", "units_dir": corpus / "units", "out": out}
    with joined("cpu") as process, mock.patch.object(trainer, "runs_in_graphs", lambda *_: graphs):
        return trainer.train(config, iteration, **folders, process=process, resume=resume, progress=False)


if __name__ == "__main__":
    train_tiny(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3]))
