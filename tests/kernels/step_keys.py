"""Prints the launches of training and evaluation that tools/aot compiles nothing for: by their keys in Triton's cache.

    python -m tests.kernels.step_keys          (without TRITON_INTERPRET)

A small batch of HuBERT Base, and in bfloat16 of Large, two layers of each, runs on a CPU with every operator on its
kernels: the objective with padding, without, and with room for more rows than there are, the model's logits, its features,
and what a graphed step captures.
The launches are noted instead of made, and nothing is compiled: Triton's launcher is only asked for their keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Optional
from unittest import mock

import torch

import hubert_fast
from benchmarks.architecture import ARCHITECTURES
from hubert_fast import cpu, tf32
from hubert_fast.kernels.launch import Launch, recording
from hubert_fast.models import plain
from hubert_fast.ops import triton_backend
from tools.aot.compiling import DTYPES, Job, key_of, launches_of
from tools.aot.launches import OPERATORS

_ARCH = 90
_CLASSES = 500
_FRAMES, _SAMPLES = 16, 16 * 320 + 80  # Triton specialises on multiples of 16: some steps have them, some have not


def steps(size: str, dtype: torch.dtype) -> Iterator[list[Launch]]:
    """Launches of training steps and of evaluation, each with the published dropout and without."""
    torch.manual_seed(0)
    *first, last = ARCHITECTURES[size].convolutions
    narrow = (*((32, *rest) for _, *rest in first), last)  # Triton's kernels see what the last one makes
    published = ARCHITECTURES[size].changed(layers=2, convolutions=narrow)
    waveforms, labels = torch.randn(2, _SAMPLES), torch.randint(0, _CLASSES, (2, _FRAMES))
    full = torch.tensor([_SAMPLES, _SAMPLES])
    padded = full - torch.tensor([0, 960])
    for architecture in dict.fromkeys((published, published.without_dropout())):  # Large has none
        model = hubert_fast.hubert_pretrain_model(**architecture.factory_arguments(_CLASSES))
        objective = hubert_fast.PretrainingObjective(model)
        for training, work in itertools.product((True, False), ("padded", "full", "room", "logits", "features")):
            model.train(training)
            with (
                recording(_ARCH) as launches,
                torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
                torch.set_grad_enabled(training),
            ):
                if work == "logits":  # the model swapped in for torchaudio's
                    loss = sum(each.square().sum() for each in model(waveforms, labels, padded))
                elif work == "features":
                    features, _ = model.wav2vec2.extract_features(waveforms, padded)
                    loss = sum(each.square().sum() for each in features)
                else:
                    lengths, capacity = padded if work == "padded" else full, 32 if work == "room" else None
                    plan = objective.plan(labels, lengths, samples=_SAMPLES, device="cpu", rows=capacity, kept=capacity)
                    loss = objective(waveforms, plan=plan).loss
            with recording(_ARCH) as backward:
                if training:
                    loss.backward()
            yield launches + backward
        model.train()
        room = hubert_fast.Capacities(rows=2 * _FRAMES, sequences=2, max_frames=_FRAMES)
        graphed = hubert_fast.GraphedStep(
            objective,
            torch.optim.SGD(model.parameters()),
            capacities=room,
            autocast=None if dtype == torch.float32 else dtype,
        )
        planned = graphed.planner(waveforms, labels, padded)
        with recording(_ARCH) as launches:
            graphed.gradients([planned])
        yield launches


def main() -> None:
    def stream_dtype(x: torch.Tensor) -> Optional[torch.dtype]:  # as on a GPU
        return torch.float32 if torch.is_autocast_enabled("cpu") else None

    with (
        mock.patch.object(triton_backend, "objection", lambda *_: None),  # that there is no GPU
        mock.patch.object(plain, "stream_dtype", stream_dtype),
        mock.patch.object(cpu, "is_cpu", lambda device: False),
    ):
        for size, dtype in (("base", "bfloat16"), ("base", "float32"), ("base", "tf32"), ("large", "bfloat16")):
            jobs = [Job(operator, size, dtype, _ARCH) for operator in OPERATORS]
            known = {key_of(launch) for job in jobs for launch in launches_of(job)}
            with tf32.allowed(dtype == "tf32"):
                launches = list(itertools.chain(*steps(size, DTYPES[dtype])))
            missing = [each for each in launches if key_of(each) not in known]
            for name in sorted({each.kernel.fn.__module__ + "." + each.kernel.__name__ for each in missing}):
                print(f"{size}, {dtype}: {name} is not compiled ahead")
            print(f"{size}, {dtype}: {len(launches)} launches looked up, {len(missing)} not compiled ahead")


if __name__ == "__main__":
    main()
