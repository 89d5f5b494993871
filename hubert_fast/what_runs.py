"""Backends that run on a batch of a given size, operator by operator, found by running one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from hubert_fast import backend
from hubert_fast.models.factories import hubert_pretrain_base
from hubert_fast.models.objective import PretrainingObjective
from hubert_fast.ops.operator import Operator

_SAMPLE_RATE = 16_000
NOT_CALLED = "-"
_WHOLE = "whole passes of PyTorch take less time than the backends for a CPU for this size"


class WhatRuns(NamedTuple):
    """An operator, the backends that ran it, and why."""

    operator: str
    inference: str  # backends; `NOT_CALLED` where something else, or PyTorch's own functions, do the work
    training: str
    why: str


def what_runs(
    batch: int, seconds: float, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[WhatRuns]:
    """Backends of a layer, the front end and the head of HuBERT Base on ``batch`` utterances of ``seconds``, without padding.

    A model of one layer is run once for inference and once in training, with dropout. Its weights are random.

    Args:
        batch: utterances, at least 1.
        seconds: of each.
        device: where to run.
        dtype: float32, or the 16-bit dtype of autocast.

    Raises:
        ValueError: for no utterance, or utterances shorter than a frame.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1; got {batch}")
    if not 0.0 < seconds < float("inf"):
        raise ValueError(f"seconds must be positive and finite; got {seconds}")
    with device:
        model = hubert_pretrain_base(encoder_layer_drop=0.0)
        waveforms = torch.randn(batch, round(seconds * _SAMPLE_RATE))
    transformer = model.wav2vec2.encoder.transformer
    transformer.layers = transformer.layers[:1]
    frames = int(model.wav2vec2.feature_extractor.output_lengths(torch.tensor(waveforms.shape[1])))
    if frames < 1:
        raise ValueError(f"seconds must be at least one frame, 0.025; got {seconds}")
    labels = torch.zeros(batch, frames, dtype=torch.int64, device=device)
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with _recorded() as inference, torch.no_grad(), cast:
        model.eval()
        model.wav2vec2.extract_features(waveforms)
        model(waveforms, labels)
    with _recorded() as training:
        with cast:
            loss = PretrainingObjective(model).train()(waveforms, labels).loss
        loss.backward()
    return [
        _line(choice, *(seen.get(choice.operator, set()) for seen in (inference, training)))
        for choice in backend.report()
        if choice.operator != "span_mask"  # which is no matter of size
    ]


def _line(choice: backend.Choice, inference: set[str], training: set[str]) -> WhatRuns:
    used = inference | training
    reasons = [choice.why] if choice.runs in used else []
    if choice.runs != "reference" and "reference" in used:
        reasons.append(_WHOLE)
    names = [", ".join(sorted(each)) or NOT_CALLED for each in (inference, training)]
    return WhatRuns(choice.operator, *names, "; ".join(reasons))


@contextmanager
def _recorded() -> Iterator[dict[str, set[str]]]:
    """The backends that run inside, by operator."""
    seen: dict[str, set[str]] = {}
    run = Operator.run

    def recording(self: Operator, chosen: str, arguments: Any) -> Any:
        seen.setdefault(self.name, set()).add(chosen)
        return run(self, chosen, arguments)

    with mock.patch.object(Operator, "run", recording):
        yield seen
