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

# Masks that are drawn to find out how many frames one may have: those of most batches. For the one of some fifty that has more
# there is a second graph with this much room, which is the last for most lengths; 300 batches of 17 short utterances needed a
# third (NOTES.md). Rows follow from the lengths and need no room.
_DRAWS, _ROOM = 48, 1.05


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
        self._capacities: dict[tuple, list[int]] = {}  # masked frames that graphs have room for, by lengths; rising

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
        rows = None if valid is None else int(valid.sum())
        kept = self._room_for(mask, valid)
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

    def _room_for(self, mask: Tensor, valid: Tensor | None) -> int:
        """Masked frames that the graph for ``mask`` holds: the fewest of those that there are for its lengths and suffice."""
        capacities = self._capacities.setdefault((*mask.shape, None if valid is None else tuple(valid.tolist())), [])
        if not capacities:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)  # `torch.manual_seed` would seed the GPU too
                drawn = (self.module.model.mask_generator.draw(*mask.shape, valid) for _ in range(_DRAWS))
                capacities.append(max(int(each.sum()) for each in drawn))
        count = int(mask.sum())
        if count > capacities[-1]:
            capacities.append(min(math.ceil(_ROOM * count), mask.numel() if valid is None else int(valid.sum())))
        return next(each for each in capacities if each >= count)

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


def _copy(plan: StepPlan) -> StepPlan:
    """With tensors of its own, for a graph to read."""
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, plan)


class HubertFastGraph(Ours):
    name = "hubert_fast graph"

    def why_not(self, setting: Setting) -> str | None:
        return None if setting.device.type == "cuda" else "CUDA graphs need a GPU"

    def build(self, setting: Setting, weights: Mapping[str, Tensor]) -> PeerModel:
        return GraphModel(build_model(setting, weights))
