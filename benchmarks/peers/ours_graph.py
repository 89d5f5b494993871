"""hubert_fast with forward and backward captured in a CUDA graph, as its README shows: the host launches one thing a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

import hubert_fast
from hubert_fast.models.plan import StepPlan

from ..batches import Batch
from .ours import ObjectiveModel, Ours, build_model
from .peer import PeerModel, Setting, autocast

_WARM_UP = 3  # steps; the first compiles kernels

# Capacities have head room and are rounded up to so many parts of the grid: the number of masked frames is random, and a graph
# is not to be captured anew in the middle of a measurement.
_HEAD_ROOM, _PARTS = 1.1, 8


class _Key(NamedTuple):
    """Batches that one graph serves."""

    dtype: torch.dtype
    utterances: int
    samples: int
    rows: int | None
    kept: int


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    waveforms: Tensor  # what the graph reads
    plan: StepPlan
    gradients: list[Tensor]  # what it writes, one of each parameter


class GraphModel(ObjectiveModel):
    """`forward_backward` replays a graph; `loss` is the same step, not captured."""

    overwrites_gradients = True

    def __init__(self, model: hubert_fast.HuBERTPretrainModel) -> None:
        super().__init__(model)
        self._captured: dict[_Key, _Captured] = {}

    def forward_backward(self, batch: Batch, dtype: torch.dtype) -> None:
        key, plan = self._plan(batch, dtype)
        if key not in self._captured:
            self._captured[key] = self._capture(batch, plan, dtype)
        captured = self._captured[key]
        captured.plan.copy_(plan)
        captured.waveforms.copy_(batch.waveforms)
        captured.graph.replay()
        for parameter, gradient in zip(self.module.parameters(), captured.gradients):
            parameter.grad = gradient

    def _plan(self, batch: Batch, dtype: torch.dtype) -> tuple[_Key, StepPlan]:
        """The mask is drawn here, as `PretrainingObjective` would draw it."""
        utterances, samples = batch.waveforms.shape
        model, frames = self.module.model, batch.labels.shape[1]
        valid = None if batch.lengths is None else model.wav2vec2.feature_extractor.output_lengths(batch.lengths)
        mask = model.mask_generator.draw(utterances, frames, valid)
        grid = utterances * frames
        rows = None if valid is None else _rounded_up(int(valid.sum()), grid)
        kept = min(_rounded_up(int(mask.sum()), grid), rows or grid)
        plan = self.module.plan(
            batch.labels,
            batch.lengths,
            samples=samples,
            device=batch.waveforms.device,
            mask=mask,
            rows=rows,
            kept=kept,
        )
        return _Key(dtype, utterances, samples, rows, kept), plan

    def _capture(self, batch: Batch, plan: StepPlan, dtype: torch.dtype) -> _Captured:
        waveforms, plan = batch.waveforms.clone(), _copy(plan)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._step(waveforms, plan, dtype)
        torch.cuda.current_stream().wait_stream(side)
        graph, others = torch.cuda.CUDAGraph(), list(self._captured.values())
        # One pool: a graph's tensors may lie where another's did, for gradients are used before the next replay.
        pool = others[0].graph.pool() if others else None
        with torch.cuda.graph(graph, pool=pool):
            self._step(waveforms, plan, dtype)
        return _Captured(graph, waveforms, plan, [each.grad for each in self.module.parameters()])

    def _step(self, waveforms: Tensor, plan: StepPlan, dtype: torch.dtype) -> None:
        self.module.zero_grad(set_to_none=True)
        with autocast(waveforms.device, dtype):
            loss = self.module(waveforms, plan=plan).loss
        loss.backward()


def _rounded_up(count: int, grid: int) -> int:
    part = math.ceil(grid / _PARTS)
    return min(grid, math.ceil(_HEAD_ROOM * count / part) * part)


def _copy(plan: StepPlan) -> StepPlan:
    """With tensors of its own, for a graph to read."""
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, plan)


class HubertFastGraph(Ours):
    name = "hubert_fast graph"

    def why_not(self, setting: Setting) -> str | None:
        return None if setting.device.type == "cuda" else "CUDA graphs need a GPU"

    def build(self, setting: Setting, weights: Mapping[str, Tensor]) -> PeerModel:
        return GraphModel(build_model(setting, weights))
