"""The CUDA kernels, thread by thread on the CPU: right, free of races and stray accesses, and 64-bit in their offsets."""

import mmap
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hubert_fast import extension
from hubert_fast.cuda_backend import conv_frontend as backend
from tests.csrc.cuda import simulation
from tests.ops import contract
from tests.ops.comparison import error
from tests.ops.frontend_problem import HUBERT, Problem, assert_as_precise

pytestmark = pytest.mark.skipif(simulation.why_not() is not None, reason=str(simulation.why_not()))


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    simulation.build(folder, [])
    return simulation.load(folder)


@pytest.fixture(autouse=True)
def _nothing_overrules_the_driver(monkeypatch):
    monkeypatch.delenv("HUBERT_FAST_OVERLAPPING_MAPS", raising=False)


@pytest.fixture
def set_compute_capability(simulated):
    yield simulated.set_compute_capability
    simulated.set_compute_capability(9, 0)


@pytest.mark.parametrize("tensor_cores", [False, True], ids=["torch-products", "tensor-core-products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_agree_with_the_reference_in_any_order_of_threads(simulated, dtype, tensor_cores):
    if dtype == torch.float32 and tensor_cores:
        pytest.skip("there are none in float32")
    orders = (0,) if dtype == torch.float16 else (0, 1, 2)  # as for bfloat16
    simulation.check(simulated, dtype, tensor_cores=tensor_cores, orders=orders)


def _assert_agree(simulated, problem, *, tensor_cores=False):
    """Within the tolerance, or as near as PyTorch comes in the same dtype: a frame alone has no variance."""
    truth = problem.reference()
    ours = [
        error(*pair) for pair in zip(simulation.run(simulated, problem, tensor_cores=tensor_cores), truth, strict=True)
    ]
    pytorchs = [error(*pair) for pair in zip(problem.reference(problem.dtype), truth, strict=True)]
    assert max(ours) <= max(simulation.TOLERANCE[problem.dtype], 3 * max(pytorchs)), (ours, pytorchs)


@given(
    first=st.tuples(st.integers(1, 16), st.integers(1, 16)), later=st.lists(st.sampled_from([2, 3]), max_size=4),
    batch=st.integers(1, 3), frames=st.integers(1, 12), extra=st.integers(0, 40), bias=st.booleans(),
    norm=st.sampled_from(["group_norm", "layer_norm"]), valid=st.none() | st.floats(0, 1), seed=st.integers(0, 100),
    tensor_cores=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@settings(max_examples=60)
def test_any_shape_agrees_with_the_reference(
    simulated, first, later, batch, frames, extra, bias, norm, valid, seed, tensor_cores, dtype
):
    shapes = [first, *((kernel, 2) for kernel in later)]
    samples = frames
    for kernel, stride in reversed(shapes):
        samples = (samples - 1) * stride + kernel
    samples += extra
    # Statistics over a few frames are ill-conditioned; no audio as long as a HuBERT frame gives layer 0 so little.
    assume(norm == "layer_norm" or (samples - first[0]) // first[1] >= 16)
    # Where no frame is valid there is no mean to take the bias out: the reference leaves it in, the closed form never has it.
    assume(valid is None or valid * samples >= first[0] + 16 * first[1])
    valid = None if valid is None else torch.tensor([samples, int(valid * samples), samples])[:batch]
    problem = Problem(
        shapes, norm=norm, bias=bias, batch=batch, samples=samples, valid=valid, seed=seed, channels=64, dtype=dtype
    )
    _assert_agree(simulated, problem, tensor_cores=tensor_cores)


@pytest.mark.parametrize(("bias", "samples"), [(True, [4000, 1777, 10, 400]), (False, [4000, 11, 5, 0])])
def test_valid_samples_agree_with_the_reference(simulated, bias, samples):
    valid = torch.tensor(samples)
    problem = Problem(
        HUBERT, norm="group_norm", batch=4, samples=4000, valid=valid, bias=bias, channels=64, dtype=torch.float32
    )
    _assert_agree(simulated, problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shapes", [HUBERT, HUBERT[:1]], ids=["seven-layers", "one-layer"])
@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
def test_the_registered_operator_is_as_torch_wants_it(simulated, norm, shapes, dtype, monkeypatch):
    """Its outputs may not share memory, and what is saved is what was announced."""
    monkeypatch.setattr(extension, "cuda", lambda: simulation.Kernels(simulated, tensor_cores=True))
    problem = Problem(shapes, norm=norm, samples=3000, channels=64, dtype=dtype)
    arguments = problem.arguments()
    for each in (each for group in arguments.parameters for each in group):
        each.requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hubert_fast.conv_frontend.default, (*arguments, True, "cuda"), test_utils=checks)
    with torch.no_grad():
        _, saved = backend.forward(arguments, True)
        assert backend.forward(arguments, False)[1] == []
    assert [(tuple(each.shape), each.dtype) for each in saved] == backend.saved_tensors(arguments)


@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
@pytest.mark.parametrize(
    ("layers", "samples", "channels"),
    [pytest.param(HUBERT[:3], 4000, 512, id="HuBERT's"), pytest.param([(10, 5), (2, 2)], 1500, 1024, id="widest")],
)
def test_wide_layers_agree_with_the_reference(simulated, layers, samples, channels, norm):
    problem = Problem(layers, norm=norm, samples=samples, channels=channels, batch=1, dtype=torch.float32)
    _assert_agree(simulated, problem)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 1.0), (0.1, 1.0), (1e-4, 0.0), (1e-4, 1e-2), (30.0, 500.0)])
def test_neither_an_offset_nor_a_small_signal_loses_the_variance(simulated, scale, offset):
    problem = Problem(
        HUBERT[:2], norm="group_norm", bias=False, channels=64, scale=scale, offset=offset, dtype=torch.float32
    )
    run = partial(simulation.run, simulated, tensor_cores=False)
    assert_as_precise(run, [problem], floor=2e-6)


def test_a_sequence_has_the_same_features_in_every_place_of_a_batch(simulated):
    problem = Problem(HUBERT, norm="group_norm", batch=3, samples=2500, channels=64, dtype=torch.bfloat16)
    features = simulation.run(simulated, problem, tensor_cores=True)[0]
    for row in range(3):
        some = slice(row, row + 1)
        alone = problem.changed(waveforms=problem.waveforms[some], direction=problem.direction[some])
        assert torch.equal(simulation.run(simulated, alone, tensor_cores=True)[0][0], features[row])


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), None), ((8, 0), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((10, 0), "sm80"), ((12, 0), "sm80")],
)
@pytest.mark.parametrize("dtype", [1, 2], ids=["bfloat16", "float16"])
def test_products_are_chosen_by_the_device(simulated, set_compute_capability, capability, expected, dtype):
    cuda, memory = simulated.cuda, torch.zeros(64, dtype=torch.bfloat16)
    sizes = {"input_stride": 8, "rows": 1, "columns": 8, "depth": 8}
    operands = cuda.Product(input=memory, weight=memory, **sizes)
    call = {"bias": None, "out": memory, "out_stride": 8, "dtype": dtype, "stream": 0}
    set_compute_capability(*capability)
    assert cuda.tensor_core_products_available(dtype) == (expected is not None)
    assert not cuda.tensor_core_products_available(0)
    if expected is None:
        with pytest.raises(RuntimeError, match="product: this build has no kernel for this GPU"):
            cuda.product(operands, **call)
    else:
        cuda.product(operands, **call)
        assert simulated.product_namespace() == expected


def _split_and_whole(simulated, compute):
    """What ``compute`` gives over a driver that refuses overlapping rows, as the kernels then do, and over one that does not."""
    results = []
    for takes in (False, True):
        with simulation.driver(simulated, takes_overlapping_maps=takes):
            results.append(compute())
            assert simulated.product_namespace() == "sm90"
            assert simulated.cuda.overlapping_maps() == takes
    return results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
@pytest.mark.parametrize(("batch", "samples"), [(1, 400), (1, 719), (2, 2700), (3, 1111)])
def test_front_end_without_overlapping_maps_is_the_same_to_the_bit(simulated, norm, dtype, batch, samples):
    problem = Problem(HUBERT, norm=norm, batch=batch, samples=samples, channels=64, dtype=dtype, seed=samples)
    split, whole = _split_and_whole(simulated, lambda: simulation.run(simulated, problem, tensor_cores=True))
    assert all(torch.equal(*pair) for pair in zip(split, whole, strict=True))
    errors = [error(*pair) for pair in zip(split, problem.reference(), strict=True)]
    assert max(errors) <= {torch.bfloat16: 0.06, torch.float16: 0.01}[dtype], errors


# Depths of up to three strides; a depth and a stride that differ by less than a stride; rows that do not overlap.
WINDOWS = [(24, 16), (24, 8), (40, 16), (528, 520), (1536, 1024), (16, 16), (16, 24)]


@pytest.mark.parametrize(("depth", "stride"), WINDOWS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 10])
def test_products_without_overlapping_maps_are_the_same_to_the_bit(simulated, rows, depth, stride):
    cuda, columns = simulated.cuda, 8
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    memory, weight, z = randn((rows - 1) * stride + depth), randn(columns, depth), randn(rows, 2 * columns)
    gradient, bias = randn(rows, columns), randn(columns).float()
    sizes = {"input_stride": stride, "rows": rows, "columns": columns, "depth": depth}
    operands, by_depth = cuda.Product(input=memory, weight=weight, **sizes), weight.T.contiguous()
    of_gradient = cuda.Product(input=memory, weight=by_depth, **sizes)
    settings = {"dtype": 1, "stream": 0}

    def compute():
        tight = [torch.full((rows, columns), 7.0).bfloat16() for _ in range(3)]
        wide = [torch.full((rows, 2 * columns), 7.0).bfloat16() for _ in range(4)]
        product, out, activation, alone = wide
        cuda.product(operands, bias=bias, out=product, out_stride=2 * columns, **settings)
        kept, activated, again = tight
        cuda.product_gelu(operands, bias=bias, z=kept, activation=activated, **settings)
        cuda.product_gelu(operands, bias=bias, z=None, activation=again, **settings)
        shared = {"z": z, "out_stride": 2 * columns, **settings}
        cuda.product_gelu_gradient(of_gradient, out=out, activation=activation, **shared)
        cuda.product_gelu_gradient(of_gradient, out=alone, activation=None, **shared)
        sums = []
        for part_rows in (1, 3, 16):
            partial = torch.full((-(-rows // part_rows), columns, depth), float("nan"))
            cuda.weight_gradient(
                gradient=gradient, input=memory, input_stride=stride, partial=partial,
                rows=rows, part_rows=part_rows, channels=columns, depth=depth, **settings,
            )  # fmt: skip
            sums.append(partial)
        return [*tight, *wide, *sums]

    split, whole = _split_and_whole(simulated, compute)
    assert all(torch.equal(*pair) for pair in zip(split, whole, strict=True))
    windows = memory.as_strided((rows, depth), (stride, 1)).double()
    product = windows @ weight.double().T + bias.double()
    for result in (split[0], split[3][:, :columns]):
        assert error(result, product) <= 0.01
    slope = torch.ops.aten.gelu_backward(product - bias.double(), z[:, :columns].double())
    assert error(split[4][:, :columns], slope) <= 0.01
    assert all((each[:, columns:] == 7.0).all() for each in split[3:7])
    assert all(error(each.sum(0), gradient.double().T @ windows) <= 1e-5 for each in split[7:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_feed_forward_block_is_as_precise_as_pytorchs(simulated, monkeypatch, dtype):
    case = next(case for case in contract.cases() if case.operator == "feed_forward")
    arguments = case.cast(dtype, torch.device("cpu"))
    pytorchs = contract.run("feed_forward", "reference", arguments)
    wide = [each.detach().double().requires_grad_() for each in arguments[:4]]
    truth = contract.run("feed_forward", "reference", arguments._replace(**dict(zip(arguments._fields, wide))))
    monkeypatch.setattr(extension, "cuda", lambda: simulated.cuda)
    for mine, theirs, exact in zip(contract.run("feed_forward", "cuda", arguments), pytorchs, truth, strict=True):
        assert error(mine, exact) <= max(1.5 * error(theirs, exact), torch.finfo(dtype).eps / 4)


@pytest.mark.parametrize("takes", [False, True])
def test_the_driver_is_asked_once_a_device(simulated, takes):
    for _ in range(2):
        with simulation.driver(simulated, takes_overlapping_maps=takes):
            assert [simulated.cuda.overlapping_maps() for _ in range(3)] == [takes] * 3
            assert simulated.maps_encoded() == 1


@pytest.mark.parametrize(("value", "expected", "asked"), [("0", False, 0), ("1", True, 0), ("", None, 1)])
@pytest.mark.parametrize("takes", [False, True])
def test_the_environment_overrules_the_driver(simulated, monkeypatch, value, expected, asked, takes):
    monkeypatch.setenv("HUBERT_FAST_OVERLAPPING_MAPS", value)
    with simulation.driver(simulated, takes_overlapping_maps=takes):
        assert simulated.cuda.overlapping_maps() == (takes if expected is None else expected)
        assert simulated.maps_encoded() == asked


def test_maps_that_are_used_against_the_drivers_word_fail(simulated, monkeypatch):
    monkeypatch.setenv("HUBERT_FAST_OVERLAPPING_MAPS", "1")
    problem = Problem(HUBERT, norm="group_norm", batch=1, samples=719, channels=64, dtype=torch.bfloat16)
    with simulation.driver(simulated, takes_overlapping_maps=False):
        with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled failed with CUresult 1"):
            simulation.run(simulated, problem, tensor_cores=True)


def test_a_wrong_value_in_the_environment_is_an_error(simulated, monkeypatch):
    monkeypatch.setenv("HUBERT_FAST_OVERLAPPING_MAPS", "no")
    with simulation.driver(simulated, takes_overlapping_maps=True):
        with pytest.raises(ValueError, match="HUBERT_FAST_OVERLAPPING_MAPS is 'no'; accepted are 0, 1 or unset"):
            simulated.cuda.overlapping_maps()
        monkeypatch.setenv("HUBERT_FAST_OVERLAPPING_MAPS", "0")
        assert simulated.cuda.overlapping_maps() is False  # an error is no answer that would be kept


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (10, 0)])
def test_products_without_tensor_maps_take_overlapping_rows(simulated, set_compute_capability, capability):
    problem = Problem(HUBERT[:3], norm="group_norm", batch=1, samples=719, channels=64, dtype=torch.bfloat16)
    set_compute_capability(*capability)
    with simulation.driver(simulated, takes_overlapping_maps=False):
        assert simulated.cuda.overlapping_maps() is None
        if capability >= (8, 0):
            simulation.run(simulated, problem, tensor_cores=True)
            assert simulated.product_namespace() == "sm80"
        assert simulated.maps_encoded() == 0


def test_gelu_is_exact_to_float_rounding(simulated):
    z = torch.linspace(-12, 12, 20001, dtype=torch.float32)
    value = F.gelu(z.double())
    derivative = torch.ops.aten.gelu_backward(torch.ones_like(z, dtype=torch.float64), z.double())
    for name, bound in (("accurate_gelu", 2e-7), ("fast_gelu", 6e-7)):
        both = torch.tensor([getattr(simulated, name)(float(each)) for each in z], dtype=torch.float64)
        # The error of Phi, at most 1e-7, counts times z in the value.
        assert ((both[:, 0] - value).abs() <= bound * z.abs().clamp(min=1)).all()
        assert ((both[:, 1] - derivative).abs() <= bound).all()


def test_sanitizers_find_nothing(tmp_path):
    simulation.build(tmp_path, simulation.SANITIZE)
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    settings = {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.csrc.cuda.simulation", str(tmp_path)]
    result = subprocess.run(
        command, cwd=simulation.ROOT, env={**os.environ, **settings}, capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stdout.endswith("clean\n"), result.stderr[-5000:]
    assert "runtime error" not in result.stderr


def _sparse(elements, dtype):
    """More memory than there is, of which only the touched pages exist: for kernels that run at its end alone."""
    # MAP_NORESERVE, which mmap does not name before Python 3.13.
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    return torch.frombuffer(memory, dtype=dtype)


BATCH, ROWS, CHANNELS = 3, 1 << 20, 1024  # 3 * 2^30 activations
FRAMES = ROWS - 1


def _only_last_blocks(simulated, per_block, total):
    simulated.set_schedule(0, -(-total // per_block) - 1)


def _last_rows(sparse, count, rows=ROWS):
    return sparse.view(BATCH, rows, CHANNELS)[-1, -count:]


@pytest.fixture
def at_the_end(simulated):
    yield simulated.cuda
    simulated.set_schedule(0, 0)


def _gelu_gradient(z, upstream):
    return torch.ops.aten.gelu_backward(upstream.double(), z.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_passes_reach_past_two_to_the_31(simulated, at_the_end, dtype):
    total = BATCH * ROWS
    z, grad, out, activation = (_sparse(total * CHANNELS, dtype) for _ in range(4))
    generator = torch.Generator().manual_seed(0)
    for each in (z, grad):
        _last_rows(each, 64)[:] = torch.randn(64, CHANNELS, generator=generator)
    rows = at_the_end.Rows(batch=BATCH, rows=ROWS, frames=FRAMES, channels=CHANNELS)
    none = at_the_end.Norm(weight=None, bias=None, epsilon=1e-5)
    number = {torch.float32: 0, torch.bfloat16: 1}[dtype]
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    settings = {"dtype": number, "stream": 0}
    expected_z, expected_grad = _last_rows(z, 64).clone(), _last_rows(grad, 64).clone()
    live = slice(0, 63)  # the last row is dead

    _only_last_blocks(simulated, 64, total)
    at_the_end.activation_forward(rows, none, z=z, out=out, out_rows=ROWS, **settings)
    assert error(_last_rows(out, 64)[live], F.gelu(expected_z[live].double())) <= tolerance
    assert (_last_rows(out, 1) == 0).all()

    at_the_end.gelu_backward(rows, grad=grad, grad_rows=ROWS, z=z, out=out, activation=activation, **settings)
    assert error(_last_rows(out, 64)[live], _gelu_gradient(expected_z, expected_grad)[live]) <= tolerance
    assert error(_last_rows(activation, 64)[live], F.gelu(expected_z[live].double())) <= tolerance

    gain, bias = torch.rand(CHANNELS, generator=generator) + 0.5, torch.randn(CHANNELS, generator=generator)
    norm = at_the_end.Norm(weight=gain, bias=bias, epsilon=1e-5)
    leaf = expected_z.double().requires_grad_()
    normalised = F.layer_norm(leaf, (CHANNELS,), gain.double(), bias.double(), 1e-5)
    (truth,) = torch.autograd.grad(F.gelu(normalised)[live], leaf, expected_grad.double()[live])
    at_the_end.activation_forward(rows, norm, z=z, out=out, out_rows=ROWS, **settings)
    assert error(_last_rows(out, 64)[live], F.gelu(normalised)[live]) <= tolerance
    partial = _sparse(total // 64 * 3 * CHANNELS, torch.float32)
    at_the_end.layer_norm_backward(
        rows, norm, grad=grad, grad_rows=ROWS, z=z, out=out, activation=activation,
        partial=partial, part_rows=64, **settings,
    )  # fmt: skip
    assert error(_last_rows(out, 64)[live], truth[live]) <= tolerance
    assert error(partial[-CHANNELS:], truth.sum(0)) <= 1e-5

    at_the_end.column_sums(x=z, total_rows=total, channels=CHANNELS, partial=partial, part_rows=64, **settings)
    sums = partial[: total // 64 * CHANNELS][-CHANNELS:]
    assert error(sums, expected_z.double().sum(0)) <= 1e-5

    _only_last_blocks(simulated, 64, BATCH)
    at_the_end.clear_dead_rows(rows, z=None, activation=z, **settings)
    assert (_last_rows(z, 1) == 0).all() and torch.equal(_last_rows(z, 64)[live], expected_z[live])


def test_layer_0_reaches_past_two_to_the_31(simulated, at_the_end):
    taps, stride = 10, 5
    generator = torch.Generator().manual_seed(0)
    samples = (FRAMES - 1) * stride + taps
    signal = torch.zeros(BATCH, samples)
    signal[-1, -5000:] = torch.randn(5000, generator=generator)
    sizes = {"batch": BATCH, "frames": FRAMES, "kernel": taps, "stride": stride, "channels": CHANNELS}
    layer = at_the_end.FirstLayer(signal=signal, signal_stride=samples, **sizes)
    statistics = torch.zeros(BATCH, taps + taps * taps + 1, dtype=torch.float64)
    statistics[:, -1] = 0.25
    filters = torch.randn(BATCH, taps + 1, CHANNELS, generator=generator)
    shared = {"statistics": statistics, "filters": filters, "rows": ROWS, "dtype": 0, "stream": 0}
    windows = (signal[-1] - 0.25).unfold(0, taps, stride).double()[-200:]
    z = windows @ filters[-1, :taps].double() + filters[-1, taps].double()
    activations = _sparse(BATCH * ROWS * CHANNELS, torch.float32)
    _only_last_blocks(simulated, 256, BATCH * ROWS)
    at_the_end.first_layer_group_norm_forward(layer, activations=activations, **shared)
    assert error(_last_rows(activations, 201)[:-1], F.gelu(z)) <= 1e-6
    assert (_last_rows(activations, 1) == 0).all()

    upstream = torch.zeros(512, CHANNELS)
    upstream[-201:-1] = torch.randn(200, CHANNELS, generator=generator)
    _last_rows(activations, 512)[:] = upstream
    partial = _sparse(BATCH * ROWS // 512 * (taps + 1) * CHANNELS, torch.float32)
    _only_last_blocks(simulated, 512, BATCH * ROWS)
    at_the_end.first_layer_group_norm_backward(layer, gradients=activations, partial=partial, **shared)
    gradient = _gelu_gradient(z, upstream[-201:-1])
    sums = partial.view(-1, taps + 1, CHANNELS)[-1]
    assert error(sums[:taps], windows.T @ gradient) <= 2e-6
    assert error(sums[taps], gradient.sum(0)) <= 2e-6
    assert error(_last_rows(activations, 201)[:-1], F.gelu(z)) <= 1e-6


def test_sums_of_parts_reach_past_two_to_the_31(simulated, at_the_end):
    outer, parts, columns = 3, 16, 1 << 26
    partial, out = _sparse(outer * parts * columns, torch.float32), _sparse(outer * columns, torch.float32)
    partial.view(outer, parts, columns)[-1, :, -32:] = 1.5
    _only_last_blocks(simulated, 32, outer * columns)
    sizes = {"outer": outer, "parts": parts, "columns": columns, "taps": 1, "channels": 1}
    at_the_end.sum_parts(**sizes, partial=partial, out=out, out_is_double=False, stream=0)
    assert (out[-32:] == 24.0).all()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("kernel must be 1 to 16", dict(kernel=17)),
        ("stride must be 1 to 16", dict(stride=0)),
        ("channels must be a multiple of 64, at most 1024", dict(channels=96)),
        ("channels must be a multiple of 64, at most 1024", dict(channels=2048)),
        ("batch and frames must be positive", dict(frames=0)),
        ("signal_stride is shorter than the frames read", dict(signal_stride=50)),
    ],
)
def test_sizes_are_checked_on_the_host(simulated, message, change):
    sizes = dict(signal=None, signal_stride=1000, batch=2, frames=100, kernel=10, stride=5, channels=64)
    layer = simulated.cuda.FirstLayer(**{**sizes, **change})
    with pytest.raises(ValueError, match=message):
        simulated.cuda.first_layer_moments(layer, valid_samples=None, partial=None, stream=0)


def test_products_and_activations_check_their_sizes_on_the_host(simulated):
    cuda = simulated.cuda
    rows, norm = cuda.Rows(batch=1, rows=10, frames=10, channels=64), cuda.Norm(weight=None, bias=None, epsilon=1e-5)
    with pytest.raises(ValueError, match="out_rows must be at least frames"):
        cuda.activation_forward(rows, norm, z=None, out=None, out_rows=9, dtype=0, stream=0)
    sizes = dict(input=None, input_stride=128, weight=None, rows=10, columns=64, depth=192)
    for message, dtype, change in (
        ("rows must be positive and at most", 1, dict(rows=(1 << 31) - 255)),
        ("columns must be a positive multiple of 8", 1, dict(columns=60)),
        ("depth must be a positive multiple of 8", 1, dict(depth=100)),
        ("input_stride must be a positive multiple of 8", 1, dict(input_stride=4)),
        ("bfloat16 or float16", 0, {}),
        (r"dtype must be 0 \(float32\), 1 \(bfloat16\) or 2 \(float16\); got -1", -1, {}),
    ):
        with pytest.raises(ValueError, match=message):
            cuda.product(cuda.Product(**{**sizes, **change}), bias=None, out=None, out_stride=64, dtype=dtype, stream=0)
