"""The operators as their contract test sees them: for each, small arguments of every kind that it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from hubert_fast import backend
from hubert_fast.ops import (
    bias_dropout_residual,
    bias_gelu_dropout,
    conv_frontend,
    cosine_cross_entropy,
    cosine_logits,
    feed_forward,
    mask_fill,
    masked_attention,
    positional_conv,
    residual_layer_norm,
)

_MODULES = (
    bias_dropout_residual, bias_gelu_dropout, conv_frontend, cosine_cross_entropy, cosine_logits, feed_forward,
    mask_fill, masked_attention, positional_conv, residual_layer_norm,
)  # fmt: skip
OPERATORS = {module._operator.name: module._operator for module in _MODULES}

# A dtype narrower than that of an operator's results, where a copy of them in one is asked for.
_NARROWER = {torch.float64: torch.float32, torch.float32: torch.bfloat16}

# What products give: in 16 bits under autocast, which leaves parameters and the stream in float32.
ROWS = {"x", "update", "frames"}


class Case(NamedTuple):
    """Arguments of an operator, its floating tensors in float64; float32 stands for a dtype narrower than theirs."""

    operator: str
    name: str
    arguments: Any

    def cast(self, dtype: torch.dtype, device: torch.device, rows: Optional[torch.dtype] = None) -> Any:
        """The arguments in ``dtype``, `ROWS` in ``rows``; tensors that may have a gradient ask for one."""
        names = OPERATORS[self.operator].layout.gradients

        def cast(name: str, value: Any) -> Any:
            if isinstance(value, list):
                return [cast(name, each) for each in value]
            if value is torch.float64:
                return dtype
            if value is torch.float32:
                return _NARROWER.get(dtype)
            if not isinstance(value, Tensor):
                return value
            to = (rows or dtype) if name in ROWS else dtype
            value = value.to(device, to) if value.is_floating_point() else value.to(device)
            return value.clone().requires_grad_() if name in names else value

        return self.arguments._make(cast(*each) for each in self.arguments._asdict().items())


def leaves(operator: str, arguments: Any) -> list[Tensor]:
    """The tensors among ``arguments`` that may have a gradient, lists flattened."""
    given = [getattr(arguments, name) for name in OPERATORS[operator].layout.gradients]
    flat = [each for value in given for each in (value if isinstance(value, list) else [value])]
    return [each for each in flat if each is not None]


def run(operator: str, name: str, arguments: Any) -> list[Optional[Tensor]]:
    """Results and gradients of a call on backend ``name``."""
    return with_gradients(operator, OPERATORS[operator].run(name, arguments), arguments)


def with_gradients(operator: str, results: Iterable[Optional[Tensor]], arguments: Any) -> list[Optional[Tensor]]:
    """``results``, None for those that the arguments do not produce, then their `gradients`."""
    results = [*map(_present, results)]
    return [*results, *gradients(present(results), leaves(operator, arguments))]


def present(results: Iterable[Optional[Tensor]]) -> list[Tensor]:
    """The results that the arguments produce."""
    return [each for each in map(_present, results) if each is not None]


def _present(result: Optional[Tensor]) -> Optional[Tensor]:
    return None if result is None or result.shape == (0,) else result


def gradients(results: list[Tensor], of: list[Tensor]) -> list[Optional[Tensor]]:
    """Gradients of a random projection, the same in every dtype, of all ``results`` that can be differentiated."""
    generator = torch.Generator().manual_seed(7)
    differentiable = [each for each in results if each.requires_grad]
    directions = [torch.randn(each.shape, generator=generator).bfloat16().to(each) for each in differentiable]
    for result, direction in zip(differentiable, directions):
        direction.masked_fill_(result.detach().isinf(), 0.0)
    return list(torch.autograd.grad(differentiable, of, directions, allow_unused=True))


def cases() -> Iterator[Case]:
    """The cases of every operator."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    seed = torch.tensor(3)
    index = torch.tensor([8, 0, 3, 1, 2, 7])
    mask, padding = torch.tensor([1, 0, 0, 1, 0, 0]).bool(), torch.tensor([0, 0, 1, 1, 0, 0]).bool()
    for p, name in ((0.0, "plain"), (0.3, "dropout")):
        given = p, seed if p else None
        yield Case("bias_gelu_dropout", name, bias_gelu_dropout.Arguments(randn(6, 5), randn(5), *given))
        yield Case("bias_gelu_dropout", f"{name}, no bias", bias_gelu_dropout.Arguments(randn(6, 5), None, *given))
        make = bias_dropout_residual.Arguments
        yield Case("bias_dropout_residual", name, make(randn(6, 5), randn(5), randn(6, 5), None, *given))
        yield Case("bias_dropout_residual", f"{name}, index", make(randn(6, 5), None, randn(9, 5), index, *given))
        yield Case("bias_dropout_residual", f"{name}, no residual", make(randn(6, 5), randn(5), None, None, *given))
        yield Case("bias_dropout_residual", f"{name}, x alone", make(randn(6, 5), None, None, None, *given))
        make = mask_fill.Arguments
        yield Case("mask_fill", name, make(randn(6, 5), None, randn(5), mask, None, *given))
        yield Case("mask_fill", f"{name}, padding", make(randn(6, 5), randn(5), randn(5), mask, padding, *given))
        make, settings = residual_layer_norm.Arguments, (p, p, given[1], 1e-5, torch.float64)
        vectors, rows = (randn(5), randn(5)), randn(6, 5)
        yield Case(
            "residual_layer_norm", f"{name}, alone", make(rows, *vectors, None, None, None, *settings, False, None)
        )
        plain = make(rows, *vectors, randn(6, 5), None, None, *settings, False, None)
        full = make(randn(9, 5), *vectors, randn(6, 5), randn(5), index, *settings, True, None)
        for each, its in ((plain, name), (full, f"{name}, index")):
            yield Case("residual_layer_norm", its, each)
            yield Case("residual_layer_norm", f"{its}, copy", each._replace(narrow=torch.float32))
        offsets, keys = torch.tensor([0, 10, 10, 17]), torch.tensor([4, 0, 7])
        make = masked_attention.Arguments
        yield Case("masked_attention", name, make(randn(19, 3, 2, 8), offsets, None, 10, *given))
        yield Case(
            "masked_attention", f"{name}, keys", make(randn(19, 3, 2, 8), offsets, keys, 12, *given, randn(3, 2, 8))
        )
        queries = None, torch.tensor([1, 2, 9, 16, 18]), torch.tensor([0, 3, 3, 4])
        its = make(randn(19, 3, 2, 8), offsets, keys, 12, *given, randn(3, 2, 8), *queries)
        yield Case("masked_attention", f"{name}, queries", its)
    labels = torch.tensor([3, 0, 1, 1, 2, 0])
    embeddings = randn(4, 8)[[0, 1, 2, 1]]  # two are equal
    yield Case("cosine_logits", "plain", cosine_logits.Arguments(randn(6, 8), embeddings, labels))
    make = cosine_cross_entropy.Arguments
    yield Case("cosine_cross_entropy", "plain", make(randn(6, 8), embeddings, labels, None))
    yield Case("cosine_cross_entropy", "index", make(randn(6, 8), embeddings, labels, torch.tensor([4, 1, 5])))
    tensors = randn(11, 8), randn(16, 8), randn(16), randn(8, 16)
    yield Case("feed_forward", "plain", feed_forward.Arguments(*tensors, 0.0, None, torch.float64))
    make, tensors = positional_conv.Arguments, (randn(11, 8), randn(8, 4, 3), randn(8))
    offsets = torch.tensor([0, 4, 9])
    yield Case("positional_conv", "plain", make(*tensors, None, offsets, 2, 5))
    yield Case("positional_conv", "gain", make(*tensors, randn(1, 1, 3), offsets, 2, 6))
    for norm, bias in (("group_norm", False), ("layer_norm", True)):
        layers = ((64, 10, 5), (64, 3, 2), (64, 2, 2))
        widths = [1, *(channels for channels, _, _ in layers)]
        weights = [0.3 * randn(out, into, taps) for into, (out, taps, _) in zip(widths, layers)]
        norms = 1 if norm == "group_norm" else len(layers)
        groups = [randn(64) for _ in layers] if bias else [], *([randn(64) for _ in range(norms)] for _ in range(2))
        strides = [stride for _, _, stride in layers]
        for valid, name in ((None, norm), (torch.tensor([333, 200]), f"{norm}, valid samples")):
            arguments = conv_frontend.Arguments(randn(2, 333), weights, *groups, strides, norm, valid, torch.float64)
            yield Case("conv_frontend", name, arguments)


def backends(device: torch.device, *, interpreted: bool) -> Iterator[tuple[Case, str]]:
    """Every case with every backend that runs it here on code of its own; `feed_forward` on the twin of its kernels."""
    here = {"triton": interpreted or device.type == "cuda", "cuda": device.type == "cuda", "cpu": device.type == "cpu"}
    for case in cases():
        entry = backend._operators[case.operator]
        for name in entry.implementations:
            is_there = here.get(name, True) and entry.why_unavailable(name) is None
            if case.operator == "feed_forward":
                is_there = name == "cuda"
            composed = name == "torch" and case.operator == "masked_attention" and device.type == "cuda"
            if name != "reference" and is_there and not composed:
                yield case, name
