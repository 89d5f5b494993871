"""Each switch of `hubert_fast.switches` on and off: the same update in graphs, timed in turn, and its gradients.

    python -m scripts.gpu_check.switches OUT

HuBERT Base, bfloat16, 175 s of audio, LayerDrop 0. Beside each is what it was predicted to save (benchmarks/predictions.py).
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch

from benchmarks.lost_device import first_line
from benchmarks.predictions import SWITCHES
from hubert_fast import tf32
from hubert_fast.switches import Switches, switched
from scripts.gpu_check.device import ON_GPU
from scripts.gpu_check.facts import facts_of_process
from scripts.gpu_check.graphed import (
    Example,
    Graphed,
    capacities_of,
    even_lengths,
    free_what_is_left,
    make_example,
    make_graphed,
    make_objective,
)  # fmt: skip
from scripts.gpu_check.models import leave_out_broken
from scripts.gpu_check.timing import Times

PART = "switches"

_ROUNDS = 12 if ON_GPU else 1
_NEAR = 0.02  # relative, of all gradients: both sides round, at other places


def main() -> int:
    facts = facts_of_process()
    leave_out_broken(facts)
    wrong = False
    with tf32.allowed(True):
        for field in dataclasses.fields(Switches):
            try:
                found = _on_and_off(field.name)
            except Exception as error:
                facts.note(PART, item=field.name, failed=first_line(error))
                return 1  # a capture that broke off leaves PyTorch's allocator in its midst
            facts.note(PART, item=field.name, predicted_ms=SWITCHES[field.name], **found)
            wrong |= not found["ok"]
            free_what_is_left()
    return int(wrong)


def _on_and_off(name: str) -> dict[str, Any]:
    sides = {value: _captured(name, value) for value in (True, False)}
    times = {value: Times() for value in sides}
    for _ in range(_ROUNDS):
        for value, (graphed, example) in sides.items():
            times[value].take(graphed.step.gradients, [example.planned])
    on, off = (_gradients(*sides[value]) for value in (True, False))
    away = float((on - off).norm() / off.norm())
    on_ms, off_ms = (times[value].figures()["ms"] for value in (True, False))
    return {"ok": away <= _NEAR, "on_ms": on_ms, "off_ms": off_ms, "saved_ms": off_ms - on_ms, "gradients_away": away}


def _captured(name: str, value: bool) -> tuple[Graphed, Example]:
    """A step whose graphs have the switch at ``value``; what a graph holds does not change with it afterwards."""
    with switched(**{name: value}):
        graphed = make_graphed(make_objective(0.0), capacities=capacities_of(even_lengths()))
        example = make_example(graphed.step, even_lengths(), 0)
        for _ in range(3):
            graphed.step.gradients([example.planned])
    if graphed.capture.graphs == 0:
        raise RuntimeError(f"{name}={value}: nothing was captured in three runs")
    return graphed, example


def _gradients(graphed: Graphed, example: Example) -> torch.Tensor:
    torch.manual_seed(0)
    graphed.step.gradients([example.planned])
    parameters = graphed.step._parameters
    return torch.cat([each.grad.detach().double().flatten() for each in parameters if each.grad is not None])


if __name__ == "__main__":
    sys.exit(main())
