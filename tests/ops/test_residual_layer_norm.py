"""``residual_layer_norm``: a residual sum and its LayerNorm, on PyTorch's passes or as the formula says."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hubert_fast import backend
from hubert_fast.ops.residual_layer_norm import residual_layer_norm
from hubert_fast.torch_backend import dropout_mask
from tests.ops.comparison import assert_as_precise, assert_twins, error

OPERATOR = "residual_layer_norm"
BACKENDS = ["torch", "reference"]


def _inputs(rows=30, channels=20, seed=0, positions=None):
    """residual, weight, bias, update, update_bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows if positions is None else positions, channels), channels, channels, (rows, channels), channels
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    inputs[1] += 2
    return inputs


def _function(index=None, with_sum=False, seed=0, **probabilities):
    """The operator as a function of `_inputs`, of which it may take fewer; of both results side by side where it has two."""

    def function(residual, weight, bias, update=None, update_bias=None):
        out = residual_layer_norm(
            residual, weight, bias, update=update, update_bias=update_bias, index=index,
            seed=torch.tensor(seed, device=residual.device), with_sum=with_sum, **probabilities,
        )  # fmt: skip
        return torch.cat(out, 1) if with_sum else out

    return function


@given(
    rows=st.integers(0, 40), channels=st.integers(2, 40), used=st.integers(3, 5), indexed=st.booleans(),
    with_sum=st.booleans(), chunk=st.integers(1, 400), update_dropout_p=st.sampled_from([0.0, 0.1, 0.9]),
    output_dropout_p=st.sampled_from([0.0, 0.1, 0.9]), seed=st.integers(-1000, 1000),
)  # fmt: skip
def test_backends_agree_for_any_shape_with_and_without_dropout(
    rows, channels, used, indexed, with_sum, chunk, update_dropout_p, output_dropout_p, seed
):
    positions = rows + 7 if indexed else rows
    index = torch.randperm(positions, generator=torch.Generator().manual_seed(seed))[:rows] if indexed else None
    function = _function(index, with_sum, seed, update_dropout_p=update_dropout_p, output_dropout_p=output_dropout_p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropout_mask, "_CHUNK_ELEMENTS", chunk)
        assert_twins(OPERATOR, function, _inputs(rows, channels, positions=positions)[:used])


@pytest.mark.parametrize("name", BACKENDS)
def test_without_dropout_it_is_layer_norm_of_the_sum(name):
    residual, weight, bias, update, update_bias = _inputs(positions=40)
    index = torch.arange(30).flip(0)
    expected = residual[index] + update + update_bias
    with backend.using(name, OPERATOR):
        normed, summed = residual_layer_norm(
            residual, weight, bias, update=update, update_bias=update_bias, index=index, with_sum=True, eps=0.1
        )
        packed = residual_layer_norm(residual, weight, bias, index=index)
    assert error(summed, expected) < 1e-12
    assert error(normed, F.layer_norm(expected, (20,), weight, bias, 0.1)) < 1e-12
    assert error(packed, F.layer_norm(residual[index], (20,), weight, bias)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("probability", [0.0, 0.1])
@pytest.mark.parametrize("with_sum", [False, True])
def test_as_precise_as_pytorch(with_sum, probability, dtype):
    function = _function(None, with_sum, update_dropout_p=probability, output_dropout_p=probability)
    assert_as_precise(OPERATOR, function, lambda seed: _inputs(200, 96, seed), dtype)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("used", ["normed", "sum"])
def test_either_result_may_go_unused(name, used):
    inputs = [each.requires_grad_() for each in _inputs()]
    residual, weight, bias, update, _ = inputs
    with backend.using(name, OPERATOR):
        normed, summed = residual_layer_norm(residual, weight, bias, update=update, with_sum=True)
    plain = F.layer_norm(residual + update, (20,), weight, bias) if used == "normed" else residual + update
    expected = torch.autograd.grad(plain.square().sum(), (residual, update))
    given_ = torch.autograd.grad((normed if used == "normed" else summed).square().sum(), (residual, update))
    assert all(error(*pair) < 1e-12 for pair in zip(given_, expected))


@pytest.mark.parametrize("name", BACKENDS)
def test_dtypes_follow_their_tensors(name):
    residual, weight, bias, update, update_bias = (each.float().requires_grad_() for each in _inputs())
    low = update.detach().bfloat16().requires_grad_()
    with backend.using(name, OPERATOR):
        outs = residual_layer_norm(residual, weight, bias, update=low, update_bias=update_bias, with_sum=True)
        (outs[0] + outs[1]).sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            normed = residual_layer_norm(residual, weight, bias)
            both = residual_layer_norm(residual, weight, bias, with_sum=True)
        assert residual_layer_norm(residual, weight, bias).dtype == torch.float32
    assert outs[0].dtype == outs[1].dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    assert normed.dtype == both[0].dtype == both[1].dtype == torch.bfloat16
    assert {each.grad.dtype for each in (residual, weight, bias, update_bias)} == {torch.float32}


@pytest.mark.parametrize("name", BACKENDS)
def test_the_two_masks_of_a_seed_differ(name):
    residual, weight, bias, update, _ = _inputs(200, 100)
    zeros, ones = torch.zeros_like(residual), torch.ones_like(update)
    with backend.using(name, OPERATOR):
        normed, summed = residual_layer_norm(
            zeros, weight, bias + 100, update=ones, update_dropout_p=0.5, output_dropout_p=0.5, with_sum=True
        )
    first, second = (summed != 0).double(), (normed != 0).double()
    assert all(abs(each.mean() - 0.5) < 0.02 for each in (first, second))
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.04


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(3)}, "residual must be floating point of shape"),
        ({"weight": torch.zeros(5)}, r"weight must be floating point of shape \[4\]"),
        ({"bias": torch.zeros(4, dtype=torch.int64)}, r"bias must be floating point of shape \[4\]"),
        ({"update": torch.zeros(2, 4)}, r"residual must have shape \[2, 4\]; got \(3, 4\)"),
        ({"update_bias": torch.zeros(4)}, "update_bias was given without an update"),
        ({"index": torch.zeros(3)}, "index must be int64"),
        ({"output_dropout_p": 1.0}, r"output_dropout_p must be in \[0, 1\); got 1.0"),
        ({"update_dropout_p": -1.0}, r"update_dropout_p must be in \[0, 1\); got -1.0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"residual": torch.zeros(3, 4), "weight": torch.zeros(4), "bias": torch.zeros(4)} | change
    with pytest.raises(ValueError, match=message):
        residual_layer_norm(**arguments)
