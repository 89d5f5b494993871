"""Memory of a call is what it takes beyond what was held before."""

import sys

import pytest
import torch
from torch import nn

from benchmarks.memory import held_by, peak_of

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted as Linux tells it")
def test_the_peak_is_what_the_call_takes_at_a_time():
    def call():
        for _ in range(10):
            torch.ones(25_000_000)  # 100 MB, given back each time, sometimes late

    assert 95e6 < peak_of(call, CPU) < 400e6


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted as Linux tells it")
def test_what_was_held_before_is_not_counted():
    held = torch.ones(50_000_000)
    assert peak_of(lambda: held.sum(), CPU) < 20e6


def test_held_are_weights_and_the_optimizers_moments():
    module = nn.Linear(100, 10, bias=False)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    assert held_by(module, optimizer) == 4000
    module(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    assert held_by(module) == 4000 and 12_000 <= held_by(module, optimizer) <= 12_016  # and the counters of steps
