"""One iteration's training, from manifest and units to model.safetensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

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
from hubert_fast.pretrain.config import IterationConfig, PretrainConfig
from hubert_fast.pretrain.distributed import Process
from hubert_fast.pretrain.forget import forgotten_ids
from hubert_fast.pretrain.left_out import LeftOut
from hubert_fast.pretrain.manifest import SPLITS, load_manifest
from hubert_fast.pretrain.metrics_log import metrics_path
from hubert_fast.pretrain.micro_batches import divide, follow_from_memory
from hubert_fast.pretrain.run_summary import training_metrics
from hubert_fast.pretrain.tensor_files import naming
from hubert_fast.pretrain.training_loop import Trainer
from hubert_fast.pretrain.units import Units


def train(
    config: PretrainConfig,
    iteration: IterationConfig,  # of config
    *,
    manifest_dir: Path,
    units_dir: Path,
    out: Path,
    process: Process,
    forgotten: Collection[str] = (),
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a new model on the units of ``units_dir`` and write ``out``/model.safetensors, metrics and checkpoints.

    Under ``torchrun`` every rank calls it; ``process`` is that of `distributed.joined`. With ``resume``, goes on from the
    newest good checkpoint, or from the start where there is none, and does nothing where the weights are there. ``forgotten``:
    paths of recordings that are not read any more. Returns what the training came to (`Metrics.outcome`).

    Raises:
        FileExistsError: without ``resume``, if ``out`` holds an earlier run.
        CheckpointMismatchError: with ``resume``, if ``out`` holds a run of another model, other settings or
            other units.
        FileNotFoundError: the weights are there but not their metrics.
        DamagedFileError: the units are not what was written.
        CorruptCheckpointError, NonFiniteTrainingError, DiskFullError, TooManyBadUtterancesError, TrainingInterrupted: see
            `Trainer.fit`.
    """
    out = Path(out)
    units = {split: Units(Path(units_dir) / f"{split}.safetensors") for split in SPLITS}
    num_classes = units["train"].num_classes
    description = _description(config, iteration, num_classes, units["train"].sha256)
    process.on_main(lambda: _require_free_or_resumed(out, description, resume))
    if not process.from_main(weights_path(out).exists()):
        process.on_main(lambda: _verify(units.values()))
        torch.manual_seed(config.seed)
        model = iteration.model.build(num_classes)
        trainer = Trainer(
            PretrainingObjective(model, **dataclasses.asdict(iteration.objective)).to(process.device),
            *_batches(manifest_dir, units, config, iteration, model, process, forgotten),
            config,
            iteration,
            process=process,
            out=out,
            description=description,
            progress=progress,
            halve=follow_from_memory(config, iteration, process),
            graphs=runs_in_graphs(config, process),
        )
        _restore_newest(trainer)
        trainer.fit()
        process.on_main(lambda: _write_weights(out, model, description))
    return process.on_main(lambda: _outcome(out))


def runs_in_graphs(config: PretrainConfig, process: Process) -> bool:
    """Whether training steps are those of a `hubert_fast.GraphedStep`."""
    return config.graphs == "auto" and process.device.type == "cuda"


def weights_path(out: Path) -> Path:
    return Path(out) / "model.safetensors"


def _description(
    config: PretrainConfig, iteration: IterationConfig, num_classes: int, units_sha256: str
) -> dict[str, Any]:
    """What decides the weights that come out, and so may not change on the way. Workers and micro-batches may."""
    optimizer, objective = dataclasses.asdict(iteration.optimizer), dataclasses.asdict(iteration.objective)
    del optimizer["accumulate"]
    own = config.data_of(iteration)
    data = {name: getattr(own, name) for name in ("batch_seconds", "max_seconds", "normalize_audio")}
    data["units_sha256"] = units_sha256
    settings = {"seed": config.seed, "optimizer": optimizer, "objective": objective, "data": data}
    return {"model_config": iteration.model.to_json(), "num_classes": num_classes, "settings": json.dumps(settings)}


def _verify(files: Iterable[Units]) -> None:
    for units in files:
        units.verify()


def _batches(
    manifest_dir: Path,
    units: Mapping[str, Units],
    config: PretrainConfig,
    iteration: IterationConfig,
    model: nn.Module,
    process: Process,
    forgotten: Collection[str],
) -> tuple[GlobalBatches, ValidationBatches | None]:
    """The training batches and, where utterances are held out, the validation batches."""

    def stream(kind: type[GlobalBatches | ValidationBatches], split: str) -> Any:
        own, of_split = config.data_of(iteration), units[split]
        gone, share = forgotten_ids(of_split.ids, forgotten), own.max_bad_utterances
        left_out = LeftOut(len(of_split), share, gone, may_be_empty=split == "valid")
        options = {"seed": config.seed, "process": process}
        return kind(load_manifest(manifest_dir, split), of_split, own, model.mask_generator, left_out, **options)

    batches = stream(GlobalBatches, "train")
    divide(batches, config, iteration, model, process)
    return batches, stream(ValidationBatches, "valid") if len(units["valid"]) else None


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

    path = process.on_main(find)
    if path is not None:
        trainer.restore(found[1] if found else load_checkpoint(path))


def _write_weights(out: Path, model: nn.Module, description: Mapping[str, Any]) -> None:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {name: str(value) for name, value in description.items()}
    with naming(weights_path(out)):
        write_with(weights_path(out), lambda path: save_file(weights, path, metadata=metadata))


def _outcome(out: Path) -> dict[str, Any]:
    outcome = training_metrics(out).outcome()
    if "last_loss" not in outcome:
        raise FileNotFoundError(
            f"{weights_path(out)} is there but its {metrics_path(out).name} is missing or empty; "
            f"remove {out} to train again"
        )
    return outcome
