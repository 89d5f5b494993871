"""An operator's arguments, a NamedTuple, as autograd takes and keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, List, Optional, Tuple, TypeVar, get_type_hints

import torch
from torch import Tensor

Record = TypeVar("Record", bound=Tuple)


class Layout(Generic[Record]):
    """Which fields of a record are tensors, which of them have gradients and which the backward reads.

    Args:
        record: annotated with Tensor, Optional[Tensor], List[Tensor] and the types of settings.
        gradients: names of the fields that have a gradient, in the order of the record.
        kept: names of the tensors that the backward reads. Lists are kept too.
        unread: arguments -> names of ``kept`` that the backward of these does not read.
    """

    def __init__(
        self,
        record: type[Record],
        gradients: Sequence[str],
        kept: Sequence[str],
        unread: Callable[[Record], Sequence[str]],
    ) -> None:
        self.record, self.gradients, self._unread = record, tuple(gradients), unread
        self.types: dict[str, Any] = get_type_hints(record)
        names = list(self.types)
        unknown = {*gradients, *kept} - {*names}
        if unknown:
            raise ValueError(f"gradients and kept must name fields of the record, {names}; got {sorted(unknown)}")
        self.places = [names.index(name) for name in gradients]
        self.lists = [place for place, name in enumerate(names) if self.types[name] == List[Tensor]]
        self._kept = {name: names.index(name) for name in kept}
        self._tensors = [place for place, name in enumerate(names) if self.types[name] in (Tensor, Optional[Tensor])]

    def flat(self, arguments: Record) -> Sequence[Any]:
        """``arguments`` with the tensors of lists behind all others, since autograd looks into no list."""
        if not self.lists:
            return arguments
        head = [len(each) if place in self.lists else each for place, each in enumerate(arguments)]
        return [*head, *(each for place in self.lists for each in arguments[place])]

    def unflat(self, flat: Sequence[Any]) -> Record:
        """The record that `flat` was made of."""
        fields = list(flat[: len(self.types)])
        tail = iter(flat[len(self.types) :])
        for place in self.lists:
            fields[place] = [next(tail) for _ in range(fields[place])]
        return self.record._make(fields)

    def wanted(self, needs: Sequence[bool]) -> list[bool]:
        """Which gradients autograd wants, given ``needs``, a flag for each field. Those of lists are wanted together."""
        return [place in self.lists or needs[place] for place in self.places]

    def flat_gradients(self, ctx: Any, gradients: Sequence[Any]) -> list[Any]:
        """A gradient, or None, for each of `flat`; ``gradients`` are in the order of `gradients`, or none at all."""
        fields: list[Any] = [None] * len(self.types)
        for place, gradient in zip(self.places, gradients):
            fields[place] = gradient
        for place in self.lists:
            fields += fields[place] or [None] * ctx.rest[place]
            fields[place] = None
        return fields

    def keep(self, ctx: Any, arguments: Record, more: Iterable[Optional[Tensor]]) -> None:
        """Put tensors where activation checkpointing and offloading find them, and settings into an attribute of ``ctx``."""
        rest = list(arguments)
        unread, tensors = self._unread(arguments), []
        for name, place in self._kept.items():
            is_read = name not in unread
            tensors.append(rest[place] if is_read else None)
            rest[place] = None if is_read else rest[place]
        for place in self.lists:
            tensors += rest[place]
            rest[place] = len(rest[place])
        for place in self._tensors:
            tensor = rest[place]
            rest[place] = None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)
        ctx.rest = rest
        ctx.save_for_backward(*tensors, *more)

    def kept(self, ctx: Any) -> tuple[Record, list[Tensor]]:
        """The arguments as the backward sees them, and what `keep` was given besides.

        A tensor that is not kept has its shape, dtype and device, and no memory.
        """
        # Activation checkpointing lets `saved_tensors` be asked for once.
        fields, tensors = list(ctx.rest), list(ctx.saved_tensors)
        start = len(self._kept)
        for place in self._tensors:
            if fields[place] is not None:
                shape, dtype, device = fields[place]
                fields[place] = torch.empty((), dtype=dtype, device=device).expand(shape)
        for place, tensor in zip(self._kept.values(), tensors):
            fields[place] = fields[place] if tensor is None else tensor
        for place in self.lists:
            fields[place], start = tensors[start : start + fields[place]], start + fields[place]
        return self.record._make(fields), tensors[start:]


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among ``values``, and in the lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list):
            yield from (each for each in value if isinstance(each, Tensor))
