"""`linear` beside PyTorch's own under autocast: values, gradients, and the memory that is lent to weights."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hubert_fast import backend, cpu
from hubert_fast.ops.linear import linear
from hubert_fast.weights import Lent, lend
from tests.ops.comparison import error

_ROWS, _IN, _OUT = 37, 64, (16, 48)


def _problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[nn.Parameter], list[nn.Parameter], Tensor]:
    torch.manual_seed(0)
    x = torch.randn(_ROWS, _IN, dtype=dtype, requires_grad=True)
    weights = [nn.Parameter(torch.randn(out, _IN)) for out in _OUT]
    biases = [nn.Parameter(torch.randn(out)) for out in _OUT]
    return x, weights, biases, torch.randn(_ROWS, sum(_OUT))


def _joined(x: Tensor, weights: list[nn.Parameter], biases: list[nn.Parameter]) -> Tensor:
    return F.linear(x, torch.cat(weights), torch.cat(biases))


def _run(form, dtype, x, weights, biases, upstream):
    inputs = [x, *weights, *biases]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = form(x, weights, biases)
    return [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def _wide(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


def _lent(weights: list[nn.Parameter], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Copies and memory for gradients, one weight after another."""
    copies = torch.cat([each.detach().flatten() for each in weights]).to(dtype)
    gradients = torch.full((len(copies),), float("nan"))
    start = 0
    for each in weights:
        part = slice(start, start + each.numel())
        lend(each, Lent(copies[part].view_as(each), gradients[part].view_as(each)))
        start += each.numel()
    return copies, gradients


@pytest.mark.parametrize(
    ("dtype", "x_dtype"),
    [
        (torch.float32, torch.float32),  # without autocast
        *itertools.product((torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)),
    ],
)
def test_no_less_exact_than_pytorch_under_autocast(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    x, weights, biases, upstream = _problem(x_dtype)
    wide = _wide(x), list(map(_wide, weights)), list(map(_wide, biases))
    exact = _run(_joined, torch.float32, *wide, upstream.double())
    theirs = _run(_joined, dtype, x, weights, biases, upstream)
    mine = _run(linear, dtype, x, weights, biases, upstream)
    assert [each.dtype for each in mine] == [each.dtype for each in theirs]
    for ours, other, truth in zip(mine, theirs, exact):
        assert error(ours, truth) <= 1.5 * error(other, truth) + 1e-7


def test_a_gradient_goes_where_memory_is_lent_for_it() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weights, biases, upstream = _problem()
        expected = _run(linear, dtype, x, weights, biases, upstream)
        (copies, of_weights), (_, of_biases) = _lent(weights, dtype), _lent(biases, dtype)
        found = _run(linear, dtype, x, weights, biases, upstream)
        for mine, theirs in zip(found, expected):
            rounding = 2**-7 if mine.dtype == torch.bfloat16 else 1e-5  # where a CPU sums in another order
            torch.testing.assert_close(mine, theirs, rtol=rounding, atol=1e-5)
        for part, memory in ((found[2:4], of_weights), (found[4:], of_biases)):
            assert part[0].data_ptr() == memory.data_ptr()
            torch.testing.assert_close(torch.cat([each.flatten() for each in part]), memory, rtol=0, atol=0)
        if cpu.product_dtype(x.device, dtype) != dtype:
            continue  # this CPU multiplies in float32, and takes the weight
        copies.zero_()  # the product reads the copy, not the weight
        zeroed = _run(linear, dtype, x, weights, biases, upstream)[0]
        torch.testing.assert_close(zeroed, torch.cat(biases).to(dtype).expand_as(zeroed), rtol=0, atol=0)


def test_memory_that_does_not_lie_together_serves_each_weight_alone() -> None:
    x, weights, _, upstream = _problem()
    expected = _run(lambda x, w, b: linear(x, w), torch.bfloat16, x, weights, [], upstream)
    for each in weights:
        lend(each, Lent(each.detach().bfloat16(), torch.zeros_like(each)))
    found = _run(lambda x, w, b: linear(x, w), torch.bfloat16, x, weights, [], upstream)
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_modes_and_transforms_see_plain_products() -> None:
    x, weights, biases, _ = _problem()
    with torch.autocast("cpu", torch.bfloat16):
        with FlopCounterMode(display=False) as counter:
            linear(x, weights, biases)
        found, expected = (
            torch.func.vmap(lambda row, form=form: form(row[None], weights, biases)[0])(x) for form in (linear, _joined)
        )
    assert counter.get_total_flops() == 2 * _ROWS * _IN * sum(_OUT)
    assert torch.equal(found, expected)


def test_weights_that_are_frozen_have_no_gradient() -> None:
    x, weights, biases, upstream = _problem()
    for each in weights:
        each.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x, weights, biases)
    found = torch.autograd.grad(out, [x, *biases], upstream.bfloat16())
    assert all(bool(each.abs().sum() > 0) for each in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_a_weight_gradient_is_float32_before_it_is_rounded() -> None:
    """Sixteen bits between would cost it 2^-9; memory that is lent has it in one product."""
    torch.manual_seed(0)
    x, upstream = (torch.randn(4096, 256, device="cuda").bfloat16() for _ in range(2))
    weight = nn.Parameter(torch.randn(256, 256, device="cuda"))
    memory = torch.full_like(weight, float("nan"))
    exact = upstream.double().t() @ x.double()
    for lent in (Lent(), Lent(weight.detach().bfloat16(), memory)):
        lend(weight, lent)
        with torch.autocast("cuda", torch.bfloat16):
            (found,) = torch.autograd.grad(linear(x, [weight]), [weight], upstream)
        assert found.dtype == torch.float32
        assert error(found, exact) <= 1e-5
    assert found.data_ptr() == memory.data_ptr()


def test_the_formula_has_a_second_derivative_under_autocast() -> None:
    x, weight = torch.randn(5, 4), nn.Parameter(torch.randn(3, 4))
    with backend.using("reference"), torch.autocast("cpu", torch.bfloat16):
        (gradient,) = torch.autograd.grad(linear(x, [weight]).float().square().sum(), weight, create_graph=True)
        assert torch.autograd.grad(gradient.sum(), weight)[0].norm() > 0.0
