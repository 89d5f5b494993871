"""``masked_attention`` in Triton: in the interpreter, or on the GPU where there is one, against float64 of the formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", minversion="3.6")

from hubert_fast import backend  # noqa: E402
from hubert_fast.kernels import dropout, head_vectors  # noqa: E402
from hubert_fast.kernels import masked_attention as kernels  # noqa: E402
from hubert_fast.kernels.launch import ARCHITECTURES  # noqa: E402
from hubert_fast.ops.masked_attention import masked_attention  # noqa: E402
from tests.kernels import dropout_twin  # noqa: E402
from tests.kernels.device import DEVICE  # noqa: E402
from tests.ops.comparison import error  # noqa: E402

OPERATOR = "masked_attention"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = -1234567890123456789


@pytest.fixture(autouse=True)
def _triton():
    with backend.using("triton", OPERATOR):
        yield


def _randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)


def _attend(qkv, lengths, keys=None, p=0.0, seed=SEED, more_frames=0):
    keys = None if keys is None else torch.tensor(keys, device=DEVICE)
    seed = torch.tensor(seed, device=DEVICE) if p else None
    longest = max(lengths, default=0) + more_frames
    return masked_attention(qkv, _offsets(lengths), keys, max_frames=longest, dropout_p=p, seed=seed)


def _formula(qkv, lengths, keys=None, p=0.0, seed=SEED):
    """PyTorch's own operations in the dtype of ``qkv``, with the kernels' dropout mask."""
    rows, _, heads, head_dim = qkv.shape
    outputs, start = [], 0
    for i, frames in enumerate(lengths):
        query, key, value = qkv[start : start + frames].permute(1, 2, 0, 3)
        count = keys[i] if keys is not None and keys[i] > 0 else frames
        weights = (query @ key[:, :count].transpose(1, 2) / math.sqrt(head_dim)).softmax(-1)
        if p:
            weights = weights * _kept(start, frames, count, heads, p, seed).to(qkv.device) * dropout.scale(p)
        outputs.append((weights @ value[:, :count]).transpose(0, 1))
        start += frames
    return torch.cat([*outputs, qkv.new_zeros(rows - start, heads, head_dim)])


def _kept(start, frames, keys, heads, p, seed=SEED):
    """The mask of a sequence, [heads, frames, keys]: a row of it is a packed row and a head."""
    rows = (start + torch.arange(frames)) * heads + torch.arange(heads)[:, None]
    return dropout_twin.keep(seed, rows[..., None], torch.arange(keys), p)


def _run(function, qkv, direction, *settings, **more):
    """The output, then the gradients of queries, keys and values."""
    leaf = qkv.clone().requires_grad_()
    out = function(leaf, *settings, **more)
    (grad,) = torch.autograd.grad(out, leaf, direction.to(out.dtype))
    return [out.detach(), *grad.unbind(1)]


def _assert_as_precise(dtype, shape, lengths, keys=None, p=0.0, seeds=3, **more):
    """Errors are root mean squares over draws; those of all gradients go together where one may be 0 but for rounding."""
    ours, pytorchs = [], []
    for seed in range(seeds):
        qkv = _randn(*shape, seed=seed, dtype=dtype)
        direction = _randn(shape[0], *shape[2:], seed=100 + seed, dtype=dtype)
        truth = _run(_formula, qkv.double(), direction, lengths, keys, p)
        ours.append(_errors(_run(_attend, qkv, direction, lengths, keys, p, **more), truth))
        pytorchs.append(_errors(_run(_formula, qkv, direction, lengths, keys, p), truth))
    ours, pytorchs = (torch.tensor(each).square().mean(0).sqrt() for each in (ours, pytorchs))
    allowed = (1.5 * pytorchs).clamp(min=torch.finfo(dtype).eps / 4)
    assert (ours <= allowed).all(), (ours, pytorchs)


def _errors(given, truth):
    return [error(given[0], truth[0]), error(torch.stack(given[1:]), torch.stack(truth[1:]))]


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=3), dead=st.integers(0, 20), heads=st.integers(1, 2),
    head_dim=st.integers(8, 100), keys=st.none() | st.lists(st.floats(0, 1), min_size=3, max_size=3),
    p=st.sampled_from([0.0, 0.1, 0.7]), dtype=st.sampled_from(DTYPES), more_frames=st.integers(0, 40),
)  # fmt: skip
def test_as_precise_as_pytorch_for_any_shape(lengths, dead, heads, head_dim, keys, p, dtype, more_frames):
    keys = None if keys is None else [int(share * length) for share, length in zip(keys, lengths)]
    shape = (sum(lengths) + dead, 3, heads, head_dim)
    _assert_as_precise(dtype, shape, lengths, keys, p, seeds=2, more_frames=more_frames)


@pytest.mark.parametrize("head_dim", [1, 3, 7])
def test_vectors_of_a_few_values(head_dim):
    """The backward takes a rounded log-sum-exp, as every flash attention does; beside so short a product it shows."""
    shape, lengths = (45, 3, 1, head_dim), [42, 1]
    qkv, direction = _randn(*shape), _randn(45, 1, head_dim, seed=1)
    truth = _run(_formula, qkv.double(), direction, lengths)
    assert max(_errors(_run(_attend, qkv, direction, lengths), truth)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "p"), [(64, 0.1), (80, 0.1), (128, 0.0)])
def test_as_precise_as_pytorch_in_each_gradient_at_the_models_head_dims(head_dim, p, dtype):
    lengths, ours, pytorchs = [50, 21], [], []
    for seed in range(2):
        qkv, direction = _randn(71, 3, 1, head_dim, seed=seed, dtype=dtype), _randn(71, 1, head_dim, dtype=dtype)
        truth = _run(_formula, qkv.double(), direction, lengths, None, p)
        for errors, function in ((ours, _attend), (pytorchs, _formula)):
            results = _run(function, qkv, direction, lengths, None, p)
            errors.append([error(*pair) for pair in zip(results, truth)])
    ours, pytorchs = (torch.tensor(each).square().mean(0).sqrt() for each in (ours, pytorchs))
    assert (ours <= 1.5 * pytorchs).all(), (ours, pytorchs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float32), (80, torch.float32), (64, torch.bfloat16)])
def test_the_blocks_of_every_gpu_are_as_precise_as_pytorch(head_dim, dtype, architecture, monkeypatch):
    monkeypatch.setattr(kernels, "architecture", lambda tensor: architecture)
    _assert_as_precise(dtype, (150, 3, 1, head_dim), [70, 0, 3, 75], [50, 0, 0, 75], 0.1, seeds=1)


def test_forward_and_backward_drop_what_the_generator_says():
    """Values, or gradients, of one unit vector a row show every weight after dropout."""
    lengths, heads, p = [7, 50], 2, 0.3
    qkv = torch.zeros(57, 3, heads, 50, device=DEVICE)
    unit = torch.eye(50, device=DEVICE)[:, None]
    qkv[7:, 2] = unit
    direction = torch.zeros(57, heads, 50, device=DEVICE)
    direction[7:] = unit
    out, _, _, value_grad = _run(_attend, qkv, direction, lengths, None, p)
    kept = _kept(7, 50, 50, heads, p).to(DEVICE)
    for weights in (out[7:].permute(1, 0, 2), value_grad[7:].permute(1, 2, 0)):  # [heads, queries, keys]
        assert torch.equal(weights > 0, kept)
        torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], dropout.scale(p) / 50))


def test_dropout_drops_as_often_as_asked_and_without_a_pattern():
    frames, heads, p = 96, 2, 0.1
    qkv = torch.zeros(frames, 3, heads, frames, device=DEVICE)
    qkv[:, 2] = torch.eye(frames, device=DEVICE)[:, None]
    masks = torch.stack([_attend(qkv, [frames], p=p, seed=seed) > 0 for seed in range(2)]).double()
    deviations = (masks - (1 - p)) / math.sqrt(p * (1 - p))  # [seeds, queries, heads, keys]
    assert deviations.mean().abs() * math.sqrt(deviations.numel()) < 5
    for dim in range(4):
        count = deviations.numel() // deviations.shape[dim]
        of_each = deviations.mean([each for each in range(4) if each != dim])
        assert of_each.abs().max() * math.sqrt(count) < 5
        for shift in (1, 2, 8, 64):
            if shift < deviations.shape[dim]:
                product = (deviations * deviations.roll(shift, dim)).mean()
                assert product.abs() * math.sqrt(deviations.numel()) < 5


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_results_repeat_to_the_bit(p):
    qkv, direction = _randn(90, 3, 2, 64, dtype=torch.bfloat16), _randn(90, 2, 64, seed=1)
    first, again = (_run(_attend, qkv, direction, [40, 1, 49], [40, 0, 20], p) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_a_sequence_gives_the_same_bits_in_every_place_of_a_batch():
    qkv, direction = _randn(90, 3, 2, 64), _randn(90, 2, 64, seed=1)
    together = _run(_attend, qkv, direction, [40, 17, 33])
    for start, stop in ((0, 40), (40, 57), (57, 90)):
        alone = _run(_attend, qkv[start:stop], direction[start:stop], [stop - start])
        assert all(torch.equal(ours[start:stop], its) for ours, its in zip(together, alone))


def test_rows_of_no_sequence_are_0_and_are_not_read():
    qkv, direction = _randn(80, 3, 1, 16), _randn(80, 1, 16, seed=1)
    clean = _run(_attend, qkv, direction, [20, 13])
    qkv[33:], direction[33:] = float("nan"), float("nan")
    for ours, expected in zip(_run(_attend, qkv, direction, [20, 13]), clean):
        assert torch.equal(ours[:33], expected[:33]) and (ours[33:] == 0).all()


def test_no_sequence_reads_another_one():
    qkv, direction = _randn(60, 3, 1, 20), _randn(60, 1, 20, seed=1)
    qkv[20:41], direction[20:41] = float("nan"), float("inf")
    for result in _run(_attend, qkv, direction, [20, 21, 19], [3, 21, 19], 0.1):
        assert result[:20].isfinite().all() and result[41:].isfinite().all()


def test_keys_that_are_not_attended_to_have_no_gradient():
    _, query_grad, key_grad, value_grad = _run(_attend, _randn(50, 3, 1, 16), _randn(50, 1, 16), [50], [13], 0.1)
    assert (query_grad != 0).all() and (key_grad[:13] != 0).all() and (value_grad[:13] != 0).all()
    assert (key_grad[13:] == 0).all() and (value_grad[13:] == 0).all()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_batches_without_a_frame(lengths, rows, p):
    out, *gradients = _run(_attend, _randn(rows, 3, 2, 8), _randn(rows, 2, 8), lengths, None, p)
    assert out.shape == (rows, 2, 8) and (out == 0).all()
    assert all((each == 0).all() for each in gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [30.0, -30.0, 1e-30])
def test_large_and_tiny_scores(factor, dtype):
    qkv = _randn(40, 3, 1, 16, dtype=dtype)
    qkv[:, 0] *= factor
    assert all(each.isfinite().all() for each in _run(_attend, qkv, _randn(40, 1, 16), [23, 17]))


def test_equal_keys_of_any_size_share_the_weight():
    """Scores far below 0: exp2 of them would be 0 in float32, with padded keys taken as scores of 0 all the more."""
    qkv = torch.full((20, 3, 1, 16), 30.0, device=DEVICE)
    qkv[:, 1] = -30.0
    qkv[:, 2] = torch.arange(20.0, device=DEVICE)[:, None, None]
    torch.testing.assert_close(_attend(qkv, [20]), torch.full((20, 1, 16), 9.5, device=DEVICE))


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_any_strides(p):
    qkv, direction = _randn(30, 3, 2, 12), _randn(30, 2, 12, seed=1)
    expected = _run(_attend, qkv, direction, [18, 12], None, p)
    spread = qkv.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).requires_grad_()
    out = _attend(spread, [18, 12], None, p)
    (grad,) = torch.autograd.grad(out, spread, direction.permute(2, 1, 0).contiguous().permute(2, 1, 0))
    assert all(map(torch.equal, [out, *grad.unbind(1)], expected))
    leaf = qkv.clone().requires_grad_()
    _attend(leaf, [18, 12], None, p).sum().backward()  # a gradient of stride 0
    torch.testing.assert_close(leaf.grad.unbind(1)[2], _run(_attend, qkv, torch.ones(30, 2, 12), [18, 12], None, p)[3])


def test_offsets_and_lengths_may_lie_on_the_host():
    qkv = _randn(30, 3, 1, 16)
    out = masked_attention(qkv, _offsets([18, 12]).cpu(), torch.tensor([4, 0]), max_frames=18)
    assert torch.equal(out, _attend(qkv, [18, 12], [4, 0]))


def test_the_seed_says_what_is_dropped_and_is_drawn_where_none_is_given():
    qkv, offsets = _randn(30, 3, 1, 16), _offsets([30])
    outs = []
    for start in (1, 1, 2):
        torch.manual_seed(start)
        outs.append(masked_attention(qkv, offsets, max_frames=30, dropout_p=0.3))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert torch.equal(_attend(qkv, [30], p=0.3), _attend(qkv, [30], p=0.3))
    assert not torch.equal(_attend(qkv, [30], p=0.3), _attend(qkv, [30], p=0.3, seed=SEED + 1))


def test_autocast_keeps_the_dtype_of_qkv():
    with torch.autocast(DEVICE.type, torch.bfloat16):
        for dtype in DTYPES:
            assert _attend(_randn(10, 3, 1, 16, dtype=dtype), [10]).dtype == dtype


@pytest.mark.parametrize(
    ("message", "qkv"),
    [
        ("float32, bfloat16 and float16; got torch.float64", torch.zeros(4, 3, 1, 8, dtype=torch.float64)),
        ("head dims up to 128; got 129", torch.zeros(4, 3, 1, 129)),
    ],
)
def test_what_the_kernels_do_not_take_is_said(message, qkv):
    with pytest.raises(backend.BackendError, match=message):
        _attend(qkv.to(DEVICE), [4])


@pytest.mark.parametrize(
    ("head_dim", "tiles"),
    [(1, (16, 0)), (16, (16, 0)), (20, (32, 0)), (40, (32, 16)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)),
     (100, (128, 0)), (128, (128, 0))],
)  # fmt: skip
def test_tiles_hold_every_column(head_dim, tiles):
    assert head_vectors.tiles(head_dim) == tiles


# What the interpreter cannot show: shapes of a training step.

gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(12, 64), (16, 80), (4, 128), (3, 24)])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("keys", [None, [779, 512, 0, 0, 4]], ids=["all-keys", "key-lengths"])
class TestOnGpu:
    pytestmark = gpu

    def test_as_precise_as_pytorch_at_a_training_steps_shapes(self, heads, head_dim, dtype, p, keys):
        lengths = [779, 513, 0, 1, 128]
        _assert_as_precise(dtype, (sum(lengths) + 77, 3, heads, head_dim), lengths, keys, p)

    def test_results_repeat_to_the_bit(self, heads, head_dim, dtype, p, keys):
        lengths = [779, 513, 0, 1, 128]
        qkv = _randn(sum(lengths), 3, heads, head_dim, dtype=dtype)
        direction = _randn(sum(lengths), heads, head_dim, seed=1)
        first = _run(_attend, qkv, direction, lengths, keys, p)
        for _ in range(3):
            assert all(map(torch.equal, first, _run(_attend, qkv, direction, lengths, keys, p)))


class TestStepsOnGpu:
    pytestmark = gpu

    def test_neither_pass_waits_for_the_device_and_both_are_captured_in_a_graph(self):
        lengths = torch.tensor([300, 20, 0, 199])
        qkv, direction = _randn(600, 3, 12, 64, dtype=torch.bfloat16), _randn(600, 12, 64, seed=1, dtype=torch.bfloat16)
        offsets, seed = _offsets(lengths.tolist()), torch.tensor(SEED, device=DEVICE)

        def step():
            leaf = qkv.detach().requires_grad_()
            out = masked_attention(leaf, offsets, max_frames=400, dropout_p=0.1, seed=seed)
            return out, *torch.autograd.grad(out, leaf, direction)

        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        graph.replay()
        assert all(map(torch.equal, captured, eager))
        offsets.copy_(_offsets([100, 400, 50, 1]))  # another batch in the same memory
        seed += 1
        graph.replay()
        assert all(map(torch.equal, captured, step()))

    def test_rows_beyond_two_to_the_31_values(self):
        if torch.cuda.mem_get_info()[0] < 40 << 30:
            pytest.skip("needs 40 GB of free memory")
        heads, head_dim = 16, 64
        rows = (1 << 31) // (3 * heads * head_dim) + 1000
        qkv = torch.zeros(rows, 3, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
        tail = _randn(700, 3, heads, head_dim, dtype=torch.bfloat16)
        qkv[-700:] = tail
        direction = torch.zeros(rows, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
        direction[-700:] = _randn(700, heads, head_dim, seed=1, dtype=torch.bfloat16)
        whole, remainder = divmod(rows - 700, 1000)
        lengths = [1000] * whole + [remainder, 700]
        results = _run(_attend, qkv, direction, lengths)
        alone = _run(_attend, tail, direction[-700:], [700])
        assert all(torch.equal(ours[-700:], its) for ours, its in zip(results, alone))
