"""One way through the stages of a step, forward and backward, in pieces that can be captured one by one or together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from hubert_fast.models.gradient_buffers import GradientBuffers
from hubert_fast.models.objective import FrameLosses, PretrainingObjective
from hubert_fast.models.plain import Stream
from hubert_fast.models.plan import StepPlan
from hubert_fast.models.stages import (
    Owned,
    Stage,
    head_losses,
    in_place_of,
    leaves_of,
    seeds_of_pass,
    skipped,
    skipped_gradient,
)
from hubert_fast.models.transformer import Seeds
from hubert_fast.models.weight_copies import WeightCopies
from hubert_fast.weights import Lent

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
        copies: of weights in the dtype of the products.
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
        copies: WeightCopies,
        *,
        overwrite: bool,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._objective, self._stages, self._head = objective, stages, head
        self._tensors, self._gradients, self._copies = tensors, gradients, copies
        self._overwrite, self._autocast = overwrite, autocast
        self._value, self._seeds = Stream(tensors.rows), tensors.seeds
        # Whether anything before each stage, and before the head, is trained.
        self._wanted = [tensors.rows_gradient is not None]
        for stage in stages:
            self._wanted.append(self._wanted[-1] or bool(stage.owned))
        self._inputs: list[Optional[Stream]] = [None] * len(stages)
        self._outputs: list[Optional[Stream]] = [None] * len(stages)
        self._leaves: list[Sequence[Tensor]] = [()] * len(stages)
        # Gradients of the output and of the input of the stage that was differentiated last.
        self._differentiated = len(stages)
        self._given = self._gradient = Stream(None)

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
    def _forward_of(self, stage: int, owned: Sequence[Owned]) -> Iterator[Sequence[Tensor]]:
        gradients = self._gradients.lent(stage) if self._overwrite else [None] * len(owned)
        leaves = leaves_of(owned, [Lent(*each) for each in zip(self._copies.of(stage), gradients)])
        with in_place_of(owned, leaves), torch.enable_grad(), self._autocast():
            yield leaves

    def _forward(self, i: int) -> None:
        stage, tensors = self._stages[i], self._tensors
        if i == 0:
            self._seeds = seeds_of_pass(self._objective, tensors.seeds, tensors.plan)
        stream = _leaves(self._value, self._wanted[i])
        with self._forward_of(i, stage.owned) as leaves:
            self._outputs[i] = stage.run(stream, tensors.plan, self._seeds)
        self._inputs[i], self._leaves[i] = stream, leaves
        self._value = _leaves(self._outputs[i], False)

    def _skip_forward(self, i: int) -> None:
        keeps, output = self._stages[i].keeps, self._outputs[i]
        if output is None:
            self._value = skipped(self._value, self._tensors.plan, keeps)
            return
        given = skipped(_leaves(self._inputs[i], False), self._tensors.plan, keeps)
        for mine, theirs in ((output.x, given.x), (output.narrow, given.operand)):
            if mine is not None:  # `data`, because autograd is not to see that what it keeps may be replaced
                mine.data.copy_(theirs)

    def _loss(self) -> None:
        stream = _leaves(self._value, self._wanted[-1])
        objective, tensors, stage = self._objective, self._tensors, len(self._stages)
        with self._forward_of(stage, self._head) as leaves:
            losses = head_losses(objective, stream, tensors.plan)
            weighted = (
                (objective.masked_weight, losses.masked_loss),
                (objective.unmasked_weight, losses.unmasked_loss),
            )
            loss = sum(weight * part for weight, part in weighted if part is not None)
        given = Stream(tensors.scale.to(loss.dtype))
        with in_place_of(self._head, leaves):
            self._gradient, found = _differentiate(Stream(loss), stream, leaves, given)
        self._gradients.collect(stage, found, overwrite=self._overwrite)
        tensors.sums.add_(_in_float64(losses))

    def _backward(self, i: int) -> None:
        stream, leaves = self._inputs[i], self._leaves[i]
        with in_place_of(self._stages[i].owned, leaves):  # activation checkpointing runs the forward again
            gradient, found = _differentiate(self._outputs[i], stream, leaves, self._gradient)
        self._differentiated, self._given, self._gradient = i, self._gradient, gradient
        self._gradients.collect(i, found, overwrite=self._overwrite)
        self._inputs[i] = self._outputs[i] = None
        if i == 0 and stream.x.requires_grad:
            self._tensors.rows_gradient.copy_(self._gradient.x)

    def _skip_backward(self, i: int) -> None:
        plan, keeps = self._tensors.plan, self._stages[i].keeps
        if self._differentiated != i:
            self._gradient = skipped_gradient(self._gradient, plan, keeps)
            return
        (x, narrow), given = self._gradient, skipped_gradient(self._given, plan, keeps)
        for mine, theirs in ((x, given.x), (narrow, given.narrow)):
            if mine is not None:
                mine.zero_() if theirs is None else mine.copy_(theirs)
        if x is not None and narrow is None and given.narrow is not None:  # the stage makes a copy and is given none
            x.add_(given.narrow)


def _leaves(stream: Stream, wanted: bool) -> Stream:
    """The tensors of a stream without what made them; ``wanted``: with a gradient."""
    return Stream(*(None if each is None else each.detach().requires_grad_(wanted) for each in stream))


def _differentiate(
    outputs: Stream, inputs: Stream, leaves: Sequence[Tensor], gradients: Stream
) -> tuple[Stream, Sequence[Optional[Tensor]]]:
    """Gradients of ``inputs``, None where nobody wants them, and of ``leaves``, given those of ``outputs``.

    An output without a gradient is one that nobody read.
    """
    pairs = [(output, given) for output, given in zip(outputs, gradients) if given is not None and output.requires_grad]
    wanted = [each for each in inputs if each is not None and each.requires_grad]
    if not pairs:
        return Stream(None), [None] * len(leaves)
    differentiated, given = zip(*pairs)
    found = torch.autograd.grad(differentiated, [*wanted, *leaves], given, allow_unused=True)
    return Stream(*found[: len(wanted)] or [None]), found[len(wanted) :]


def _in_float64(losses: FrameLosses) -> Tensor:
    """[6] float64, 0 where there is none."""
    zero = losses.masked_count.new_zeros((), dtype=torch.float64)
    return torch.stack([zero if each is None else each.detach().double() for each in losses])
