"""Whether a configuration can be run at all, asked before anything is written: a typo must not cost hours of units."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from hubert_fast.pretrain.config import PretrainConfig
from hubert_fast.pretrain.manifest import LONGEST_SECONDS

_SIZES = ("encoder_num_layers", "encoder_num_heads", "encoder_pos_conv_groups", "final_dim", "mask_length")
_DROPOUTS = ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop")
_SHARES = (*(f"encoder_{each}" for each in _DROPOUTS), "mask_prob", "mask_channel_prob")


def check_config(config: PretrainConfig) -> None:
    """Raise a ValueError that names the first setting that is out of range, its value, and what is accepted.

    Iterations without steps are not run and, but for their steps, not looked at.
    """

    def check(accepted: str, holds: Callable[[Any], bool], *names: str) -> None:
        # Conditions are written so that a NaN fails them.
        for name in names:
            value = operator.attrgetter(name)(config)
            if not holds(value):
                raise ValueError(f"{name}={value!r} must be {accepted}")

    def at_least(least: int, *names: str) -> None:
        check(f"{least} or more", lambda value: value >= least, *names)

    def part(*names: str) -> None:
        check("in [0, 1)", lambda value: 0 <= value < 1, *names)

    def clustering(name: str) -> None:
        at_least(2, f"{name}.clusters")
        clusters = operator.attrgetter(f"{name}.clusters")(config)
        check(f"clusters={clusters} or more", lambda frames: frames >= clusters, f"{name}.fit_frames")
        at_least(1, f"{name}.init_attempts")

    def batch(name: str) -> None:
        longest = config.data.max_seconds
        accepted = f"data.max_seconds={longest} or more, so that the longest utterance fits"
        check(accepted, lambda seconds: seconds is None or seconds >= longest, name)

    at_least(0, "seed", "data.workers")
    check("0.025 (one frame) or more", lambda seconds: seconds >= 0.025, "data.max_seconds")
    batch("data.batch_seconds")
    check(f"in [0, {LONGEST_SECONDS:g})", lambda seconds: 0 <= seconds < LONGEST_SECONDS, "data.min_seconds")
    part("data.valid_fraction")
    at_least(1, *(f"logging.{each}" for each in ("log_every", "valid_every", "save_every", "keep_checkpoints")))
    clustering("evaluation")
    layers = 0  # of the model before
    for name in ("first", "second", "third"):
        at_least(0, f"{name}.optimizer.steps")
        iteration = getattr(config, name)
        if iteration.optimizer.steps == 0:
            continue
        batch(f"{name}.batch_seconds")
        clustering(f"{name}.units")
        accepted = f"0 (MFCC) or a layer of the model before it, in [1, {layers}]"
        accepted = accepted if layers else "0 (MFCC): there is no model before it"
        check(accepted, range(layers + 1).__contains__, f"{name}.units.layer")
        layers = iteration.model.encoder_num_layers
        at_least(1, *(f"{name}.model.{each}" for each in _SIZES))
        for divisor in ("encoder_num_heads", "encoder_pos_conv_groups"):
            parts = getattr(iteration.model, divisor)
            accepted = f"a positive multiple of {divisor}={parts}"
            check(accepted, lambda dim, parts=parts: dim > 0 and dim % parts == 0, f"{name}.model.encoder_embed_dim")
        check("in [0, 1]", lambda share: 0 <= share <= 1, *(f"{name}.model.{each}" for each in _SHARES))
        positive = ("learning_rate", "eps", "clip_norm")
        check("more than 0", lambda value: value > 0, *(f"{name}.optimizer.{each}" for each in positive))
        part(f"{name}.optimizer.warmup_fraction")
        check("each in [0, 1)", lambda betas: all(0 <= beta < 1 for beta in betas), f"{name}.optimizer.betas")
        at_least(0, f"{name}.optimizer.weight_decay")
        at_least(1, f"{name}.optimizer.accumulate")
        weights = ("masked_weight", "unmasked_weight", "feature_weight")
        at_least(0, *(f"{name}.objective.{each}" for each in weights))
    if not config.iterations():
        raise ValueError("optimizer.steps must be 1 or more in one iteration at least, not 0 in all")
