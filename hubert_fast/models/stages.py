"""The packed part of a training step as stages: what comes before the layers, each layer, the head.

A stage is a function of the stream of the one before it, of the plan and of seeds, and has parameters of its own. So each can be
captured, differentiated, left out and reduced over ranks by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from hubert_fast.models.encoder_layer import SelfAttention
from hubert_fast.models.hubert import HeadInput
from hubert_fast.models.objective import FrameLosses, PretrainingObjective
from hubert_fast.models.plain import Stream, wanted_rows
from hubert_fast.models.plan import StepPlan
from hubert_fast.models.transformer import Seeds
from hubert_fast.weights import Lent, lend


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
    run: Callable[[Stream, StepPlan, Seeds], Stream]
    keeps: bool = False  # whether it leaves the rows that the plan keeps
    skippable: bool = False  # by LayerDrop


def encoder_stages(objective: PretrainingObjective) -> list[Stage]:
    """The stages before the head, in order; the first is given packed features of the front end."""
    model = objective.model
    encoder, masks = model.wav2vec2.encoder, model.mask_generator
    transformer = encoder.transformer

    def embed(stream: Stream, plan: StepPlan, seeds: Seeds) -> Stream:
        x = encoder.masked_rows(stream.x, plan.layout, plan.input_mask, masks, seeds.projection)
        return transformer.embed(x, plan.layout, seeds.embedding)

    def layer(i: int, last: bool) -> Callable[[Stream, StepPlan, Seeds], Stream]:
        def run(stream: Stream, plan: StepPlan, seeds: Seeds) -> Stream:
            layout, keep = (plan.kept_layout, plan.keep) if last else (plan.layout, None)
            return transformer.run_layer(transformer.layers[i], stream, layout, keep, seeds.of_layer(i))

        return run

    before = [encoder.feature_projection, masks, transformer.pos_conv_embed]
    if transformer.layer_norm_first:
        before.append(transformer.layer_norm)
    stages = [Stage("input", _owned(before), embed)]
    skippable, last = transformer.layer_drop > 0.0, len(transformer.layers) - 1
    for i, module in enumerate(transformer.layers):
        stages.append(Stage(f"layer {i}", _owned_by_layer(module), layer(i, i == last), i == last, skippable))
    return stages


def seeds_of_pass(objective: PretrainingObjective, seeds: Seeds, plan: StepPlan) -> Seeds:
    """``seeds`` with the columns of all layers' attention masks, made once a pass."""
    return objective.model.wav2vec2.encoder.transformer.with_columns(seeds, plan.layout)


def head_parameters(objective: PretrainingObjective) -> list[Owned]:
    """Parameters of what follows the layers."""
    transformer = objective.model.wav2vec2.encoder.transformer
    norm = [] if transformer.layer_norm_first else [transformer.layer_norm]
    return _owned([*norm, objective.model.logit_generator])


def head_losses(objective: PretrainingObjective, stream: Stream, plan: StepPlan) -> FrameLosses:
    """The sums over the frames, given the stream after the last layer."""
    hidden = objective.model.head_rows(objective.model.wav2vec2.encoder.transformer.finish(stream))
    return objective.frame_losses(HeadInput(hidden, plan.labels, plan.masked, plan.unmasked))


def front_end_parameters(objective: PretrainingObjective) -> list[Owned]:
    """Parameters of the convolutions."""
    return _owned([objective.model.wav2vec2.feature_extractor])


def skipped(stream: Stream, plan: StepPlan, keeps: bool) -> Stream:
    """The stream after a stage that LayerDrop leaves out."""
    return wanted_rows(stream, plan.keep if keeps else None)


def skipped_gradient(gradient: Stream, plan: StepPlan, keeps: bool) -> Stream:
    """The gradient before such a stage, given that after it."""
    if not keeps or plan.keep is None:
        return gradient
    return Stream(*(None if each is None else _scattered(each, plan.keep, len(plan.mask)) for each in gradient))


def _scattered(gradient: Tensor, keep: Tensor, rows: int) -> Tensor:
    return gradient.new_zeros(rows, gradient.shape[1]).index_copy_(0, keep, gradient)


def leaves_of(owned: Sequence[Owned], lent: Sequence[Lent]) -> list[nn.Parameter]:
    """Leaves on the memory of the parameters, in this order, each with its part of ``lent``.

    Nothing that hangs on the parameters, such as hooks or a stream of an earlier backward, takes part in a capture of theirs.
    """
    leaves = [nn.Parameter(each.parameter.detach()) for each in owned]
    for leaf, memory in zip(leaves, lent):
        lend(leaf, memory)
    return leaves


@contextmanager
def in_place_of(owned: Sequence[Owned], leaves: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside it the modules have ``leaves`` where their parameters are."""
    for each, leaf in zip(owned, leaves):
        each.put(leaf)
    try:
        yield
    finally:
        for each in owned:
            each.put(each.parameter)


def _owned_by_layer(layer: nn.Module) -> list[Owned]:
    """The trained parameters of a layer, those of queries, keys and values one after another: they are one product's."""
    owned = _owned([layer])
    attention = getattr(layer, "attention", None)
    if not isinstance(attention, SelfAttention):
        return owned
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    first = [each._parameters.get(name) for name in ("weight", "bias") for each in projections]
    places = {id(parameter): place for place, parameter in enumerate(first)}
    return sorted(owned, key=lambda each: places.get(id(each.parameter), len(first)))


def _owned(modules: Iterable[nn.Module]) -> list[Owned]:
    """The trained parameters below ``modules``, each once, in order."""
    found: dict[nn.Parameter, Owned] = {}
    for top in modules:
        for module in top.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    found.setdefault(parameter, Owned(parameter, [])).places.append((module, name))
    return list(found.values())
