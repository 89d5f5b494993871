"""`feed_forward` beside PyTorch's own; on a CPU over the twin of the extension's kernels."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from hubert_fast import backend, extension
from hubert_fast.cuda_backend import device
from hubert_fast.cuda_backend import feed_forward as cuda_backend
from hubert_fast.ops import feed_forward as module
from hubert_fast.ops.feed_forward import feed_forward
from hubert_fast.switches import switched
from hubert_fast.weights import Lent, lend
from tests.kernels.device import DEVICE
from tests.ops import products_twin
from tests.ops.comparison import assert_as_precise, assert_twins, error

_ROWS, _DIM, _HIDDEN = 133, 64, 264
_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension's where it has them for this machine, else their twin."""
    if DEVICE.type == "cuda" and extension.cuda() and extension.cuda().tensor_core_products_available(1):
        return
    monkeypatch.setattr(cuda_backend, "extension", SimpleNamespace(cuda=lambda: products_twin))
    monkeypatch.setattr(device, "objection", lambda name, tensor: None)
    monkeypatch.setattr(backend._operators["feed_forward"], "unavailable", {})


def _draw(seed: int = 0, rows: int = _ROWS, dim: int = _DIM, hidden: int = _HIDDEN) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(DEVICE)

    return [randn(rows, dim), randn(hidden, dim) / dim**0.5, randn(hidden), randn(dim, hidden) / hidden**0.5]


def _problem(x_dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Rows and, in float32, parameters."""
    x, *parameters = _draw()
    return x.to(x_dtype).requires_grad_(), *(nn.Parameter(each.float()) for each in parameters)


def _composed(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2)


def _run(form: Callable[..., Tensor], tensors: tuple[Tensor, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Output and every gradient, under autocast to ``dtype`` where that has 16 bits."""
    with torch.autocast(DEVICE.type, dtype, enabled=dtype.itemsize == 2):
        out = form(*tensors)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
    return [out, *torch.autograd.grad(out, tensors, upstream)]


def _on_cuda(*tensors: Tensor, **settings: Any) -> Tensor:
    with backend.using("cuda", "feed_forward"):
        return feed_forward(*tensors, **settings)


@pytest.mark.usefixtures("kernels")
@_DTYPES
def test_as_precise_as_pytorch(dtype):
    assert_as_precise("feed_forward", feed_forward, _draw, dtype, name="cuda")


@pytest.mark.usefixtures("kernels")
@_DTYPES
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_precise_as_pytorch_under_autocast_and_in_its_dtypes(dtype, x_dtype):
    tensors = _problem(x_dtype)
    exact = _run(_composed, tuple(each.detach().double().requires_grad_() for each in tensors), torch.float64)
    theirs, mine = _run(_composed, tensors, dtype), _run(_on_cuda, tensors, dtype)
    assert [each.dtype for each in mine] == [each.dtype for each in theirs]
    for ours, other, truth in zip(mine, theirs, exact, strict=True):
        assert error(ours, truth) <= 1.5 * error(other, truth)


@given(rows=st.integers(0, 30), dim=st.integers(1, 20), hidden=st.integers(1, 20), p=st.sampled_from([0.0, 0.3]))
def test_backends_agree_for_any_shape_with_and_without_dropout(rows, dim, hidden, p):
    seed = torch.tensor(5, device=DEVICE)

    def function(*tensors: Tensor) -> Tensor:
        with backend.using("reference", "bias_gelu_dropout"):  # draws the reference's masks
            return feed_forward(*tensors, dropout_p=p, seed=seed)

    assert_twins("feed_forward", function, _draw(0, rows, dim, hidden))


@pytest.mark.usefixtures("kernels")
def test_kept_are_the_input_and_the_values_before_gelu():
    tensors, kept = _problem(), []
    with saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            feed_forward(*tensors)
    more = [each for each in kept if not any(each is other for other in tensors)]
    assert [(each.shape, each.dtype) for each in more] == [((_ROWS, _HIDDEN), torch.bfloat16)]
    assert len(kept) == 5


@pytest.mark.usefixtures("kernels")
def test_memory_that_is_lent_is_used():
    tensors = _problem()
    expected = _run(_on_cuda, tensors)
    lent = [
        Lent(each.detach().bfloat16() if each.ndim == 2 else None, torch.full_like(each, torch.nan))
        for each in tensors[1:]
    ]
    for each, memory in zip(tensors[1:], lent):
        lend(each, memory)
    found = _run(_on_cuda, tensors)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert [each.data_ptr() for each in found[2:]] == [each.gradient.data_ptr() for each in lent]
    # Products read the copies, not the weights.
    lent[0].copy.zero_()
    out, of_x, *_ = _run(_on_cuda, tensors)
    assert torch.equal(out, out[:1].expand_as(out)) and not of_x.any()
    lent[2].copy.zero_()
    out, _, of_weight1, *_ = _run(_on_cuda, tensors)
    assert not out.any() and not of_weight1.any()


@pytest.mark.usefixtures("kernels")
def test_parameters_may_begin_anywhere_in_memory():
    tensors = [each.bfloat16().requires_grad_() for each in _draw()]

    def moved(each: Tensor) -> Tensor:
        memory = torch.empty(each.numel() + 1, dtype=each.dtype, device=each.device)
        return memory[1:].view_as(each).copy_(each.detach()).requires_grad_()

    for mine, theirs in zip(_run(_on_cuda, [*map(moved, tensors)]), _run(_on_cuda, tensors), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def _ran(function: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that ``function`` ran the operator on; none where it was composed."""
    ran: list[str] = []
    with monkeypatch.context() as patch:
        run = module._operator.run
        patch.setattr(module._operator, "run", lambda chosen, given: ran.append(chosen) or run(chosen, given))
        function()
    return ran


@pytest.mark.usefixtures("kernels")
def test_the_kernels_run_where_they_can_and_are_wanted(monkeypatch):
    tensors, (x, *parameters) = _problem(), _draw()

    def call(given=tensors, dtype=torch.bfloat16, **settings):
        return _ran(lambda: _run(lambda *each: feed_forward(*each, **settings), given, dtype), monkeypatch)

    assert call() == ["cuda"]
    assert call(dropout_p=0.1) == []
    wide = [each.requires_grad_() for each in (x.float(), *(each.float() for each in parameters))]
    assert call(wide, torch.float32) == []
    with switched(gelu_epilogues=False):
        assert call() == []
        with backend.using("cuda", "feed_forward"):
            assert call() == ["cuda"]
    with backend.using("torch", "feed_forward"):
        assert call() == []


@pytest.mark.usefixtures("kernels")
def test_modes_see_products_and_flops_are_theirs(monkeypatch):
    tensors, forward = _problem(), 2 * 2 * _ROWS * _DIM * _HIDDEN
    with FlopCounterMode(display=False) as counter:
        assert _ran(lambda: _run(feed_forward, tensors), monkeypatch) == []
    assert counter.get_total_flops() == 3 * forward
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = feed_forward(*tensors)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * forward


@pytest.mark.usefixtures("kernels")
def test_compilers_see_the_composition():
    tensors, compiled = _problem(), torch.compile(feed_forward, fullgraph=True, backend="aot_eager")
    with switched(gelu_epilogues=False):
        expected = _run(feed_forward, tensors)
    for mine, theirs in zip(_run(compiled, tensors), expected, strict=True):
        # A call that is not compiled takes oneDNN's products, or wider ones: they add and round otherwise.
        assert mine.dtype == theirs.dtype and (mine - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 12)}, "multiples of 8 as dim and hidden; got 3 rows, 12 and 16"),
        ({"weight1": torch.zeros(20, 8)}, "multiples of 8 as dim and hidden; got 3 rows, 8 and 20"),
        ({"x": torch.zeros(0, 8)}, "it takes 1 to 2147483392 rows"),
        ({"dtype": torch.float32}, "it computes in torch.bfloat16, torch.float16, not torch.float32"),
        ({"dropout_p": 0.1}, "it drops nothing; got a dropout_p of 0.1"),
        ({}, "this build has no products of torch.bfloat16 for cpu"),
    ],
)
def test_objections_name_what_is_in_the_way(monkeypatch, change, message):
    x, weight1 = torch.zeros(3, 8), torch.zeros(16, 8)
    arguments = module.Arguments(x, weight1, torch.zeros(16), weight1.t(), 0.0, None, torch.bfloat16)
    arguments = arguments._replace(**change)
    assert cuda_backend.objection(arguments) == "it runs on an NVIDIA GPU, and x is on cpu"
    monkeypatch.setattr(device, "objection", lambda name, tensor: None)
    without = SimpleNamespace(tensor_core_products_available=lambda dtype: False)
    monkeypatch.setattr(cuda_backend, "extension", SimpleNamespace(cuda=lambda: without))
    assert message in cuda_backend.objection(arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8)}, "x must be floating point of shape"),
        ({"weight1": torch.zeros(16, 9)}, r"weight1 must be floating point of shape \[16, 8\]; got torch.float32 \(16, 9\)"),
        ({"weight2": torch.zeros(8, 16).long()}, r"weight2 must be floating point of shape \[8, 16\]; got torch.int64"),
        ({"bias1": torch.zeros(16).long()}, r"bias1 must be floating point of shape \[16\]"),
        ({"x": torch.zeros(3, 8).bfloat16()}, "weight1 must have the dtype of x without autocast, torch.bfloat16; got"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\)"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, message):
    given = {"x": torch.zeros(3, 8), "weight1": torch.zeros(16, 8), "bias1": torch.zeros(16)}
    with pytest.raises(ValueError, match=message):
        feed_forward(**{**given, "weight2": torch.zeros(8, 16), **change})


def test_asked_for_by_name_it_says_why_it_cannot_run():
    x, *parameters = (each.float().cpu() for each in _draw())
    with pytest.raises(backend.BackendError, match=re.escape("backend 'cuda' of operator 'feed_forward'")):
        _on_cuda(x, *parameters)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an NVIDIA GPU")
def test_both_ways_are_captured_in_a_graph():
    tensors = [each.bfloat16().requires_grad_() for each in _draw(rows=8743, dim=768, hidden=3072)]
    eager, graph = _run(_on_cuda, tensors), torch.cuda.CUDAGraph()
    upstream = torch.randn(8743, 768, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    with torch.cuda.graph(graph):
        out = _on_cuda(*tensors)
        captured = [out, *torch.autograd.grad(out, tensors, upstream)]
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(captured, eager, strict=True))


def test_who_plans_memory_is_told_whether_hidden_values_are_kept_once(kernels):
    assert module.keeps_hidden_once(DEVICE, torch.bfloat16)
    assert not module.keeps_hidden_once(DEVICE, torch.float32)
    with switched(gelu_epilogues=False):
        assert not module.keeps_hidden_once(DEVICE, torch.bfloat16)
    with backend.using("torch", "feed_forward"):
        assert not module.keeps_hidden_once(DEVICE, torch.bfloat16)
