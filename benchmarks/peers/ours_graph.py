"""hubert_fast with `GraphedStep`, as its trainer uses it: the host starts the front end and a few graphs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import hubert_fast

from ..batches import Batch
from .ours import ObjectiveModel, Ours, build_model
from .peer import PeerModel, Setting


class GraphModel(ObjectiveModel):
    """`forward_backward` is that of `GraphedStep`; `loss` is the same, eager. A batch is planned once, as ahead of a step."""

    overwrites_gradients = True

    def __init__(self, model: hubert_fast.HuBERTPretrainModel) -> None:
        super().__init__(model)
        self._steps: dict[tuple[torch.dtype, torch.Size], hubert_fast.GraphedStep] = {}
        self._planned: dict[tuple[torch.dtype, int], tuple[Batch, hubert_fast.MicroBatch]] = {}

    def forward_backward(self, batch: Batch, dtype: torch.dtype) -> None:
        step = self._step(batch, dtype)
        key = dtype, id(batch)
        if key not in self._planned:
            labels, mask = batch.labels.cpu(), batch.mask.cpu()
            planned = step.planner(torch.zeros(batch.waveforms.shape), labels, batch.lengths, mask=mask)
            if batch.waveforms.is_cuda:
                planned = planned.pin_memory()
            # The batch is kept, so that its id stays its own.
            self._planned[key] = batch, planned._replace(waveforms=batch.waveforms)
        step.gradients([self._planned[key][1]], masked_frames=1.0)

    def _step(self, batch: Batch, dtype: torch.dtype) -> hubert_fast.GraphedStep:
        """The step for batches of this shape."""
        key = dtype, batch.waveforms.shape
        if key not in self._steps:
            utterances, frames = batch.labels.shape
            self._steps[key] = hubert_fast.GraphedStep(
                self.module,
                torch.optim.SGD(self.module.parameters()),  # not used: the suite has its own
                capacities=hubert_fast.Capacities(rows=utterances * frames, sequences=utterances, max_frames=frames),
                autocast=None if dtype == torch.float32 else dtype,
            )
        return self._steps[key]


class HubertFastGraph(Ours):
    name = "hubert_fast graph"

    def why_not(self, setting: Setting) -> str | None:
        return None if setting.device.type == "cuda" else "CUDA graphs need a GPU"

    def build(self, setting: Setting, weights: Mapping[str, Tensor]) -> PeerModel:
        return GraphModel(build_model(setting, weights))
