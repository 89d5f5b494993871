"""The passes over rows of channels on every backend; tests/kernels/test_row_passes.py has what Triton's alone promise."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hubert_fast import backend
from hubert_fast.ops.bias_dropout_residual import bias_dropout_residual
from hubert_fast.ops.bias_gelu_dropout import bias_gelu_dropout
from hubert_fast.ops.mask_fill import mask_fill
from hubert_fast.ops.residual_layer_norm import residual_layer_norm
from hubert_fast.reference import dropout as masks
from tests.ops.comparison import assert_as_precise, assert_twins, device_of, error, on_every_backend


def passes(
    rows, channels, *, p=0.0, output_p=None, shares=(0.5, 0.3), seed=0, biased=True, indexed=False, with_sum=None,
    device="cpu",
):  # fmt: skip
    """For each pass its name, a function of its floating tensors that gives one, and ``draw(seed)`` of those in float64.

    ``biased`` with the bias that is optional, ``indexed`` with an index or padding; ``shares`` of masked rows and of padding;
    ``output_p`` of the normed sum (None: as ``p`` where ``indexed``), ``with_sum`` with that sum (None: as ``biased``). Of
    fewer than 4 channels there is no norm.
    """
    output_p = (p if indexed else 0.0) if output_p is None else output_p
    with_sum = biased if with_sum is None else with_sum
    flags = torch.rand(2, rows, generator=torch.Generator().manual_seed(seed)).to(device)
    positions = rows + 7 if indexed else rows
    index = torch.randperm(positions, generator=torch.Generator().manual_seed(seed))[:rows].to(device)
    index, padding = (index, flags[1] < shares[1]) if indexed else (None, None)
    seed = torch.tensor(seed, device=device)
    dropout = {"dropout_p": p, "seed": seed}

    def embedded(x, embedding, bias=None):
        return mask_fill(x, bias, embedding, flags[0] < shares[0], padding=padding, **dropout)

    def normed(residual, weight, bias):
        return residual_layer_norm(residual, weight, bias, index=index, output_dropout_p=p, seed=seed)

    def summed_and_normed(residual, weight, bias, update, update_bias=None):
        both = residual_layer_norm(
            residual, weight, bias, update=update, update_bias=update_bias, index=index, update_dropout_p=p,
            output_dropout_p=output_p, seed=seed, with_sum=with_sum,
        )  # fmt: skip
        return torch.cat(both, 1) if with_sum else both

    x, residual, vector = (rows, channels), (positions, channels), (channels,)
    bias = [vector] * biased
    found = [
        ("bias_gelu_dropout", lambda x, bias=None: bias_gelu_dropout(x, bias, **dropout), [x, *bias]),
        (
            "bias_dropout_residual",
            lambda x, residual, bias=None: bias_dropout_residual(x, bias, residual, index=index, **dropout),
            [x, residual, *bias],
        ),
        ("bias_dropout_residual", lambda x, bias=None: bias_dropout_residual(x, bias, **dropout), [x, *bias]),
        ("mask_fill", embedded, [x, vector, *bias]),
        ("residual_layer_norm", normed, [residual, vector, vector]),
        ("residual_layer_norm", summed_and_normed, [residual, vector, vector, x, *bias]),
    ]
    for name, function, shapes in found[: 4 if channels < 4 else None]:

        def draw(seed, shapes=shapes):
            generator = torch.Generator().manual_seed(seed)
            return [2 * torch.randn(each, dtype=torch.float64, generator=generator).to(device) for each in shapes]

        yield name, function, draw


def stream_with_copy(*, p, updated, device="cpu"):
    """A float32 stream, a 16-bit update of it and a 16-bit copy of what is normed, of which both go on: a function that gives
    one tensor, the same of PyTorch's operations without dropout, and ``draw(seed)`` of float32 inputs in float64.
    """
    index = None if updated else torch.randperm(200, generator=torch.Generator().manual_seed(0))[:150].to(device)

    def function(residual, weight, bias, update=None, update_bias=None):
        narrow = torch.float64 if residual.dtype == torch.float64 else torch.bfloat16  # the truth is not rounded
        results = residual_layer_norm(
            residual, weight, bias, update=update if update is None else update.to(narrow), update_bias=update_bias,
            index=index, update_dropout_p=p, output_dropout_p=p, seed=torch.tensor(5, device=device), with_sum=updated,
            narrow=narrow,
        )  # fmt: skip
        return torch.cat([each.to(residual.dtype) for each in results], 1)

    def plain(residual, weight, bias, update=None, update_bias=None):
        summed = [residual + (update.bfloat16() + update_bias)] if updated else []
        normed = F.layer_norm(summed[0] if updated else residual[index], (96,), weight, bias)
        return torch.cat([normed, normed.bfloat16().float(), *summed], 1)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(200, 96), 96, 96, *([(200, 96), 96] if updated else [])]
        tensors = [torch.randn(each, generator=generator, dtype=torch.float64).to(device) for each in shapes]
        return [*tensors[:3], *(each.bfloat16().double() for each in tensors[3:])]

    return function, plain, draw


_RATE, _SHARE = st.sampled_from([0.0, 0.1, 0.6, 0.99]), st.sampled_from([0.0, 0.3, 0.5, 1.0])
SETTINGS = {
    "p": _RATE, "output_p": _RATE, "shares": st.tuples(_SHARE, _SHARE), "biased": st.booleans(), "indexed": st.booleans(),
    "with_sum": st.booleans(),
}  # fmt: skip


@given(
    rows=st.integers(0, 40), channels=st.integers(1, 40), chunk=st.integers(1, 400),
    settings=st.fixed_dictionaries(SETTINGS), seed=st.integers(-1000, 1000),
)  # fmt: skip
def test_backends_agree_for_any_shape_with_and_without_dropout(rows, channels, chunk, settings, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_CHUNK_ELEMENTS", chunk)
        for name, function, draw in passes(rows, channels, seed=seed, **settings):
            assert_twins(name, function, draw(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_as_precise_as_pytorch(p, dtype):
    for biased in (True, False):
        for name, function, draw in passes(200, 96, p=p, biased=biased):
            assert_as_precise(name, function, draw, dtype)


@pytest.mark.parametrize("updated", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_float32_stream_and_its_16_bit_copy_are_as_precise_as_pytorch(p, updated):
    function, plain, draw = stream_with_copy(p=p, updated=updated)
    assert_as_precise("residual_layer_norm", function, draw, torch.float32, plain=None if p else plain)


def test_without_dropout_they_are_the_formulas():
    x, residual, bias, weight = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 5), (6, 5), 5, 5))
    index, mask, padding = (
        torch.tensor([5, 0, 3, 2]),
        torch.tensor([1, 0, 1, 0]).bool(),
        torch.tensor([1, 1, 0, 0]).bool(),
    )
    summed = residual[index] + x + bias
    normed = F.layer_norm(summed, (5,), weight, bias, 0.1)
    given_ = (
        bias_gelu_dropout(x, bias),
        bias_dropout_residual(x, bias, residual, index=index),
        bias_dropout_residual(x, bias),
        mask_fill(x, bias, weight, mask, padding=padding),
        *residual_layer_norm(residual, weight, bias, update=x, update_bias=bias, index=index, eps=0.1, with_sum=True),
    )
    filled = torch.stack([weight, torch.zeros(5), weight, x[3] + bias])
    expected = F.gelu(x + bias), summed, x + bias, filled, normed, summed
    assert all(error(*pair) < 1e-12 for pair in zip(given_, expected, strict=True))
    assert bias_dropout_residual(x, None) is x


@on_every_backend
def test_values_that_are_not_finite_do_not_pass_a_mask_or_padding(name):
    x, embedding, bias = (torch.randn(shape, device=device_of(name)) for shape in ((3, 5), 5, 5))
    x[:2] = float("nan")
    leaves = [each.requires_grad_() for each in (x, bias, embedding)]
    mask, padding = torch.tensor([[True, False, False], [False, True, False]], device=x.device)
    with backend.using(name, "mask_fill"):
        out = mask_fill(*leaves, mask, padding=padding)
    weight = torch.ones_like(out)
    weight[1] = float("nan")  # what comes back into a row of padding goes nowhere
    out.backward(weight)
    assert out.isfinite().all() and all(each.grad.isfinite().all() for each in leaves)


def test_the_gradient_of_a_wide_embedding_is_summed_wide():
    x, mask = torch.randn(4000, 8).bfloat16(), torch.ones(4000, dtype=torch.bool)
    embedding = torch.randn(8, requires_grad=True)
    out = mask_fill(x, torch.randn(8), embedding, mask)
    gradient = torch.randn(4000, 8).bfloat16()
    out.backward(gradient)
    assert error(embedding.grad, gradient.double().sum(0)) < 1e-6


@on_every_backend
@pytest.mark.parametrize("used", [[0], [1], [2], [0, 1], [1, 2]], ids=str)
def test_any_result_may_go_unused(name, used):
    shapes = (30, 20), 20, 20, (30, 20)
    leaves = [torch.randn(shape, device=device_of(name), requires_grad=True) for shape in shapes]
    residual, weight, bias, update = leaves
    with backend.using(name, "residual_layer_norm"):
        ours = residual_layer_norm(residual, weight, bias, update=update, narrow=torch.bfloat16, with_sum=True)
    normed = F.layer_norm(residual + update, (20,), weight, bias)
    plain = normed, normed.bfloat16(), residual + update
    directions = [torch.randn(30, 20, device=residual.device).bfloat16() for _ in used]
    given_, expected = (
        torch.autograd.grad(
            [side[i] for i in used], (residual, update), [to.to(side[i]) for i, to in zip(used, directions)]
        )
        for side in (ours, plain)
    )
    assert all(error(*pair) < 1e-5 for pair in zip(given_, expected))


@on_every_backend
def test_a_narrow_copy_is_what_is_normed_in_that_dtype(name):
    residual, weight = torch.randn(30, 20, device=device_of(name)), torch.ones(20, device=device_of(name))
    with backend.using(name, "residual_layer_norm"):
        for narrow in (torch.bfloat16, torch.float16):
            normed, copy, summed = residual_layer_norm(residual, weight, weight, narrow=narrow, with_sum=True)
            assert torch.equal(copy, normed.to(narrow)) and summed is residual
        normed, copy = residual_layer_norm(residual, weight, weight, narrow=torch.float32)
    assert copy is normed


def test_a_layer_norm_without_an_update_has_autocasts_dtype():
    residual, vector = torch.randn(30, 20), torch.randn(20)
    with torch.autocast("cpu", torch.bfloat16):
        results = (
            residual_layer_norm(residual, vector, vector),
            *residual_layer_norm(residual, vector, vector, with_sum=True),
        )
    assert [each.dtype for each in results] == 3 * [torch.bfloat16]
    assert residual_layer_norm(residual, vector, vector).dtype == torch.float32


def test_the_two_masks_of_a_seed_differ():
    zeros, weight = torch.zeros(200, 100), torch.ones(100)
    normed, summed = residual_layer_norm(
        zeros, weight, weight * 100, update=zeros + 1, update_dropout_p=0.5, output_dropout_p=0.5, with_sum=True
    )
    masks = torch.stack([(summed != 0).flatten(), (normed != 0).flatten()]).double()
    assert (masks.mean(1) - 0.5).abs().max() < 0.02
    assert abs(torch.corrcoef(masks)[0, 1]) < 0.04


def test_the_seed_alone_decides_what_is_dropped_and_without_one_each_call_drops_others():
    x, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((100, 100), 100))
    first, again = (bias_gelu_dropout(x, bias, dropout_p=0.3, seed=torch.tensor(7)) for _ in range(2))
    drawn = [bias_gelu_dropout(x, bias, dropout_p=0.3) for _ in range(2)]
    assert torch.equal(first, again) and not torch.equal(*drawn)
    for out in (first, *drawn):
        dropped = out == 0
        assert abs(dropped.double().mean() - 0.3) < 0.025
        assert error(out, (F.gelu(x + bias) / 0.7).masked_fill(dropped, 0.0)) < 1e-4  # p is a multiple of 2^-16


_X, _BIAS = torch.zeros(3, 4), torch.zeros(4)
_GOOD = {
    bias_gelu_dropout: {"x": _X, "bias": _BIAS, "dropout_p": 0.1},
    bias_dropout_residual: {"x": _X, "bias": _BIAS, "residual": _X},
    mask_fill: {"x": _X, "bias": _BIAS, "embedding": _BIAS, "mask": torch.zeros(3, dtype=torch.bool)},
    residual_layer_norm: {"residual": _X, "weight": _BIAS, "bias": _BIAS},
}


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (bias_gelu_dropout, {"x": torch.zeros(3)}, "x must be floating point of shape"),
        (bias_gelu_dropout, {"x": _X.long()}, "x must be floating point of shape"),
        (bias_gelu_dropout, {"bias": torch.zeros(5)}, r"bias must be floating point of shape \[4\]"),
        (bias_gelu_dropout, {"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\); got 1.0"),
        (bias_gelu_dropout, {"seed": torch.zeros(1, dtype=torch.int64)}, "seed must be a scalar int64"),
        (bias_gelu_dropout, {"seed": torch.tensor(1.0)}, "seed must be a scalar int64"),
        (bias_dropout_residual, {"x": torch.zeros(3)}, "x must be floating point of shape"),
        (bias_dropout_residual, {"bias": torch.zeros(5)}, r"bias must be floating point of shape \[4\]"),
        (bias_dropout_residual, {"residual": torch.zeros(2, 4)}, r"residual must have shape \[3, 4\]; got \(2, 4\)"),
        (bias_dropout_residual, {"residual": torch.zeros(3, 5)}, r"residual must have shape \[3, 4\]; got \(3, 5\)"),
        (
            bias_dropout_residual,
            {"index": torch.zeros(2, dtype=torch.int64)},
            "with an index of 3; got .* with an index of 2",
        ),
        (bias_dropout_residual, {"index": torch.zeros(3)}, "index must be int64"),
        (
            bias_dropout_residual,
            {"residual": None, "index": torch.zeros(3, dtype=torch.int64)},
            "index was given without a residual",
        ),
        (bias_dropout_residual, {"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\); got -0.1"),
        (mask_fill, {"x": torch.zeros(3)}, "x must be floating point of shape"),
        (mask_fill, {"bias": torch.zeros(5)}, r"bias must be floating point of shape \[4\]"),
        (mask_fill, {"embedding": torch.zeros(1, 4)}, r"embedding must be floating point of shape \[4\]"),
        (mask_fill, {"mask": torch.zeros(3)}, r"mask must be bool of shape \[3\]"),
        (mask_fill, {"padding": torch.zeros(4, dtype=torch.bool)}, r"padding must be bool of shape \[3\]"),
        (mask_fill, {"dropout_p": 2.0}, r"dropout_p must be in \[0, 1\); got 2.0"),
        (residual_layer_norm, {"residual": torch.zeros(3)}, "residual must be floating point of shape"),
        (residual_layer_norm, {"weight": torch.zeros(5)}, r"weight must be floating point of shape \[4\]"),
        (residual_layer_norm, {"bias": _BIAS.long()}, r"bias must be floating point of shape \[4\]"),
        (residual_layer_norm, {"update": torch.zeros(2, 4)}, r"residual must have shape \[2, 4\]; got \(3, 4\)"),
        (residual_layer_norm, {"update_bias": _BIAS}, "update_bias was given without an update"),
        (residual_layer_norm, {"index": torch.zeros(3)}, "index must be int64"),
        (residual_layer_norm, {"narrow": torch.float64}, "narrower than the results' torch.float32.*got torch.float64"),
        (residual_layer_norm, {"narrow": torch.int8}, "narrow must be a floating dtype"),
        (residual_layer_norm, {"output_dropout_p": 1.0}, r"output_dropout_p must be in \[0, 1\); got 1.0"),
        (residual_layer_norm, {"update_dropout_p": -1.0}, r"update_dropout_p must be in \[0, 1\); got -1.0"),
    ],
)
def test_bad_arguments_are_named(function, change, message):
    with pytest.raises(ValueError, match=message):
        function(**_GOOD[function] | change)
