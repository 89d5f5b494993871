"""Triton kernels of ``bias_dropout_residual``: precision, exact masks forward and backward, determinism."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_fast import backend
from hubert_fast.kernels import dropout
from hubert_fast.reference import bias_dropout_residual as reference
from tests.kernels.device import DEVICE
from tests.kernels.precision import assert_kernels_as_precise, kept
from tests.ops.comparison import run
from tests.ops.test_bias_dropout_residual import OPERATOR, _function, _inputs


def _plain(dropout_p, seed=0, index=None):
    def function(x, residual, bias=None):
        mask = kept(seed, *x.shape, dropout_p)
        return reference.bias_dropout_residual(x, bias, residual, index, kept=mask, scale=dropout.scale(dropout_p))

    return function


@given(
    rows=st.integers(0, 70), channels=st.integers(1, 150), used=st.integers(2, 3), seed=st.integers(-1000, 1000),
    dropout_p=st.sampled_from([0.0, 0.1, 0.6]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    indexed=st.booleans(),
)  # fmt: skip
@settings(max_examples=6)
def test_any_shape_is_as_precise_as_pytorch(rows, channels, used, seed, dropout_p, dtype, indexed):
    positions = rows + 7 if indexed else rows
    index = torch.randperm(positions, generator=torch.Generator().manual_seed(seed))[:rows].to(DEVICE)
    index = index if indexed else None
    draw = lambda seed: _inputs(rows, channels, seed, positions)[:used]  # noqa: E731
    function, plain = _function(dropout_p, seed, index), _plain(dropout_p, seed, index)
    assert_kernels_as_precise(OPERATOR, function, plain, draw, dtype, seeds=2, roundings=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_rows_are_as_precise_as_pytorch(dtype):
    draw = lambda seed: _inputs(270, 80, seed)  # noqa: E731
    assert_kernels_as_precise(OPERATOR, _function(0.1), _plain(0.1), draw, dtype, seeds=2)


def test_forward_and_backward_drop_what_the_seed_says():
    x, residual, bias = (each.float().to(DEVICE) for each in _inputs(70, 50))
    for seed in (0, -1, 1 << 62):
        out, x_grad, residual_grad, _ = run(OPERATOR, "triton", _function(0.3, seed), [x, residual, bias])
        mask = kept(seed, 70, 50, 0.3)
        assert torch.equal(out != residual, mask) and torch.equal(x_grad != 0, mask) and (residual_grad != 0).all()


def test_two_runs_are_equal_to_the_bit():
    inputs = [each.bfloat16().to(DEVICE) for each in _inputs(200, 40)]
    runs = [run(OPERATOR, "triton", _function(0.1), inputs) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs))


def test_dtypes_follow_their_tensors():
    x, residual, bias = (each.float().to(DEVICE).requires_grad_() for each in _inputs())
    low = x.detach().bfloat16().requires_grad_()
    with backend.using("triton", OPERATOR):
        out = _function(0.1)(low, residual, bias)
    out.sum().backward()
    assert (out.dtype, low.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert residual.grad.dtype == bias.grad.dtype == torch.float32
