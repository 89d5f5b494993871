"""Does it learn the same: one training on the kernels and on the reference, and on the reference from another seed.

    python -m scripts.gpu_check.converge OUT

Tones of sixteen pitches, their numbers the labels; bfloat16, dropout off. The kernels follow the reference where the mean loss
of the last tenth of the steps is nearer to the reference's than that of the reference's other seed is, or within `_NEAR`.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

import hubert_fast
from benchmarks.architecture import Architecture
from benchmarks.peers.peer import autocast
from scripts.gpu_check.device import DEVICE, ON_GPU
from scripts.gpu_check.facts import Facts, facts_of_process
from scripts.gpu_check.models import DTYPE, architecture, leave_out_broken

_STEPS = 300 if ON_GPU else 4
_LAYERS = 4 if ON_GPU else 1
_ROWS, _SAMPLES = (8, 48_000) if ON_GPU else (2, 6_000)
_BATCHES = 16
_TONES = 16
_NEAR = 0.01

# (what it is called, backend, seed)
_RUNS = (("reference", "reference", 0), ("kernels", "auto", 0), ("reference, other seed", "reference", 1))


def main() -> int:
    facts = facts_of_process()
    chosen = architecture("base").without_dropout().changed(layers=_LAYERS)
    batches = _batches(chosen)
    curves = {}
    for name, backend, seed in _RUNS:
        started = time.monotonic()
        curves[name] = losses(chosen, batches, backend, seed, facts)
        every = max(1, _STEPS // 10)
        shown = [round(each, 4) for each in curves[name][::every].tolist()]
        facts.note(
            "converge", run=name, seconds=round(time.monotonic() - started, 1), losses=shown, last=_last(curves[name])
        )
    reference, kernels, other = (_last(curves[name]) for name, _, _ in _RUNS)
    away, spread = abs(kernels / reference - 1), abs(other / reference - 1)
    first = (curves["kernels"] / curves["reference"] - 1).abs()[:20]
    ok = away <= max(spread, _NEAR)
    facts.note("converge", run="verdict", away=away, spread=spread, first_20_steps_away=float(first.max()), ok=ok)
    return int(not ok)


def losses(chosen: Architecture, batches: list[tuple[Tensor, ...]], backend: str, seed: int, facts: Facts) -> Tensor:
    """The mean loss of a masked frame in each step, ``[steps]`` float64."""
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        model = hubert_fast.hubert_pretrain_model(**chosen.factory_arguments(_TONES))
    objective = hubert_fast.PretrainingObjective(model).train()
    optimizer = torch.optim.AdamW(
        objective.parameters(), lr=3e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True
    )
    found = []
    with hubert_fast.backend.using(backend):
        if backend != "reference":
            leave_out_broken(facts)
        for number in range(_STEPS):
            with autocast(torch.device(DEVICE), getattr(torch, DTYPE)):
                result = objective(*batches[number % len(batches)])
            loss = result.mean
            loss.backward()
            torch.nn.utils.clip_grad_norm_(objective.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
    return torch.stack(found).double().cpu()


def _batches(chosen: Architecture) -> list[tuple[Tensor, ...]]:
    """Waveforms ``[rows, samples]``, labels ``[rows, frames]`` and lengths, in samples."""
    generator, batches = torch.Generator().manual_seed(0), []
    frames = chosen.frames_of(_SAMPLES)
    for _ in range(_BATCHES):
        tones = torch.randint(_TONES, (_ROWS, frames), generator=generator)
        steps = tones.repeat_interleave(320, 1) * 0.03 + 0.05  # radians a sample
        steps = torch.cat([steps, steps[:, -1:].expand(-1, _SAMPLES - steps.shape[1])], 1)
        waveforms = steps.cumsum(1).sin() + 0.1 * torch.randn(_ROWS, _SAMPLES, generator=generator)
        lengths = torch.randint(_SAMPLES // 2, _SAMPLES + 1, (_ROWS,), generator=generator)
        lengths[0] = _SAMPLES
        batches.append((waveforms.to(DEVICE), tones.to(DEVICE), lengths))
    return batches


def _last(curve: Tensor) -> float:
    return float(curve[-max(1, len(curve) // 10) :].mean())


if __name__ == "__main__":
    sys.exit(main())
