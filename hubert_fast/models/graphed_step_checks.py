"""Checks of what users hand to `GraphedStep`. Each raises a ValueError that names the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

import torch
from torch.optim import Optimizer

from hubert_fast.models.capacities import Capacities
from hubert_fast.models.micro_batch import MicroBatch
from hubert_fast.models.objective import PretrainingObjective
from hubert_fast.models.plain import is_plain
from hubert_fast.models.transformer import Transformer
from hubert_fast.models.wrappers import gathers


def check_objective(objective: PretrainingObjective) -> None:
    """``objective`` must be ours, without hooks, with a weight on frames and parameters to train on one device."""
    if type(objective) is not PretrainingObjective:
        raise ValueError(
            f"objective must be a PretrainingObjective, wrapped by nothing; got {type(objective).__name__}"
        )
    transformer = objective.model.wav2vec2.encoder.transformer
    for name, module, kind in (
        ("objective", objective, PretrainingObjective),
        ("transformer", transformer, Transformer),
    ):
        if not is_plain(module, kind):
            raise ValueError(
                f"{name} must be a {kind.__name__} without hooks, which a graphed step would not call; got "
                f"{type(module).__name__}"
            )
    if gathers(objective):
        raise ValueError(
            "objective must not be sharded, nor any part of it: a graphed step keeps its weights where they lie"
        )
    if not objective.masked_weight and not objective.unmasked_weight:
        raise ValueError("objective must have a weight on masked or unmasked frames; both are 0")
    devices = {each.device for each in objective.parameters() if each.requires_grad}
    if len(devices) != 1:
        raise ValueError(f"objective must have parameters to train, on one device; got {sorted(map(str, devices))}")


def check_optimizer(objective: PretrainingObjective, optimizer: Optimizer) -> None:
    """``optimizer`` must step parameters of ``objective``."""
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    stepped = {each for group in optimizer.param_groups for each in group["params"]}
    if stepped.isdisjoint(objective.parameters()):
        raise ValueError(f"optimizer must step parameters of objective; got one over {len(stepped)} others")


def check_settings(
    clip_norm: Optional[float],
    capacities: Optional[Capacities],
    autocast: Optional[torch.dtype],
    reduce_dtype: torch.dtype,
    most_graphs: int,
) -> None:
    """The other settings must be of their types and in range."""
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive or None; got {clip_norm}")
    if capacities is not None and not isinstance(capacities, Capacities):
        raise ValueError(f"capacities must be Capacities or None; got {capacities!r}")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be torch.bfloat16, torch.float16 or None; got {autocast!r}")
    if reduce_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"reduce_dtype must be torch.float32 or torch.bfloat16; got {reduce_dtype}")
    if most_graphs < 0:
        raise ValueError(f"most_graphs must be at least 0; got {most_graphs}")


def check_update(
    micro_batches: Sequence[MicroBatch], masked_frames: Optional[float], capacities: Optional[Capacities]
) -> None:
    """``micro_batches`` must be planned for a step with ``capacities``, and ``masked_frames`` be a count."""
    if isinstance(micro_batches, MicroBatch) or not all(isinstance(each, MicroBatch) for each in micro_batches):
        raise ValueError(f"micro_batches must be a list of MicroBatch; got {type(micro_batches).__name__}")
    if not micro_batches:
        raise ValueError("micro_batches must hold one or more; got none")
    largest = 0 if capacities is None else capacities.largest_rows
    for each in micro_batches:
        if each.fits and each.capacity.rows > largest:
            raise ValueError(
                f"micro_batches must be planned with the capacities of the step ({capacities}), as its planner does; got "
                f"{each.capacity}"
            )
    if masked_frames is not None and not 0 <= masked_frames < math.inf:
        raise ValueError(f"masked_frames must be at least 0 and finite; got {masked_frames}")
