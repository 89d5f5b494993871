"""The kernels of ``positional_conv``: implicit GEMMs over runs of frames, and the filters packed with weight normalisation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hubert_fast import tf32
from hubert_fast.kernels import positional_conv as kernels
from hubert_fast.kernels import weight_norm
from hubert_fast.ops.positional_conv import positional_conv
from hubert_fast.switches import switched
from tests.kernels.device import DEVICE
from tests.ops.comparison import assert_as_precise, error, run
from tests.ops.test_masked_attention import EMPTY
from tests.ops.test_positional_conv import embed, inputs, offsets_of

OPERATOR = "positional_conv"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_device(tensors, dtype=torch.float32):
    return [each.to(DEVICE, dtype) for each in tensors]


@pytest.fixture(scope="module", autouse=True)
def _few_parts():
    """64 programs a sum are most of what Triton's interpreter would do here."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setattr(kernels, "PARTS", 4)
            patch.setattr(weight_norm, "PARTS", 4)
        yield


@pytest.fixture
def tiles_of_a_gpu(monkeypatch):
    """Block sizes of sm_90 wherever the test runs."""
    for module in (kernels, weight_norm):
        monkeypatch.setattr(module, "architecture", lambda tensor: 90)


@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any), empty=EMPTY, dead=st.integers(0, 4),
    groups=st.integers(1, 2), group_channels=st.integers(1, 12), taps=st.integers(1, 9), normalised=st.booleans(),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000),
)  # fmt: skip
@example(
    lengths=[7, 0, 5], empty=60, dead=40, groups=1, group_channels=40, taps=3, normalised=True, dtype=torch.bfloat16, seed=0
)  # fmt: skip
def test_as_precise_as_pytorch_for_any_shape(
    lengths, empty, dead, groups, group_channels, taps, normalised, dtype, seed
):  # fmt: skip
    lengths = [*lengths, *empty * [0]]
    shape = sum(lengths) + dead, groups, group_channels, taps
    normalised = normalised and taps > 1  # a single gain's gradient is one number, in which all may cancel

    def draw(number):
        return on_device(inputs(*shape, normalised=normalised, seed=seed + number), torch.float64)

    # Where a result has few numbers, a small error is luck.
    roundings = 10.0 if dtype == torch.float32 else 1.0
    assert_as_precise(OPERATOR, embed(lengths, groups), draw, dtype, name="triton", seeds=2, roundings=roundings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalised", [True, False])
def test_as_precise_as_pytorch(normalised, dtype):
    def draw(seed):
        return on_device(inputs(92, 2, 8, 16, normalised=normalised, seed=seed), torch.float64)

    assert_as_precise(OPERATOR, embed([50, 31, 9]), draw, dtype, name="triton", seeds=3)


@pytest.mark.parametrize(("width", "folded"), [(48, True), (48, False), (64, True), (80, True), (80, False)])
def test_tiles_of_a_gpu_are_as_precise_as_pytorch(width, folded, tiles_of_a_gpu):
    lengths = [70, 0, 3, 61]

    def draw(seed):
        return on_device(inputs(137, 1, width, 6, seed=seed), torch.float64)

    with switched(folded_filters=folded):
        assert_as_precise(OPERATOR, embed(lengths, 1), draw, torch.bfloat16, name="triton", seeds=1)


def _assert_runs(lengths, dead, fold):
    """The table has each run of a loop over the sequences once, those of dead rows without a sequence, and else nothing."""
    rows, low = sum(lengths) + dead, 0
    expected = []
    for length in lengths:
        expected += [(first, low, low + length) for first in range(low, low + length, fold)]
        low += length
    expected += [(first, rows, rows) for first in range(low, rows, fold)]
    offsets = offsets_of(lengths).to(DEVICE)
    table = torch.empty(3, rows + len(offsets), dtype=torch.int32, device=DEVICE)
    kernels._fill_run_table(table, offsets, rows, fold)
    table = table[:, : kernels._run_count(rows, offsets, fold)].T.tolist()
    assert [tuple(each) for each in table if each != [rows, rows, rows]] == expected
    assert fold > 1 or len(table) == rows  # a row's run is found without a search


@given(
    lengths=st.lists(st.just(0) | st.integers(0, 12), min_size=0, max_size=9), empty=st.integers(0, 300),
    dead=st.integers(0, 6), fold=st.integers(1, 6),
)  # fmt: skip
@example(lengths=[0, 0, 7, 0, 0, 0, 3, 0], empty=250, dead=40, fold=5)
@example(lengths=[], empty=0, dead=0, fold=3)
@settings(max_examples=40)
def test_runs_are_those_of_a_loop_over_the_sequences(lengths, empty, dead, fold):
    _assert_runs([*lengths, *empty * [0]], dead, fold)


@pytest.mark.parametrize("fold", [1, 5])
def test_runs_of_as_many_sequences_as_attention_takes(fold):
    _assert_runs([3, *16_000 * [0, 1, 0, 0], *1_533 * [0]], 17, fold)


def test_groups_of_the_published_models_fill_a_tile():
    assert [kernels._tile_columns(90, width, 128, 2) for width in (48, 64, 80)] == [(256, 5), (256, 4), (256, 3)]
    assert kernels._tile_columns(90, 48, 1, 2) == (64, 1)  # folding a kernel of one tap only adds work


def test_a_gain_of_zero_still_has_a_gradient():
    x, weight, bias, gain = on_device(inputs(20))
    gain[:, :, 2] = 0.0
    truth = run(OPERATOR, "reference", embed([12, 8]), [each.double() for each in (x, weight, bias, gain)])
    ours = run(OPERATOR, "triton", embed([12, 8]), [x, weight, bias, gain])
    assert all(error(*pair) < 1e-6 for pair in zip(ours, truth))


@pytest.fixture
def _full_float32():
    with tf32.allowed(False):
        yield


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 64, 80])
def test_shapes_of_the_published_models_are_as_precise_as_pytorch(width, dtype, _full_float32):
    lengths = [700, 1, 0, 779, 64, *250 * [0]]

    def draw(seed):
        x, weight, bias, gain = inputs(1550, 16, width, 128, seed=seed)
        return on_device([x, weight, bias, gain / gain.numel() ** 0.5], torch.float64)

    assert_as_precise(OPERATOR, embed(lengths, 16), draw, dtype, name="triton", seeds=2)
    drawn = [each.to(dtype) for each in draw(0)]
    first, second = (run(OPERATOR, "triton", embed(lengths, 16), drawn) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an NVIDIA GPU")
def test_the_host_does_not_wait_for_the_device():
    x, weight, bias, gain = (each.requires_grad_() for each in on_device(inputs(700, 4, 48, 128)))
    offsets = offsets_of([300, 400]).to(DEVICE)

    def step():
        out = positional_conv(x, weight, bias, offsets, groups=4, max_frames=400, gain=gain)
        F.mse_loss(out, torch.zeros_like(out)).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
