"""Triton kernels of ``cosine_logits`` and ``cosine_cross_entropy``: precision, selection, equal classes, memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hubert_fast import backend, tf32
from hubert_fast.ops.cosine_cross_entropy import cosine_cross_entropy
from hubert_fast.ops.cosine_logits import cosine_logits
from hubert_fast.reference import cosine_cross_entropy as reference
from tests.kernels.device import DEVICE
from tests.ops.comparison import assert_as_precise, run
from tests.ops.test_cosine import DTYPES, LOGITS, LOSS, OPERATORS, functions, inputs_of


@pytest.fixture(autouse=True)
def _triton():
    with backend.using("triton", LOGITS), backend.using("triton", LOSS):
        yield


def _inputs(frames=30, classes=11):
    return inputs_of(frames, classes, dtype=torch.float32, device=DEVICE)


def _assert_as_precise(operator, shape, dtype, labels, *, seeds=1, duplicates=False, **settings):
    def draw(seed):
        x, embeddings, _ = inputs_of(*shape, seed, device=DEVICE)
        if duplicates:
            embeddings[0] = embeddings[-1]
        return x, embeddings

    ours, plain = functions(operator, labels, **settings)
    assert_as_precise(operator, ours, draw, dtype, name="triton", plain=plain, seeds=seeds, roundings=1.0)


@given(
    frames=st.integers(1, 70), classes=st.integers(2, 40), dim=st.integers(2, 70), indexed=st.booleans(),
    duplicates=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=6)
def test_any_shape_is_as_precise_as_pytorch(frames, classes, dim, indexed, duplicates, dtype, seed):
    generator, shape = torch.Generator().manual_seed(seed), (frames, classes, dim)
    labels = inputs_of(*shape, seed, device=DEVICE)[2]
    _assert_as_precise(LOGITS, shape, dtype, labels, seeds=2, duplicates=duplicates)
    labels[(torch.rand(frames, generator=generator) < 0.2).to(DEVICE)] = -1
    index = torch.randperm(frames, generator=generator)[: frames // 2].to(DEVICE) if indexed else None
    _assert_as_precise(LOSS, shape, dtype, labels, seeds=2, duplicates=duplicates, index=index)


@OPERATORS
@pytest.mark.parametrize("shape", [(130, 40, 70), (10, 300, 20)], ids=str)
@DTYPES
def test_more_blocks_and_splits_are_as_precise_as_pytorch(dtype, shape, operator):
    _assert_as_precise(operator, shape, dtype, inputs_of(*shape, device=DEVICE)[2])


@pytest.mark.parametrize("duplicates", [False, True])
def test_the_count_is_the_references(duplicates):
    x, embeddings, labels = _inputs(70, 4)
    labels[::7] = -1
    if duplicates:
        embeddings[2] = embeddings[1]
    _, expected = reference.cosine_cross_entropy(x.double(), embeddings.double(), labels)
    assert cosine_cross_entropy(x, embeddings, labels)[1] == expected > 0


def test_a_label_that_is_no_class_makes_its_positive_logit_nan_and_the_loss_infinite():
    x, embeddings, labels = _inputs()
    labels[4] = 11
    assert cosine_cross_entropy(x, embeddings, labels)[0] == float("inf")
    labels[7] = -1
    assert cosine_logits(x, embeddings, labels).isnan().nonzero().tolist() == [[4, 0], [7, 0]]


def test_a_frame_that_is_not_a_number_makes_the_loss_none():
    x, embeddings, labels = _inputs()
    x[4, 3] = float("nan")
    assert cosine_cross_entropy(x, embeddings, labels)[0].isnan()


def test_no_tensor_has_frames_times_classes_elements():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    frames, classes = 640, 64
    x, embeddings, labels = inputs_of(frames, classes, 4, dtype=torch.float32, device=DEVICE)
    with Largest() as largest:
        cosine_cross_entropy(x.requires_grad_(), embeddings.requires_grad_(), labels)[0].backward()
    assert largest.elements < frames * classes


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an NVIDIA GPU")
@OPERATORS
@pytest.mark.parametrize("shape", [(4021, 500, 256), (4021, 504, 768), (1000, 10_000, 1024)], ids=str)
@DTYPES
def test_the_models_shapes_are_as_precise_as_pytorch(shape, dtype, operator):
    labels = inputs_of(*shape, device=DEVICE)[2]
    with tf32.allowed(False):
        if operator == LOGITS:
            _assert_as_precise(operator, shape, dtype, labels)
        else:  # whose embeddings stay in float32
            _assert_as_precise(operator, shape, torch.float32, labels, frames_dtype=dtype)
    _assert_repeatable(operator, shape, dtype, labels)


def _assert_repeatable(operator, shape, dtype, labels):
    inputs, (ours, _) = inputs_of(*shape, dtype=dtype, device=DEVICE)[:2], functions(operator, labels)
    first, second = (run(operator, "triton", ours, inputs) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@OPERATORS
def test_blocks_and_splits_are_added_in_the_same_order_every_time(operator):
    shape = (130, 40, 70)
    _assert_repeatable(operator, shape, torch.float32, inputs_of(*shape, device=DEVICE)[2])
