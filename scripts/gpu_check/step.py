"""How fast: whole training steps, sides in turn in one process, and where our step's time goes.

    python -m scripts.gpu_check.step OUT [peers]           # a side that ends its process is noted, and the others go on
    python -m scripts.gpu_check.step OUT NAME here         # NAME "ours" or "peers", in this process

HuBERT Base, bfloat16, 175 s of audio without padding, 500 classes, dropout on, LayerDrop off.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Optional

import torch

import hubert_fast
from benchmarks.clock import synchronize
from benchmarks.flops import step_flops
from benchmarks.lost_device import answers, first_line
from benchmarks.memory import held_by, peak_of
from benchmarks.peers import PEERS
from benchmarks.peers.agreement import DifferentWork, check
from benchmarks.peers.peer import Peer, PeerModel, Setting
from benchmarks.training import TrainingStep
from hubert_fast import tf32
from scripts.gpu_check import isolated
from scripts.gpu_check.device import DEVICE, ON_GPU
from scripts.gpu_check.facts import Facts, facts_of_process
from scripts.gpu_check.models import DTYPE, NUM_CLASSES, architecture, full_batches, leave_out_broken, setting
from scripts.gpu_check.profile import profile
from scripts.gpu_check.timing import Times

SIDES = {
    "ours": ("hubert_fast", "torchaudio", "hubert_fast graph"),
    "peers": (
        "hubert_fast", "hubert_fast swapped in", "transformers sdpa", "torchaudio masked only",
        *(("minimal-hubert", "torchaudio compiled") if ON_GPU else ()),  # to compile takes minutes on a CPU
    ),
}  # fmt: skip
# Seconds that a side may take, and the first with the imports before it.
_LIMITS = {
    "ours": {"item_seconds": 40, "first_seconds": 60},
    "peers": {"item_seconds": 150, "first_seconds": 60},
}

_BATCHES = 4
_ROUNDS = 12 if ON_GPU else 2
# Medians so far are noted after these rounds, for a process that is stopped.
_NOTED_AFTER = (1, 3, 6, _ROUNDS)


@dataclass
class _Side:
    name: str
    step: TrainingStep
    times: Times = field(default_factory=Times)


def main() -> int:
    facts = facts_of_process()
    sides = sys.argv[2] if sys.argv[2:] else "ours"
    if sys.argv[3:] != ["here"]:
        return isolated.run(facts, part_of_facts(sides), "scripts.gpu_check.step", sides, "here", **_LIMITS[sides])
    leave_out_broken(facts)
    # As the suite sets them: shapes repeat, and all sides compute in TF32 what they compute in float32.
    torch.backends.cudnn.benchmark = True
    with tf32.allowed(True):
        _measure(facts, sides)
    return 0


def part_of_facts(sides: str) -> str:
    """Facts of both stages are read alike, and are told apart by this name."""
    return "step" if sides == "ours" else "step peers"


def _measure(facts: Facts, which: str) -> None:
    part = part_of_facts(which)
    items = isolated.Items(facts, part)
    chosen = setting(architecture("base"), DTYPE)
    batches = full_batches(chosen.architecture, _BATCHES)
    weights = _weights(chosen)
    flops = step_flops(chosen.architecture, batches[0].samples, NUM_CLASSES, int(batches[0].mask.sum()))
    sides = []
    for name in items.left(SIDES[which]):
        side = _built(facts, part, name, chosen, weights, batches)
        if side is not None:
            sides.append(side)
    for number in range(1, _ROUNDS + 1):
        for side in list(sides):
            items.begin(side.name)
            try:
                _round(side, batches, chosen)
            except Exception as error:
                sides.remove(side)
                _note_failure(facts, part, side.name, error)
        if number in _NOTED_AFTER:
            for side in sides:
                figures = _figures(side, flops)
                facts.note(part, peer=side.name, rounds=number, audio_s=batches[0].audio_seconds, **figures)
    ours = next((side for side in sides if side.name == "hubert_fast"), None)
    for _ in items.left(["profile"] if which == "ours" and ours is not None else []):
        profile(facts, ours.step, batches, chosen, statistics.median(ours.times.whole))


def _weights(chosen: Setting) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        arguments = chosen.architecture.factory_arguments(NUM_CLASSES)
        return hubert_fast.hubert_pretrain_model(**arguments).state_dict()


def _built(facts: Facts, part: str, name: str, chosen: Setting, weights, batches) -> Optional[_Side]:
    """The side after its first steps, or None where it cannot run here or fails, which is noted."""
    peer = PEERS[name]
    reason = peer.why_not(chosen)
    if reason is not None:
        facts.note(part, item=name, failed=reason)
        return None
    try:
        differences = _check(peer, chosen)
        before = _reserved()
        with chosen.device:
            model = peer.build(chosen, weights)
        step = TrainingStep(model)
        started = time.monotonic()
        step(batches[0], chosen.dtype)
        synchronize(DEVICE)
        first = round(time.monotonic() - started, 2)
        _round(_Side(name, step), batches, chosen)  # captures graphs and chooses kernels
        memory = _memory(model, step, chosen, batches, before)
    except Exception as error:
        _note_failure(facts, part, name, error)
        return None
    facts.note(part, peer=name, version=peer.version(), check=differences, first_s=first, **memory)
    return _Side(name, step)


def _note_failure(facts: Facts, part: str, name: str, error: Exception) -> None:
    facts.note(part, item=name, failed=first_line(error))
    if not answers(DEVICE):
        sys.exit(isolated.LOST)


def _check(peer: Peer, chosen: Setting) -> dict[str, float] | str:
    """How far the peer is from the reference; one of others that does other work is not timed.

    Ours is timed all the same: `smoke` tells what is wrong with it, and a fault in float32 says nothing of a bfloat16 step.
    """
    try:
        return check(peer, chosen)
    except DifferentWork as error:
        if not peer.name.startswith("hubert_fast"):
            raise
        return first_line(error)


def _reserved() -> float:
    """GiB that PyTorch holds on the GPU for what lives."""
    gc.collect()
    if not ON_GPU:
        return 0.0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / 2**30


def _memory(
    model: PeerModel, step: TrainingStep, chosen: Setting, batches, before: float
) -> dict[str, Optional[float]]:
    peak = peak_of(lambda: step(batches[0], chosen.dtype), chosen.device)
    # A graph's memory lies in a pool of its own, of which a replay says nothing; what is reserved more than before has it.
    reserved = _reserved() - before if ON_GPU else None
    if peak is None or model.overwrites_gradients:
        return {"peak_gib": None, "reserved_gib": reserved}
    return {"peak_gib": (held_by(model.module, step.optimizer) + peak) / 2**30, "reserved_gib": reserved}


def _round(side: _Side, batches, chosen: Setting) -> None:
    """A step on each batch. Every round draws the same masks: other numbers of masked frames may want another graph."""
    torch.manual_seed(0)
    for batch in batches:
        side.times.take(side.step, batch, chosen.dtype)


def _figures(side: _Side, flops: float) -> dict[str, float]:
    return {**side.times.figures(), "tflops": flops / statistics.median(side.times.whole) / 1e12}


if __name__ == "__main__":
    sys.exit(main())
