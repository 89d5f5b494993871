"""``bias_gelu_dropout``: dropout(gelu(x + bias)), on PyTorch's passes or as the formula says."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hubert_fast import backend
from hubert_fast.ops.bias_gelu_dropout import bias_gelu_dropout
from hubert_fast.torch_backend import dropout_mask
from tests.ops.comparison import assert_as_precise, assert_twins, error

OPERATOR = "bias_gelu_dropout"
BACKENDS = ["torch", "reference"]


def _inputs(rows=30, channels=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(rows, channels, dtype=torch.float64, generator=generator)
    return x, torch.randn(channels, dtype=torch.float64, generator=generator)


def _function(dropout_p, seed=0):
    return lambda x, bias=None: bias_gelu_dropout(
        x, bias, dropout_p=dropout_p, seed=torch.tensor(seed, device=x.device)
    )


@given(
    rows=st.integers(0, 40), channels=st.integers(1, 40), biased=st.booleans(), chunk=st.integers(1, 400),
    dropout_p=st.sampled_from([0.0, 0.1, 0.5, 0.99]), seed=st.integers(-1000, 1000),
)  # fmt: skip
def test_backends_agree_for_any_shape_with_and_without_dropout(rows, channels, biased, chunk, dropout_p, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropout_mask, "_CHUNK_ELEMENTS", chunk)
        assert_twins(OPERATOR, _function(dropout_p, seed), _inputs(rows, channels)[: 2 if biased else 1])


@pytest.mark.parametrize("name", BACKENDS)
def test_without_dropout_it_is_gelu_of_the_sum(name):
    x, bias = _inputs()
    with backend.using(name, OPERATOR):
        assert error(bias_gelu_dropout(x, bias), F.gelu(x + bias)) < 1e-12
        assert error(bias_gelu_dropout(x, None), F.gelu(x)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_as_precise_as_pytorch(dropout_p, dtype):
    assert_as_precise(OPERATOR, _function(dropout_p), lambda seed: _inputs(200, 96, seed), dtype)


@pytest.mark.parametrize("name", BACKENDS)
def test_float32_parameters_meet_16_bit_rows(name):
    x, bias = (each.requires_grad_() for each in _inputs())
    low = x.detach().bfloat16().requires_grad_()
    wide = bias.detach().float().requires_grad_()
    with backend.using(name, OPERATOR):
        out = bias_gelu_dropout(low, wide)
        out.sum().backward()
        bias_gelu_dropout(x, bias).sum().backward()
    assert (out.dtype, low.grad.dtype, wide.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert error(wide.grad, bias.grad) < 0.01 and error(low.grad, x.grad) < 0.01


@pytest.mark.parametrize("name", BACKENDS)
def test_the_seed_alone_decides_what_is_dropped_and_without_one_each_call_drops_others(name):
    x, bias = _inputs(100, 100)
    with backend.using(name, OPERATOR):
        first, again = (bias_gelu_dropout(x, bias, dropout_p=0.3, seed=torch.tensor(7)) for _ in range(2))
        drawn = [bias_gelu_dropout(x, bias, dropout_p=0.3) for _ in range(2)]
    assert torch.equal(first, again) and not torch.equal(*drawn)
    for out in (first, *drawn):
        dropped = out == 0
        assert abs(dropped.double().mean() - 0.3) < 0.025
        assert error(out, (F.gelu(x + bias) / 0.7).masked_fill(dropped, 0.0)) < 1e-4  # p is a multiple of 2^-16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, "x must be floating point of shape"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, "x must be floating point of shape"),
        ({"bias": torch.zeros(5)}, r"bias must be floating point of shape \[4\]"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\); got 1.0"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, "seed must be a scalar int64"),
        ({"seed": torch.tensor(1.0)}, "seed must be a scalar int64"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"x": torch.zeros(3, 4), "bias": torch.zeros(4), "dropout_p": 0.1} | change
    with pytest.raises(ValueError, match=message):
        bias_gelu_dropout(**arguments)
