"""``mask_fill``: mask embedding, padding, bias and dropout, on PyTorch's passes or as the formula says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hubert_fast import backend
from hubert_fast.ops.mask_fill import mask_fill
from hubert_fast.torch_backend import dropout_mask
from tests.ops.comparison import assert_as_precise, assert_twins, error

OPERATOR = "mask_fill"
BACKENDS = ["torch", "reference"]


def _inputs(rows=30, channels=20, seed=0):
    """x, embedding, bias."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in ((rows, channels), channels, channels)]


def _flags(rows, share, seed=0):
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < share


def _function(mask, padding=None, dropout_p=0.0, seed=0):
    def function(x, embedding, bias=None):
        return mask_fill(
            x, bias, embedding, mask, padding=padding, dropout_p=dropout_p, seed=torch.tensor(seed, device=x.device)
        )

    return function


@given(
    rows=st.integers(0, 40), channels=st.integers(1, 40), biased=st.booleans(), masked=st.floats(0, 1),
    padded=st.none() | st.floats(0, 1), chunk=st.integers(1, 400), dropout_p=st.sampled_from([0.0, 0.1, 0.5, 0.99]),
    seed=st.integers(-1000, 1000),
)  # fmt: skip
def test_backends_agree_for_any_shape_with_and_without_dropout(
    rows, channels, biased, masked, padded, chunk, dropout_p, seed
):
    padding = None if padded is None else _flags(rows, padded, seed + 1)
    function = _function(_flags(rows, masked, seed), padding, dropout_p, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropout_mask, "_CHUNK_ELEMENTS", chunk)
        assert_twins(OPERATOR, function, _inputs(rows, channels)[: 3 if biased else 2])


@pytest.mark.parametrize("name", BACKENDS)
def test_masked_rows_are_the_embedding_and_padding_is_0(name):
    x, embedding, bias = _inputs(4, 5)
    mask, padding = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
    with backend.using(name, OPERATOR):
        out = _function(mask, padding)(x, embedding, bias)
    expected = torch.stack([embedding, torch.zeros(5).double(), embedding, x[3] + bias])
    assert error(out, expected) < 1e-12


@pytest.mark.parametrize("name", BACKENDS)
def test_values_that_are_not_finite_do_not_pass_a_mask_or_padding(name):
    x, embedding, bias = (each.requires_grad_() for each in _inputs(3, 5))
    with torch.no_grad():
        x[:2] = float("nan")
    with backend.using(name, OPERATOR):
        out = _function(torch.tensor([True, False, False]), torch.tensor([False, True, False]))(x, embedding, bias)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(each.grad.isfinite().all() for each in (x, embedding, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_as_precise_as_pytorch(dropout_p, dtype):
    function = _function(_flags(200, 0.5), _flags(200, 0.2, 1), dropout_p)
    assert_as_precise(OPERATOR, function, lambda seed: _inputs(200, 96, seed), dtype)


@pytest.mark.parametrize("name", BACKENDS)
def test_dtypes_follow_their_tensors(name):
    x, embedding, bias = (each.float().requires_grad_() for each in _inputs())
    low = x.detach().bfloat16().requires_grad_()
    with backend.using(name, OPERATOR):
        out = _function(_flags(30, 0.5), None, 0.1)(low, embedding, bias)
    out.sum().backward()
    assert (out.dtype, low.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert embedding.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, "x must be floating point of shape"),
        ({"bias": torch.zeros(5)}, r"bias must be floating point of shape \[4\]"),
        ({"embedding": torch.zeros(1, 4)}, r"embedding must be floating point of shape \[4\]"),
        ({"mask": torch.zeros(3)}, r"mask must be bool of shape \[3\]"),
        ({"padding": torch.zeros(4, dtype=torch.bool)}, r"padding must be bool of shape \[3\]"),
        ({"dropout_p": 2.0}, r"dropout_p must be in \[0, 1\); got 2.0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"x": torch.zeros(3, 4), "bias": torch.zeros(4), "embedding": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        mask_fill(**arguments | {"mask": torch.zeros(3, dtype=torch.bool)} | change)
