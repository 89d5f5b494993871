"""``masked_attention``: attention within packed sequences, with PyTorch's kernels, as the formula says, or on Triton's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hubert_fast import backend, cpu, extension
from hubert_fast.cpu_backend import masked_attention as cpu_backend
from hubert_fast.ops import masked_attention as operator
from hubert_fast.ops.masked_attention import dropout_columns, masked_attention
from hubert_fast.torch_backend import masked_attention as kernels
from tests.ops.comparison import assert_as_precise, assert_twins, device_of, error, on_every_backend, run

OPERATOR = "masked_attention"

# Backend "cpu" takes float32 and bfloat16 alone.
on_all_backends = pytest.mark.parametrize(
    "name", [*on_every_backend.args[1], *(["cpu"] if extension.cpu() is not None else [])]
)


def qkv_of(rows, heads=2, head_dim=8, seed=0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, heads, head_dim, dtype=torch.float64, generator=generator).to(device, dtype)


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def keys_of(lengths, shares):
    """The keys of each sequence: a share of its rows, or with no shares None. Sequences past the last share have 0, all."""
    if shares is None:
        return None
    keys = [int(share * length) for share, length in zip(shares, lengths)]
    return keys + [0] * (len(lengths) - len(keys))


def attend(lengths, keys=None, *, p=0.0, seed=0, more_frames=0, qkv_bias=None, columns=None, wanted=None, fillers=()):
    """The operator as a function of qkv, with the same dropout on every call.

    ``wanted``: rows whose output is wanted, ascending; ``fillers`` are then named behind them as rows of no sequence.
    """

    def function(qkv):
        device, longest = qkv.device, max(lengths, default=0) + more_frames
        key_lengths = None if keys is None else torch.tensor(keys, device=device)
        given_seed = torch.tensor(seed, device=device) if p else None
        offsets = offsets_of(lengths).to(device)
        settings = {"max_frames": longest, "dropout_p": p, "seed": given_seed}
        if wanted is not None:
            query_offsets = torch.searchsorted(torch.tensor(wanted, dtype=torch.int64), offsets_of(lengths))
            rows = torch.tensor([*wanted, *fillers], dtype=torch.int64, device=device)
            settings |= {"query_rows": _strided(rows), "query_offsets": _strided(query_offsets)}  # these on the host
        return masked_attention(qkv, offsets, key_lengths, qkv_bias=qkv_bias, columns=columns, **settings)

    return function


def _strided(vector):
    return torch.stack([vector, torch.full_like(vector, -1)], 1)[:, 0]


def some(rows, share, seed=0):
    """A share of the rows, ascending."""
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed)).lt(share).nonzero().squeeze(1).tolist()


# What a plan with a capacity ends in: sequences without a row.
EMPTY = st.sampled_from([0, 1, 60])


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4), empty=EMPTY, dead=st.integers(0, 9),
    heads=st.integers(1, 4), head_dim=st.integers(1, 24),
    keys=st.none() | st.lists(st.floats(0, 1), min_size=4, max_size=4), p=st.sampled_from([0.0, 0.1, 0.5, 0.99]),
    more_frames=st.integers(0, 100), seed=st.integers(0, 1000), share=st.none() | st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)  # fmt: skip
def test_backends_agree_for_any_shape_with_and_without_dropout(
    lengths, empty, dead, heads, head_dim, keys, p, more_frames, seed, share
):
    lengths = [*lengths, *empty * [0]]
    keys = keys_of(lengths, keys)
    wanted = None if share is None else some(sum(lengths) + dead, share, seed)
    function = attend(lengths, keys, p=p, seed=seed, more_frames=more_frames, wanted=wanted)
    assert_twins(OPERATOR, function, [qkv_of(sum(lengths) + dead, heads, head_dim, seed)])


@pytest.mark.parametrize(
    ("lengths", "keys"),
    [
        ([9, 9, 9], None), ([9, 9, 9], [9, 0, 4]), ([5, 0, 12, 1], None), ([12, 3], [2, 3]), ([5, 12], [0, 7]),
        ([0, 5, 0, 12, *40 * [0]], [0, 3, 0, 12, *40 * [0]]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dead", [0, 3, 18])
@pytest.mark.parametrize("more_frames", [0, 50])
@pytest.mark.parametrize("share", [None, 0.5])
def test_padded_attention_of_other_devices_equals_the_reference(lengths, keys, dead, more_frames, share, monkeypatch):
    """The formulation for GPUs, run on the CPU."""
    wanted = None if share is None else some(sum(lengths), share)
    function = attend(lengths, keys, more_frames=more_frames, wanted=wanted, fillers=[1, 0])

    def padded(qkv):
        with monkeypatch.context() as patch:
            patch.setattr(operator._operator, "run", lambda _, arguments: [operator._padded(arguments)])
            return function(qkv)

    inputs = [qkv_of(sum(lengths) + dead)]
    both = (run(OPERATOR, "reference", each, inputs) for each in (padded, function))
    assert all(error(*pair) < 1e-12 for pair in zip(*both))


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_backends_agree_where_heads_run_in_groups(head_dim, p, monkeypatch):
    monkeypatch.setattr(kernels, "_SCORES_BYTES", 1 << 17)
    assert_twins(OPERATOR, attend([90, 130, 1], p=p), [qkv_of(221, 5, head_dim)])


@pytest.mark.parametrize("name", ["auto", "torch", *(["cpu"] if extension.cpu() is not None else [])])
@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [1.0, 9.0])
def test_dropout_in_16_bits_is_as_exact_as_pytorchs(name, products, factor, monkeypatch):
    """Scores rounded to bfloat16 make the error 3 times PyTorch's, 10 times where they are large; rounded weights 1.5 times."""
    monkeypatch.setattr(cpu, "_SLOW", {torch.bfloat16} if products == torch.float32 else set())
    frames, heads, p = 80, 2, 0.125  # few: "auto" would take the formula in float32
    qkv = qkv_of(frames, heads, 32) * torch.tensor([factor, 1.0, 1.0])[:, None, None]
    qkv = qkv.bfloat16()
    direction = torch.randn(frames, heads, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    arguments = operator.Arguments(qkv, offsets_of([frames]), None, frames, p, torch.tensor(3))
    runs = operator._operator.choose(arguments) if name == "auto" else name
    masks = (cpu_backend._Masks if runs == "cpu" else kernels.Masks)(arguments)
    sequence = kernels._sequences(qkv.float(), arguments)[0]
    ones = torch.ones(heads, frames, frames)
    kept = masks.of(sequence, slice(0, heads))(ones, ones) != 0

    def pytorchs(qkv):
        grid = qkv.permute(1, 2, 0, 3)[:, None]
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(*grid, None, p, False, kept[None])
        return out[0].transpose(0, 1)

    def both(function, dtype):
        leaf = qkv.to(dtype, copy=True).requires_grad_()
        out = function(leaf)
        return out, *torch.autograd.grad(out, leaf, direction.to(dtype))[0].unbind(1)

    with backend.using(name, OPERATOR):
        ours = both(attend([frames], p=p, seed=3), torch.bfloat16)
    exact, theirs = both(pytorchs, torch.float64), both(pytorchs, torch.bfloat16)
    for found, plain, truth in zip(ours, theirs, exact):
        assert error(found, truth) <= 1.5 * error(plain, truth)


class _GivenMasks:
    """The dropout masks of backend "cpu", for PyTorch's operations in any dtype."""

    def __init__(self, arguments):
        self._masks = cpu_backend._Masks(arguments)

    def of(self, sequence, group):
        drop = self._masks.of(sequence, group)
        return lambda x, out: torch.mul(x, drop(torch.ones(x.shape), torch.empty(x.shape)).to(x.dtype), out=out)


@pytest.mark.skipif(extension.cpu() is None, reason=str(extension.why_not("cpu")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [None, [0, 2, 33, 34, 35, 90, 130]], ids=["all", "some"])
def test_dropout_in_c_is_the_formula_with_another_mask(wanted, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_SCORES_BYTES", 1 << 16)  # several groups of heads
    function = attend([33, 60, 49], [0, 41, 0], p=0.2, seed=5, wanted=wanted)
    inputs = [qkv_of(150, 5, 16).to(dtype)]
    ours = run(OPERATOR, "cpu", function, inputs)
    other_mask = run(OPERATOR, "torch", function, inputs)
    monkeypatch.setattr(kernels.forward, "__defaults__", (_GivenMasks,))
    monkeypatch.setattr(kernels.backward, "__defaults__", (_GivenMasks,))
    theirs = run(OPERATOR, "torch", function, inputs)
    truth = run(OPERATOR, "torch", function, [each.double() for each in inputs])
    for found, plain, exact, other in zip(ours, theirs, truth, other_mask):
        assert error(found, exact) <= 1.5 * error(plain, exact) and error(other, exact) > 0.1


def test_few_scores_stay_the_formulas_unless_it_would_round_them():
    arguments = operator.Arguments(qkv_of(49, dtype=torch.float32), offsets_of([49]), None, 49, 0.1, torch.tensor(1))
    assert operator._operator.choose(arguments) == "reference"
    assert operator._operator.choose(arguments._replace(qkv=arguments.qkv.bfloat16())) != "reference"


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_autocast_rounds_no_float32(name):
    qkv = qkv_of(30, dtype=torch.float32)
    with backend.using(name, OPERATOR):
        plain = attend([30], p=0.1)(qkv)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(plain, attend([30], p=0.1)(qkv))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_a_bias_is_summed_before_it_is_rounded_where_products_are_float32(dtype, monkeypatch):
    monkeypatch.setattr(cpu, "_SLOW", {dtype})
    qkv, bias = qkv_of(200).to(dtype), torch.zeros(3, 2, 8)

    def gradient(dtype):
        leaf = bias.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        with backend.using("torch", OPERATOR):
            out = attend([200], p=0.1, qkv_bias=leaf)(qkv.to(dtype))
        return torch.autograd.grad(out, leaf, torch.ones_like(out))[0]

    exact = gradient(torch.float64)
    for found, truth in zip(gradient(dtype)[::2], exact[::2]):  # that of the keys' bias is 0
        assert error(found, truth) < 1e-5


@pytest.mark.skipif(extension.cpu() is None, reason=str(extension.why_not("cpu")))
def test_dropout_in_c_is_what_runs_on_a_cpu_and_says_what_it_cannot():
    arguments = operator.Arguments(
        qkv_of(800, dtype=torch.float32), offsets_of([400, 400]), None, 400, 0.1, torch.tensor(1)
    )
    assert operator._operator.choose(arguments) == "cpu"
    wide = arguments._replace(qkv=arguments.qkv.double())
    assert operator._operator.choose(wide) == "torch" and "qkv is torch.float64" in cpu_backend.objection(wide)
    assert "is on meta" in cpu_backend.objection(arguments._replace(qkv=arguments.qkv.to("meta")))


@on_all_backends
def test_a_probability_next_to_1_keeps_some_and_stays_finite(name):
    qkv = qkv_of(40, dtype=torch.float32, device=device_of(name))
    assert all(each.isfinite().all() for each in run(OPERATOR, name, attend([40], p=1.0 - 2**-20, seed=1), [qkv]))


def test_a_sequence_without_keys_attends_to_all_of_its_rows():
    qkv = qkv_of(20)
    out, everywhere = attend([10, 10], [0, 4])(qkv), attend([10, 10])(qkv)
    assert out.isfinite().all() and torch.equal(out[:10], everywhere[:10])


@on_all_backends
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_rows_of_no_sequence_are_0_and_are_not_read(name, p):
    qkv = qkv_of(80, 1, 16, dtype=torch.float32, device=device_of(name)).requires_grad_()
    direction = torch.ones(80, 1, 16, device=qkv.device)
    results = []
    with backend.using(name, OPERATOR):
        for fill in (1.0, float("nan")):
            with torch.no_grad():
                qkv[33:], direction[33:] = fill, fill
            out = attend([20, 13], p=p)(qkv)
            results.append((out, *torch.autograd.grad(out, qkv, direction)))
    for clean, ours in zip(*results):
        assert torch.equal(ours[:33], clean[:33]) and (ours[:33] != 0).any() and (ours[33:] == 0).all()


@on_all_backends
def test_no_sequence_reads_another_one(name):
    qkv, direction = (
        each.to(device_of(name)) for each in (qkv_of(60, 1, 20, dtype=torch.float32), torch.ones(60, 1, 20))
    )
    qkv[20:41], direction[20:41] = float("nan"), float("inf")
    with backend.using(name, OPERATOR):
        out = attend([20, 21, 19], [3, 21, 19], p=0.1)(qkv.requires_grad_())
    for result in (out, *torch.autograd.grad(out, qkv, direction)):
        assert result[:20].isfinite().all() and result[41:].isfinite().all()


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [30.0, -30.0, 1e-30])
def test_large_and_tiny_scores(name, factor, dtype):
    qkv = qkv_of(40, 1, 16, dtype=dtype, device=device_of(name))
    qkv[:, 0] *= factor
    assert all(each.isfinite().all() for each in run(OPERATOR, name, attend([23, 17]), [qkv]))


@on_all_backends
def test_the_seed_says_what_is_dropped_and_is_drawn_where_none_is_given(name):
    qkv = qkv_of(30, 1, 16, dtype=torch.float32, device=device_of(name))

    def drawn(start):
        torch.manual_seed(start)
        return masked_attention(qkv, offsets_of([30]), max_frames=30, dropout_p=0.3)

    with backend.using(name, OPERATOR):
        for draw in (drawn, lambda seed: attend([30], p=0.3, seed=seed)(qkv)):
            first, again, other = (draw(seed) for seed in (1, 1, 2))
            assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_as_precise_as_pytorch(p, dtype):
    assert_as_precise(OPERATOR, attend([50, 83], p=p), lambda seed: [qkv_of(133, 2, 64, seed)], dtype)


@on_all_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_gradient_of_a_bias_is_the_sum_of_that_of_the_rows(p, dtype, name):
    lengths, device = [1, 63, 0, 64, 65], device_of(name)
    qkv = qkv_of(198, 2, 20, dtype=dtype, device=device).requires_grad_()
    bias = torch.randn(3, 2, 20, device=device).requires_grad_()
    with backend.using(name, OPERATOR):
        out, plain = (attend(lengths, [0, 40, 0, 64, 1], p=p, qkv_bias=each)(qkv) for each in (bias, None))
    direction = qkv_of(198, 2, 20, seed=1, dtype=dtype, device=device)[:, 0]
    qkv_grad, bias_grad = torch.autograd.grad(out, (qkv, bias), direction)
    assert torch.equal(out, plain) and torch.equal(qkv_grad, *torch.autograd.grad(plain, qkv, direction))
    assert bias_grad.dtype == torch.float32 and bias_grad.shape == bias.shape
    assert error(bias_grad, qkv_grad.double().sum(0)) < (1e-5 if dtype == torch.float32 else 1e-2)


# Sequence 1 has no query, sequence 3 all. Behind them are dead rows, 8 of the 10; live ones; and more than there are rows.
SOME = 40, [10, 4, 0, 6, 10], [0, 3, 9, *range(14, 20), 25]
FILLERS = {"none": [], "dead": [31, 33, *range(34, 40)], "live": [5, 1, 22], "many": 60 * [5]}


@on_all_backends
@pytest.mark.parametrize("fillers", FILLERS.values(), ids=FILLERS)
@pytest.mark.parametrize("keys", [None, [4, 0, 0, 5, 10]], ids=["all-keys", "key-lengths"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_queries_of_some_rows_give_what_these_rows_have_of_all(p, keys, fillers, name):
    rows, lengths, wanted = SOME
    device, count = device_of(name), len(wanted) + len(fillers)
    qkv = qkv_of(rows, 2, 20, dtype=torch.float32, device=device).requires_grad_()
    bias = torch.randn(3, 2, 20, device=device).requires_grad_()
    direction = torch.randn(count, 2, 20, generator=torch.Generator().manual_seed(1)).to(device)
    with backend.using(name, OPERATOR):
        whole = attend(lengths, keys, p=p, qkv_bias=bias)(qkv)
        whole = torch.cat([whole[wanted], whole.new_zeros(len(fillers), 2, 20)])
        ours = attend(lengths, keys, p=p, qkv_bias=bias, wanted=wanted, fillers=fillers)(qkv)
    torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)
    for own, its in zip(*(torch.autograd.grad(out, (qkv, bias), direction) for out in (ours, whole))):
        torch.testing.assert_close(own, its, rtol=1e-4, atol=1e-5)


@on_all_backends
def test_nobody_asks_for_a_query(name):
    qkv = qkv_of(14, 2, 8, dtype=torch.float32, device=device_of(name))
    out, grad = run(OPERATOR, name, attend([10, 4], p=0.1, wanted=[]), [qkv])
    assert out.shape == (0, 2, 8) and (grad == 0).all()


def test_dropout_drops_as_often_as_asked_and_keeps_the_expectation():
    """With values of one unit vector per key, the output shows every attention weight after dropout."""
    frames, heads, p = 64, 4, 0.3
    qkv = torch.zeros(frames, 3, heads, frames, dtype=torch.float64)
    qkv[:, 2] = torch.eye(frames, dtype=torch.float64)[:, None]
    weights = torch.stack([attend([frames], p=p, seed=seed)(qkv) for seed in range(8)])
    kept = weights > 0
    assert abs(kept.double().mean() - (1 - p)) < 0.01  # 131,072 draws: five standard deviations are 0.006
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / frames / (1 - p)), rtol=1e-4, atol=0)
    for dim in (0, 1, 2, 3):  # seeds, queries, heads and keys are all dropped alike
        share = kept.double().mean([each for each in range(4) if each != dim])
        assert (share - (1 - p)).abs().max() < 0.06
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[0, :, 0], kept[0, :, 1])


def test_other_backends_need_no_columns_and_ignore_them():
    with backend.using("torch", OPERATOR):
        assert dropout_columns(torch.tensor([3, 4]), 10) is None
        columns = torch.zeros(128, dtype=torch.int32)
        results = [attend([10], p=0.3, columns=each)(qkv_of(10)) for each in (columns, None)]
    assert torch.equal(*results)


@pytest.mark.parametrize("seeds", [torch.tensor(3), torch.tensor([3], dtype=torch.int32)])
def test_columns_are_of_a_list_of_seeds(seeds):
    with pytest.raises(ValueError, match=r"seeds must be int64 of shape \[layers\]"):
        dropout_columns(seeds, 10)


def test_random_numbers_are_drawn_only_for_dropout():
    following = []
    for length, p in ((10, 0.0), (10, 0.1), (30, 0.1)):
        torch.manual_seed(0)
        masked_attention(qkv_of(length), offsets_of([length]), max_frames=length, dropout_p=p)
        following.append(torch.rand(1))
    torch.manual_seed(0)
    unmoved = torch.rand(1)
    assert torch.equal(following[0], unmoved) and not torch.equal(following[1], unmoved)
    assert torch.equal(*following[1:])  # one number whatever the size: what is drawn next does not depend on the batch


def _queries(rows=None, offsets=None):
    rows, offsets = torch.arange(4) if rows is None else rows, torch.tensor([0, 4]) if offsets is None else offsets
    return {"query_rows": rows, "query_offsets": offsets}


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"qkv must have shape .*; got \(10, 2, 2, 8\)", dict(qkv=qkv_of(10)[:, :2])),
        (r"qkv must be floating point; got torch.int64", dict(qkv=qkv_of(10).long())),
        (r"offsets must be int64 .*; got torch.int32", dict(offsets=offsets_of([10]).int())),
        (r"offsets must be int64 .*; got torch.int64 \(1, 2\)", dict(offsets=offsets_of([10])[None])),
        (r"offsets must be int64 .*; got torch.int64 \(0,\)", dict(offsets=offsets_of([])[:0])),
        (r"key_lengths must be int64 .*; got torch.int32", dict(key_lengths=torch.tensor([4], dtype=torch.int32))),
        (r"key_lengths must be int64 of shape \[1\].*; got torch.int64 \(2,\)", dict(key_lengths=torch.tensor([4, 4]))),
        (r"seed must be a scalar int64 tensor", dict(seed=torch.tensor([4]))),
        (r"qkv_bias must be .* \[3, 2, 8\]; got torch.float32 \(48,\)", dict(qkv_bias=torch.zeros(48))),
        (r"query_rows and query_offsets must be given together", dict(query_rows=torch.arange(4))),
        (r"query_rows must be int64 of shape \[queried\].*; got torch.int32 \(4,\)", _queries(torch.arange(4).int())),
        (r"query_offsets must be int64 of shape \[2\].*; got torch.int64 \(1,\)", _queries(offsets=torch.tensor([4]))),
        (r"columns were given without the seed", dict(columns=torch.zeros(128, dtype=torch.int32))),
        (
            r"columns must be int32 .* \[10 or more\] on cpu; got torch.int32 \(9,\)",
            dict(columns=torch.zeros(9, dtype=torch.int32), seed=torch.tensor(4)),
        ),
        (r"dropout_p must be in \[0, 1\); got 1.0", dict(dropout_p=1.0)),
        (r"dropout_p must be in \[0, 1\); got -0.1", dict(dropout_p=-0.1)),
    ],
)
def test_bad_arguments_are_named(message, change):
    arguments = {"qkv": qkv_of(10), "offsets": offsets_of([10]), "key_lengths": None, "max_frames": 10, **change}
    with pytest.raises(ValueError, match=message):
        masked_attention(**arguments)
