"""An operator as `torch.library` knows it: for whoever must see one operator instead of what it does (`operator`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, List, Optional, Tuple

import torch
from torch import Tensor

from hubert_fast.ops import flop_formulas
from hubert_fast.ops.record import tensors_of

if TYPE_CHECKING:
    from hubert_fast.ops.operator import Operator


def register(operator: Operator) -> tuple[Callable[..., tuple[Any, ...]], Callable[..., list[Any]]]:
    """Define ``hubert_fast::<name>`` and ``hubert_fast::<name>_backward``.

    Returns:
        the former. It takes the record's fields, whether to save what the backward needs, and the backend; it returns the
        results and, last, the list of what was saved. An absent result is an empty tensor;
        the latter, behind the signature of `Operator.backward`.
    """
    types, layout = operator.layout.types, operator.layout

    def forward(*given: Any) -> tuple[Any, ...]:
        *fields, save, chosen = given
        arguments = layout.record._make(fields)
        results, saved = operator.forward(chosen, arguments, save)
        return *_present(results, arguments), saved

    def fake(*given: Any) -> tuple[Any, ...]:
        *fields, save, chosen = given
        arguments = layout.record._make(fields)
        like = arguments[0]
        saved_tensors = getattr(operator.implementation(chosen), "saved_tensors", lambda arguments: [])
        saved = [like.new_empty(shape, dtype=dtype) for shape, dtype in saved_tensors(arguments)] if save else []
        return *_present(operator.fake(arguments, save), arguments), saved

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *fields, _, chosen = inputs
        *results, saved = output
        # As an eager call keeps them: activation checkpointing compares the two where a mode is on in one of its runs alone.
        results = [None if each.shape == (0,) else each for each in results]
        operator.keep(ctx, chosen, layout.record._make(fields), results, saved)

    def gradients(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        given = list(upstream[:-1])  # of the results, not of what was saved
        placed: list[Any] = [None] * (len(types) + 2)
        if all(each is None for each in given):
            return tuple(placed)
        arguments, saved = layout.kept(ctx)
        found = call_backward(ctx.chosen, arguments, saved, given, layout.wanted(ctx.needs_input_grad))
        for place, gradient in zip(layout.places, found):
            placed[place] = gradient
        return tuple(placed)

    def call_backward(
        chosen: str, arguments: Any, saved: Sequence[Optional[Tensor]], given: Sequence[Any], wanted: list[bool]
    ) -> list[Any]:
        asked, one = list(wanted), operator.one_gradient(arguments)
        if one is not None:
            first, second = (layout.gradients.index(each) for each in one)
            asked[first], asked[second] = wanted[first] or wanted[second], False
        flat = iter(backward(*arguments, _present(saved, arguments), list(given), asked, chosen))
        found: list[Any] = [None] * len(asked)
        for i, (place, is_asked) in enumerate(zip(layout.places, asked)):
            if is_asked:
                found[i] = [next(flat) for _ in arguments[place]] if place in layout.lists else next(flat)
        if one is not None:
            found[second] = found[first]
        return found

    def run_backward(*given: Any) -> list[Tensor]:
        *fields, saved, upstream, asked, chosen = given
        found = operator.backward(chosen, layout.record._make(fields), saved, tuple(upstream), asked)
        found = list(tensors_of(each for each, is_asked in zip(found, asked) if is_asked))
        # A gradient that is passed on as it is: what a registered operator returns may not be one of its arguments.
        return [
            each.clone() if any(each is other for other in (*upstream, *found[:i])) else each
            for i, each in enumerate(found)
        ]

    def fake_backward(*given: Any) -> list[Tensor]:
        *fields, _, _, asked, _ = given
        of = tensors_of(fields[place] for place, is_asked in zip(layout.places, asked) if is_asked)
        return [each.new_empty(each.shape) for each in of]

    returns = Tuple[(*[Tensor] * len(operator.results), List[Tensor])]
    registered = _define(operator.title, forward, {**types, "save": bool, "chosen": str}, returns, fake)
    registered.register_autograd(gradients, setup_context=set_up)
    fields = {name: Optional[Tensor] if each is Tensor else each for name, each in types.items()}
    more = {"saved": List[Tensor], "upstream": List[Optional[Tensor]], "asked": List[bool], "chosen": str}
    backward = _define(operator.backward_title, run_backward, {**fields, **more}, List[Tensor], fake_backward)
    if operator.flops is not None:
        size = len(types)
        for name, is_backward in ((operator.name, False), (f"{operator.name}_backward", True)):

            def count(*given: Any, is_backward: bool = is_backward, **others: Any) -> int:
                return operator.flops(layout.record._make(given[:size]), is_backward)

            flop_formulas.add(getattr(torch.ops.hubert_fast, name), count)
    return registered, call_backward


def _present(tensors: Sequence[Optional[Tensor]], arguments: tuple[Any, ...]) -> list[Tensor]:
    return [arguments[0].new_empty(0) if each is None else each for each in tensors]


def _define(title: str, function: Callable, parameters: dict[str, Any], returns: Any, fake: Callable) -> Any:
    """A custom operator that runs ``function`` and takes ``parameters``, a type for each name."""

    def prototype() -> None: ...

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    prototype.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind, annotation=each) for name, each in parameters.items()], return_annotation=returns
    )
    schema = torch.library.infer_schema(prototype, mutates_args=())
    defined = torch.library.custom_op(title, function, mutates_args=(), schema=schema)
    defined.register_fake(fake)
    return defined
