"""Weights of products in 16 bits, which a graphed step makes once an update instead of in every forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor, nn

from hubert_fast.models.flat_memory import flat_memory, views_of
from hubert_fast.models.stages import Owned
from hubert_fast.switches import switches


class WeightCopies:
    """Copies of the weights and biases of `nn.Linear` modules in the dtype of their products.

    They are no cache: `refresh` makes them anew from what the parameters hold, whoever wrote it.

    Args:
        stages: parameters of each stage, of which only those in float32 have a copy.
        dtype: of the copies; None: there are none.
    """

    def __init__(self, stages: Sequence[Sequence[Owned]], dtype: Optional[torch.dtype]) -> None:
        dtype = dtype if switches.weight_copies else None
        self._copies: list[list[Optional[Tensor]]] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for owned in stages:
            copied = [dtype is not None and _is_of_product(each) for each in owned]
            parameters = [each.parameter for each, is_copied in zip(owned, copied) if is_copied]
            views = views_of(flat_memory(parameters, dtype), parameters)
            self._copies.append([next(views) if is_copied else None for is_copied in copied])
            self._pairs += [
                (copy, each.parameter.detach()) for copy, each in zip(self._copies[-1], owned) if copy is not None
            ]

    def of(self, stage: int) -> list[Optional[Tensor]]:
        """The copy of each parameter of a stage, None where there is none."""
        return self._copies[stage]

    def refresh(self) -> None:
        """Make the copies equal to the parameters."""
        if self._pairs:
            copies, parameters = zip(*self._pairs)
            with torch.no_grad():
                torch._foreach_copy_(copies, parameters)


def _is_of_product(owned: Owned) -> bool:
    is_linear = all(type(module) is nn.Linear for module, _ in owned.places)
    return is_linear and owned.parameter.dtype == torch.float32
