import pytest
import torch

from hubert_fast.pretrain.schedule import linear_warmup_decay


def rates(steps, warmup_fraction):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = linear_warmup_decay(optimizer, steps=steps, warmup_fraction=warmup_fraction)
    used = []
    for _ in range(steps):
        used.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return [*used, scheduler.get_last_lr()[0]]


@pytest.mark.parametrize(
    ("steps", "warmup_fraction", "expected"),
    [
        (10, 0.4, [0.5, 1.0, 1.5, 2.0, 2.0, 10 / 6, 8 / 6, 1.0, 4 / 6, 2 / 6, 0.0]),
        (4, 0.0, [2.0, 1.5, 1.0, 0.5, 0.0]),
        (2, 1.0, [1.0, 2.0, 0.0]),
        (1, 0.08, [2.0, 0.0]),
    ],
)
def test_rises_linearly_to_the_peak_then_falls_linearly_to_zero_after_the_last_step(steps, warmup_fraction, expected):
    assert rates(steps, warmup_fraction) == pytest.approx(expected)
