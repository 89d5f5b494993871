"""What the GPU backend of ``conv_frontend`` hands to its kernels is right: the kernels are replaced by a twin on the CPU.

The twin (`tests.ops.cuda_twin`) knows addresses, sizes and strides only, so these tests hold the layout of buffers, the
operands of the products and the formulas of the gradients. The kernels themselves are the subject of ``tests/csrc/cuda``.
"""

import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from hubert_fast.cuda_backend import conv_frontend as backend
from hubert_fast.ops.conv_frontend import Arguments
from hubert_fast.reference import conv_frontend as reference
from tests.ops.comparison import error
from tests.ops.cuda_twin import CudaTwin

HUBERT = [(10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)]


class Problem:
    """Random parameters and audio, and the results of the reference and of the backend over the twin."""

    def __init__(self, shapes, *, norm, bias=True, batch=2, samples=3000, channels=8, valid=None, seed=0, dtype=None):
        self.shapes, self.norm, self.valid = shapes, norm, valid
        self.dtype = dtype or torch.float64
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        norms = 1 if norm == "group_norm" else len(shapes)
        widths = [1] + [channels] * len(shapes)
        self.groups = [
            [
                randn(out, into, kernel) * (2 / (into * kernel)) ** 0.5
                for into, out, (kernel, _) in zip(widths, widths[1:], shapes)
            ],
            [0.1 * randn(channels) for _ in shapes] if bias else [],
            [1 + 0.2 * randn(channels) for _ in range(norms)],
            [0.3 * randn(channels) for _ in range(norms)],
        ]
        self.waveforms = randn(batch, samples)
        self.strides = [stride for _, stride in shapes]
        self.direction = randn(batch, reference.output_length(samples, *zip(*shapes)), channels)

    def reference(self):
        groups = [[each.clone().requires_grad_() for each in group] for group in self.groups]
        features = reference.conv_frontend(
            self.waveforms, *groups, strides=self.strides, norm=self.norm, valid_samples=self.valid
        )
        leaves = [each for group in groups for each in group]
        grads = torch.autograd.grad(features, leaves, self.direction, allow_unused=True)
        return [features.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads))]

    def arguments(self, dtype=torch.float64):
        return Arguments(self.waveforms, *self.groups, self.strides, self.norm, self.valid, dtype)

    def backend(self, tensor_cores, save=True):
        dtype = self.dtype
        twin = CudaTwin(torch.promote_types(dtype, torch.float32), tensor_cores=tensor_cores)
        with torch.no_grad(), twin.active():
            waveforms, direction = self.waveforms.to(dtype), self.direction.to(dtype)
            groups = [[each.to(dtype) for each in group] for group in self.groups]
            valid = None if self.valid is None else self.valid.clone()
            for each in (waveforms, direction, *(each for group in groups for each in group)):
                twin.memory.add(each)
            arguments = Arguments(waveforms, *groups, self.strides, self.norm, valid, dtype)
            (features,), saved = backend.forward(arguments, save, kernels=twin)
            if not save:
                return [features], saved
            grads = backend.backward(arguments, saved, (direction,), [True] * 4, kernels=twin)
        return [features, *(each for group in grads for each in group)], saved


def _assert_agree(problem, tensor_cores, tolerance=1e-9):
    truth = problem.reference()
    results, _ = problem.backend(tensor_cores)
    errors = [error(given, exact) for given, exact in zip(results, truth, strict=True)]
    assert max(errors) <= tolerance, errors


@given(
    first=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    later=st.lists(st.sampled_from([2, 3]), max_size=4),
    batch=st.integers(1, 3),
    frames=st.integers(1, 12),
    extra=st.integers(0, 40),
    norm=st.sampled_from(["group_norm", "layer_norm"]),
    bias=st.booleans(),
    valid=st.none() | st.floats(0, 1),
    tensor_cores=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_shape_agrees_with_the_reference(first, later, batch, frames, extra, norm, bias, valid, tensor_cores, seed):
    shapes = [first, *((kernel, 2) for kernel in later)]
    samples = frames
    for kernel, stride in reversed(shapes):
        samples = (samples - 1) * stride + kernel
    samples += extra
    # PyTorch's group_norm refuses a single value in all; no audio as long as a HuBERT frame gives layer 0 so little.
    assume(norm == "layer_norm" or (samples - first[0]) // first[1] > 0)
    # Where no frame is valid there is no mean to take the bias out: the reference leaves it in, the closed form never has it.
    assume(valid is None or not bias or valid * samples >= first[0])
    valid_samples = None if valid is None else torch.tensor([samples, int(valid * samples), samples])[:batch]
    problem = Problem(
        shapes, norm=norm, bias=bias, batch=batch, samples=samples, valid=valid_samples, seed=seed, channels=8
    )
    _assert_agree(problem, tensor_cores, 1e-7)


@pytest.mark.parametrize("tensor_cores", [False, True], ids=["torch-products", "tensor-core-products"])
@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
@pytest.mark.parametrize(("batch", "samples"), [(1, 400), (1, 719), (3, 400), (2, 5000), (4, 3333)])
def test_hubert_agrees_with_the_reference(norm, tensor_cores, batch, samples):
    _assert_agree(Problem(HUBERT, norm=norm, batch=batch, samples=samples, seed=samples), tensor_cores, 1e-8)


@pytest.mark.parametrize("tensor_cores", [False, True], ids=["torch-products", "tensor-core-products"])
def test_valid_samples_agree_with_the_reference(tensor_cores):
    for bias, samples in ((True, [4000, 1777, 10, 400]), (False, [4000, 11, 5, 0])):
        valid = torch.tensor(samples)
        problem = Problem(HUBERT, norm="group_norm", batch=4, samples=4000, valid=valid, bias=bias)
        _assert_agree(problem, tensor_cores, 1e-8)


@pytest.mark.parametrize("tensor_cores", [False, True], ids=["torch-products", "tensor-core-products"])
@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_are_close(norm, dtype, tensor_cores):
    problem = Problem(HUBERT, norm=norm, channels=64, dtype=dtype)
    _assert_agree(problem, tensor_cores, {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.008}[dtype])


@pytest.mark.parametrize("tensor_cores", [False, True], ids=["torch-products", "tensor-core-products"])
@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
def test_nothing_is_saved_where_nothing_is_asked_for(norm, tensor_cores):
    problem = Problem(HUBERT, norm=norm)
    (features,), saved = problem.backend(tensor_cores, save=False)
    assert saved == []
    assert error(features, problem.reference()[0]) <= 1e-9


@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
@pytest.mark.parametrize("layers", [1, 2, 7])
def test_saved_tensors_are_those_announced(norm, layers):
    shapes = HUBERT[:layers]
    problem = Problem(shapes, norm=norm, batch=3, samples=2345)
    _, saved = problem.backend(tensor_cores=True)
    assert [(tuple(each.shape), each.dtype) for each in saved] == backend.saved_tensors(problem.arguments())


def test_saved_memory_is_the_preactivations_and_little_else():
    arguments = Problem(HUBERT, norm="group_norm", batch=4, samples=160000, channels=512).arguments(torch.bfloat16)
    saved = backend.saved_tensors(arguments)
    size = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in saved)
    assert size <= 1.01 * 4 * sum(arguments.frames[1:]) * 512 * 2


@given(samples=st.integers(400, 100_000))
def test_rows_double_and_leave_a_dead_row(samples):
    weights = [torch.empty(1, 1, kernel, device="meta") for kernel, _ in HUBERT]
    strides = [stride for _, stride in HUBERT]
    arguments = Arguments(
        torch.empty(1, samples, device="meta"), weights, [], [], [], strides, "group_norm", None, None
    )
    frames = arguments.frames
    rows = backend.rows_of_layers(frames)
    assert all(below == 2 * above for below, above in zip(rows, rows[1:]))
    assert rows[0] >= frames[0] and all(r > f for r, f in zip(rows[1:], frames[1:]))
    smaller = [count // rows[-1] * (rows[-1] - 1) for count in rows]
    assert smaller[0] < frames[0] or any(r <= f for r, f in zip(smaller[1:], frames[1:]))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("kernel and a stride of at most 16; this one has 1, 17 and 5", dict(shapes=[(17, 5), (3, 2)])),
        ("kernel and a stride of at most 16; this one has 1, 10 and 20", dict(shapes=[(10, 20), (3, 2)])),
        ("stride 2 and kernel 2 or 3; layer 1 has 3 and 3", dict(shapes=[(10, 5), (3, 3)])),
        ("stride 2 and kernel 2 or 3; layer 2 has 2 and 4", dict(shapes=[(10, 5), (3, 2), (4, 2)])),
        (r"multiple of 64 and at most 1024; the layers have \[96, 96\]", dict(channels=96)),
        (r"multiple of 64 and at most 1024; the layers have \[1088, 1088\]", dict(channels=1088)),
    ],
)
def test_objections_name_what_is_in_the_way(message, change):
    settings = {"shapes": [(10, 5), (3, 2)], "channels": 512, **change}
    into, weights = 1, []
    for kernel, _ in settings["shapes"]:
        weights.append(torch.empty(settings["channels"], into, kernel, device="meta"))
        into = settings["channels"]
    strides = [stride for _, stride in settings["shapes"]]
    reason = backend.layers_objection(weights, strides)
    assert reason is not None
    assert re.search(message, reason), reason


def test_waveforms_elsewhere_are_refused():
    problem = Problem([(10, 5)], norm="group_norm", samples=400)
    reason = backend.objection(problem.arguments(torch.float32))
    assert reason == "it runs on an NVIDIA GPU, and the waveforms are on cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shapes", [HUBERT, HUBERT[:1]], ids=["seven-layers", "one-layer"])
@pytest.mark.parametrize("tensor_cores", [False, True], ids=["torch-products", "tensor-cores"])
@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
def test_the_custom_operator_takes_what_the_backend_gives(norm, tensor_cores, shapes, dtype, monkeypatch):
    """Its outputs may not share memory, and the fake implementation knows the tensors that are saved."""
    problem = Problem(shapes, norm=norm, samples=3000)
    twin = CudaTwin(torch.float32, tensor_cores=tensor_cores)

    def over_the_twin(function):
        def call(*arguments):
            with twin.active():  # here, because below a custom operator no dispatch mode of its caller is on
                for leaf in tree_leaves(tuple(arguments[0]) + arguments[1:]):
                    if isinstance(leaf, torch.Tensor):
                        twin.memory.add(leaf)
                return function(*arguments, kernels=twin)

        return call

    monkeypatch.setattr(backend, "forward", over_the_twin(backend.forward))
    monkeypatch.setattr(backend, "backward", over_the_twin(backend.backward))
    groups = [[each.float().requires_grad_() for each in group] for group in problem.groups]
    arguments = (problem.waveforms.float(), *groups, problem.strides, norm, None, dtype, True, "cuda")
    features, saved = torch.ops.hubert_fast.conv_frontend(*arguments)
    features.backward(problem.direction.to(dtype))
    assert all(each.grad.isfinite().all() for group in groups for each in group)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_features, fake_saved = torch.ops.hubert_fast.conv_frontend(*arguments)
    for real, fake in zip([features, *saved], [fake_features, *fake_saved], strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_a_device_runs_what_was_built_for_it_or_for_older_ones_as_ptx():
    runs = backend._runs_on
    assert runs((8, 0), "80") and runs((8, 6), "80") and not runs((8, 0), "86") and not runs((9, 0), "80")
    assert runs((9, 0), "90a") and not runs((10, 0), "90a") and not runs((8, 0), "90a")
    assert runs((12, 0), "80+") and runs((8, 0), "80+") and not runs((7, 5), "80+")
