"""Triton kernels of the passes over rows of channels: precision with exact masks, forward and backward."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hubert_fast import backend
from hubert_fast.ops.bias_gelu_dropout import bias_gelu_dropout
from hubert_fast.ops.residual_layer_norm import residual_layer_norm
from tests.kernels import dropout_twin
from tests.kernels.device import DEVICE
from tests.ops.comparison import assert_as_precise, error, run
from tests.ops.test_row_passes import passes, stream_with_copy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@given(
    rows=st.integers(0, 70), channels=st.integers(4, 150), biased=st.booleans(), indexed=st.booleans(),
    p=st.sampled_from([0.0, 0.1, 0.6]), seed=st.integers(-(1 << 63), (1 << 63) - 1), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@example(rows=270, channels=80, biased=True, indexed=False, p=0.1, seed=1 << 62, dtype=torch.float32)
@example(rows=270, channels=80, biased=True, indexed=False, p=0.1, seed=-1, dtype=torch.bfloat16)
@settings(max_examples=8)
def test_any_shape_is_as_precise_as_pytorch(rows, channels, biased, indexed, p, seed, dtype):
    for name, function, draw in passes(rows, channels, p=p, seed=seed, biased=biased, indexed=indexed, device=DEVICE):
        with dropout_twin.in_references():
            assert_as_precise(name, function, draw, dtype, name="triton", seeds=2, roundings=0.5)


@pytest.mark.parametrize("updated", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_float32_stream_and_its_16_bit_copy_are_as_precise_as_pytorch(p, updated):
    function, plain, draw = stream_with_copy(p=p, updated=updated, device=DEVICE)
    with dropout_twin.in_references():
        assert_as_precise(
            "residual_layer_norm", function, draw, torch.float32, name="triton", plain=None if p else plain, seeds=4
        )


@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_few_channels_and_rows_that_are_all_masked_or_all_padding(channels, shares):
    for name, function, draw in passes(9, channels, p=0.1, shares=shares, indexed=True, device=DEVICE):
        inputs = [each.float() for each in draw(0)]
        with dropout_twin.in_references():
            truth = run(name, "reference", function, [each.double() for each in inputs])
        results = run(name, "triton", function, inputs)
        assert all(error(*pair) < 1e-6 for pair in zip(results, truth, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_is_precise_from_tail_to_tail(dtype):
    x = torch.linspace(-12, 12, 4000).view(50, 80).to(DEVICE, dtype)
    out, slope = run("bias_gelu_dropout", "triton", lambda x: bias_gelu_dropout(x, None), [x])
    wide = x.double()
    below = torch.special.erfc(-wide / 2**0.5) / 2  # Phi, which 1 + erf would lose in the left tail
    exact, exact_slope = wide * below, below + wide * torch.exp(-wide.square() / 2) / (2 * torch.pi) ** 0.5
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype).double()
    unit = torch.finfo(dtype).eps
    # To 1 + erf, and below normal numbers.
    lost = {torch.float32: 5e-7, torch.bfloat16: 1e-36, torch.float16: 6e-8}[dtype]
    assert ((out - exact).abs() <= unit * exact.abs() + lost).all()
    assert ((slope - exact_slope * direction.to(DEVICE)).abs() <= unit * slope.abs() + 2e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_far_from_0_are_as_precise_as_pytorch(dtype):
    """Their variance is that of what is centred: E[x^2] - E[x]^2 would lose it."""
    *_, (name, _, draw) = passes(40, 150, device=DEVICE)

    def function(residual, weight, bias, update, update_bias):
        return residual_layer_norm(residual, weight, bias, update=update, update_bias=update_bias)

    def draw_far(seed):
        residual, *others = draw(seed)
        return [residual + 100, *others]

    assert_as_precise(name, function, draw_far, dtype, name="triton", seeds=4)


def test_the_kept_sum_and_gradients_are_those_of_a_call_that_does_not_return_it():
    *_, (name, function, draw) = passes(40, 30, indexed=True, biased=False, device=DEVICE)
    inputs = [each.float() for each in draw(0)]
    with backend.using("triton", name):
        with torch.no_grad():
            evaluated = function(*inputs)
        trained = function(*(each.requires_grad_() for each in inputs))
    assert torch.equal(evaluated, trained)


def test_what_kernels_cannot_take_is_refused_by_name():
    x = torch.zeros(2, 4097, device=DEVICE)
    with (
        backend.using("triton", "residual_layer_norm"),
        pytest.raises(backend.BackendError, match="up to 4096 channels; got 4097"),
    ):
        residual_layer_norm(x, x[0], x[1])
    assert residual_layer_norm(x, x[0], x[1]).shape == x.shape
