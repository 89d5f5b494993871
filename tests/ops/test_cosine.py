"""``cosine_logits``, torchaudio's logits from one matrix product, and ``cosine_cross_entropy``, their loss without them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.ops.turns import peak_bytes
from hubert_fast import backend
from hubert_fast.ops.cosine_cross_entropy import cosine_cross_entropy
from hubert_fast.ops.cosine_logits import cosine_logits
from hubert_fast.torch_backend import cosine_cross_entropy as chunked
from tests.ops.comparison import assert_as_precise, assert_twins, device_of, error, on_every_backend, run

LOGITS, LOSS = "cosine_logits", "cosine_cross_entropy"
OPERATORS = pytest.mark.parametrize("operator", [LOGITS, LOSS])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def inputs_of(frames=30, classes=11, dim=16, seed=0, dtype=torch.float64, device="cpu"):
    """Frames, embeddings and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(frames, dim, dtype=torch.float64, generator=generator)
    embeddings = torch.rand(classes, dim, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, classes, (frames,), generator=generator)
    return x.to(device, dtype), embeddings.to(device, dtype), labels.to(device)


def functions(operator, labels, index=None, frames_dtype=None):
    """The operator, and PyTorch's normalise and matmul, as functions of frames and embeddings.

    PyTorch's broadcast cosine_similarity sums pairwise, which no matrix product does. With ``frames_dtype`` float32 frames are
    brought to it first, as autocast does; float64 ones are the truth's.
    """

    def narrowed(x):
        return x if frames_dtype is None or x.dtype == torch.float64 else x.to(frames_dtype)

    def ours(x, embeddings):
        if operator == LOGITS:
            return cosine_logits(narrowed(x), embeddings, labels)
        return cosine_cross_entropy(narrowed(x), embeddings, labels, index)[0]

    def plain(x, embeddings):
        counted = torch.arange(len(labels), device=labels.device) if index is None else index
        counted = counted[labels[counted] >= 0]
        x, own = narrowed(x)[counted], labels[counted]
        scores = F.normalize(x.float(), eps=1e-8) @ F.normalize(embeddings.float(), eps=1e-8).T / 0.1
        equal = (embeddings[own][:, None] == embeddings).all(-1)
        logits = torch.cat([scores.gather(1, own[:, None]), scores.masked_fill(equal, float("-inf"))], 1)
        if operator == LOGITS:
            return logits.to(x.dtype)
        return F.cross_entropy(logits, torch.zeros_like(own), reduction="sum")

    return ours, plain


@given(
    frames=st.integers(0, 40), classes=st.integers(2, 30), dim=st.integers(1, 40), left_out=st.floats(0, 1),
    indexed=st.booleans(), duplicates=st.booleans(), chunk=st.integers(1, 50), seed=st.integers(0, 1000),
)  # fmt: skip
def test_backends_agree_for_any_shape(frames, classes, dim, left_out, indexed, duplicates, chunk, seed):
    x, embeddings, labels = inputs_of(frames, classes, dim, seed)
    generator = torch.Generator().manual_seed(seed)
    if duplicates:
        embeddings = embeddings[torch.randint(0, classes, (classes,), generator=generator)]
    assert_twins(LOGITS, cosine_logits, (x, embeddings, labels))
    labels[torch.rand(frames, generator=generator) < left_out] = -1
    index = torch.randperm(frames, generator=generator)[: frames // 2] if indexed else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_CHUNK_ROWS", chunk)
        assert_twins(LOSS, functions(LOSS, labels, index)[0], (x, embeddings))
        counts = []
        for name in ("torch", "reference"):
            with backend.using(name, LOSS):
                counts.append(cosine_cross_entropy(x, embeddings, labels, index)[1])
        assert torch.equal(*counts)


@OPERATORS
@DTYPES
def test_as_precise_as_pytorch(dtype, operator):
    ours, plain = functions(operator, inputs_of(200, 50, 64)[2])
    assert_as_precise(operator, ours, lambda seed: inputs_of(200, 50, 64, seed)[:2], dtype, plain=plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_logits_and_their_dtype_are_torchaudios(dtype):
    x, embeddings, labels = inputs_of(dtype=dtype)
    embeddings[2] = embeddings[7] = embeddings[4].clone()
    from tests import torchaudio_peer  # skips where there is no torchaudio

    with torchaudio_peer.precise(dtype):
        expected = torchaudio_peer.components._compute_logits(x, labels, embeddings)
    logits = cosine_logits(x, embeddings, labels)
    assert logits.dtype == expected.dtype == dtype
    assert error(logits, expected) <= {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]


def test_loss_and_count_are_those_of_torchaudios_logits():
    x, embeddings, labels = inputs_of(400, 4)
    embeddings[2] = embeddings[1]
    from tests import torchaudio_peer
    from tests.models.twins import recipe_correct

    with torchaudio_peer.in_double_precision():
        logits = torchaudio_peer.components._compute_logits(x, labels, embeddings)
    expected = F.cross_entropy(logits, torch.zeros_like(labels), reduction="sum")
    loss, correct = cosine_cross_entropy(x, embeddings, labels)
    assert error(loss, expected) <= 1e-12
    assert int(correct) == recipe_correct(logits) > 0


@on_every_backend
def test_classes_with_an_equal_embedding_are_minus_infinity(name):
    x, embeddings, _ = inputs_of(6, 5, dtype=torch.float32, device=device_of(name))
    embeddings[3] = embeddings[1]
    embeddings[4], embeddings[2] = -0.0, 0.0
    with backend.using(name, LOGITS):
        logits = cosine_logits(x, embeddings, torch.tensor([0, 1, 2, 3, 4, 0], device=x.device))
    expected = torch.tensor([
        [1, 0, 0, 0, 0],
        [0, 1, 0, 1, 0],
        [0, 0, 1, 0, 1],
        [0, 1, 0, 1, 0],
        [0, 0, 1, 0, 1],
        [1, 0, 0, 0, 0],
    ], dtype=torch.bool, device=x.device)  # fmt: skip
    assert torch.equal(logits[:, 1:].isinf(), expected)
    assert logits[:, 0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_every_backend
def test_zeros_of_either_sign_are_equal(name, dtype):
    x, embeddings, labels = inputs_of(8, 40, 16, dtype=dtype)
    signs = torch.where(torch.rand(20, 16, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    embeddings[:20] = embeddings[0].masked_fill(torch.arange(16) < 8, 0.0) * signs.where(torch.arange(16) < 8, 1.0)
    arguments = (each.to(device_of(name)) for each in (x, embeddings, torch.full_like(labels, 3)))
    with backend.using(name, LOGITS):
        logits = cosine_logits(*arguments).cpu()
    assert torch.equal(logits[:, 1:].isinf(), (torch.arange(40) < 20).expand(8, 40))


@on_every_backend
def test_equal_embeddings_whose_norms_float32_cannot_hold_are_equal(name):
    x, embeddings, labels = inputs_of(4, 6, 64, dtype=torch.float32, device=device_of(name))
    embeddings[1] = embeddings[3] = torch.tensor([3e38, -3e38]).repeat(32)
    with backend.using(name, LOGITS):
        logits = cosine_logits(x, embeddings, torch.tensor([1, 3, 0, 2], device=x.device))
    assert logits[:2, [2, 4]].isneginf().all()


def test_the_loss_holds_neither_scores_of_all_frames_nor_gradients_of_all_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK_ROWS", 64)
    x, embeddings, labels = inputs_of(2048, 500, 64, dtype=torch.float32)
    x.requires_grad_()
    with backend.using("torch", LOSS):
        most = peak_bytes(lambda i: cosine_cross_entropy(x, embeddings, labels)[0].backward(), "cpu")
    assert 0 < most < 2048 * 500 * 4 / 2


def test_gradients_of_transposed_frames_lie_as_the_compiler_expects():
    x, embeddings, labels = inputs_of(8, 5, 3)
    x, index = x.t().contiguous().t().requires_grad_(), torch.tensor([1, 6])
    with backend.using("torch", LOSS):
        (grad,) = torch.autograd.grad(cosine_cross_entropy(x, embeddings, labels, index)[0], [x])
    assert grad.is_contiguous()


@on_every_backend
def test_nearly_equal_embeddings_are_not_equal(name):
    x, embeddings, _ = inputs_of(4, 3, dtype=torch.float32, device=device_of(name))
    embeddings[1] = embeddings[0]
    embeddings[1, 5] = torch.nextafter(embeddings[0, 5], embeddings[0, 5] + 1.0)
    with backend.using(name, LOGITS):
        logits = cosine_logits(x, embeddings, torch.zeros(4, dtype=torch.long, device=x.device))
    assert logits[:, 1].isinf().all() and logits[:, 2:].isfinite().all()


@on_every_backend
def test_a_tie_counts_as_correct(name):
    _, embeddings, _ = inputs_of(2, 3, dtype=torch.float32, device=device_of(name))
    embeddings[2] = 2 * embeddings[1]  # the same direction, so the same score, and not an equal embedding
    with backend.using(name, LOSS):
        own = torch.tensor([1], device=embeddings.device)
        loss, correct = cosine_cross_entropy(embeddings[1:2].clone(), embeddings, own)
    assert int(correct) == 1 and loss >= torch.log(torch.tensor(2.0)) - 1e-6


@on_every_backend
def test_frames_left_out_and_frames_not_selected_have_no_gradient(name):
    x, embeddings, labels = inputs_of(90, dtype=torch.float32, device=device_of(name))
    labels[::3] = -1
    index = torch.arange(79, 0, -2, device=x.device)
    with backend.using(name, LOSS):
        cosine_cross_entropy(x.requires_grad_(), embeddings, labels, index)[0].backward()
    counted = torch.zeros(90, dtype=torch.bool, device=x.device)
    counted[index] = labels[index] >= 0
    assert torch.equal(x.grad.abs().sum(1) > 0, counted)


@on_every_backend
def test_no_frame_at_all_gives_no_logits_and_a_loss_of_zero(name):
    x, embeddings, labels = inputs_of(5, dtype=torch.float32, device=device_of(name))
    leaves = x.requires_grad_(), embeddings.requires_grad_()
    with backend.using(name, LOGITS), backend.using(name, LOSS):
        loss, correct = cosine_cross_entropy(x, embeddings, torch.full_like(labels, -1))
        empty, _ = cosine_cross_entropy(x[:0], embeddings, labels[:0])
        logits = cosine_logits(x[:0], embeddings, labels[:0])
        (loss + empty + logits.sum()).backward()
    assert loss == 0 and correct == 0 and empty == 0 and logits.shape == (0, 12)
    assert all((each.grad == 0).all() for each in leaves)


@OPERATORS
@on_every_backend
def test_rows_of_zeros_have_the_references_values_and_gradients(name, operator):
    x, embeddings, labels = inputs_of(dtype=torch.float32, device=device_of(name))
    x[3] = 0.0
    embeddings[5] = 0.0
    ours, _ = functions(operator, labels)
    results = run(operator, name, ours, (x, embeddings))
    truth = run(operator, "reference", ours, (x.double(), embeddings.double()))
    assert max(error(*pair) for pair in zip(results, truth, strict=True)) < 1e-6


@pytest.mark.parametrize(
    ("function", "message", "change"),
    [
        (cosine_logits, r"frames must be .*; got \(30, 16\) and \(11, 15\)", lambda x, e, y: (x, e[:, 1:], y)),
        (cosine_logits, r"frames must be .*; got \(2, 15, 16\)", lambda x, e, y: (x.view(2, 15, 16), e, y)),
        (cosine_logits, r"floating point; got torch.int64", lambda x, e, y: (x.long(), e, y)),
        (cosine_logits, r"labels must be int64 of shape \[30\]; got torch.int32", lambda x, e, y: (x, e, y.int())),
        (cosine_logits, r"labels must be .*; got torch.int64 \(29,\)", lambda x, e, y: (x, e, y[1:])),
        (cosine_cross_entropy, r"frames must be .*; got \(30, 16\) and", lambda x, e, y: (x, e[:, 1:], y)),
        (cosine_cross_entropy, r"floating point; got .* and torch.int64", lambda x, e, y: (x, e.long(), y)),
        (cosine_cross_entropy, r"index must be int64 .*; got torch.bool", lambda x, e, y: (x, e, y, y > 3)),
    ],
)
def test_bad_arguments_are_named(function, message, change):
    with pytest.raises(ValueError, match=message):
        function(*change(*inputs_of()))
