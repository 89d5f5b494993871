"""16-bit copies of weights in a graphed step: whoever writes a weight, the next update reads it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from hubert_fast import GraphedStep
from hubert_fast.models import plain
from hubert_fast.models.stages import encoder_stages, in_place_of, leaves_of
from hubert_fast.models.weight_copies import WeightCopies
from hubert_fast.switches import Switches, switched
from hubert_fast.weights import Lent, in_dtype
from tests.models.test_graphed_step import RANDOM, ROOM, adamw, as_on_a_gpu, assert_equal, build, data, train_both  # noqa: F401


def _output_projection(objective: nn.Module) -> nn.Linear:
    return objective.model.wav2vec2.encoder.transformer.layers[1].attention.out_proj


def _edit_in_place(update: int, objective: nn.Module, _: Any) -> None:
    with torch.no_grad():
        _output_projection(objective).weight.mul_(1.0 + 0.1 * update)


def _load_state_dict(update: int, objective: nn.Module, _: Any) -> None:
    objective.load_state_dict({name: each * 1.01 for name, each in objective.state_dict().items()})


def _swap_in_an_average(update: int, objective: nn.Module, _: Any) -> None:
    for each in objective.parameters():
        each.data = 0.9 * each.data


def _merge_an_adapter(update: int, objective: nn.Module, _: Any) -> None:
    generator = torch.Generator().manual_seed(update)
    weight = _output_projection(objective).weight
    up, down = (torch.randn(size, generator=generator) for size in ((len(weight), 2), (2, weight.shape[1])))
    weight.data += 0.01 * up @ down


WRITERS = [_edit_in_place, _load_state_dict, _swap_in_an_average, _merge_an_adapter]


@pytest.mark.parametrize("capture", [False, True], ids=["as-it-runs", "captured"])
@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__.strip("_"))
def test_what_is_written_into_weights_between_updates_is_seen(writer, capture):
    theirs, ours, _ = train_both(4, 1, capture=capture, autocast=True, before=writer, **RANDOM)
    assert_equal(theirs, ours)


def test_a_weight_that_is_transposed_where_it_lies_is_seen():
    objective, gradients = build(), []
    before = GraphedStep(objective, adamw(objective), capacities=ROOM, autocast=torch.bfloat16)
    weight = _output_projection(objective).weight
    weight.data = weight.data.t()
    for step in (before, GraphedStep(objective, adamw(objective), capacities=ROOM, autocast=torch.bfloat16)):
        torch.manual_seed(0)
        step.gradients([step.planner(*data(0))])
        gradients.append([each.grad.clone() for each in objective.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("capture", [False, True], ids=["as-it-runs", "captured"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_float32_stream_with_its_narrow_copy_equals_that_of_a_loop_to_the_bit(monkeypatch, accumulate, capture):
    """CUDA's autocast has such streams; on a CPU it takes a patch. LayerDrop leaves out the last layer too."""
    monkeypatch.setattr(plain, "stream_dtype", lambda x: torch.float32)
    theirs, ours, _ = train_both(12, accumulate, capture=capture, autocast=True, **RANDOM)
    assert_equal(theirs, ours)


# Whose stream has no copy, before or after some layer: that layer takes or gives a tensor.
HOOKED = {
    "layer": lambda transformer: transformer.layers[1],
    "attention": lambda transformer: transformer.layers[1].attention,
    "dropout of the input": lambda transformer: transformer.dropout,
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", HOOKED)
def test_layer_drop_of_a_stream_whose_copy_not_all_layers_read_equals_that_of_a_loop_to_the_bit(
    monkeypatch, name, accumulate
):
    def hook(objective: nn.Module) -> None:
        HOOKED[name](objective.model.wav2vec2.encoder.transformer).register_forward_hook(lambda *_: None)

    monkeypatch.setattr(plain, "stream_dtype", lambda x: torch.float32)
    settings = {"capture": True, "autocast": True, "prepare": hook, "encoder_layer_drop": 0.5}
    theirs, ours, _ = train_both(12, accumulate, **settings)
    assert_equal(theirs, ours)


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(Switches)])
def test_a_switch_turns_off_no_more_than_rounding(monkeypatch, name):
    monkeypatch.setattr(plain, "stream_dtype", lambda x: torch.float32)
    _, on, _ = train_both(4, 1, autocast=True, **RANDOM)
    with switched(**{name: False}):
        theirs, off, _ = train_both(4, 1, autocast=True, **RANDOM)
    assert_equal(theirs, off)
    on, off = (torch.cat([each.flatten() for each in state.values()]) for state in (on, off))
    assert (on - off).norm() <= 1e-3 * off.norm()


def test_queries_keys_and_values_are_one_matrix_without_a_copy():
    objective = build()
    stages = [stage.owned for stage in encoder_stages(objective)]
    copies = WeightCopies(stages, torch.bfloat16)
    copies.refresh()
    attention = objective.model.wav2vec2.encoder.transformer.layers[0].attention
    with in_place_of(stages[1], leaves_of(stages[1], [Lent(each) for each in copies.of(1)])):
        for name in ("weight", "bias"):
            three = [getattr(each, name) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
            whole = in_dtype(three, torch.bfloat16)
            assert whole.data_ptr() == in_dtype(three[:1], torch.bfloat16).data_ptr()
            assert torch.equal(whole, torch.cat([each.detach() for each in three]).bfloat16())
