"""One iteration's training, from manifest and units to model.safetensors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hubert_fast import PretrainingObjective
from hubert_fast.pretrain.atomic import write_with
from hubert_fast.pretrain.batches import GlobalBatches, ValidationBatches
from hubert_fast.pretrain.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    remove_leftovers,
    require_same_run,
)
from hubert_fast.pretrain.config import DataConfig, LoggingConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from hubert_fast.pretrain.distributed import Process, joined
from hubert_fast.pretrain.main_only import on_main
from hubert_fast.pretrain.manifest import load_manifest
from hubert_fast.pretrain.metrics_log import metrics_path, read_metrics
from hubert_fast.pretrain.tensor_files import naming
from hubert_fast.pretrain.training_loop import Trainer
from hubert_fast.pretrain.units import Units


@dataclass(frozen=True)
class TrainResult:
    """Where a finished training stands: its weights and the first and last of what it logged (per masked frame)."""

    weights: Path
    steps: int
    first_loss: float
    last_loss: float
    first_masked_accuracy: float | None
    """None where the objective gives masked frames no weight"""
    last_masked_accuracy: float | None
    valid_loss: float | None
    """None without held-out utterances"""
    valid_masked_accuracy: float | None
    audio_seconds: float
    """audio trained on, each epoch counted"""
    seconds: float
    """wall time"""


def train(
    model_config: ModelConfig,
    data_config: DataConfig,
    optimizer_config: OptimizerConfig,
    objective_config: ObjectiveConfig,
    logging_config: LoggingConfig,
    *,
    manifest_dir: Path,
    units_dir: Path,
    out: Path,
    seed: int,
    resume: bool = False,
    device: str = "cpu",
    autocast: bool = True,
    progress: bool = True,
    process: Process | None = None,
) -> TrainResult:
    """Train a new model on the units of ``units_dir`` and write ``out``/model.safetensors, metrics and checkpoints.

    Under ``torchrun`` every rank calls it; pass ``process`` where `distributed.joined` has been entered already (then
    ``device`` is not read), otherwise it is entered here. With ``resume``, goes on from the newest good checkpoint, or
    from the start where there is none, and does nothing where the weights are there. ``autocast``: bfloat16.

    Raises:
        FileExistsError: without ``resume``, if ``out`` holds an earlier run.
        CheckpointMismatchError: with ``resume``, if ``out`` holds a run of another model, other settings or
            other units.
        CorruptCheckpointError, NonFiniteTrainingError, DiskFullError, TrainingInterrupted: see `Trainer.fit`.
    """
    out = Path(out)
    with joined(device) if process is None else nullcontext(process) as this_process:
        units_path = Path(units_dir) / "train.safetensors"
        units = _units(units_path)
        description = _description(
            model_config,
            data_config,
            optimizer_config,
            objective_config,
            units.num_classes,
            on_main(this_process, lambda: _sha256(units_path)),
            seed,
        )
        on_main(this_process, lambda: _require_free_or_resumed(out, description, resume))
        if not this_process.from_main(weights_path(out).exists()):
            torch.manual_seed(seed)
            model = model_config.build(units.num_classes)
            objective = PretrainingObjective(model, **dataclasses.asdict(objective_config)).to(this_process.device)
            trainer = Trainer(
                objective,
                *_batches(
                    manifest_dir, units_dir, data_config, optimizer_config, model, seed=seed, process=this_process
                ),
                optimizer_config,
                logging_config,
                process=this_process,
                out=out,
                description=description,
                seed=seed,
                autocast=autocast,
                unused_parameters=model_config.encoder_layer_drop > 0 or model_config.mask_prob == 0,
                progress=progress,
            )
            _restore_newest(trainer)
            trainer.fit()
            on_main(this_process, lambda: _write_weights(out, model, description))
        return on_main(this_process, lambda: _result(out, optimizer_config.steps))


def weights_path(out: Path) -> Path:
    return Path(out) / "model.safetensors"


def _description(
    model_config: ModelConfig,
    data_config: DataConfig,
    optimizer_config: OptimizerConfig,
    objective_config: ObjectiveConfig,
    num_classes: int,
    units_sha256: str,
    seed: int,
) -> dict[str, Any]:
    """What decides the weights that come out, and so may not change on the way. Workers and micro-batches may."""
    optimizer = dataclasses.asdict(optimizer_config)
    del optimizer["accumulate"]
    data = {name: getattr(data_config, name) for name in ("batch_seconds", "max_seconds", "normalize_audio")}
    data["units_sha256"] = units_sha256
    settings = {"seed": seed, "optimizer": optimizer, "objective": dataclasses.asdict(objective_config), "data": data}
    return {"model_config": model_config.to_json(), "num_classes": num_classes, "settings": json.dumps(settings)}


def _batches(
    manifest_dir: Path,
    units_dir: Path,
    data_config: DataConfig,
    optimizer_config: OptimizerConfig,
    model: nn.Module,
    *,
    seed: int,
    process: Process,
) -> tuple[GlobalBatches, ValidationBatches | None]:
    """The training batches and, where utterances are held out, the validation batches."""
    streams = {}
    for split, stream in (("train", GlobalBatches), ("valid", ValidationBatches)):
        cuts = list(load_manifest(manifest_dir, split))
        if cuts or split == "train":
            streams[split] = stream(
                cuts,
                _units(Path(units_dir) / f"{split}.safetensors"),
                data_config,
                model.mask_generator,
                seed=seed,
                accumulate=optimizer_config.accumulate,
                rank=process.rank,
                world_size=process.world_size,
                pin_memory=process.device.type == "cuda",
            )
    return streams["train"], streams.get("valid")


def _units(path: Path) -> Units:
    with naming(path):
        return Units.load(path)


def _require_free_or_resumed(out: Path, description: Mapping[str, Any], resume: bool) -> None:
    earlier = [
        path for path in (weights_path(out), metrics_path(out), *list_checkpoints(out / "checkpoints")) if path.exists()
    ]
    if earlier and not resume:
        raise FileExistsError(
            f"out: {out} holds an earlier training ({earlier[0].name}); resume it or choose another folder"
        )
    remove_leftovers(out)
    remove_leftovers(out / "checkpoints")
    if weights_path(out).exists():
        with naming(weights_path(out)), safe_open(weights_path(out), framework="pt") as file:
            metadata = file.metadata()
        require_same_run(weights_path(out), metadata, description)


def _restore_newest(trainer: Trainer) -> None:
    """Every rank goes on from the checkpoint that rank 0 found to be good."""
    process = trainer.process
    found = []  # rank 0 keeps what it read: a state is too large to be sent around

    def find() -> Path | None:
        found.extend(newest_checkpoint(trainer.checkpoints) or ())
        if found:
            require_same_run(*found, trainer.description)
        return found[0] if found else None

    path = on_main(process, find)
    if path is not None:
        trainer.restore(found[1] if found else load_checkpoint(path))


def _write_weights(out: Path, model: nn.Module, description: Mapping[str, Any]) -> None:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {
        "model_config": description["model_config"],
        "num_classes": str(description["num_classes"]),
        "settings": description["settings"],
    }
    with naming(weights_path(out)):
        write_with(weights_path(out), lambda path: save_file(weights, path, metadata=metadata))


def _sha256(path: Path) -> str:
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def _result(out: Path, steps: int) -> TrainResult:
    lines = read_metrics(out)
    trained = [line for line in lines if "loss" in line]
    valid = [line for line in lines if "valid_loss" in line]
    if not trained:
        raise FileNotFoundError(
            f"{weights_path(out)} is there but its {metrics_path(out).name} is missing or empty; "
            f"remove {out} to train again"
        )
    return TrainResult(
        weights=weights_path(out),
        steps=steps,
        first_loss=trained[0]["loss"],
        last_loss=trained[-1]["loss"],
        first_masked_accuracy=trained[0].get("masked_accuracy"),
        last_masked_accuracy=trained[-1].get("masked_accuracy"),
        valid_loss=valid[-1]["valid_loss"] if valid else None,
        valid_masked_accuracy=valid[-1].get("valid_masked_accuracy") if valid else None,
        audio_seconds=trained[-1]["audio_seconds"],
        seconds=trained[-1]["seconds"],
    )
