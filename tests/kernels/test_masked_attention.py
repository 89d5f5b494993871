"""``masked_attention`` in Triton: in the interpreter, or on the GPU where there is one, against float64 of the formula."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", minversion="3.6")

from hubert_fast import backend  # noqa: E402
from hubert_fast.kernels import head_vectors  # noqa: E402
from hubert_fast.kernels import masked_attention as kernels  # noqa: E402
from hubert_fast.kernels.launch import ARCHITECTURES, INTERPRETER  # noqa: E402
from hubert_fast.ops.masked_attention import dropout_columns, masked_attention  # noqa: E402
from tests.kernels import dropout_twin  # noqa: E402
from tests.kernels.device import DEVICE  # noqa: E402
from tests.ops import comparison  # noqa: E402
from tests.ops.test_masked_attention import EMPTY, OPERATOR, attend, keys_of, offsets_of, qkv_of, some  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = -1234567890123456789


def _qkv(rows, heads, head_dim, seed=0, dtype=torch.float32):
    return qkv_of(rows, heads, head_dim, seed, dtype, DEVICE)


def _run(function, qkv, direction=None):
    """The output and the gradient of qkv."""
    leaf = qkv.clone().requires_grad_()
    with backend.using("triton", OPERATOR):
        out = function(leaf)
    return out.detach(), *torch.autograd.grad(out, leaf, torch.ones_like(out) if direction is None else direction)


def _assert_as_precise(dtype, shape, function, seeds=3):
    with dropout_twin.in_references():
        draw = lambda seed: [_qkv(*shape, seed, torch.float64)]  # noqa: E731
        comparison.assert_as_precise(OPERATOR, function, draw, dtype, name="triton", seeds=seeds)


@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=3), empty=EMPTY, dead=st.integers(0, 20),
    heads=st.integers(1, 2), head_dim=st.integers(8, 100),
    keys=st.none() | st.lists(st.floats(0, 1), min_size=3, max_size=3), p=st.sampled_from([0.0, 0.1, 0.7]),
    dtype=st.sampled_from(DTYPES), more_frames=st.integers(0, 90), share=st.none() | st.sampled_from([0.1, 0.5, 1.0]),
)  # fmt: skip
@example(
    lengths=[0, 45, 0, 3], empty=60, dead=13, heads=2, head_dim=16, keys=[0.0, 0.5], p=0.1, dtype=torch.bfloat16,
    more_frames=90, share=None,
)  # fmt: skip
def test_as_precise_as_pytorch_for_any_shape(lengths, empty, dead, heads, head_dim, keys, p, dtype, more_frames, share):
    lengths = [*lengths, *empty * [0]]
    keys = keys_of(lengths, keys)
    wanted = None if share is None else some(sum(lengths) + dead, share)
    function = attend(lengths, keys, p=p, seed=SEED, more_frames=more_frames, wanted=wanted)
    _assert_as_precise(dtype, (sum(lengths) + dead, heads, head_dim), function, seeds=2)


@pytest.mark.parametrize("head_dim", [1, 3, 7])
def test_vectors_of_a_few_values(head_dim):
    """The backward takes a rounded log-sum-exp, as every flash attention does; beside so short a product it shows."""
    qkv, function = _qkv(45, 1, head_dim), attend([42, 1])
    ours = comparison.run(OPERATOR, "triton", function, [qkv])
    truth = comparison.run(OPERATOR, "reference", function, [qkv.double()])
    assert all(comparison.error(*pair) < 1e-6 for pair in zip(ours, truth))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "p"), [(64, 0.1), (80, 0.1), (128, 0.0)])
def test_as_precise_as_pytorch_in_each_gradient_at_the_models_head_dims(head_dim, p, dtype):
    def function(query, key, value):
        return attend([50, 21], p=p, seed=SEED)(torch.stack([query, key, value], 1))

    def draw(seed):
        return _qkv(71, 1, head_dim, seed, torch.float64).unbind(1)

    with dropout_twin.in_references():
        comparison.assert_as_precise(OPERATOR, function, draw, dtype, name="triton", seeds=2, roundings=0.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float32), (80, torch.float32), (64, torch.bfloat16)])
def test_the_blocks_of_every_gpu_are_as_precise_as_pytorch(head_dim, dtype, architecture, monkeypatch):
    monkeypatch.setattr(kernels, "architecture", lambda tensor: architecture)
    function = attend([70, 0, 3, 75], [50, 0, 0, 75], p=0.1, seed=SEED)
    _assert_as_precise(dtype, (150, 1, head_dim), function, seeds=1)


# Rows that have a query: of the six sequences below that have rows none, 63, all 64, 1, 63 and 128; and two rows of no sequence.
WANTED = [*range(1, 64), *range(64, 128), 190, *range(193, 319, 2), *range(322, 450), 451, 454]


@pytest.mark.parametrize("architecture", [INTERPRETER, 80, 90])
@pytest.mark.parametrize("keys", [None, [1, 60, 0, 64, 65, 64, 0, 70]], ids=["all-keys", "key-lengths"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("wanted", [None, WANTED], ids=["all-queries", "some"])
def test_sequences_that_fill_their_blocks_or_just_do_not(wanted, p, keys, architecture, monkeypatch, memory_of_nan):
    monkeypatch.setattr(kernels, "architecture", lambda tensor: architecture)
    lengths = [1, 63, 0, 64, 65, 128, 0, 129]
    shape = sum(lengths) + 5, 1, 16

    def function(qkv, bias):
        return attend(lengths, keys, p=p, seed=SEED, more_frames=60, qkv_bias=bias, wanted=wanted)(qkv)

    def draw(seed):
        return [_qkv(*shape, seed, torch.float64), _qkv(*shape, seed, torch.float64)[0]]

    with dropout_twin.in_references():
        comparison.assert_as_precise(OPERATOR, function, draw, torch.bfloat16, name="triton", seeds=1)


@pytest.fixture
def memory_of_nan():
    """PyTorch fills new memory with NaN and the largest integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("architecture", [INTERPRETER, *ARCHITECTURES])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_keys_gradient_reads_no_block_of_rows_that_the_queries_did_not_write(architecture, head_dim, dtype):
    of_queries = kernels._query_backward_blocks(architecture, dtype, head_dim, True)
    of_keys = kernels._key_backward_blocks(architecture, dtype, head_dim)
    forward = kernels._forward_blocks(architecture, dtype, head_dim, True)
    longest = max(each.sizes["BLOCK_QUERIES"] for each in of_keys)
    assert longest <= min(each.sizes["BLOCK_QUERIES"] for each in of_queries)
    assert all(kernels.ROOM % size == 0 for each in [*forward, *of_queries, *of_keys] for size in each.sizes.values())


def test_a_sequence_gives_the_same_bits_in_every_place_of_a_batch():
    qkv, direction = _qkv(90, 2, 64), _qkv(90, 2, 64, seed=1)[:, 0]
    together = _run(attend([40, 17, 33]), qkv, direction)
    for start, stop in ((0, 40), (40, 57), (57, 90)):
        alone = _run(attend([stop - start]), qkv[start:stop], direction[start:stop])
        assert all(torch.equal(ours[start:stop], its) for ours, its in zip(together, alone))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_batches_without_a_frame(lengths, rows, p):
    out, grad = _run(attend(lengths, p=p), _qkv(rows, 2, 8))
    assert out.shape == (rows, 2, 8) and (out == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("max_frames", [1, 128, 129, 300])
def test_columns_that_were_made_ahead_change_no_bit(max_frames, memory_of_nan):
    seeds = torch.tensor([3, SEED, 1 << 40], device=DEVICE)
    lengths, qkv = [max_frames // 2, max_frames], _qkv(max_frames // 2 + max_frames, 2, 16)
    with backend.using("triton", OPERATOR):
        columns = dropout_columns(seeds, max_frames)
        assert len(columns) == 3 and columns.dtype == torch.int32
        for seed, row in list(zip(seeds, columns))[: 3 if max_frames < 300 else 1]:
            ours, plain = (_run(attend(lengths, p=0.3, seed=int(seed), columns=each), qkv) for each in (row, None))
            assert all(map(torch.equal, ours, plain))
        others = _run(attend(lengths, p=0.3, seed=3, columns=columns[1]), qkv)
    assert max_frames == 1 or not torch.equal(others[0], _run(attend(lengths, p=0.3, seed=3), qkv)[0])


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_queries_alone_give_what_their_rows_give(p, memory_of_nan):
    """To the bit on a GPU, and on the CPUs whose products of NumPy do not depend on how many rows there are."""
    lengths, qkv, direction = [40, 17, 0, 33], _qkv(94, 2, 64), _qkv(94, 2, 64, seed=1)[:, 0]
    wanted = some(94, 0.5)
    whole, grad = _run(
        attend(lengths, p=p), qkv, direction * torch.zeros(94, 1, 1).index_fill(0, torch.tensor(wanted), 1.0).to(DEVICE)
    )
    ours, own = _run(attend(lengths, p=p, wanted=wanted), qkv, direction[wanted])
    rounding = 0.0 if DEVICE.type == "cuda" else 1e-6
    for pair in ((ours, whole[wanted]), (own[wanted, 0], grad[wanted, 0])):
        torch.testing.assert_close(*pair, rtol=rounding, atol=rounding)
    torch.testing.assert_close(own, grad, rtol=1e-5, atol=1e-6)


def test_equal_keys_of_any_size_share_the_weight():
    """Scores far below 0: exp2 of them would be 0 in float32, with padded keys taken as scores of 0 all the more."""
    qkv = torch.full((20, 3, 1, 16), 30.0, device=DEVICE)
    qkv[:, 1] = -30.0
    qkv[:, 2] = torch.arange(20.0, device=DEVICE)[:, None, None]
    torch.testing.assert_close(_run(attend([20]), qkv)[0], torch.full((20, 1, 16), 9.5, device=DEVICE))


def test_offsets_and_lengths_may_lie_on_the_host():
    qkv = _qkv(30, 1, 16)
    with backend.using("triton", OPERATOR):
        out = masked_attention(qkv, offsets_of([18, 12]), torch.tensor([4, 0]), max_frames=18)
        assert torch.equal(out, attend([18, 12], [4, 0])(qkv))


def test_longer_vectors_than_the_kernels_take_are_refused_by_name():
    with pytest.raises(backend.BackendError, match="head dims up to 128; got 129"):
        _run(attend([4]), _qkv(4, 1, 129))


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
@pytest.mark.parametrize("keys", [None, [779, 512, 0, 0, 4, *200 * [0]]], ids=["all-keys", "key-lengths"])
class TestOnGpu:
    pytestmark = gpu
    lengths = [779, 513, 0, 1, 128, *200 * [0]]

    def test_as_precise_as_pytorch_at_a_training_steps_shapes(self, heads, head_dim, dtype, p, keys):
        function = attend(self.lengths, keys, p=p, seed=SEED, more_frames=500)
        _assert_as_precise(dtype, (sum(self.lengths) + 77, heads, head_dim), function)

    def test_results_repeat_to_the_bit(self, heads, head_dim, dtype, p, keys):
        qkv = _qkv(sum(self.lengths), heads, head_dim, dtype=dtype)
        first, *others = (_run(attend(self.lengths, keys, p=p, seed=SEED), qkv, qkv[:, 0]) for _ in range(4))
        assert all(all(map(torch.equal, first, each)) for each in others)


class TestStepsOnGpu:
    pytestmark = gpu

    def test_neither_pass_waits_for_the_device_and_both_are_captured_in_a_graph(self):
        qkv, direction = _qkv(600, 12, 64, dtype=torch.bfloat16), _qkv(600, 12, 64, seed=1, dtype=torch.bfloat16)[:, 0]
        offsets, seed = offsets_of([300, 20, 0, 199]).to(DEVICE), torch.tensor(SEED, device=DEVICE)

        def step():
            leaf = qkv.detach().requires_grad_()
            with backend.using("triton", OPERATOR):
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
        offsets.copy_(offsets_of([100, 400, 50, 1]))  # another batch in the same memory
        seed += 1
        graph.replay()
        assert all(map(torch.equal, captured, step()))

    def test_rows_beyond_two_to_the_31_values(self):
        if torch.cuda.mem_get_info()[0] < 40 << 30:
            pytest.skip("needs 40 GB of free memory")
        heads, head_dim = 16, 64
        rows = (1 << 31) // (3 * heads * head_dim) + 1000
        qkv = torch.zeros(rows, 3, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
        tail = qkv[-700:] = _qkv(700, heads, head_dim, dtype=torch.bfloat16)
        direction = torch.zeros(rows, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
        direction[-700:] = tail[:, 0]
        whole, remainder = divmod(rows - 700, 1000)
        lengths = [1000] * whole + [remainder, 700]
        results = _run(attend(lengths), qkv, direction)
        alone = _run(attend([700]), tail, direction[-700:])
        assert all(torch.equal(ours[-700:], its) for ours, its in zip(results, alone))
