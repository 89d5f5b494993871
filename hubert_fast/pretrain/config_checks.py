"""Whether a configuration can be run at all, asked before anything is written: a typo must not cost hours of units."""

from __future__ import annotations

from typing import Any

from hubert_fast.pretrain.config import (
    DataConfig,
    EvaluationConfig,
    IterationConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    UnitsConfig,
)
from hubert_fast.pretrain.scan import LONGEST_SECONDS

_SIZES = ("encoder_num_layers", "encoder_num_heads", "encoder_pos_conv_groups", "final_dim", "mask_length")
_DROPOUTS = ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop")
_SHARES = (*(f"encoder_{each}" for each in _DROPOUTS), "mask_prob", "mask_channel_prob")


def check_config(config: PretrainConfig) -> None:
    """Raise a ValueError that names the first setting that is out of range, its value, and what is accepted.

    Iterations without steps are not run and, but for their steps, not looked at.
    """
    _require(config.seed >= 0, "seed", config.seed, "0 or more")
    _check_data(config.data)
    _at_least(1, "logging", config.logging, "log_every", "valid_every", "save_every", "keep_checkpoints")
    _check_clustering("evaluation", config.evaluation)
    previous = None
    for name in ("first", "second", "third"):
        iteration = getattr(config, name)
        _at_least(0, f"{name}.optimizer", iteration.optimizer, "steps")
        if iteration.optimizer.steps > 0:
            _check_iteration(name, iteration, config.data)
            _check_layer(f"{name}.units.layer", iteration.units.layer, previous)
            previous = iteration.model
    if previous is None:
        raise ValueError("optimizer.steps must be 1 or more in one iteration at least, not 0 in all")


def _check_data(data: DataConfig) -> None:
    _require(data.max_seconds >= 0.025, "data.max_seconds", data.max_seconds, "0.025 (one frame) or more")
    _check_batch("data.batch_seconds", data.batch_seconds, data.max_seconds)
    if data.micro_batch_seconds != "auto":
        finite = data.micro_batch_seconds < float("inf")
        _require(finite, "data.micro_batch_seconds", data.micro_batch_seconds, "auto or a finite number")
        _check_batch("data.micro_batch_seconds", data.micro_batch_seconds, data.max_seconds)
    in_range = 0 <= data.min_seconds < LONGEST_SECONDS
    _require(in_range, "data.min_seconds", data.min_seconds, f"in [0, {LONGEST_SECONDS:g})")
    counts = data.channel == "mix" or data.channel >= 1
    _require(counts, "data.channel", data.channel, "mix or the number of a channel, 1 or more")
    _require(0 <= data.valid_fraction < 1, "data.valid_fraction", data.valid_fraction, "in [0, 1)")
    bad = data.max_bad_utterances
    _require(0 <= bad <= 1, "data.max_bad_utterances", bad, "in [0, 1]")
    _at_least(0, "data", data, "workers")


def _check_batch(name: str, batch_seconds: float, max_seconds: float) -> None:
    accepted = f"data.max_seconds={max_seconds} or more, so that the longest utterance fits"
    _require(batch_seconds >= max_seconds, name, batch_seconds, accepted)


def _check_clustering(name: str, settings: UnitsConfig | EvaluationConfig) -> None:
    _at_least(2, name, settings, "clusters")
    accepted = f"clusters={settings.clusters} or more"
    _require(settings.fit_frames >= settings.clusters, f"{name}.fit_frames", settings.fit_frames, accepted)
    _at_least(1, name, settings, "init_attempts")


def _check_iteration(name: str, iteration: IterationConfig, data: DataConfig) -> None:
    if iteration.batch_seconds is not None:
        _check_batch(f"{name}.batch_seconds", iteration.batch_seconds, data.max_seconds)
    _check_clustering(f"{name}.units", iteration.units)
    least, most = iteration.units.min_perplexity, iteration.units.clusters
    _require(1 <= least <= most, f"{name}.units.min_perplexity", least, f"in [1, clusters={most}]")
    _check_model(f"{name}.model", iteration.model)
    _check_optimizer(f"{name}.optimizer", iteration.optimizer, data)
    weights = ("masked_weight", "unmasked_weight", "feature_weight")
    _at_least(0, f"{name}.objective", iteration.objective, *weights)


def _check_layer(name: str, layer: int, previous: ModelConfig | None) -> None:
    if previous is None:
        _require(layer == 0, name, layer, "0 (MFCC): there is no model before it")
        return
    layers = previous.encoder_num_layers
    accepted = f"0 (MFCC) or a layer of the model before it, in [1, {layers}]"
    _require(0 <= layer <= layers, name, layer, accepted)


def _check_model(name: str, model: ModelConfig) -> None:
    _at_least(1, name, model, *_SIZES)
    dim = model.encoder_embed_dim
    for divisor in ("encoder_num_heads", "encoder_pos_conv_groups"):
        parts = getattr(model, divisor)
        accepted = f"a positive multiple of {divisor}={parts}"
        _require(dim > 0 and dim % parts == 0, f"{name}.encoder_embed_dim", dim, accepted)
    for share in _SHARES:
        value = getattr(model, share)
        _require(0 <= value <= 1, f"{name}.{share}", value, "in [0, 1]")


def _check_optimizer(name: str, optimizer: OptimizerConfig, data: DataConfig) -> None:
    for positive in ("learning_rate", "eps", "clip_norm"):
        value = getattr(optimizer, positive)
        _require(value > 0, f"{name}.{positive}", value, "more than 0")
    _require(0 <= optimizer.warmup_fraction < 1, f"{name}.warmup_fraction", optimizer.warmup_fraction, "in [0, 1)")
    _require(all(0 <= beta < 1 for beta in optimizer.betas), f"{name}.betas", optimizer.betas, "each in [0, 1)")
    _at_least(0, name, optimizer, "weight_decay")
    if optimizer.accumulate is not None:
        _at_least(1, name, optimizer, "accumulate")
        accepted = f"none where data.micro_batch_seconds={data.micro_batch_seconds} says how batches are split"
        _require(data.micro_batch_seconds == "auto", f"{name}.accumulate", optimizer.accumulate, accepted)


def _at_least(least: int, name: str, settings: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(settings, field)
        _require(value >= least, f"{name}.{field}", value, f"{least} or more")


def _require(holds: bool, name: str, value: Any, accepted: str) -> None:
    # Conditions are written so that a NaN fails them.
    if not holds:
        raise ValueError(f"{name}={value!r} must be {accepted}")
