"""Dropout of the C++ passes: one mask whatever the instructions, the threads and the order of rows."""

import pytest
import torch

from hubert_fast import extension
from tests.ops import cpu_dropout_twin

pytestmark = pytest.mark.skipif(extension.cpu() is None, reason=str(extension.why_not("cpu")))


def dropped(x, *, seed=3, p=0.1, first=0, stride=10_000, index=None, threads=2):
    x, out = x.contiguous(), torch.full(x.shape, float("nan"))
    groups, rows, columns = x.shape
    settings = dict(
        groups=groups, rows=rows, columns=columns, index=index, first=first, stride=stride, seed=seed,
        threshold=round(p * 65536), scale=1 / (1 - p), threads=threads,
    )  # fmt: skip
    extension.cpu().drop(values=x, out=out, **settings)
    in_place = x.clone()
    extension.cpu().drop(values=in_place, out=in_place, **settings)
    assert torch.equal(in_place, out)
    return out


@pytest.fixture(params=extension.cpu().instruction_sets() if extension.cpu() else [])
def instruction_set(request):
    before = extension.cpu().instruction_set()
    extension.cpu().use_instruction_set(request.param)
    yield request.param
    extension.cpu().use_instruction_set(before)


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 32, 33, 499])
def test_instruction_sets_drop_alike(instruction_set, columns):
    x = torch.randn(3, 40, columns, generator=torch.Generator().manual_seed(0))
    found = dropped(x)
    extension.cpu().use_instruction_set("baseline")
    assert torch.equal(found, dropped(x))
    numbers = torch.arange(3)[:, None] * 10_000 + torch.arange(40)
    assert torch.equal(found != 0, cpu_dropout_twin.keep(3, numbers, columns, 0.1) & (x != 0))


def test_what_is_kept_is_scaled(instruction_set):
    x = torch.randn(2, 30, 70, generator=torch.Generator().manual_seed(0))
    found, mask = dropped(x), dropped(torch.ones_like(x)) > 0
    torch.testing.assert_close(found, x * mask / 0.9, rtol=1e-6, atol=0)


def test_the_number_of_a_row_says_what_is_dropped_of_it():
    x = torch.ones(3, 40, 50)
    whole = dropped(x, first=5)
    assert torch.equal(whole, dropped(x, first=5, threads=1))
    assert torch.equal(whole[1:2, 7:11], dropped(x[1:2, 7:11], first=5 + 10_000 + 7))
    some = torch.tensor([30, 2, 39])
    assert torch.equal(whole[:, some], dropped(x[:, some], first=5, index=some))
    for other in (dropped(x, first=6), dropped(x, first=5, seed=4), dropped(x, first=5, seed=3 - 2**63)):
        assert not torch.equal(whole, other)


def test_draws_are_even_and_know_nothing_of_one_another():
    p, shape = 0.1, (12, 500, 499)
    draws = [dropped(torch.ones(shape), seed=seed, p=p).eq(0).double() - p for seed in (3, 4)]
    variance, count = p * (1 - p), draws[0].numel()
    for drawn in draws:
        assert drawn.mean().abs() < 5 * (variance / count) ** 0.5
        for dim in range(3):  # the means of slices differ as much as chance lets them
            means = drawn.transpose(0, dim).flatten(1).mean(1)
            expected = variance / (count / shape[dim])
            assert 0.3 * expected < means.square().mean() < 2 * expected
    first, second = draws
    pairs = [(first, second), *((first[:, :, :-lag], first[:, :, lag:]) for lag in (1, 15, 16, 17, 31, 32, 64))]
    pairs += [(first[:, :-1], first[:, 1:]), (first[:-1], first[1:])]
    for left, right in pairs:
        assert (left * right).mean().abs() < 5 * variance / left.numel() ** 0.5


@pytest.mark.parametrize("change", [{"threads": 0}, {"p": 1.0}, {"p": -0.1}])
def test_bad_settings_are_refused(change):
    with pytest.raises((ValueError, ZeroDivisionError)):
        dropped(torch.ones(1, 2, 3), **change)


def test_an_empty_tensor_has_nothing_to_drop():
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        assert dropped(torch.ones(shape)).shape == shape
