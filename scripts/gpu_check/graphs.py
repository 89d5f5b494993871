"""Updates in CUDA graphs (`hubert_fast.GraphedStep`): are they those of a plain loop, how fast, and what is captured.

    python -m scripts.gpu_check.graphs OUT         # an item that fails is noted, and a new process does the others
    python -m scripts.gpu_check.graphs OUT here    # in this process

HuBERT Base, bfloat16, 175 s of audio, 500 classes, dropout on. A plain loop is given the same capacities, so that both compute
rows of the same number. On a CPU, which tries the script, the tests' stand-in captures.
"""

from __future__ import annotations

import dataclasses
import gc
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import hubert_fast
from benchmarks.batches import SAMPLE_RATE, Batch, make
from benchmarks.lost_device import first_line
from hubert_fast import tf32
from scripts.gpu_check import isolated
from scripts.gpu_check.device import DEVICE, ON_GPU
from scripts.gpu_check.facts import facts_of_process
from scripts.gpu_check.graphed import (
    AUTOCAST,
    CLIP_NORM,
    LEARNING_RATE,
    CountedCapture,
    Example,
    adamw,
    capacities_of,
    even_lengths,
    free_what_is_left,
    in_autocast,
    lengths_of_batch,
    made_by,
    make_example,
    make_graphed,
    make_objective,
    of_one_capacity,
    pinned,
    planned_example,
    until_all_captured,
    until_captured,
)  # fmt: skip
from scripts.gpu_check.models import NUM_CLASSES, architecture, leave_out_broken
from scripts.gpu_check.timing import Times

PART = "graphs"
LAYER_DROP = 0.05  # of the published recipe

# Relative, of the gradients of a group of parameters and of a loss. Both sides run the same kernels on the same shapes.
_NEAR_GRADIENT, _NEAR_LOSS = 0.01, 0.01
_UPDATES = 20 if ON_GPU else 6
_ROUNDS = 6 if ON_GPU else 1
_Gradients = dict[str, Optional[Tensor]]


def main() -> int:
    facts = facts_of_process()
    if sys.argv[2:] != ["here"]:
        code = isolated.run(facts, PART, "scripts.gpu_check.graphs", "here", item_seconds=20, first_seconds=40)
        wrong = [each["item"] for each in facts.of(PART) if "failed" in each or each.get("ok") is False]
        if wrong:
            print(f"error: {', '.join(wrong)}")
        return code or int(bool(wrong))
    leave_out_broken(facts)
    with tf32.allowed(True):
        for name in isolated.Items(facts, PART).left(ITEMS):
            started = time.monotonic()
            try:
                found = ITEMS[name]()
            except Exception as error:
                traceback.print_exc()
                facts.note(PART, item=name, failed=first_line(error))
                if ON_GPU:  # a capture that broke off leaves PyTorch's allocator in its midst
                    return isolated.LOST
            else:
                facts.note(PART, item=name, done=True, seconds=round(time.monotonic() - started, 1), **found)
            free_what_is_left()
    return 0


# Comparison


def _gradients(layer_drop: float) -> dict[str, Any]:
    """Gradients of a graphed step, as it runs, captured, and replayed on another batch after one of another capacity."""
    objective = make_objective(layer_drop)
    graphed = make_graphed(objective)
    first, second = of_one_capacity(graphed.step)
    shorter = make_example(graphed.step, lengths_of_batch(0.7), 0)
    found = {"as it runs": _compared(objective, graphed.step, [first])}
    runs = 1 + until_captured(graphed, [first])
    graphs = graphed.capture.graphs
    found["captured"] = _compared(objective, graphed.step, [first])
    until_captured(graphed, [shorter])
    found["another capacity"] = _compared(objective, graphed.step, [shorter])
    found["another batch"] = _compared(objective, graphed.step, [second])
    twice = [_of_graphs(objective, graphed.step, [second], seed=5) for _ in range(2)]
    repeats = all(_equal(twice[0][name], twice[1][name]) for name in twice[0])
    return _verdict(found, repeats, repeats=repeats, graphs=graphs, runs_before_capture=runs)


def _accumulated() -> dict[str, Any]:
    """Two micro-batches an update, of one capacity: the first runs as it is, the second captures."""
    objective = make_objective(0.0)
    graphed = make_graphed(objective)
    both = of_one_capacity(graphed.step)
    found = {str(number): _compared(objective, graphed.step, both) for number in (1, 2, 3)}
    found["in the other order"] = _compared(objective, graphed.step, both[::-1])
    return _verdict(found, graphs=graphed.capture.graphs)


def _fits_none() -> dict[str, Any]:
    """A batch that is larger than every capacity, before and after a capacity was captured."""
    objective = make_objective(0.0)
    graphed = make_graphed(objective)
    longer = make_example(graphed.step, lengths_of_batch(1.1), 0)
    found = {"before": _compared(objective, graphed.step, [longer])}
    until_captured(graphed, [make_example(graphed.step, lengths_of_batch(), 0)])
    graphs = graphed.capture.graphs
    found["after"] = _compared(objective, graphed.step, [longer])
    eager = not longer.planned.fits and graphed.capture.graphs == graphs
    return _verdict(found, eager, eager=eager)


def _full() -> dict[str, Any]:
    """One capacity may be captured; another runs eagerly from then on."""
    objective = make_objective(0.0)
    graphed = make_graphed(objective, most_graphs=1)
    first, shorter = (
        make_example(graphed.step, lengths_of_batch(), 0),
        make_example(graphed.step, lengths_of_batch(0.7), 0),
    )
    until_captured(graphed, [first])
    graphs = graphed.capture.graphs
    found = {f"other, {number}": _compared(objective, graphed.step, [shorter]) for number in (1, 2, 3)}
    found["first"] = _compared(objective, graphed.step, [first])
    return _verdict(found, graphed.capture.graphs == graphs, graphs=graphs)


def _updates() -> dict[str, Any]:
    """Losses and weights after the same updates by a graphed step and by a plain loop."""
    ours, theirs = make_objective(LAYER_DROP), make_objective(LAYER_DROP)
    graphed, by_hand = make_graphed(ours), adamw(theirs)
    examples = [*of_one_capacity(graphed.step), make_example(graphed.step, lengths_of_batch(0.7), 0)]
    before = _flat(theirs)
    losses: dict[str, list[Tensor]] = {"graphed": [], "plain": []}
    for number in range(_UPDATES):
        example = examples[number % len(examples)]
        torch.manual_seed(number)
        result = graphed.step([example.planned])
        losses["graphed"].append(result.mean)
        torch.manual_seed(number)
        losses["plain"].append(_plain_gradients(theirs, [example]))
        nn.utils.clip_grad_norm_(theirs.parameters(), CLIP_NORM)
        by_hand.step()
    mine, plain = (torch.stack([each.double() for each in losses[side]]).cpu() for side in ("graphed", "plain"))
    away, after = (mine / plain - 1).abs(), _flat(theirs)
    weights_away = float((_flat(ours) - after).norm() / (after - before).norm())
    return {
        "ok": bool(away.max() <= _NEAR_LOSS),
        "updates": _UPDATES,
        "graphs": graphed.capture.graphs,
        "loss_away": float(away.max()),
        "weights_away": weights_away,  # of the way that the plain ones went
        "graphed": mine.tolist(),
        "plain": plain.tolist(),
    }


def _optimizers() -> dict[str, Any]:
    """Each optimizer: whether it is captured, and its cost on the host where it is not."""
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "AdamW, fused": lambda each: torch.optim.AdamW(each, LEARNING_RATE, fused=True),
        "AdamW": lambda each: torch.optim.AdamW(each, LEARNING_RATE, foreach=True),
        "SGD, fused": lambda each: torch.optim.SGD(each, LEARNING_RATE, momentum=0.9, fused=True),
    }
    if ON_GPU:
        makers["AdamW, capturable"] = lambda each: torch.optim.AdamW(each, LEARNING_RATE, capturable=True)
    found, well = {}, True
    for name, make_optimizer in makers.items():
        free_what_is_left()
        objective = make_objective(0.0)
        graphed = make_graphed(objective, make_optimizer(objective.parameters()))
        example, times = make_example(graphed.step, lengths_of_batch(), 0), Times()
        for _ in range(3):
            graphed.step([example.planned])
        for _ in range(3):
            times.take(graphed.step, [example.planned])
        finite = bool(_flat(objective).isfinite().all())
        well &= finite and (graphed.optimizers.graphs > 0) == (name != "AdamW")
        found[name] = {"graphs": graphed.optimizers.graphs, "finite": finite, **times.figures()}
    return {"ok": well, **found}


# Timing


def _timed(layer_drop: float) -> dict[str, Any]:
    """An update, graphed and eager in turn; its memory."""
    batches = [make(even_lengths(), architecture("base"), NUM_CLASSES, seed=number) for number in range(4)]
    batches = [pinned(each) for each in batches]
    memory = _Memory()
    theirs = make_objective(layer_drop)
    by_hand = adamw(theirs)

    def eager(batch: Batch) -> None:
        with in_autocast():
            waveforms, labels = (each.to(DEVICE, non_blocking=True) for each in (batch.waveforms, batch.labels))
            output = theirs(waveforms, labels, batch.lengths, mask=batch.mask)
        (output.loss / int(batch.mask.sum())).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), CLIP_NORM)
        by_hand.step()
        by_hand.zero_grad(set_to_none=True)

    for batch in batches:
        eager(batch)
    eager_memory, memory = memory.taken(), _Memory()  # what is left of eager ones is given back
    ours = make_objective(layer_drop)
    graphed = make_graphed(ours, capacities=capacities_of(even_lengths()))
    examples = [planned_example(graphed.step, each) for each in batches]
    until_all_captured(graphed, examples)
    graphed_memory = memory.taken()
    capture, optimizers = graphed.capture, graphed.optimizers
    capture.launches = optimizers.launches = 0
    times = {"graphed": Times(), "eager": Times()}
    sides = {"graphed": lambda i: graphed.step([examples[i].planned]), "eager": lambda i: eager(batches[i])}
    for number in range(_ROUNDS):
        for name, call in sides.items():
            torch.manual_seed(number)  # the same layers are dropped on both sides
            for i in range(len(batches)):
                times[name].take(call, i)
    return {
        "audio_s": batches[0].audio_seconds,
        **times["graphed"].figures(),
        **{f"eager_{name}": value for name, value in times["eager"].figures().items()},
        "capacities": len({each.planned.capacity for each in examples}),
        "launches": (capture.launches + optimizers.launches) / len(times["graphed"].whole),
        "graphs": capture.graphs,
        "capture_s": capture.seconds,
        "optimizer_graphs": optimizers.graphs,
        "optimizer_capture_s": optimizers.seconds,
        "memory_gib": graphed_memory,
        "eager_memory_gib": eager_memory,
        "predicted_gib": _predicted_bytes(ours, batches[0]) / 2**30,
    }


def _extraction() -> dict[str, Any]:
    """Units of layer 6 for calls of 300 s of audio."""
    from hubert_fast.pretrain import features
    from hubert_fast.pretrain.codebook import Codebook

    seconds, utterances, calls = (10.0, 30, 8) if ON_GPU else (0.5, 2, 3)
    model = make_objective(0.0).model.eval()
    layer = min(6, len(model.wav2vec2.encoder.transformer.layers))
    dim = model.wav2vec2.encoder.transformer.pos_conv_embed.embed_dim
    rng = np.random.default_rng(0)
    waveforms = [
        rng.standard_normal(round(seconds * SAMPLE_RATE)).astype(np.float32) for _ in range(utterances * calls)
    ]
    codebooks = {layer: Codebook(rng.standard_normal((NUM_CLASSES, dim)).astype(np.float32))}
    device = torch.device(DEVICE, 0) if ON_GPU else torch.device(DEVICE)
    units, figures = {}, {}
    for name in ("graphed", "eager"):
        free_what_is_left()
        with mock.patch.object(features, "load_model", lambda weights: model):
            layers = features.ModelLayers(Path(), device=device, autocast=AUTOCAST is not None)
        layers.call_seconds = utterances * seconds
        capture = CountedCapture(made_by(layers._capture)) if name == "graphed" else None
        layers._capture = capture
        layers._start = started = _Host(layers._start)
        call = waveforms, codebooks, layer, layer
        units[name] = np.concatenate(layers._assign_on_device(*call)[layer])  # compiles and captures
        started.seconds.clear()
        times = Times()
        for _ in range(2):
            times.take(layers._assign_on_device, *call)
        whole = min(times.whole)
        figures[name] = {
            "audio_seconds_per_second": utterances * calls * seconds / whole,
            "ms_a_call": 1e3 * whole / calls,
            "host_ms_a_call": 1e3 * float(np.median(started.seconds)),
            "graphs": 0 if capture is None else capture.graphs,
        }
    # A bfloat16 frame between two centroids may go to the other one where rows are rounded up.
    alike = float((units["graphed"] == units["eager"]).mean())
    return {"ok": alike >= 0.98, "alike": alike, "layer": layer, **figures}


class _Host:
    """``call``, whose seconds on the host are kept."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.seconds: list[float] = []

    def __call__(self, *arguments: Any) -> Any:
        started = time.perf_counter()
        result = self._call(*arguments)
        self.seconds.append(time.perf_counter() - started)
        return result


class _Memory:
    """Memory that PyTorch holds, and the device, from here on."""

    def __init__(self) -> None:
        self._before = self._held()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()

    def taken(self) -> Optional[dict[str, float]]:
        """GiB more than at the beginning: the peak of what was allocated, what is reserved, what the device lacks.

        The last has the graphs themselves too, which lie in memory of the driver.
        """
        if not ON_GPU:
            return None
        peak = torch.cuda.max_memory_allocated()
        now = {"allocated": peak, **{name: value for name, value in self._held().items() if name != "allocated"}}
        return {name: (value - self._before[name]) / 2**30 for name, value in now.items()}

    def _held(self) -> dict[str, int]:
        gc.collect()
        if not ON_GPU:
            return {}
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        return {"allocated": torch.cuda.memory_allocated(), "reserved": reserved, "device": total - free}


def _plain_gradients(objective: hubert_fast.PretrainingObjective, examples: Sequence[Example]) -> Tensor:
    """Gradients of the loss per masked frame, by autograd over the whole objective; returns the loss."""
    objective.zero_grad(set_to_none=True)
    frames = sum(each.planned.masked_frames for each in examples)
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for batch, planned in examples:
        plan = objective.plan(
            batch.labels,
            batch.lengths,
            samples=batch.waveforms.shape[1],
            device=DEVICE,
            mask=batch.mask,
            rows=planned.capacity.rows if planned.fits else None,
            kept=planned.capacity.kept if planned.fits else None,
        )
        with in_autocast():
            loss = objective(batch.waveforms.to(DEVICE), plan=plan).loss
        (loss * (1 / frames)).backward()
        total += loss.detach() / frames
    return total


def _of(objective: nn.Module) -> _Gradients:
    named = objective.named_parameters()
    return {name: None if each.grad is None else each.grad.detach().clone() for name, each in named}


def _of_graphs(
    objective: nn.Module, step: hubert_fast.GraphedStep, examples: Sequence[Example], *, seed: int
) -> _Gradients:
    torch.manual_seed(seed)
    step.gradients([each.planned for each in examples])
    return _of(objective)


class _Comparison(NamedTuple):
    equal: bool  # to the bit
    errors: dict[str, float]  # relative, by group of parameters


def _compared(
    objective: hubert_fast.PretrainingObjective, step: hubert_fast.GraphedStep, examples: Sequence[Example]
) -> _Comparison:
    """The graphed step's gradients beside those of the objective, with the same random numbers."""
    mine = _of_graphs(objective, step, examples, seed=3)
    torch.manual_seed(3)
    _plain_gradients(objective, examples)
    theirs = _of(objective)
    sums: dict[str, list[float]] = {}
    for name in theirs:
        away, whole = sums.setdefault(_group(name), [0.0, 0.0])
        if (mine[name] is None) != (theirs[name] is None):
            away = float("inf")
        elif theirs[name] is not None:
            away += float((mine[name].double() - theirs[name].double()).square().sum())
            whole += float(theirs[name].double().square().sum())
        sums[_group(name)] = [away, whole]
    errors = {group: (away / whole) ** 0.5 if whole else away for group, (away, whole) in sums.items()}
    return _Comparison(all(_equal(mine[name], theirs[name]) for name in theirs), errors)


def _equal(one: Optional[Tensor], other: Optional[Tensor]) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _group(name: str) -> str:
    layer = re.search(r"transformer\.layers\.(\d+)\.", name)
    if layer:
        return f"layer {layer[1]}"
    groups = ("feature_extractor", "feature_projection", "pos_conv_embed", "mask_generator", "logit_generator")
    return next((each for each in groups if each in name), "last norm")


def _verdict(found: dict[str, _Comparison], also: bool = True, **more: Any) -> dict[str, Any]:
    """``also``: whether all else is as it should be."""
    worst = {name: max(each.errors.items(), key=lambda item: _finite_or_inf(item[1])) for name, each in found.items()}
    near = all(error <= _NEAR_GRADIENT for _, error in worst.values())
    wrong = {name: found[name].errors for name, (_, error) in worst.items() if not error <= _NEAR_GRADIENT}
    equal = {name: each.equal for name, each in found.items()}
    return {"ok": near and also, **more, "equal": equal, "worst": worst, "wrong": wrong}


def _finite_or_inf(error: float) -> float:
    return error if error == error else float("inf")


def _flat(objective: nn.Module) -> Tensor:
    return torch.cat([each.detach().double().flatten() for each in objective.parameters()])


def _predicted_bytes(objective: hubert_fast.PretrainingObjective, batch: Batch) -> int:
    from hubert_fast.pretrain.config import ModelConfig
    from hubert_fast.pretrain.memory_model import MemoryModel

    arguments = architecture("base").factory_arguments(NUM_CLASSES)
    names = {each.name for each in dataclasses.fields(ModelConfig)}
    config = ModelConfig(**{name: value for name, value in arguments.items() if name in names})
    memory = MemoryModel(config, sum(each.numel() for each in objective.parameters()), AUTOCAST is not None)
    return memory.peak(memory.largest(*batch.waveforms.shape))


ITEMS: dict[str, Callable[[], dict[str, Any]]] = {
    "gradients": lambda: _gradients(0.0),
    "time": lambda: _timed(0.0),
    "updates": _updates,
    "time, LayerDrop": lambda: _timed(LAYER_DROP),
    "gradients, LayerDrop 0.5": lambda: _gradients(0.5),
    "two micro-batches": _accumulated,
    "a batch that fits no capacity": _fits_none,
    "optimizers": _optimizers,
    "most_graphs": _full,
    "extraction": _extraction,
}


if __name__ == "__main__":
    sys.exit(main())
