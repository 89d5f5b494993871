"""Triton kernels of ``bias_gelu_dropout``: precision, exact masks forward and backward, determinism."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_fast import backend
from hubert_fast.kernels import dropout
from hubert_fast.ops.bias_gelu_dropout import bias_gelu_dropout
from hubert_fast.reference import bias_gelu_dropout as reference
from tests.kernels.device import DEVICE
from tests.kernels.precision import assert_kernels_as_precise, kept
from tests.ops.comparison import run
from tests.ops.test_bias_gelu_dropout import OPERATOR, _function, _inputs

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def _plain(dropout_p, seed=0):
    def function(x, bias=None):
        mask = kept(seed, *x.shape, dropout_p)
        return reference.bias_gelu_dropout(x, bias, kept=mask, scale=dropout.scale(dropout_p))

    return function


@given(
    rows=st.integers(0, 70), channels=st.integers(1, 150), used=st.integers(1, 2), seed=st.integers(-1000, 1000),
    dropout_p=st.sampled_from([0.0, 0.1, 0.6]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
@settings(max_examples=6)
def test_any_shape_is_as_precise_as_pytorch(rows, channels, used, seed, dropout_p, dtype):
    function, plain = _function(dropout_p, seed), _plain(dropout_p, seed)
    draw = lambda seed: _inputs(rows, channels, seed)[:used]  # noqa: E731
    assert_kernels_as_precise(OPERATOR, function, plain, draw, dtype, seeds=2, roundings=0.5)


@DTYPES
def test_many_rows_are_as_precise_as_pytorch(dtype):
    draw = lambda seed: _inputs(270, 80, seed)  # noqa: E731
    assert_kernels_as_precise(OPERATOR, _function(0.1), _plain(0.1), draw, dtype, seeds=2)


@DTYPES
def test_gelu_is_precise_from_tail_to_tail(dtype):
    x = torch.linspace(-12, 12, 4000).view(50, 80).to(DEVICE, dtype)
    out, slope = run(OPERATOR, "triton", _function(0.0), [x])
    wide = x.double()
    below = torch.special.erfc(-wide / 2**0.5) / 2  # Phi, which 1 + erf would lose in the left tail
    exact, exact_slope = wide * below, below + wide * torch.exp(-wide.square() / 2) / (2 * torch.pi) ** 0.5
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype).double()
    unit = torch.finfo(dtype).eps
    lost = {torch.float32: 5e-7, torch.bfloat16: 1e-36, torch.float16: 6e-8}[
        dtype
    ]  # to 1 + erf, and below normal numbers
    assert ((out - exact).abs() <= unit * exact.abs() + lost).all()
    assert ((slope - exact_slope * direction.to(DEVICE)).abs() <= unit * slope.abs() + 2e-5).all()


def test_forward_and_backward_drop_what_the_seed_says():
    x, bias = (each.abs().float().to(DEVICE) for each in _inputs(70, 50))  # no value is 0 by itself
    for seed in (0, -1, 1 << 62):
        out, x_grad, _ = run(OPERATOR, "triton", _function(0.3, seed), [x, bias])
        mask = kept(seed, 70, 50, 0.3)
        assert torch.equal(out != 0, mask) and torch.equal(x_grad != 0, mask)


def test_two_runs_are_equal_to_the_bit():
    inputs = [each.bfloat16().to(DEVICE) for each in _inputs(200, 40)]
    runs = [run(OPERATOR, "triton", _function(0.1), inputs) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs))


def test_float32_parameters_meet_16_bit_rows():
    x, bias = (each.to(DEVICE) for each in _inputs())
    low, wide = x.bfloat16().requires_grad_(), bias.float().requires_grad_()
    with backend.using("triton", OPERATOR):
        out = bias_gelu_dropout(low, wide)
    out.sum().backward()
    assert (out.dtype, low.grad.dtype, wide.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
