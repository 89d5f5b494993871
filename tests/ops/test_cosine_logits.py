"""``cosine_logits``: torchaudio's logits, from one matrix product."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hubert_fast import backend
from hubert_fast.ops.cosine_logits import cosine_logits
from tests.ops.comparison import assert_as_precise, assert_twins, error

OPERATOR = "cosine_logits"
BACKENDS = ["torch", "reference"]


def _inputs(frames=30, classes=11, dim=16, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(frames, dim, dtype=torch.float64, generator=generator)
    embeddings = torch.rand(classes, dim, dtype=torch.float64, generator=generator)
    return x.to(dtype), embeddings.to(dtype), torch.randint(0, classes, (frames,), generator=generator)


@given(
    frames=st.integers(0, 40), classes=st.integers(1, 30), dim=st.integers(1, 40), duplicates=st.booleans(),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_backends_agree_for_any_shape(frames, classes, dim, duplicates, seed):
    x, embeddings, labels = _inputs(frames, classes, dim, seed)
    if duplicates:
        embeddings = embeddings[torch.randint(0, classes, (classes,), generator=torch.Generator().manual_seed(seed))]
    assert_twins(OPERATOR, cosine_logits, (x, embeddings, labels))


def plain_logits(x, embeddings, labels):
    """PyTorch's normalise and matmul. Its broadcast cosine_similarity sums pairwise, which no matrix product does."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scores = F.normalize(x.to(wide), eps=1e-8) @ F.normalize(embeddings.to(wide), eps=1e-8).T / 0.1
    others = scores.scatter(1, labels[:, None], float("-inf"))
    return torch.cat([scores.gather(1, labels[:, None]), others], 1).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_precise_as_pytorch(dtype):
    assert_as_precise(OPERATOR, cosine_logits, lambda seed: _inputs(200, 50, 64, seed), dtype, plain=plain_logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_values_and_dtype_are_torchaudios(name, dtype):
    x, embeddings, labels = _inputs(dtype=dtype)
    embeddings[2] = embeddings[7] = embeddings[4].clone()
    from tests import torchaudio_peer  # skips where there is no torchaudio

    with torchaudio_peer.precise(dtype):
        expected = torchaudio_peer.components._compute_logits(x, labels, embeddings)
    with backend.using(name, OPERATOR):
        logits = cosine_logits(x, embeddings, labels)
    assert logits.dtype == expected.dtype == dtype
    assert error(logits, expected) <= {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("name", BACKENDS)
def test_classes_with_an_equal_embedding_are_minus_infinity(name):
    x, embeddings, _ = _inputs(6, 5)
    embeddings[3] = embeddings[1]
    embeddings[4] = 0.0
    embeddings[2] = 0.0
    with backend.using(name, OPERATOR):
        logits = cosine_logits(x, embeddings, torch.tensor([0, 1, 2, 3, 4, 0]))
    expected = torch.tensor([
        [1, 0, 0, 0, 0],
        [0, 1, 0, 1, 0],
        [0, 0, 1, 0, 1],
        [0, 1, 0, 1, 0],
        [0, 0, 1, 0, 1],
        [1, 0, 0, 0, 0],
    ], dtype=torch.bool)  # fmt: skip
    assert torch.equal(logits[:, 1:].isinf(), expected)
    assert logits[:, 0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_zeros_of_either_sign_are_equal(name, dtype):
    x, embeddings, labels = _inputs(8, 40, 16, dtype=dtype)
    signs = torch.where(torch.rand(20, 16, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    embeddings[:20] = embeddings[0].masked_fill(torch.arange(16) < 8, 0.0) * signs.where(torch.arange(16) < 8, 1.0)
    with backend.using(name, OPERATOR):
        logits = cosine_logits(x, embeddings, torch.full_like(labels, 3))
    assert torch.equal(logits[:, 1:].isinf(), (torch.arange(40) < 20).expand(8, 40))


@pytest.mark.parametrize("name", BACKENDS)
def test_nearly_equal_embeddings_are_not_equal(name):
    x, embeddings, _ = _inputs(4, 3, dtype=torch.float32)
    embeddings[1] = embeddings[0]
    embeddings[1, 5] = torch.nextafter(embeddings[0, 5], torch.tensor(2.0))
    with backend.using(name, OPERATOR):
        logits = cosine_logits(x, embeddings, torch.zeros(4, dtype=torch.long))
    assert logits[:, 1].isinf().all() and logits[:, 2:].isfinite().all()


def test_rows_of_zeros_have_similarity_zero_and_the_references_gradient():
    x, embeddings, labels = _inputs()
    x[3] = 0.0
    embeddings[5] = 0.0
    with backend.using("torch", OPERATOR):
        logits = cosine_logits(x, embeddings, labels)
    assert not logits.isnan().any()
    assert (logits[3][logits[3].isfinite()] == 0).all()
    assert_twins(OPERATOR, cosine_logits, (x, embeddings, labels))


def test_autocast_leaves_the_dtype_of_the_frames():
    x, embeddings, labels = _inputs(dtype=torch.float32)
    plain = cosine_logits(x, embeddings, labels)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cosine_logits(x, embeddings, labels)
        half = cosine_logits(x.bfloat16(), embeddings, labels)
    assert torch.equal(inside, plain)  # float32 frames are compared in float32, as in torchaudio
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"frames must be .*; got \(30, 16\) and \(11, 15\)", lambda x, e, y: (x, e[:, 1:], y)),
        (r"frames must be .*; got \(2, 15, 16\)", lambda x, e, y: (x.view(2, 15, 16), e, y)),
        (r"floating point; got torch.int64", lambda x, e, y: (x.long(), e, y)),
        (r"labels must be int64 of shape \[30\]; got torch.int32", lambda x, e, y: (x, e, y.int())),
        (r"labels must be int64 of shape \[30\]; got torch.int64 \(29,\)", lambda x, e, y: (x, e, y[1:])),
    ],
)
def test_bad_arguments_are_named(message, change):
    with pytest.raises(ValueError, match=message):
        cosine_logits(*change(*_inputs()))
