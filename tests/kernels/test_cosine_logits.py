"""Triton kernels of ``cosine_logits``: precision, layout, determinism."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_fast import backend, tf32
from hubert_fast.ops.cosine_logits import cosine_logits
from hubert_fast.reference import cosine_logits as reference
from tests.kernels.device import DEVICE
from tests.kernels.precision import assert_kernels_as_precise
from tests.ops.comparison import error, run
from tests.ops.test_cosine_logits import OPERATOR
from tests.ops.test_cosine_logits import _inputs as _inputs_on_cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton():
    with backend.using("triton", OPERATOR):
        yield


def _inputs(frames=30, classes=11, dim=16, seed=0, dtype=torch.float32):
    return [each.to(DEVICE) for each in _inputs_on_cpu(frames, classes, dim, seed, dtype)]


def _functions(labels):
    """The logits of frames and embeddings, by the operator and as PyTorch computes them: normalised, multiplied in float32."""

    def function(x, embeddings):
        return cosine_logits(x, embeddings, labels)

    def plain(x, embeddings):
        if x.dtype == torch.float64:
            return reference.cosine_logits(x, embeddings, labels)
        scores = F.normalize(x.float(), eps=1e-8) @ F.normalize(embeddings.float(), eps=1e-8).T / 0.1
        equal = (embeddings[labels][:, None] == embeddings).all(-1)
        return torch.cat([scores.gather(1, labels[:, None]), scores.masked_fill(equal, float("-inf"))], 1).to(x.dtype)

    return function, plain


@given(
    frames=st.integers(1, 70), classes=st.integers(2, 40), dim=st.integers(2, 70), duplicates=st.booleans(),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=6)
def test_any_shape_is_as_precise_as_pytorch(frames, classes, dim, duplicates, dtype, seed):
    _, _, labels = _inputs(frames, classes, dim, seed)

    def draw(each):
        x, embeddings, _ = _inputs_on_cpu(frames, classes, dim, seed + each)
        if duplicates:
            embeddings[0] = embeddings[-1]
        return x, embeddings

    assert_kernels_as_precise(OPERATOR, *_functions(labels), draw, dtype, seeds=2, roundings=1.0)


@pytest.mark.parametrize("shape", [(130, 40, 70), (10, 300, 20)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_blocks_and_splits_are_as_precise_as_pytorch(dtype, shape):
    _, _, labels = _inputs(*shape)
    draw = lambda seed: _inputs_on_cpu(*shape, seed)[:2]  # noqa: E731
    assert_kernels_as_precise(OPERATOR, *_functions(labels), draw, dtype, seeds=1)


def test_16_bit_frames_take_float32_embeddings():
    x, embeddings, labels = _inputs(40, 30, 20)
    x = x.bfloat16()
    ours = run(OPERATOR, "triton", _functions(labels)[0], (x, embeddings))
    assert [each.dtype for each in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]
    # The gradient of the logits is rounded to their dtype, so the truth is given the same one.
    x, embeddings = x.double().requires_grad_(), embeddings.double().requires_grad_()
    truth = reference.cosine_logits(x, embeddings, labels)
    direction = torch.randn(truth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (truth.masked_fill(truth.isinf(), 0.0) * direction.bfloat16().to(DEVICE)).sum().backward()
    errors = [error(*pair) for pair in zip(ours, (truth, x.grad, embeddings.grad), strict=True)]
    assert errors[0] < 2**-8 and errors[1] < 2**-8 and errors[2] < 1e-6


def test_classes_with_an_equal_embedding_are_minus_infinity():
    x, embeddings, _ = _inputs(6, 5)
    embeddings[3] = embeddings[1]
    embeddings[4], embeddings[2] = -0.0, 0.0
    logits = cosine_logits(x, embeddings, torch.tensor([0, 1, 2, 3, 4, 0], device=DEVICE))
    expected = torch.tensor([
        [1, 0, 0, 0, 0],
        [0, 1, 0, 1, 0],
        [0, 0, 1, 0, 1],
        [0, 1, 0, 1, 0],
        [0, 0, 1, 0, 1],
        [1, 0, 0, 0, 0],
    ], dtype=torch.bool, device=DEVICE)  # fmt: skip
    assert torch.equal(logits[:, 1:].isinf(), expected)
    assert logits[:, 0].isfinite().all()


def test_rows_of_zeros_have_similarity_zero_and_the_references_gradient():
    x, embeddings, labels = _inputs()
    x[3] = 0.0
    embeddings[5] = 0.0
    function, plain = _functions(labels)
    ours = run(OPERATOR, "triton", function, (x, embeddings))
    assert (ours[0][3][ours[0][3].isfinite()] == 0).all()
    truth = run(OPERATOR, "reference", plain, (x.double(), embeddings.double()))
    assert max(error(*pair) for pair in zip(ours, truth, strict=True)) < 1e-6


def test_a_label_that_is_no_class_makes_its_positive_logit_nan():
    x, embeddings, labels = _inputs()
    labels[4], labels[7] = 11, -1
    nan = cosine_logits(x, embeddings, labels).isnan()
    assert nan.nonzero().tolist() == [[4, 0], [7, 0]]


def test_no_frame_gives_no_logits_and_gradients_of_zero():
    x, embeddings, labels = _inputs()
    logits = cosine_logits(x[:0], embeddings.requires_grad_(), labels[:0])
    logits.sum().backward()
    assert logits.shape == (0, 12) and (embeddings.grad == 0).all()


def test_two_runs_are_equal_to_the_bit():
    _, _, labels = _inputs(100, 40)
    function, _ = _functions(labels)
    runs = [run(OPERATOR, "triton", function, _inputs(100, 40)[:2]) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("shape", [(4021, 500, 256), (4021, 504, 768), (1000, 10_000, 1024)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_models_shapes_are_as_precise_as_pytorch(shape, dtype):
    labels = _inputs(*shape)[2]
    draw = lambda seed: _inputs_on_cpu(*shape, seed)[:2]  # noqa: E731
    with tf32.allowed(False):
        assert_kernels_as_precise(OPERATOR, *_functions(labels), draw, dtype, seeds=1)
