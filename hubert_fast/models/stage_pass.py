"""One way through the stages of a step, forward and backward, in pieces that can be captured one by one or together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from hubert_fast.models.encoder import Seeds
from hubert_fast.models.gradient_buffers import GradientBuffers
from hubert_fast.models.objective import FrameLosses, PretrainingObjective
from hubert_fast.models.plan import StepPlan
from hubert_fast.models.stages import Owned, Stage, head_losses, in_place_of, skipped, skipped_gradient

Work = Callable[[], None]


class Piece(NamedTuple):
    """A part of a pass."""

    run: Work
    skip: Optional[Work] = None  # in its stead where LayerDrop leaves the stage out
    stage: Optional[int] = None  # the stage that LayerDrop may leave out
    # Stages whose gradients of this micro-batch are there after it; the head is one past the last.
    complete: Sequence[int] = ()


class PassTensors(NamedTuple):
    """Memory that outlasts a pass: what it reads and writes."""

    plan: StepPlan
    rows: Tensor  # [rows, features]: packed features
    rows_gradient: Optional[Tensor]  # [rows, features]; None: nobody wants it
    seeds: Seeds
    scale: Tensor  # [] float64: gradient of the loss
    sums: Tensor  # [6] float64: `FrameLosses` are added to it


class StagePass:
    """Forward, loss and backward of one micro-batch.

    Each stage is differentiated by itself: its input is a leaf. Where both a piece and what stands in its stead are
    captured, the latter writes to the memory of the former.

    Args:
        objective: whose stages these are.
        stages: those before the head.
        head: parameters of the head.
        tensors: memory of the pass.
        gradients: where gradients of parameters go.
        overwrite: whether gradients are written there, or added.
        autocast: makes the context of each forward.
    """

    def __init__(
        self,
        objective: PretrainingObjective,
        stages: Sequence[Stage],
        head: Sequence[Owned],
        tensors: PassTensors,
        gradients: GradientBuffers,
        *,
        overwrite: bool,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._objective, self._stages, self._head = objective, stages, head
        self._tensors, self._gradients, self._overwrite, self._autocast = tensors, gradients, overwrite, autocast
        self._value = tensors.rows
        # Whether anything before each stage, and before the head, is trained.
        self._wanted = [tensors.rows_gradient is not None]
        for stage in stages:
            self._wanted.append(self._wanted[-1] or bool(stage.owned))
        self._inputs: list[Optional[Tensor]] = [None] * len(stages)
        self._outputs: list[Optional[Tensor]] = [None] * len(stages)
        self._leaves: list[Sequence[Tensor]] = [()] * len(stages)
        # Gradients of the output and of the input of the stage that was differentiated last.
        self._differentiated = len(stages)
        self._given: Optional[Tensor] = None
        self._gradient: Optional[Tensor] = None

    def pieces(self) -> Iterator[Piece]:
        """The pieces in order. A later one needs that those before it have run."""
        stages = range(len(self._stages))
        for i in stages:
            yield self._piece(self._forward, self._skip_forward, i)
        yield Piece(self._loss, complete=[len(self._stages)])
        for i in reversed(stages):
            yield self._piece(self._backward, self._skip_backward, i)._replace(complete=[i])

    def _piece(self, run: Callable[[int], None], skip: Callable[[int], None], i: int) -> Piece:
        if not self._stages[i].skippable:
            return Piece(lambda: run(i))
        return Piece(lambda: run(i), lambda: skip(i), i)

    @contextmanager
    def _forward_of(self, owned: Sequence[Owned]) -> Iterator[Sequence[Tensor]]:
        with in_place_of(owned) as leaves, torch.enable_grad(), self._autocast():
            yield leaves

    def _forward(self, i: int) -> None:
        stage, tensors = self._stages[i], self._tensors
        x = self._value.detach()
        x.requires_grad_(self._wanted[i])
        with self._forward_of(stage.owned) as leaves:
            self._outputs[i] = stage.run(x, tensors.plan, tensors.seeds)
        self._inputs[i], self._leaves[i] = x, leaves
        self._value = self._outputs[i].detach()

    def _skip_forward(self, i: int) -> None:
        keeps, output = self._stages[i].keeps, self._outputs[i]
        if output is None:
            self._value = skipped(self._value, self._tensors.plan, keeps)
        else:  # `data`, because autograd is not to see that what it keeps may be replaced
            output.data.copy_(skipped(self._inputs[i].detach(), self._tensors.plan, keeps))

    def _loss(self) -> None:
        x = self._value.detach().requires_grad_(self._wanted[-1])
        objective, tensors = self._objective, self._tensors
        with self._forward_of(self._head) as leaves:
            losses = head_losses(objective, x, tensors.plan)
            weighted = (
                (objective.masked_weight, losses.masked_loss),
                (objective.unmasked_weight, losses.unmasked_loss),
            )
            loss = sum(weight * part for weight, part in weighted if part is not None)
        self._gradient, found = _differentiate(loss, x, leaves, tensors.scale.to(loss.dtype))
        self._gradients.collect(len(self._stages), found, overwrite=self._overwrite)
        tensors.sums.add_(_in_float64(losses))

    def _backward(self, i: int) -> None:
        x, leaves = self._inputs[i], self._leaves[i]
        gradient, found = _differentiate(self._outputs[i], x, leaves, self._gradient)
        self._differentiated, self._given, self._gradient = i, self._gradient, gradient
        self._gradients.collect(i, found, overwrite=self._overwrite)
        self._inputs[i] = self._outputs[i] = None
        if i == 0 and x.requires_grad:
            self._tensors.rows_gradient.copy_(self._gradient)

    def _skip_backward(self, i: int) -> None:
        plan, keeps = self._tensors.plan, self._stages[i].keeps
        if self._gradient is None:
            return
        if self._differentiated == i:
            self._gradient.copy_(skipped_gradient(self._given, plan, keeps))
        else:
            self._gradient = skipped_gradient(self._gradient, plan, keeps)


def _differentiate(
    output: Tensor, x: Tensor, leaves: Sequence[Tensor], gradient: Optional[Tensor]
) -> tuple[Optional[Tensor], Sequence[Optional[Tensor]]]:
    """Gradients of ``x``, None where nobody wants it, and of ``leaves``, given that of ``output``."""
    if not output.requires_grad:
        return None, [None] * len(leaves)
    wanted = [x, *leaves] if x.requires_grad else leaves
    found = torch.autograd.grad(output, wanted, gradient, allow_unused=True)
    return (found[0], found[1:]) if x.requires_grad else (None, found)


def _in_float64(losses: FrameLosses) -> Tensor:
    """[6] float64, 0 where there is none."""
    zero = losses.masked_count.new_zeros((), dtype=torch.float64)
    return torch.stack([zero if each is None else each.detach().double() for each in losses])
