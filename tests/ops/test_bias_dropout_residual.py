"""``bias_dropout_residual``: residual + dropout(x + bias), on PyTorch's passes or as the formula says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hubert_fast import backend
from hubert_fast.ops.bias_dropout_residual import bias_dropout_residual
from hubert_fast.torch_backend import dropout_mask
from tests.ops.comparison import assert_as_precise, assert_twins, error

OPERATOR = "bias_dropout_residual"
BACKENDS = ["torch", "reference"]


def _inputs(rows=30, channels=20, seed=0, positions=None):
    """x, residual, bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, channels), (rows if positions is None else positions, channels), (channels,)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def _function(dropout_p=0.0, seed=0, index=None):
    def function(x, residual, bias=None):
        return bias_dropout_residual(
            x, bias, residual, index=index, dropout_p=dropout_p, seed=torch.tensor(seed, device=x.device)
        )

    return function


@given(
    rows=st.integers(0, 40), channels=st.integers(1, 40), biased=st.booleans(), indexed=st.booleans(),
    chunk=st.integers(1, 400), dropout_p=st.sampled_from([0.0, 0.1, 0.5, 0.99]), seed=st.integers(-1000, 1000),
)  # fmt: skip
def test_backends_agree_for_any_shape_with_and_without_dropout(rows, channels, biased, indexed, chunk, dropout_p, seed):
    positions = rows + 7 if indexed else rows
    index = torch.randperm(positions, generator=torch.Generator().manual_seed(seed))[:rows] if indexed else None
    inputs = _inputs(rows, channels, positions=positions)[: 3 if biased else 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropout_mask, "_CHUNK_ELEMENTS", chunk)
        assert_twins(OPERATOR, _function(dropout_p, seed, index), inputs)


@pytest.mark.parametrize("name", BACKENDS)
def test_without_dropout_it_is_a_sum(name):
    x, residual, bias = _inputs(positions=50)
    index = torch.arange(30).flip(0)
    with backend.using(name, OPERATOR):
        assert error(_function(index=index)(x, residual, bias), x + bias + residual[index]) < 1e-12
        assert error(_function()(x, residual[:30]), x + residual[:30]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_as_precise_as_pytorch(dropout_p, dtype):
    assert_as_precise(OPERATOR, _function(dropout_p), lambda seed: _inputs(200, 96, seed), dtype)


@pytest.mark.parametrize("name", BACKENDS)
def test_dtypes_follow_their_tensors(name):
    x, residual, bias = (each.float().requires_grad_() for each in _inputs())
    low = x.detach().bfloat16().requires_grad_()
    with backend.using(name, OPERATOR):
        out = _function(0.1)(low, residual, bias)
    out.sum().backward()
    assert (out.dtype, low.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert residual.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, "x must be floating point of shape"),
        ({"bias": torch.zeros(5)}, r"bias must be floating point of shape \[4\]"),
        ({"residual": torch.zeros(2, 4)}, r"residual must have shape \[3, 4\]; got \(2, 4\)"),
        ({"residual": torch.zeros(3, 5)}, r"residual must have shape \[3, 4\]; got \(3, 5\)"),
        ({"index": torch.zeros(2, dtype=torch.int64)}, "with an index of 3; got .* with an index of 2"),
        ({"index": torch.zeros(3)}, "index must be int64"),
        ({"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\); got -0.1"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"x": torch.zeros(3, 4), "bias": torch.zeros(4), "residual": torch.zeros(3, 4)} | change
    with pytest.raises(ValueError, match=message):
        bias_dropout_residual(**arguments)
