"""Triton kernels of ``mask_fill``: precision, exact masks forward and backward, determinism."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_fast import backend
from hubert_fast.kernels import dropout
from hubert_fast.reference import mask_fill as reference
from tests.kernels.device import DEVICE
from tests.kernels.precision import assert_kernels_as_precise, kept
from tests.ops.comparison import run
from tests.ops.test_mask_fill import OPERATOR, _flags, _function, _inputs


def _plain(mask, padding=None, dropout_p=0.0, seed=0):
    def function(x, embedding, bias=None):
        keep = kept(seed, *x.shape, dropout_p)
        scale = dropout.scale(dropout_p)
        return reference.mask_fill(x, bias, embedding, mask, padding, kept=keep, scale=scale)

    return function


@given(
    rows=st.integers(0, 70), channels=st.integers(1, 150), used=st.integers(2, 3), seed=st.integers(-1000, 1000),
    dropout_p=st.sampled_from([0.0, 0.1, 0.6]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    masked=st.floats(0, 1), padded=st.none() | st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=6)
def test_any_shape_is_as_precise_as_pytorch(rows, channels, used, seed, dropout_p, dtype, masked, padded):
    mask = _flags(rows, masked, seed).to(DEVICE)
    padding = None if padded is None else _flags(rows, padded, seed + 1).to(DEVICE)
    draw = lambda seed: _inputs(rows, channels, seed)[:used]  # noqa: E731
    function, plain = _function(mask, padding, dropout_p, seed), _plain(mask, padding, dropout_p, seed)
    assert_kernels_as_precise(OPERATOR, function, plain, draw, dtype, seeds=2, roundings=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_rows_are_as_precise_as_pytorch(dtype):
    flags = _flags(270, 0.5).to(DEVICE), _flags(270, 0.2, 1).to(DEVICE)
    draw = lambda seed: _inputs(270, 80, seed)  # noqa: E731
    assert_kernels_as_precise(OPERATOR, _function(*flags, 0.1), _plain(*flags, 0.1), draw, dtype, seeds=2)


def test_forward_and_backward_drop_what_the_seed_says():
    x, embedding, bias = (each.float().to(DEVICE) for each in _inputs(70, 50))
    mask, padding = _flags(70, 0.3).to(DEVICE), _flags(70, 0.3, 1).to(DEVICE)
    live = ~(mask | padding)
    for seed in (0, -1, 1 << 62):
        out, x_grad, _, _ = run(OPERATOR, "triton", _function(mask, padding, 0.3, seed), [x, embedding, bias])
        keep = kept(seed, 70, 50, 0.3) & live[:, None]
        assert torch.equal(out != 0, keep | mask[:, None]) and torch.equal(x_grad != 0, keep)


def test_values_that_are_not_finite_do_not_pass_a_mask_or_padding():
    x, embedding, bias = (each.float().to(DEVICE) for each in _inputs(3, 5))
    x[:2] = float("nan")
    leaves = [each.requires_grad_() for each in (x, embedding, bias)]
    flags = torch.tensor([[True, False, False], [False, True, False]], device=DEVICE)
    with backend.using("triton", OPERATOR):
        out = _function(*flags)(*leaves)
    weight = torch.ones_like(out)
    weight[1] = float("nan")  # what comes back into a row of padding goes nowhere
    out.backward(weight)
    assert out.isfinite().all() and all(each.grad.isfinite().all() for each in leaves)


def test_two_runs_are_equal_to_the_bit():
    inputs = [each.bfloat16().to(DEVICE) for each in _inputs(200, 40)]
    function = _function(_flags(200, 0.5).to(DEVICE), None, 0.1)
    runs = [run(OPERATOR, "triton", function, inputs) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs))
