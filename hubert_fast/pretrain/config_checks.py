"""Whether a configuration can be run at all, asked before anything is written: a typo must not cost hours of units."""

from __future__ import annotations

from typing import Any

from hubert_fast.pretrain.config import (
    DataConfig,
    IterationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PretrainConfig,
    UnitsConfig,
)
from hubert_fast.pretrain.manifest import LONGEST_SECONDS


def check_config(config: PretrainConfig) -> None:
    """Raise a ValueError that names the first setting that is out of range, its value, and what is accepted.

    Iterations without steps are not run and, but for their steps, not looked at.
    """
    _require(config.seed >= 0, "seed", config.seed, "0 or more")
    _check_data(config.data)
    for name in ("log_every", "valid_every", "save_every", "keep_checkpoints"):
        _at_least(1, f"logging.{name}", getattr(config.logging, name))
    evaluation = config.evaluation
    _check_clustering("evaluation", evaluation.clusters, evaluation.fit_frames, evaluation.init_attempts)
    previous = None
    for name in ("first", "second", "third"):
        iteration = getattr(config, name)
        _at_least(0, f"{name}.optimizer.steps", iteration.optimizer.steps)
        if iteration.optimizer.steps > 0:
            _check_iteration(name, iteration, config.data.max_seconds)
            _check_layer(name, iteration.units, previous)
            previous = iteration.model
    steps = {name: 0 for name in ("first", "second", "third")}
    _require(previous is not None, "optimizer.steps", steps, "1 or more in one iteration at least")


def _check_data(data: DataConfig) -> None:
    _require(data.max_seconds >= 0.025, "data.max_seconds", data.max_seconds, "0.025 (one frame) or more")
    _check_batch("data.batch_seconds", data.batch_seconds, data.max_seconds)
    in_range = 0 <= data.min_seconds < LONGEST_SECONDS
    _require(in_range, "data.min_seconds", data.min_seconds, f"in [0, {LONGEST_SECONDS:g})")
    _require(0 <= data.valid_fraction < 1, "data.valid_fraction", data.valid_fraction, "in [0, 1)")
    _at_least(0, "data.workers", data.workers)


def _check_batch(name: str, batch_seconds: float, max_seconds: float) -> None:
    accepted = f"data.max_seconds={max_seconds} or more, so that the longest utterance fits"
    _require(batch_seconds >= max_seconds, name, batch_seconds, accepted)


def _check_iteration(name: str, iteration: IterationConfig, max_seconds: float) -> None:
    units = iteration.units
    _check_clustering(f"{name}.units", units.clusters, units.fit_frames, units.init_attempts)
    _check_model(f"{name}.model", iteration.model)
    _check_optimizer(f"{name}.optimizer", iteration.optimizer)
    _check_objective(f"{name}.objective", iteration.objective)
    if iteration.batch_seconds is not None:
        _check_batch(f"{name}.batch_seconds", iteration.batch_seconds, max_seconds)


def _check_clustering(name: str, clusters: int, fit_frames: int, init_attempts: int) -> None:
    _at_least(2, f"{name}.clusters", clusters)
    _require(fit_frames >= clusters, f"{name}.fit_frames", fit_frames, f"clusters={clusters} or more")
    _at_least(1, f"{name}.init_attempts", init_attempts)


def _check_layer(name: str, units: UnitsConfig, previous: ModelConfig | None) -> None:
    if previous is None:
        _require(units.layer == 0, f"{name}.units.layer", units.layer, "0 (MFCC): there is no model before it")
        return
    layers = previous.encoder_num_layers
    accepted = f"0 (MFCC) or a layer of the model before it, in [1, {layers}]"
    _require(0 <= units.layer <= layers, f"{name}.units.layer", units.layer, accepted)


def _check_model(name: str, model: ModelConfig) -> None:
    for size in ("encoder_num_layers", "encoder_num_heads", "encoder_pos_conv_groups", "final_dim", "mask_length"):
        _at_least(1, f"{name}.{size}", getattr(model, size))
    for divisor in ("encoder_num_heads", "encoder_pos_conv_groups"):
        parts, dim = getattr(model, divisor), model.encoder_embed_dim
        accepted = f"a positive multiple of {divisor}={parts}"
        _require(dim > 0 and dim % parts == 0, f"{name}.encoder_embed_dim", dim, accepted)
    shares = ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop")
    for share in (*(f"encoder_{each}" for each in shares), "mask_prob", "mask_channel_prob"):
        value = getattr(model, share)
        _require(0 <= value <= 1, f"{name}.{share}", value, "in [0, 1]")


def _check_optimizer(name: str, optimizer: OptimizerConfig) -> None:
    for positive in ("learning_rate", "eps", "clip_norm"):
        value = getattr(optimizer, positive)
        _require(value > 0, f"{name}.{positive}", value, "more than 0")
    _require(0 <= optimizer.warmup_fraction < 1, f"{name}.warmup_fraction", optimizer.warmup_fraction, "in [0, 1)")
    _require(all(0 <= beta < 1 for beta in optimizer.betas), f"{name}.betas", optimizer.betas, "each in [0, 1)")
    _require(optimizer.weight_decay >= 0, f"{name}.weight_decay", optimizer.weight_decay, "0 or more")
    _at_least(1, f"{name}.accumulate", optimizer.accumulate)


def _check_objective(name: str, objective: ObjectiveConfig) -> None:
    for weight in ("masked_weight", "unmasked_weight", "feature_weight"):
        value = getattr(objective, weight)
        _require(value >= 0, f"{name}.{weight}", value, "0 or more")


def _at_least(least: int, name: str, value: int) -> None:
    _require(value >= least, name, value, f"{least} or more")


def _require(holds: bool, name: str, value: Any, accepted: str) -> None:
    # Conditions are written so that a NaN fails them.
    if not holds:
        raise ValueError(f"{name}={value!r} must be {accepted}")
