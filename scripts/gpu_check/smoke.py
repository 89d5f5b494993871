"""Is it right: loss and every gradient of the whole model, on all kernels together and on each operator's alone.

    python -m scripts.gpu_check.smoke OUT            # checks that end their process are noted, and the others go on
    python -m scripts.gpu_check.smoke OUT here       # in this process

The truth is the reference in float64. What is allowed is twice the error of the reference computed in the dtype, and never less
than `_FLOORS`. Dropout is off, but for one check that only asks whether the loss is about the reference's.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from benchmarks.lost_device import answers, first_line
from benchmarks.peers.agreement import weights_of
from benchmarks.peers.ours import HubertFast, HubertFastSwappedIn
from benchmarks.peers.peer import PeerModel, Setting, autocast
from hubert_fast import tf32
from scripts.gpu_check import isolated
from scripts.gpu_check.device import DEVICE
from scripts.gpu_check.facts import Facts, facts_of_process
from scripts.gpu_check.models import OPERATORS, architecture, kernels_of, padded_batch, setting

PART = "smoke"

# Relative errors that are allowed however small that of the reference in the same dtype is.
# Products with AMX left 3.3e-2 on the tiny models that stand in on a CPU, beside the reference's 1.6e-2.
_FLOORS = {"float32": 1e-5, "bfloat16": 4e-2}
_TIMES_THE_REFERENCES = 2.0

# A mean over so many masks and dropouts; the losses of kernels and reference differ by their random numbers alone.
_DROPOUT_SEEDS = 4
_DROPOUT_TOLERANCE = 0.05


@dataclass(frozen=True)
class Check:
    """One comparison: of which model, in which dtype, with which operators on their kernels."""

    name: str
    dtype: str
    operators: tuple[str, ...]
    model: str = "base"
    layers: int | None = None  # of the model; None: all
    swapped_in: bool = False  # by the model's logits, not by the objective
    dropout: bool = False


def checks() -> list[Check]:
    """The most telling first."""
    everything = [
        Check("all, bfloat16", "bfloat16", OPERATORS),
        Check("all, float32", "float32", OPERATORS),
        Check("all, bfloat16, with dropout", "bfloat16", OPERATORS, dropout=True),
        Check("all, bfloat16, large", "bfloat16", OPERATORS, "large", 4),
        Check("all, bfloat16, swapped in", "bfloat16", OPERATORS, layers=2, swapped_in=True),
    ]
    return everything + [
        # `models.leave_out_broken` knows the operator by this name.
        Check(f"{operator}, {dtype}", dtype, (operator,), layers=2, swapped_in=operator == "cosine_logits")
        for dtype in ("bfloat16", "float32")
        for operator in OPERATORS
    ]


def main() -> int:
    facts = facts_of_process()
    if sys.argv[2:] != ["here"]:
        code = isolated.run(facts, PART, "scripts.gpu_check.smoke", "here", item_seconds=25, first_seconds=50)
        return code or int(any("failed" in each or each.get("ok") is False for each in facts.of(PART)))
    by_name = {each.name: each for each in checks()}
    for name in isolated.Items(facts, PART).left(by_name):
        _run(facts, by_name[name])
    return 0


def _run(facts: Facts, check: Check) -> None:
    started = time.monotonic()
    try:
        found = _dropout(check) if check.dropout else _compare(check)
    except Exception as error:
        lost = not answers(DEVICE)
        facts.note(PART, item=check.name, done=True, ok=False, error=first_line(error), lost=lost)
        if lost:
            sys.exit(isolated.LOST)
        return
    seconds = round(time.monotonic() - started, 2)
    facts.note(PART, item=check.name, done=True, seconds=seconds, **found)


def _compare(check: Check) -> dict[str, object]:
    chosen = _setting(check)
    exact = replace(chosen, dtype=torch.float64)
    truth = _reference(exact, check.swapped_in)
    theirs = _errors(_reference(chosen, check.swapped_in), truth)
    with kernels_of(check.operators):
        mine = _errors(_loss_and_gradients(chosen, check.swapped_in), truth)
    floor = _FLOORS[check.dtype]
    allowed = {name: max(_TIMES_THE_REFERENCES * theirs[name], floor) for name in mine}
    # The worst first; not a number is worst.
    excess = {name: math.inf if math.isnan(error) else error / allowed[name] for name, error in mine.items()}
    ordered = sorted(excess, key=excess.__getitem__, reverse=True)
    wrong = [name for name in ordered if excess[name] > 1.0]
    return {
        "ok": not wrong,
        "not_finite": any(map(math.isnan, mine.values())),
        "loss_error": mine["loss"],
        "wrong": wrong[:6],
        "worst": {name: [mine[name], theirs[name]] for name in ordered[:3]},
    }


def _dropout(check: Check) -> dict[str, object]:
    losses = {}
    for side, operators in (("kernels", check.operators), ("reference", ())):
        with kernels_of(operators):
            losses[side] = _losses_with_dropout(_setting(check))
    difference = float(losses["kernels"].mean() / losses["reference"].mean() - 1)
    means = {side: float(each.mean()) for side, each in losses.items()}
    return {"ok": abs(difference) <= _DROPOUT_TOLERANCE, "difference": difference, **means}


def _losses_with_dropout(chosen: Setting) -> Tensor:
    model, batch, losses = _build(chosen, swapped_in=False), padded_batch(chosen.architecture), []
    for seed in range(_DROPOUT_SEEDS):
        torch.manual_seed(seed)
        model.forward_backward(batch, chosen.dtype)
        bad = [name for name, each in model.module.named_parameters() if not each.grad.isfinite().all()]
        if bad:
            raise FloatingPointError(f"gradients that are not finite: {bad[:6]}")
        torch.manual_seed(seed)
        with torch.no_grad(), autocast(chosen.device, chosen.dtype):
            losses.append(model.loss(batch).double().cpu())
    return torch.stack(losses)


def _setting(check: Check) -> Setting:
    chosen = architecture(check.model)
    if check.layers is not None:
        chosen = chosen.changed(layers=min(chosen.layers, check.layers))
    return setting(chosen if check.dropout else chosen.without_dropout(), check.dtype, padded=True)


@lru_cache(maxsize=8)
def _reference(chosen: Setting, swapped_in: bool) -> dict[str, Tensor]:
    with kernels_of(()):
        return _loss_and_gradients(chosen, swapped_in)


def _loss_and_gradients(chosen: Setting, swapped_in: bool) -> dict[str, Tensor]:
    """On the CPU, in float64."""
    model, batch = _build(chosen, swapped_in), padded_batch(chosen.architecture)
    if chosen.dtype == torch.float64:
        model.module.double()
        batch = replace(batch, waveforms=batch.waveforms.double())
    torch.manual_seed(batch.seed)
    # float64 needs no autocast, as float32.
    with autocast(chosen.device, torch.float32 if chosen.dtype == torch.float64 else chosen.dtype):
        loss = model.loss(batch)
    loss.backward()
    gradients = {name: each.grad.double().cpu() for name, each in model.module.named_parameters()}
    return {"loss": loss.detach().double().cpu(), **gradients}


def _build(chosen: Setting, swapped_in: bool) -> PeerModel:
    # The weights and the mask do not depend on the dtype.
    weights = weights_of(replace(chosen, dtype=torch.float32))
    with chosen.device:
        return (HubertFastSwappedIn() if swapped_in else HubertFast()).build(chosen, weights)


def _errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative to the norm; of a gradient that is 0 but for rounding (the key's bias) to that of the query's."""
    norms = {name: truth[name.replace("k_proj.bias", "q_proj.bias")].norm() for name in truth}
    return {name: float((found[name] - truth[name]).norm() / norms[name].clamp(min=1e-30)) for name in truth}


if __name__ == "__main__":
    with tf32.allowed(False):  # the reference's products are to be as exact as float32 gets
        sys.exit(main())
