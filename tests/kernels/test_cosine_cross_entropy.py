"""Triton kernels of ``cosine_cross_entropy``: precision, selection, equal classes, determinism, memory."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hubert_fast import backend, tf32
from hubert_fast.ops.cosine_cross_entropy import cosine_cross_entropy
from hubert_fast.reference import cosine_cross_entropy as reference
from tests.kernels.device import DEVICE
from tests.kernels.precision import assert_kernels_as_precise
from tests.ops.comparison import error, run
from tests.ops.test_cosine_cross_entropy import OPERATOR
from tests.ops.test_cosine_cross_entropy import _inputs as _inputs_on_cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton():
    with backend.using("triton", OPERATOR):
        yield


def _inputs(frames=30, classes=11, dim=16, seed=0, dtype=torch.float32):
    return [each.to(DEVICE) for each in _inputs_on_cpu(frames, classes, dim, seed, dtype)]


def _functions(labels, index=None, frames_dtype=None):
    """The loss of frames and embeddings, by the operator and as PyTorch computes it: normalised, and multiplied in float32.

    With ``frames_dtype`` float32 frames are brought to it first, as autocast does; float64 ones are the truth's.
    """

    def narrowed(x):
        return x if frames_dtype is None or x.dtype == torch.float64 else x.to(frames_dtype)

    def function(x, embeddings):
        return cosine_cross_entropy(narrowed(x), embeddings, labels, index)[0]

    def plain(x, embeddings):
        if x.dtype == torch.float64:
            return reference.cosine_cross_entropy(x, embeddings, labels, index)[0]
        counted = torch.arange(len(labels), device=DEVICE) if index is None else index
        counted = counted[labels[counted] >= 0]
        x, own = narrowed(x).float()[counted], labels[counted]
        scores = F.normalize(x, eps=1e-8) @ F.normalize(embeddings.float(), eps=1e-8).T / 0.1
        positive = scores.gather(1, own[:, None])
        others = scores.masked_fill((embeddings[own][:, None] == embeddings).all(-1), float("-inf"))
        return F.cross_entropy(torch.cat([positive, others], 1), torch.zeros_like(own), reduction="sum")

    return function, plain


@given(
    frames=st.integers(1, 70), classes=st.integers(2, 40), dim=st.integers(2, 70), indexed=st.booleans(),
    duplicates=st.booleans(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=6)
def test_any_shape_is_as_precise_as_pytorch(frames, classes, dim, indexed, duplicates, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    _, _, labels = _inputs(frames, classes, dim, seed)
    labels[torch.rand(frames, generator=generator) < 0.2] = -1
    index = torch.randperm(frames, generator=generator)[: frames // 2].to(DEVICE) if indexed else None

    def draw(each):
        x, embeddings, _ = _inputs_on_cpu(frames, classes, dim, seed + each)
        if duplicates:
            embeddings[0] = embeddings[-1]
        return x, embeddings

    assert_kernels_as_precise(OPERATOR, *_functions(labels, index), draw, dtype, seeds=2, roundings=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_frames_are_as_precise_as_pytorch(dtype):
    _, _, labels = _inputs(130, 40, 70)
    draw = lambda seed: _inputs_on_cpu(130, 40, 70, seed)[:2]  # noqa: E731
    assert_kernels_as_precise(OPERATOR, *_functions(labels), draw, dtype, seeds=1, roundings=1.0)


@pytest.mark.parametrize("frames_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_frames_lose_nothing_of_float32_embeddings(frames_dtype):
    _, _, labels = _inputs(80, 30, 40)

    def draw(seed):
        x, embeddings, _ = _inputs_on_cpu(80, 30, 40, seed)
        return x.to(frames_dtype), embeddings

    assert_kernels_as_precise(
        OPERATOR, *_functions(labels, frames_dtype=frames_dtype), draw, torch.float32, seeds=2, roundings=1.0
    )


def test_classes_are_split_among_programs():
    _, _, labels = _inputs(10, 300, 20)
    draw = lambda seed: _inputs_on_cpu(10, 300, 20, seed)[:2]  # noqa: E731
    assert_kernels_as_precise(OPERATOR, *_functions(labels), draw, torch.float32, seeds=1, roundings=1.0)


@pytest.mark.parametrize("duplicates", [False, True])
def test_the_count_is_the_references(duplicates):
    x, embeddings, labels = _inputs(70, 4)
    labels[::7] = -1
    if duplicates:
        embeddings[2] = embeddings[1]
    _, expected = reference.cosine_cross_entropy(x.double(), embeddings.double(), labels)
    _, correct = cosine_cross_entropy(x, embeddings, labels)
    assert correct == expected > 0
    assert correct.dtype == torch.int64 and not correct.requires_grad


def test_a_tie_counts_as_correct():
    _, embeddings, _ = _inputs(2, 3)
    embeddings[2] = 2 * embeddings[1]  # the same direction, so the same score, and not an equal embedding
    loss, correct = cosine_cross_entropy(embeddings[1:2].clone(), embeddings, torch.tensor([1], device=DEVICE))
    assert correct == 1 and loss >= torch.log(torch.tensor(2.0)) - 1e-6


def test_an_equal_embedding_is_no_rival():
    x, embeddings, labels = _inputs(10, 2)
    embeddings[1] = embeddings[0]
    loss, correct = cosine_cross_entropy(x, embeddings, labels)
    assert loss.abs() < 1e-4 and correct == 10


def test_frames_left_out_and_frames_not_selected_have_no_gradient():
    x, embeddings, labels = _inputs(90)
    x.requires_grad_()
    labels[::3] = -1
    index = torch.arange(79, 0, -2, device=DEVICE)
    cosine_cross_entropy(x, embeddings, labels, index)[0].backward()
    counted = torch.zeros(90, dtype=torch.bool, device=DEVICE)
    counted[index] = labels[index] >= 0
    assert torch.equal(x.grad.abs().sum(1) > 0, counted)


def test_no_frame_at_all_is_a_loss_of_zero():
    x, embeddings, labels = _inputs(5)
    x.requires_grad_(), embeddings.requires_grad_()
    loss, correct = cosine_cross_entropy(x, embeddings, torch.full_like(labels, -1))
    empty, _ = cosine_cross_entropy(x[:0], embeddings, labels[:0])
    (loss + empty).backward()
    assert loss == 0 and correct == 0 and empty == 0 and (x.grad == 0).all() and (embeddings.grad == 0).all()


def test_rows_of_zeros_have_the_references_loss_and_gradient():
    x, embeddings, labels = _inputs()
    x[3] = 0.0
    embeddings[5] = 0.0
    function, plain = _functions(labels)
    ours = run(OPERATOR, "triton", function, (x, embeddings))
    truth = run(OPERATOR, "reference", plain, (x.double(), embeddings.double()))
    assert max(error(*pair) for pair in zip(ours, truth, strict=True)) < 1e-6


def test_a_label_that_is_no_class_makes_the_loss_infinite():
    x, embeddings, labels = _inputs()
    labels[4] = 11
    assert cosine_cross_entropy(x, embeddings, labels)[0] == float("inf")


def test_a_frame_that_is_not_a_number_makes_the_loss_none():
    x, embeddings, labels = _inputs()
    x[4, 3] = float("nan")
    assert cosine_cross_entropy(x, embeddings, labels)[0].isnan()


def test_two_runs_are_equal_to_the_bit():
    _, _, labels = _inputs(100, 40)
    function, _ = _functions(labels)
    runs = [run(OPERATOR, "triton", function, _inputs(100, 40)[:2]) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_strided_inputs_are_taken_as_they_are():
    x, embeddings, labels = _inputs()
    spread = x.T.contiguous().T, embeddings.repeat_interleave(2, 1)[:, ::2]
    index = torch.arange(30, device=DEVICE).repeat_interleave(2)[::2]
    function, _ = _functions(labels)
    strided, _ = _functions(labels.repeat_interleave(2)[::2], index)
    both = (run(OPERATOR, "triton", *each) for each in ((strided, spread), (function, (x, embeddings))))
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


def test_rows_of_a_wider_tensor_are_taken_where_they_lie():
    x, embeddings, labels = _inputs()
    wide = torch.cat([x, x], 1)[:, :16]
    assert torch.equal(
        cosine_cross_entropy(wide, embeddings, labels)[0], cosine_cross_entropy(x, embeddings, labels)[0]
    )


def test_no_tensor_has_frames_times_classes_elements():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    frames, classes = 640, 64
    x, embeddings, labels = _inputs(frames, classes, 4)
    with Largest() as largest:
        cosine_cross_entropy(x.requires_grad_(), embeddings.requires_grad_(), labels)[0].backward()
    assert largest.elements < frames * classes


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("shape", [(4021, 500, 256), (4021, 504, 768), (1000, 10_000, 1024)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_models_shapes_are_as_precise_as_pytorch(shape, dtype):
    labels = _inputs(*shape)[2]

    def draw(seed):
        x, embeddings, _ = _inputs_on_cpu(*shape, seed)
        return x.to(dtype), embeddings

    functions = _functions(labels, frames_dtype=dtype)
    with tf32.allowed(False):
        assert_kernels_as_precise(OPERATOR, *functions, draw, torch.float32, seeds=1, roundings=1.0)
