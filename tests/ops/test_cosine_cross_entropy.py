"""``cosine_cross_entropy``: the loss of `cosine_logits` against column 0, without the logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hubert_fast import backend
from hubert_fast.ops.cosine_cross_entropy import cosine_cross_entropy
from hubert_fast.ops.cosine_logits import cosine_logits
from hubert_fast.torch_backend import cosine_cross_entropy as chunked
from tests.ops.comparison import assert_as_precise, assert_twins, error
from tests.ops.test_cosine_logits import plain_logits

OPERATOR = "cosine_cross_entropy"
BACKENDS = ["torch", "reference"]


def _inputs(frames=30, classes=11, dim=16, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(frames, dim, dtype=torch.float64, generator=generator)
    embeddings = torch.rand(classes, dim, dtype=torch.float64, generator=generator)
    return x.to(dtype), embeddings.to(dtype), torch.randint(0, classes, (frames,), generator=generator)


def _loss(*arguments):
    return cosine_cross_entropy(*arguments)[0]


@given(
    frames=st.integers(0, 40), classes=st.integers(2, 30), dim=st.integers(1, 40), left_out=st.floats(0, 1),
    indexed=st.booleans(), duplicates=st.booleans(), chunk=st.integers(1, 50), seed=st.integers(0, 1000),
)  # fmt: skip
def test_backends_agree_for_any_shape(frames, classes, dim, left_out, indexed, duplicates, chunk, seed):
    x, embeddings, labels = _inputs(frames, classes, dim, seed)
    generator = torch.Generator().manual_seed(seed)
    labels[torch.rand(frames, generator=generator) < left_out] = -1
    index = torch.randperm(frames, generator=generator)[: frames // 2] if indexed else None
    if duplicates:
        embeddings[0] = embeddings[-1]
    before, chunked._CHUNK_ROWS = chunked._CHUNK_ROWS, chunk
    try:
        assert_twins(OPERATOR, lambda x, embeddings: _loss(x, embeddings, labels, index), (x, embeddings))
        counts = []
        for name in BACKENDS:
            with backend.using(name, OPERATOR):
                counts.append(cosine_cross_entropy(x, embeddings, labels, index)[1])
        assert torch.equal(*counts)
    finally:
        chunked._CHUNK_ROWS = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_precise_as_pytorch(dtype):
    def plain(x, embeddings, labels):
        logits = plain_logits(x.float(), embeddings, labels)
        return F.cross_entropy(logits, torch.zeros_like(labels), reduction="sum")

    assert_as_precise(OPERATOR, _loss, lambda seed: _inputs(200, 50, 64, seed), dtype, plain=plain)


@pytest.mark.parametrize("name", BACKENDS)
def test_loss_and_count_are_those_of_torchaudios_logits(name):
    x, embeddings, labels = _inputs(400, 4)
    embeddings[2] = embeddings[1]
    from tests import torchaudio_peer  # skips where there is no torchaudio
    from tests.models.twins import recipe_correct

    with torchaudio_peer.in_double_precision():
        logits = torchaudio_peer.components._compute_logits(x, labels, embeddings)
    expected = F.cross_entropy(logits, torch.zeros_like(labels), reduction="sum")
    with backend.using(name, OPERATOR):
        loss, correct = cosine_cross_entropy(x, embeddings, labels)
    assert error(loss, expected) <= 1e-12
    assert int(correct) == recipe_correct(logits) > 0
    assert correct.dtype == torch.int64 and not correct.requires_grad


@pytest.mark.parametrize("name", BACKENDS)
def test_a_tie_counts_as_correct(name):
    x, embeddings, _ = _inputs(2, 3)
    embeddings[2] = 2 * embeddings[1]  # the same direction, so the same score, and not an equal embedding
    with backend.using(name, OPERATOR):
        loss, correct = cosine_cross_entropy(embeddings[1:2].clone(), embeddings, torch.tensor([1]))
    assert int(correct) == 1 and loss >= torch.log(torch.tensor(2.0)) - 1e-9


def test_frames_left_out_and_frames_not_selected_have_no_gradient():
    x, embeddings, labels = _inputs()
    x.requires_grad_()
    labels[::3] = -1
    index = torch.arange(0, 20)
    cosine_cross_entropy(x, embeddings, labels, index)[0].backward()
    counted = (labels >= 0) & (torch.arange(30) < 20)
    assert torch.equal(x.grad.abs().sum(1) > 0, counted)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_frame_at_all_is_a_loss_of_zero(name):
    x, embeddings, labels = _inputs(5)
    x.requires_grad_()
    with backend.using(name, OPERATOR):
        loss, correct = cosine_cross_entropy(x, embeddings, torch.full_like(labels, -1))
        loss.backward()
        empty, _ = cosine_cross_entropy(x[:0], embeddings, labels[:0])
    assert loss == 0 and correct == 0 and empty == 0 and (x.grad == 0).all()


def test_rows_of_zeros_have_the_references_loss_and_gradient():
    x, embeddings, labels = _inputs()
    x[3] = 0.0
    embeddings[5] = 0.0
    assert_twins(OPERATOR, _loss, (x, embeddings, labels))


def test_the_loss_is_that_of_the_logits_operator():
    x, embeddings, labels = _inputs(dtype=torch.float64)
    logits = cosine_logits(x, embeddings, labels)
    expected = F.cross_entropy(logits, torch.zeros_like(labels), reduction="sum")
    assert error(_loss(x, embeddings, labels), expected) <= 1e-12


@pytest.mark.parametrize("name", BACKENDS)
def test_the_loss_of_bfloat16_frames_is_float32(name):
    x, embeddings, labels = _inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), backend.using(name, OPERATOR):
        loss = _loss(x.bfloat16(), embeddings, labels)
    assert loss.dtype == torch.float32
    assert error(loss, _loss(x.bfloat16().double(), embeddings.double(), labels)) <= 1e-5


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"frames must be .*; got \(30, 16\) and \(11, 15\)", lambda x, e, y: (x, e[:, 1:], y)),
        (r"floating point; got torch.float64 and torch.int64", lambda x, e, y: (x, e.long(), y)),
        (r"labels must be int64 of shape \[30\]; got torch.int32", lambda x, e, y: (x, e, y.int())),
        (r"index must be int64 of shape \[selected\]; got torch.bool", lambda x, e, y: (x, e, y, y > 3)),
    ],
)
def test_bad_arguments_are_named(message, change):
    with pytest.raises(ValueError, match=message):
        cosine_cross_entropy(*change(*_inputs()))
