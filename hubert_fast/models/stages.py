"""The packed part of a training step as stages: what comes before the layers, each layer, the head.

A stage is a function of the rows of the one before it, of the plan and of seeds, and has parameters of its own. So each can be
captured, differentiated, left out and reduced over ranks by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from hubert_fast.models.encoder import Seeds
from hubert_fast.models.hubert import HeadInput
from hubert_fast.models.objective import FrameLosses, PretrainingObjective
from hubert_fast.models.plan import StepPlan


class Owned(NamedTuple):
    """A parameter and where it is found: in several modules, where they share it."""

    parameter: nn.Parameter
    places: list[tuple[nn.Module, str]]

    def put(self, parameter: nn.Parameter) -> None:
        """Let the modules have ``parameter`` there."""
        for module, name in self.places:
            module._parameters[name] = parameter


class Stage(NamedTuple):
    """A part of the encoder on rows."""

    name: str
    owned: list[Owned]  # parameters that are trained
    run: Callable[[Tensor, StepPlan, Seeds], Tensor]  # rows -> rows
    keeps: bool = False  # whether it leaves the rows that the plan keeps
    skippable: bool = False  # by LayerDrop


def encoder_stages(objective: PretrainingObjective) -> list[Stage]:
    """The stages before the head, in order; the first is given packed features of the front end."""
    model = objective.model
    encoder, masks = model.wav2vec2.encoder, model.mask_generator
    transformer = encoder.transformer

    def embed(x: Tensor, plan: StepPlan, seeds: Seeds) -> Tensor:
        x = encoder.masked_rows(x, plan, masks, seeds.projection)
        return transformer.embed(x, plan.layout, seeds.embedding)

    def layer(i: int, last: bool) -> Callable[[Tensor, StepPlan, Seeds], Tensor]:
        def run(x: Tensor, plan: StepPlan, seeds: Seeds) -> Tensor:
            keep = plan.keep if last else None
            if seeds.layers is None:
                return transformer.layers[i](x, plan.layout, keep)
            return transformer.layers[i](x, plan.layout, keep, seeds.layers[i])

        return run

    before = [encoder.feature_projection, masks, transformer.pos_conv_embed]
    if transformer.layer_norm_first:
        before.append(transformer.layer_norm)
    stages = [Stage("input", _owned(before), embed)]
    skippable, last = transformer.layer_drop > 0.0, len(transformer.layers) - 1
    for i, module in enumerate(transformer.layers):
        stages.append(Stage(f"layer {i}", _owned([module]), layer(i, i == last), i == last, skippable))
    return stages


def head_parameters(objective: PretrainingObjective) -> list[Owned]:
    """Parameters of what follows the layers."""
    transformer = objective.model.wav2vec2.encoder.transformer
    norm = [] if transformer.layer_norm_first else [transformer.layer_norm]
    return _owned([*norm, objective.model.logit_generator])


def head_losses(objective: PretrainingObjective, x: Tensor, plan: StepPlan) -> FrameLosses:
    """The sums over the frames, given the rows after the last layer."""
    hidden = objective.model.wav2vec2.encoder.transformer.finish(x)
    return objective.frame_losses(HeadInput(hidden, plan.labels, plan.masked, plan.unmasked))


def front_end_parameters(objective: PretrainingObjective) -> list[Owned]:
    """Parameters of the convolutions."""
    return _owned([objective.model.wav2vec2.feature_extractor])


def skipped(x: Tensor, plan: StepPlan, keeps: bool) -> Tensor:
    """The rows after a stage that LayerDrop leaves out."""
    return x.index_select(0, plan.keep) if keeps and plan.keep is not None else x


def skipped_gradient(gradient: Tensor, plan: StepPlan, keeps: bool) -> Tensor:
    """The gradient before such a stage, given that after it."""
    if not keeps or plan.keep is None:
        return gradient
    return gradient.new_zeros(len(plan.mask), gradient.shape[1]).index_copy_(0, plan.keep, gradient)


@contextmanager
def in_place_of(owned: Sequence[Owned]) -> Iterator[list[nn.Parameter]]:
    """Inside it the modules have leaves of their own on the memory of their parameters, in this order.

    Nothing that hangs on the parameters, such as hooks or a stream of an earlier backward, then takes part in a capture.
    """
    leaves = [nn.Parameter(each.parameter.detach()) for each in owned]
    for each, leaf in zip(owned, leaves):
        each.put(leaf)
    try:
        yield leaves
    finally:
        for each in owned:
            each.put(each.parameter)


def _owned(modules: Iterable[nn.Module]) -> list[Owned]:
    """The trained parameters below ``modules``, each once, in order."""
    found: dict[nn.Parameter, Owned] = {}
    for top in modules:
        for module in top.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    found.setdefault(parameter, Owned(parameter, [])).places.append((module, name))
    return list(found.values())
