"""Triton kernels of ``residual_layer_norm``: precision, exact masks forward and backward, determinism."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_fast import backend
from hubert_fast.kernels import dropout
from hubert_fast.ops.residual_layer_norm import residual_layer_norm
from hubert_fast.reference import residual_layer_norm as reference
from tests.kernels.device import DEVICE
from tests.kernels.precision import assert_kernels_as_precise, kept
from tests.ops.comparison import error, run
from tests.ops.test_residual_layer_norm import OPERATOR, _function, _inputs


def _plain(index=None, with_sum=False, seed=0, update_dropout_p=0.0, output_dropout_p=0.0):
    def function(residual, weight, bias, update=None, update_bias=None):
        rows, channels = len(residual) if index is None else len(index), residual.shape[1]
        update_kept = kept(seed, rows, channels, update_dropout_p)
        scale = dropout.scale(update_dropout_p)
        summed = reference.residual_sum(residual, update, update_bias, index, kept=update_kept, scale=scale)
        output_kept = kept(seed, rows, channels, output_dropout_p, second=True)
        scale = dropout.scale(output_dropout_p)
        normed = reference.layer_norm_dropout(summed, weight, bias, eps=1e-5, kept=output_kept, scale=scale)
        return torch.cat((normed, summed), 1) if with_sum else normed

    return function


@given(
    rows=st.integers(0, 70), channels=st.integers(4, 150), used=st.integers(3, 5), seed=st.integers(-1000, 1000),
    update_dropout_p=st.sampled_from([0.0, 0.1, 0.6]), output_dropout_p=st.sampled_from([0.0, 0.1, 0.6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), indexed=st.booleans(), with_sum=st.booleans(),
)  # fmt: skip
@settings(max_examples=7)
def test_any_shape_is_as_precise_as_pytorch(
    rows, channels, used, seed, update_dropout_p, output_dropout_p, dtype, indexed, with_sum
):
    positions = rows + 7 if indexed else rows
    index = torch.randperm(positions, generator=torch.Generator().manual_seed(seed))[:rows].to(DEVICE)
    settings = index if indexed else None, with_sum, seed
    probabilities = {"update_dropout_p": update_dropout_p, "output_dropout_p": output_dropout_p}
    draw = lambda seed: _inputs(rows, channels, seed, positions)[:used]  # noqa: E731
    function, plain = _function(*settings, **probabilities), _plain(*settings, **probabilities)
    assert_kernels_as_precise(OPERATOR, function, plain, draw, dtype, seeds=2, roundings=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_rows_are_as_precise_as_pytorch(dtype):
    probabilities = {"update_dropout_p": 0.1, "output_dropout_p": 0.1}
    function, plain = _function(None, True, **probabilities), _plain(None, True, **probabilities)
    draw = lambda seed: _inputs(270, 80, seed)  # noqa: E731
    assert_kernels_as_precise(OPERATOR, function, plain, draw, dtype, seeds=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_far_from_0_are_as_precise_as_pytorch(dtype):
    """Their variance is that of what is centred: E[x^2] - E[x]^2 would lose it."""

    def draw(seed):
        residual, *others = _inputs(40, 150, seed)
        return [residual + 100, *others]

    assert_kernels_as_precise(OPERATOR, _function(), _plain(), draw, dtype, seeds=4)


def test_forward_and_backward_drop_what_the_seed_says():
    inputs = [each.float().to(DEVICE) for each in _inputs(70, 50)]
    for seed in (0, -1, 1 << 62):
        function = _function(None, True, seed, update_dropout_p=0.3, output_dropout_p=0.4)
        out, *grads = run(OPERATOR, "triton", function, inputs)
        normed, summed = out.split(50, 1)
        assert torch.equal(normed != 0, kept(seed, 70, 50, 0.4, second=True))
        mask = kept(seed, 70, 50, 0.3)
        assert torch.equal(summed != inputs[0], mask) and torch.equal(grads[3] != 0, mask)


def test_two_runs_are_equal_to_the_bit():
    inputs = [each.bfloat16().to(DEVICE) for each in _inputs(200, 40)]
    function = _function(None, True, update_dropout_p=0.1, output_dropout_p=0.1)
    runs = [run(OPERATOR, "triton", function, inputs) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs))


def test_the_kept_sum_and_gradients_are_those_of_a_call_that_does_not_return_it():
    inputs = [each.float().to(DEVICE) for each in _inputs(40, 30)]
    leaves = [each.clone().requires_grad_() for each in inputs]
    with backend.using("triton", OPERATOR):
        with torch.no_grad():
            evaluated = _function()(*inputs)
        trained = _function()(*leaves)
    assert torch.equal(evaluated, trained)


@pytest.mark.parametrize("used", ["normed", "sum"])
def test_either_result_may_go_unused(used):
    residual, weight, bias, update, _ = (each.float().to(DEVICE).requires_grad_() for each in _inputs())
    with backend.using("triton", OPERATOR):
        normed, summed = residual_layer_norm(residual, weight, bias, update=update, with_sum=True)
    plain = residual + update
    plain = torch.nn.functional.layer_norm(plain, (20,), weight, bias) if used == "normed" else plain
    expected = torch.autograd.grad(plain.square().sum(), (residual, update))
    given_ = torch.autograd.grad((normed if used == "normed" else summed).square().sum(), (residual, update))
    assert all(error(*pair) < 1e-5 for pair in zip(given_, expected))


def test_dtypes_follow_their_tensors():
    residual, weight, bias, update, update_bias = (each.float().to(DEVICE).requires_grad_() for each in _inputs())
    low = update.detach().bfloat16().requires_grad_()
    with backend.using("triton", OPERATOR):
        outs = residual_layer_norm(residual, weight, bias, update=low, update_bias=update_bias, with_sum=True)
        (outs[0] + outs[1]).sum().backward()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            packed = residual_layer_norm(residual, weight, bias, index=torch.tensor([3, 1], device=DEVICE))
    assert outs[0].dtype == outs[1].dtype == torch.float32 and low.grad.dtype == packed.dtype == torch.bfloat16
    assert {each.grad.dtype for each in (residual, weight, bias, update_bias)} == {torch.float32}


def test_what_kernels_cannot_take_is_refused_by_name():
    wide = torch.zeros(2, 4097, device=DEVICE)
    for x, message in ((wide, "up to 4096 channels; got 4097"), (wide.double(), "got torch.float64")):
        with backend.using("triton", OPERATOR), pytest.raises(backend.BackendError, match=message):
            residual_layer_norm(x, x[0], x[1])
        assert residual_layer_norm(x, x[0], x[1]).shape == x.shape
