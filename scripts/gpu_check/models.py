"""The models, batches and backends of the check's stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import hubert_fast
from benchmarks.architecture import ARCHITECTURES, Architecture
from benchmarks.batches import SAMPLE_RATE, Batch, even, make
from benchmarks.operators import OPERATORS as MEASURED
from benchmarks.peers.peer import Setting
from scripts.gpu_check.device import DEVICE, ON_GPU
from scripts.gpu_check.facts import Facts

NUM_CLASSES = 500

# Those of a training step that have kernels; masks are drawn on the host.
OPERATORS = tuple(each for each in MEASURED if each != "span_mask")

# The kernels that are checked, by name: "auto" would check PyTorch's formulation where they cannot run, and say that all is well.
# feed_forward's know neither float32 nor dropout, with which other operators make it up. A CPU, which stands in to try the
# script, has none of them, and may compute many times more slowly in bfloat16.
_BY_NAME = {"conv_frontend": "cuda", "feed_forward": "auto"}
KERNELS = {each: _BY_NAME.get(each, "triton") if ON_GPU else "torch" for each in OPERATORS}
DTYPE = "bfloat16" if ON_GPU else "float32"


def architecture(name: str) -> Architecture:
    """A published one; on a CPU "tiny", with the norms of ``name``."""
    if ON_GPU:
        return ARCHITECTURES[name]
    like = ARCHITECTURES[name]
    return ARCHITECTURES["tiny"].changed(norm=like.norm, pre_norm=like.pre_norm)


def setting(chosen: Architecture, dtype: str, *, padded: bool = False) -> Setting:
    return Setting(chosen, NUM_CLASSES, torch.device(DEVICE), getattr(torch, dtype), padded)


def full_batches(chosen: Architecture, count: int) -> list[Batch]:
    """Of 175 s of audio without padding: 14 x 12.5 s. On a CPU of 1 s."""
    lengths = even(14, 12.5) if ON_GPU else even(2, 0.5)
    return [make(lengths, chosen, NUM_CLASSES, seed=number).to(DEVICE) for number in range(count)]


def padded_batch(chosen: Architecture) -> Batch:
    """Three utterances of different lengths."""
    seconds = (12.5, 9.0, 3.0) if ON_GPU else (0.6, 0.5, 0.4)
    return make([round(each * SAMPLE_RATE) for each in seconds], chosen, NUM_CLASSES, seed=1).to(DEVICE)


@contextmanager
def kernels_of(operators: tuple[str, ...]) -> Iterator[None]:
    """Inside it ``operators`` run on their kernels, all others by the reference's formulas."""
    with hubert_fast.backend.using("reference"):
        for each in operators:
            hubert_fast.backend.use(KERNELS[each], each)
        if "bias_gelu_dropout" in operators and "feed_forward" not in operators:
            hubert_fast.backend.use("torch", "feed_forward")  # calls it, as neither the formula nor the kernels do
        yield


def leave_out_broken(facts: Facts) -> list[str]:
    """Have operators whose kernels `smoke` found broken run by PyTorch, so that all else can still be measured.

    Broken are those that ended their process, raised an error or gave no numbers in any dtype, or wrong ones in bfloat16, which
    is what is measured.
    """
    broken = [name for name in OPERATORS if any(_is_broken(name, each) for each in facts.of("smoke"))]
    for each in broken:
        hubert_fast.backend.use("torch", each)
    if broken:
        facts.note("left out", operators=broken, why="smoke found them broken: PyTorch's operations run in their place")
    return broken


def _is_broken(operator: str, fact: dict[str, Any]) -> bool:
    if not fact["item"].startswith(f"{operator}, "):
        return False
    if "failed" in fact or "error" in fact or fact.get("not_finite"):
        return True
    return fact["ok"] is False and fact["item"] == f"{operator}, bfloat16"
