import pytest
import torch

from hubert_fast.pretrain.schedule import linear_warmup_decay, warmup_decay_factor


def rates(steps, warmup_fraction):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = linear_warmup_decay(optimizer, steps=steps, warmup_fraction=warmup_fraction)
    used = []
    for _ in range(steps):
        used.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return used, scheduler.get_last_lr()[0]


def test_rises_linearly_to_the_peak_then_falls_linearly_to_zero_after_the_last_step():
    used, after = rates(10, 0.4)
    assert used == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2 * 5 / 6, 2 * 4 / 6, 2 * 3 / 6, 2 * 2 / 6, 2 * 1 / 6])
    assert after == 0.0


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.08, 0.5, 1.0])
def test_every_step_has_a_positive_rate_of_at_most_the_peak(steps, warmup_fraction):
    used, _ = rates(steps, warmup_fraction)
    assert all(0.0 < rate <= 2.0 for rate in used)
    assert max(used) == 2.0


def test_is_zero_beyond_the_last_step():
    assert warmup_decay_factor(25, steps=20, warmup_steps=2) == 0.0


@pytest.mark.parametrize("arguments", [{"steps": 0, "warmup_fraction": 0.1}, {"steps": 5, "warmup_fraction": 1.1}])
def test_names_the_argument_that_is_out_of_range(arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="steps must be|warmup_fraction must"):
        linear_warmup_decay(optimizer, **arguments)
