"""``masked_attention``: attention within packed sequences, with PyTorch's kernels or as the formula says."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hubert_fast import backend
from hubert_fast.ops.masked_attention import masked_attention
from hubert_fast.torch_backend import masked_attention as kernels
from tests.ops.comparison import assert_as_precise, assert_twins, error, run

OPERATOR = "masked_attention"
BACKENDS = ["torch", "reference"]


def _qkv(rows, heads=2, head_dim=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, heads, head_dim, dtype=torch.float64, generator=generator).to(dtype)


def _offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def _attend(offsets, key_lengths=None, *, dropout_p=0.0, seed=0):
    """The operator as a function of qkv, with the same dropout on every call."""

    def function(qkv):
        torch.manual_seed(seed)
        longest = int(offsets.diff().max())
        return masked_attention(qkv, offsets, key_lengths, max_frames=longest, dropout_p=dropout_p)

    return function


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4), dead=st.integers(0, 9), heads=st.integers(1, 4),
    head_dim=st.integers(1, 24), keys=st.none() | st.lists(st.floats(0, 1), min_size=4, max_size=4),
    dropout_p=st.sampled_from([0.0, 0.1, 0.5, 0.99]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_backends_agree_for_any_shape_with_and_without_dropout(lengths, dead, heads, head_dim, keys, dropout_p, seed):
    key_lengths = None if keys is None else torch.tensor([int(share * length) for share, length in zip(keys, lengths)])
    function = _attend(_offsets(lengths), key_lengths, dropout_p=dropout_p, seed=seed)
    assert_twins(OPERATOR, function, [_qkv(sum(lengths) + dead, heads, head_dim, seed)])


@pytest.mark.parametrize(
    ("lengths", "keys"),
    [([9, 9, 9], None), ([9, 9, 9], [9, 0, 4]), ([5, 0, 12, 1], None), ([12, 3], [2, 3]), ([5, 12], [0, 7])],
)
@pytest.mark.parametrize("dead", [0, 3, 18])
def test_padded_attention_of_other_devices_equals_the_reference(lengths, keys, dead):
    """What runs on a GPU, run on the CPU: the output and, through autograd, the gradient."""
    key_lengths = None if keys is None else torch.tensor(keys)
    offsets, results = _offsets(lengths), []
    for function in (kernels.padded_attention, None):
        qkv = _qkv(sum(lengths) + dead).requires_grad_()
        if function is None:
            with backend.using("reference", OPERATOR):
                out = masked_attention(qkv, offsets, key_lengths, max_frames=max(lengths))
        else:
            out = function(qkv, offsets, key_lengths, max(lengths), 0.0)
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    for ours, truth in zip(*results):
        assert error(ours, truth) < 1e-12


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_backends_agree_where_heads_run_in_groups(head_dim, dropout_p, monkeypatch):
    monkeypatch.setattr(kernels, "_SCORES_BYTES", 1 << 17)
    function = _attend(_offsets([90, 130, 1]), dropout_p=dropout_p)
    assert_twins(OPERATOR, function, [_qkv(221, 5, head_dim)])


@pytest.mark.parametrize("name", BACKENDS)
def test_equal_sequences_are_scaled_dot_product_attention(name):
    qkv = _qkv(3 * 20)
    key_lengths = torch.tensor([20, 7, 13])
    query, key, value = qkv.view(3, 20, 3, 2, 8).permute(2, 0, 3, 1, 4)
    mask = (torch.arange(20) < key_lengths[:, None])[:, None, None]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).reshape(60, 2, 8)
    with backend.using(name, OPERATOR):
        assert error(_attend(_offsets([20] * 3), key_lengths)(qkv), expected) <= 1e-12


@pytest.mark.parametrize("name", BACKENDS)
def test_packed_rows_equal_padded_rows(name):
    lengths = [20, 7, 13]
    padded = _qkv(60)
    valid = (torch.arange(20) < torch.tensor(lengths)[:, None]).flatten()
    results = []
    for qkv, function in (
        (padded, _attend(_offsets([20] * 3), torch.tensor(lengths))),
        (padded[valid], _attend(_offsets(lengths))),
    ):
        leaf = qkv.clone().requires_grad_()
        with backend.using(name, OPERATOR):
            out = function(leaf)
        out = out[valid] if len(out) == 60 else out
        out.square().sum().backward()
        results.append((out, leaf.grad[valid] if len(leaf) == 60 else leaf.grad))
    for packed, wanted in zip(results[1], results[0]):
        assert error(packed, wanted) <= 1e-12


@pytest.mark.parametrize("name", BACKENDS)
def test_a_sequence_without_keys_attends_to_all_of_its_rows(name):
    qkv = _qkv(20)
    with backend.using(name, OPERATOR):
        out = _attend(_offsets([10, 10]), torch.tensor([0, 4]))(qkv)
        everywhere = _attend(_offsets([10, 10]))(qkv)
    assert out.isfinite().all() and torch.equal(out[:10], everywhere[:10])


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_of_no_sequence_are_0_and_have_no_gradient(name, dropout_p):
    qkv = _qkv(20).requires_grad_()
    with backend.using(name, OPERATOR):
        out = _attend(_offsets([9, 4]), dropout_p=dropout_p)(qkv)
        out.sum().backward()
    assert (out[:13] != 0).all() and (out[13:] == 0).all()
    assert (qkv.grad[:13, 2] != 0).any() and (qkv.grad[13:] == 0).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_the_seed_says_what_is_dropped(name):
    qkv, offsets = _qkv(20), _offsets([20])
    outs = []
    for seed in (1, 1, 2):
        with backend.using(name, OPERATOR):
            outs.append(masked_attention(qkv, offsets, max_frames=20, dropout_p=0.3, seed=torch.tensor(seed)))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_as_precise_as_pytorch(dropout_p, dtype):
    function = _attend(_offsets([50, 83]), dropout_p=dropout_p)
    assert_as_precise(OPERATOR, function, lambda seed: [_qkv(133, 2, 64, seed)], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_do_not_overflow(dtype):
    results = run(OPERATOR, "torch", _attend(_offsets([30])), [30 * _qkv(30, dtype=dtype)])
    assert all(each.isfinite().all() for each in results)


def test_dropout_drops_as_often_as_asked_and_keeps_the_expectation():
    """With values of one unit vector per key, the output shows every attention weight after dropout."""
    frames, heads, p = 64, 4, 0.3
    qkv = torch.zeros(frames, 3, heads, frames, dtype=torch.float64)
    qkv[:, 2] = torch.eye(frames, dtype=torch.float64)[:, None]
    weights = torch.stack([_attend(_offsets([frames]), dropout_p=p, seed=seed)(qkv) for seed in range(8)])
    kept = weights > 0
    assert abs(kept.double().mean() - (1 - p)) < 0.01  # 131,072 draws: five standard deviations are 0.006
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / frames / (1 - p)), rtol=1e-4, atol=0)
    for dim in (0, 1, 2, 3):  # seeds, queries, heads and keys are all dropped alike
        share = kept.double().mean([each for each in range(4) if each != dim])
        assert (share - (1 - p)).abs().max() < 0.06
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[0, :, 0], kept[0, :, 1])


@pytest.mark.parametrize("name", BACKENDS)
def test_dropout_is_the_same_for_the_same_seed_and_in_the_backward(name):
    """The output is linear in the values, so the gradient of the values shows the mask that the backward used."""
    lengths, qkv = _offsets([25, 11]), _qkv(36).requires_grad_()
    function = _attend(lengths, dropout_p=0.4, seed=3)
    with backend.using(name, OPERATOR):
        out = function(qkv)
        assert torch.equal(out, function(qkv))
        assert not torch.equal(out, _attend(lengths, dropout_p=0.4, seed=4)(qkv))
        direction = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, qkv, direction)
    # <direction, out(values)> = <grad of the values, values> only if both passes dropped the same weights.
    torch.testing.assert_close((grad[:, 2] * qkv[:, 2]).sum(), (direction * out).sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BACKENDS)
def test_random_numbers_are_drawn_only_for_dropout(name):
    with backend.using(name, OPERATOR):
        torch.manual_seed(0)
        masked_attention(_qkv(10), _offsets([10]), max_frames=10)
        unmoved = torch.rand(1)
        torch.manual_seed(0)
        assert torch.equal(unmoved, torch.rand(1))
        following = []
        for length in (10, 30):  # one number whatever the size: what is drawn next does not depend on the batch
            torch.manual_seed(0)
            masked_attention(_qkv(length), _offsets([length]), max_frames=length, dropout_p=0.1)
            following.append(torch.rand(1))
    assert torch.equal(*following) and not torch.equal(following[0], unmoved)


def test_autocast_keeps_the_dtype_of_qkv():
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert _attend(_offsets([10]))(_qkv(10, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"qkv must have shape .*; got \(10, 2, 2, 8\)", dict(qkv=_qkv(10)[:, :2])),
        (r"qkv must be floating point; got torch.int64", dict(qkv=_qkv(10).long())),
        (r"offsets must be int64 .*; got torch.int32", dict(offsets=_offsets([10]).int())),
        (r"offsets must be int64 .*; got torch.int64 \(1, 2\)", dict(offsets=_offsets([10])[None])),
        (r"offsets must be int64 .*; got torch.int64 \(0,\)", dict(offsets=_offsets([])[:0])),
        (r"key_lengths must be int64 .*; got torch.int32", dict(key_lengths=torch.tensor([4], dtype=torch.int32))),
        (r"key_lengths must be int64 of shape \[1\].*; got torch.int64 \(2,\)", dict(key_lengths=torch.tensor([4, 4]))),
        (r"seed must be a scalar int64 tensor", dict(seed=torch.tensor([4]))),
        (r"dropout_p must be in \[0, 1\); got 1.0", dict(dropout_p=1.0)),
        (r"dropout_p must be in \[0, 1\); got -0.1", dict(dropout_p=-0.1)),
    ],
)
def test_bad_arguments_are_named(message, change):
    arguments = {"qkv": _qkv(10), "offsets": _offsets([10]), "key_lengths": None, "max_frames": 10, **change}
    with pytest.raises(ValueError, match=message):
        masked_attention(**arguments)
