"""Gradients of the parameters of stages, at fixed places: a graph writes them there, ranks reduce them stage by stage."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Optional

import torch
from torch import Tensor, nn

from hubert_fast.models.flat_memory import flat_memory, views_of
from hubert_fast.switches import switches


class GradientBuffers:
    """Memory for the gradients of ``stages``, lists of parameters, each in one of them.

    Raises:
        ValueError: for a parameter that is in two, or one whose dtype is not that of the others of its stage.
    """

    def __init__(self, stages: Sequence[Sequence[nn.Parameter]]) -> None:
        self._parameters = [list(each) for each in stages]
        every = [parameter for stage in stages for parameter in stage]
        if len(set(every)) < len(every):
            raise ValueError("objective has a parameter that two of its stages share: a graphed step cannot train it")
        self.flat = [_flat(stage) for stage in stages]  # one a stage
        self._views = [list(views_of(flat, stage)) for stage, flat in zip(stages, self.flat)]
        # Whether a gradient was ever there: none comes for a parameter that takes no part.
        self.used = [[False] * len(stage) for stage in stages]

    def collect(self, stage: int, gradients: Sequence[Optional[Tensor]], *, overwrite: bool) -> None:
        """Write or add the gradients of a stage; None stands for 0."""
        used, views = self.used[stage], self._views[stage]
        mine, theirs = [], []
        for place, (view, gradient) in enumerate(zip(views, gradients)):
            if gradient is not None:
                used[place] = True
                if gradient.data_ptr() != view.data_ptr():  # a product may have written it here (`lent`)
                    mine.append(view)
                    theirs.append(gradient)
            elif overwrite:  # another process may have left a sum there
                view.zero_()
        if mine:
            (torch._foreach_copy_ if overwrite else torch._foreach_add_)(mine, theirs)

    def lent(self, stage: int) -> list[Optional[Tensor]]:
        """Memory that a product may write the gradient of each parameter of a stage to; None: `collect` alone writes it."""
        return list(self._views[stage]) if switches.wide_weight_gradients else [None] * len(self._views[stage])

    def zero(self, stages: Collection[int]) -> None:
        """Set the gradients of ``stages`` to 0."""
        buffers = [self.flat[stage] for stage in stages if self.flat[stage].numel()]
        if buffers:
            torch._foreach_zero_(buffers)

    def give(self, stages: Collection[int]) -> None:
        """Make the gradients of ``stages`` those of their parameters; those of other stages have none."""
        for i, (parameters, views, used) in enumerate(zip(self._parameters, self._views, self.used)):
            for parameter, view, was_used in zip(parameters, views, used):
                parameter.grad = view if was_used and i in stages else None


def _flat(stage: Sequence[nn.Parameter]) -> Tensor:
    dtypes = {parameter.dtype for parameter in stage}
    if len(dtypes) > 1:
        raise ValueError(f"parameters of one stage must have one dtype; got {sorted(map(str, dtypes))}")
    return flat_memory(stage)
