"""Captured sections of a graphed step keep the rules of a CUDA stream capture."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import hubert_fast
from hubert_fast import GraphedStep
from tests.models.capture_rules import CaptureByTheRules, ForbiddenInCaptureError, gpu_kernels
from tests.models.test_graphed_step import RANDOM, ROOM, build, data

SIZES = {
    "base": RANDOM,
    "large": {"encoder_layer_norm_first": True, "encoder_layer_drop": 0.0},
    "frames of both kinds, channel masks": {"unmasked_weight": 0.5, "mask_channel_prob": 0.3, **RANDOM},
}


def train(objective: hubert_fast.PretrainingObjective, updates: int = 4) -> CaptureByTheRules:
    """Updates in bfloat16, of which every second leaves out all layers where there is LayerDrop."""
    optimizer = torch.optim.AdamW(objective.parameters(), 1e-3, fused=True)
    step = GraphedStep(objective, optimizer, clip_norm=1.0, capacities=ROOM, autocast=torch.bfloat16)
    capture = CaptureByTheRules(step)
    transformer = objective.model.wav2vec2.encoder.transformer
    torch.manual_seed(0)
    batch = step.planner(*data(0))
    with gpu_kernels():
        for update in range(updates):
            is_dropped = update % 2 == 0 and transformer.layer_drop > 0
            drawn = mock.Mock(return_value=[is_dropped] * len(transformer.layers))
            with mock.patch.object(transformer, "draw_dropped_layers", drawn):
                step([batch])
    return capture


@pytest.mark.parametrize("size", SIZES)
def test_a_capture_waits_for_nothing_draws_nothing_and_reads_nothing_of_the_host(size):
    objective = build(**SIZES[size])
    layers = len(objective.model.wav2vec2.encoder.transformer.layers)
    capture = train(objective)
    # One for all, and one of the optimizer; or forward and backward, and what stands in their stead, of each layer, input and
    # head, and two of the optimizer.
    assert capture.graphs == (2 if size == "large" else 4 * layers + 3 + 2)


class Bad(nn.Module):
    """A layer that ends with ``work``."""

    def __init__(self, layer: nn.Module, work: Any) -> None:
        super().__init__()
        self.layer, self.work = layer, work

    def forward(self, x: Tensor, attention_mask: Tensor, position_bias: None) -> tuple[Tensor, None]:
        rows = self.layer(x, attention_mask)[0].flatten(0, 1)
        return self.work(rows).view(x.shape), None


ON_HOST = torch.tensor(0.5)
BAD = {
    "waits": lambda x: x * x.detach().nan_to_num().sum().item(),
    "selects": lambda x: x + x.detach()[x.detach()[:, 0] > 0].sum(),
    "draws": lambda x: nn.functional.dropout(x, 0.1),
    "reads memory of the host": lambda x: x * ON_HOST,
    "makes a tensor on the host": lambda x: x * torch.ones(()),
    "copies from the host": lambda x: x * torch.tensor([0.5]),
    "cpu in a capture": lambda x: x.cpu(),
}


@pytest.mark.parametrize("what", BAD)
def test_a_layer_that_breaks_the_rules_is_found(what):
    objective = build()
    layers = objective.model.wav2vec2.encoder.transformer.layers
    layers[0] = Bad(layers[0], BAD[what])
    with pytest.raises(ForbiddenInCaptureError):
        train(objective)
