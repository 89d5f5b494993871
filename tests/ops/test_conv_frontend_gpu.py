"""``conv_frontend`` on a GPU: against float64 of the reference, and what only the real kernels can show.

As a program, it saves what the tensor-core products compute, for a test that compares two processes.

    HUBERT_FAST_OVERLAPPING_MAPS=0 python -m tests.ops.test_conv_frontend_gpu FILE
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hubert_fast import extension, tf32
from hubert_fast.cuda_backend import conv_frontend as backend
from tests.ops.comparison import error
from tests.ops.frontend_problem import HUBERT, Problem, assert_as_precise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(extension.cuda() is None, reason=str(extension.why_not("cuda"))),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture(autouse=True)
def _full_float32():
    with tf32.allowed(False):
        yield


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float16: 0.01}


def _problem(dtype, norm="group_norm", *, shapes=HUBERT, channels=512, **settings):
    return Problem(shapes, norm=norm, channels=channels, dtype=dtype, device="cuda", **settings)


@torch.no_grad()
def _both_ways(arguments, direction):
    """The features and every gradient."""
    (features,), saved = backend.forward(arguments, save=True)
    gradients = backend.backward(arguments, saved, (direction,), [True] * 4)
    return [features, *(each for group in gradients for each in group)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
def test_as_precise_as_pytorch(norm, dtype):
    settings = {"bias": norm == "layer_norm", "samples": 16000}
    assert_as_precise(
        lambda problem: problem.run("cuda"), (_problem(dtype, norm, seed=i, **settings) for i in range(4))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
@pytest.mark.parametrize(
    ("shapes", "batch", "samples", "channels"),
    [
        (HUBERT, 1, 400, 512),
        (HUBERT, 1, 719, 64),
        (HUBERT, 3, 33333, 192),
        (HUBERT, 5, 8001, 1024),
        ([(16, 7), (3, 2)], 2, 9999, 128),
        ([(10, 5)], 2, 4321, 512),
    ],
)
def test_odd_sizes_agree_with_the_reference(shapes, batch, samples, channels, norm, dtype):
    problem = _problem(dtype, norm, shapes=shapes, batch=batch, samples=samples, channels=channels)
    errors = [error(*pair) for pair in zip(problem.run("cuda"), problem.reference(), strict=True)]
    assert max(errors) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_valid_samples_agree_with_the_reference(dtype):
    valid = torch.tensor([20000, 7777, 10])
    problem = _problem(dtype, batch=3, samples=20000, valid=valid, bias=False)
    problem.direction = problem.direction / 8  # some gradients are large: float16 ends at 65,504
    errors = [error(*pair) for pair in zip(problem.run("cuda"), problem.reference(), strict=True)]
    assert max(errors) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
def test_results_repeat_to_the_bit(norm, dtype):
    problem = _problem(dtype, norm, batch=3, samples=80000)
    first = problem.run("cuda")
    for _ in range(5):
        assert all(torch.equal(*pair) for pair in zip(first, problem.run("cuda"), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
def test_a_sequence_has_the_same_features_in_every_place_of_a_batch(norm, dtype):
    if not extension.cuda().tensor_core_products_available(NUMBERS[dtype]):
        pytest.skip("torch.mm may take another algorithm for another batch")
    problem = _problem(dtype, norm, batch=4, samples=30001)
    features = problem.features("cuda")
    for row in range(4):
        alone = problem.changed(waveforms=problem.waveforms[row : row + 1])
        assert torch.equal(alone.features("cuda")[0], features[row])


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 1.0), (1e-4, 0.0), (1e-4, 1e-2), (30.0, 500.0)])
def test_neither_an_offset_nor_a_small_signal_loses_the_variance(scale, offset):
    problem = _problem(torch.float32, bias=False, samples=16000, scale=scale, offset=offset)
    assert_as_precise(lambda problem: problem.run("cuda"), [problem], floor=5e-6)


def test_more_than_two_to_the_31_activations():
    dtype = torch.bfloat16
    batch, samples = 88, 240_000  # 88 * 47,999 * 512 values in layer 0
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free memory")
    problem = _problem(dtype, bias=False, batch=1, samples=samples)
    arguments, end = problem.arguments(), problem.direction.to(dtype)
    generator = torch.Generator("cuda").manual_seed(0)
    waveforms = torch.randn(batch, samples, device="cuda", generator=generator)
    direction = torch.zeros(batch, *end.shape[1:], dtype=dtype, device="cuda")
    direction[-1] = end[0]  # only the end of every buffer has a gradient
    features, *gradients = _both_ways(arguments._replace(waveforms=waveforms), direction)
    alone, *expected = _both_ways(arguments._replace(waveforms=waveforms[-1:]), end)
    for given, exact in zip([features[-1:], *gradients], [alone, *expected]):
        assert error(given, exact) <= 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
def test_forward_and_backward_are_captured_in_a_graph(norm, dtype):
    problem = _problem(dtype, norm, samples=16000)
    arguments, direction = problem.arguments(), problem.direction.to(dtype)

    def step():
        return _both_ways(arguments, direction)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = [each.clone() for each in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(*pair) for pair in zip(captured, eager, strict=True))
    # New audio in the same memory: nothing of the capture's data was baked in.
    arguments.waveforms.mul_(0.5).add_(0.125)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(captured, step(), strict=True))


def test_autocast_gives_its_dtype_and_float32_gradients():
    problem = _problem(torch.float32, bias=False, samples=16000)
    with torch.autocast("cuda", torch.bfloat16):
        features, *gradients = problem.run("cuda")
    assert features.dtype == torch.bfloat16
    assert error(features, problem.reference()[0]) <= 0.03
    assert all(each.dtype == torch.float32 and each.isfinite().all() for each in gradients)


# The tensor-core products one by one, where a wrong stride is easier to see than in the whole.

PRODUCT_SIZES = [
    (1, 64, 128),
    (127, 512, 1024),
    (129, 192, 576),
    (1000, 512, 1536),
    (4096, 1024, 3072),
    (8743, 3072, 768),
    (40000, 512, 1536),
]


@pytest.fixture
def products():
    cuda = extension.cuda()
    if not cuda.tensor_core_products_available(1):
        pytest.skip("there are no tensor-core products for this GPU")
    cuda.set_device(torch.cuda.current_device())
    return cuda


def _stride(depth):
    """Between rows of an input; those of kernel 3 overlap by a third."""
    return depth // 3 * 2 if depth % 3 == 0 else depth


def _operands(products, rows, columns, depth, dtype, seed=0):
    """Overlapping rows of an input and a weight as the kernels take them, for a data gradient too; these as tensors; and the
    exact product."""
    generator = torch.Generator("cuda").manual_seed(seed)
    stride = _stride(depth)
    memory = torch.randn((rows - 1) * stride + depth, device="cuda", generator=generator).to(dtype)
    weight = (torch.randn(columns, depth, device="cuda", generator=generator) / depth**0.5).to(dtype)
    sizes = {"input_stride": stride, "rows": rows, "columns": columns, "depth": depth}
    by_depth = weight.T.contiguous()
    operands, of_gradient = (products.Product(input=memory, weight=each, **sizes) for each in (weight, by_depth))
    window = memory.as_strided((rows, depth), (stride, 1))
    return operands, of_gradient, (memory, weight, by_depth), window.double() @ weight.double().T


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("rows", "columns", "depth"), PRODUCT_SIZES)
def test_products_are_right(products, rows, columns, depth, dtype):
    operands, of_gradient, _keep, truth = _operands(products, rows, columns, depth, dtype)
    settings = {"dtype": NUMBERS[dtype], "stream": torch.cuda.current_stream().cuda_stream}
    bound = 2 * torch.finfo(dtype).eps
    bias = torch.randn(columns, device="cuda")
    out = torch.full((rows, 2 * columns), 7.0, device="cuda", dtype=dtype)
    products.product(operands, bias=bias, out=out, out_stride=2 * columns, **settings)
    assert error(out[:, :columns], truth + bias.double()) <= bound
    assert (out[:, columns:] == 7.0).all()
    products.product(operands, bias=None, out=out, out_stride=2 * columns, **settings)
    assert error(out[:, :columns], truth) <= bound

    z, activation = (torch.full((rows, columns), float("nan"), device="cuda", dtype=dtype) for _ in range(2))
    products.product_gelu(operands, bias=bias, z=z, activation=activation, **settings)
    assert error(z, truth + bias.double()) <= bound
    assert error(activation, F.gelu(truth + bias.double())) <= bound
    again = torch.empty_like(activation)
    products.product_gelu(operands, bias=bias, z=None, activation=again, **settings)
    assert torch.equal(again, activation)

    wide_z = torch.randn(rows, 2 * columns, device="cuda").to(dtype)
    gradient, activation = (torch.full((rows, 2 * columns), 7.0, device="cuda", dtype=dtype) for _ in range(2))
    wide = {"z": wide_z, "out": gradient, "out_stride": 2 * columns}
    products.product_gelu_gradient(of_gradient, **wide, activation=activation, **settings)
    below = wide_z[:, :columns].double()
    assert error(gradient[:, :columns], torch.ops.aten.gelu_backward(truth, below)) <= bound
    assert error(activation[:, :columns], F.gelu(below)) <= bound
    assert (gradient[:, columns:] == 7.0).all() and (activation[:, columns:] == 7.0).all()
    kept = gradient.clone()
    products.product_gelu_gradient(of_gradient, **wide, activation=None, **settings)
    assert torch.equal(gradient, kept)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    ("rows", "part_rows", "channels", "depth"),
    [
        (1, 64, 64, 128),
        (100, 64, 192, 576),
        (1000, 1024, 512, 1024),
        (40001, 4096, 512, 1536),
        (5000, 5000, 1024, 3072),
    ],
)
def test_weight_gradients_are_right(products, rows, part_rows, channels, depth, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    stride = _stride(depth)
    gradient = torch.randn(rows, channels, device="cuda", generator=generator).to(dtype)
    memory = torch.randn((rows - 1) * stride + depth, device="cuda", generator=generator).to(dtype)
    parts = -(-rows // part_rows)
    partial = torch.full((parts, channels, depth), float("nan"), device="cuda")
    products.weight_gradient(
        gradient=gradient, input=memory, input_stride=stride, partial=partial,
        rows=rows, part_rows=part_rows, channels=channels, depth=depth, dtype=NUMBERS[dtype],
        stream=torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    window = memory.as_strided((rows, depth), (stride, 1))
    for part in range(parts):
        some = slice(part * part_rows, (part + 1) * part_rows)
        assert (
            error(partial[part], gradient[some].double().T @ window[some].double()) <= 3e-5
        )  # tensor cores truncate their sums


def _products_of_overlapping_rows():
    """Products one by one and the whole front end, both ways, in both 16-bit dtypes: what the split of rows passes through."""
    products = extension.cuda()
    products.set_device(torch.cuda.current_device())
    results = []
    for dtype in DTYPES[1:]:
        settings = {"dtype": NUMBERS[dtype], "stream": torch.cuda.current_stream().cuda_stream}
        for rows, columns, depth in [*PRODUCT_SIZES[:-1], (1, 64, 192), (2, 64, 192), (3, 512, 1536)]:
            operands, of_gradient, (memory, *_weights), _ = _operands(products, rows, columns, depth, dtype)
            outs = [torch.zeros(rows, 2 * columns, device="cuda", dtype=dtype) for _ in range(3)]
            tight = [torch.zeros(rows, columns, device="cuda", dtype=dtype) for _ in range(3)]
            product, out, activation = outs
            kept, activated, gradient = tight
            products.product(operands, bias=None, out=product, out_stride=2 * columns, **settings)
            products.product_gelu(operands, bias=None, z=kept, activation=activated, **settings)
            products.product_gelu_gradient(
                of_gradient, z=product, out=out, activation=activation, out_stride=2 * columns, **settings
            )
            tight[2].copy_(tight[0])
            part_rows = max(rows // 3, 1)
            partial = torch.zeros(-(-rows // part_rows), columns, depth, device="cuda")
            products.weight_gradient(
                gradient=gradient, input=memory, input_stride=_stride(depth), rows=rows,
                partial=partial, part_rows=part_rows, channels=columns, depth=depth, **settings,
            )  # fmt: skip
            results += [*outs, *tight, partial]
        for norm in ("group_norm", "layer_norm"):
            results += _problem(dtype, norm, batch=3, samples=33333).run("cuda")
    return [each.cpu() for each in results]


def test_overlapping_rows_are_the_same_to_the_bit_with_and_without_overlapping_maps(products, tmp_path):
    """And the driver takes such maps exactly if it says so."""
    takes = products.overlapping_maps()
    if takes is None:
        pytest.skip("the products for this GPU load without tensor maps")
    if os.environ.get("HUBERT_FAST_OVERLAPPING_MAPS"):
        pytest.skip("HUBERT_FAST_OVERLAPPING_MAPS is set, so the driver was not asked")
    results = {}
    for way in ("0", "1"):
        path = tmp_path / way
        command = [sys.executable, "-m", "tests.ops.test_conv_frontend_gpu", str(path)]
        environment = {**os.environ, "HUBERT_FAST_OVERLAPPING_MAPS": way}
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
        if way == "1" and not takes:
            assert "cuTensorMapEncodeTiled failed" in done.stderr
            return
        assert done.returncode == 0, done.stderr[-5000:]
        results[way] = torch.load(path, weights_only=True)
    assert all(torch.equal(*pair) for pair in zip(results["0"], results["1"], strict=True))


if __name__ == "__main__":
    torch.save(_products_of_overlapping_rows(), sys.argv[1])
