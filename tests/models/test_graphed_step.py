"""A graphed step gives the weights of a plain training loop."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import pickle
import weakref
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hubert_fast
from hubert_fast import Capacities, GraphedStep, cpu
from hubert_fast.models import encoder_layer
from hubert_fast.ops.masked_attention import masked_attention
from tests.models import configurations
from tests.models.graph_stand_in import replace_capture
from tests.models.twins import num_frames

SAMPLES = 8000  # 24 frames
ROOM = Capacities(rows=64, sequences=3, max_frames=num_frames(SAMPLES))
DROPOUTS = ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout")
RANDOM = {"encoder_layer_drop": 0.5, **{f"encoder_{name}": 0.1 for name in DROPOUTS}}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is arranged as for a GPU: a capture records PyTorch's operations, and a CPU's own products are none."""
    monkeypatch.setattr(cpu, "is_cpu", lambda device: False)


def build(
    unmasked_weight: float = 0.0, dtype: torch.dtype = torch.float32, **changes: Any
) -> hubert_fast.PretrainingObjective:
    torch.manual_seed(0)
    convolutions = [(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2
    small = {"extractor_conv_layer_config": convolutions, "encoder_embed_dim": 64, "encoder_num_layers": 3}
    model = hubert_fast.hubert_pretrain_model(**configurations.base(**{**small, "encoder_num_heads": 2, **changes}))
    return hubert_fast.PretrainingObjective(model.to(dtype).train(), unmasked_weight=unmasked_weight)


def data(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Waveforms, labels and lengths of three rows, the first of them full."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3000, 6500, (3,), generator=generator)
    lengths[0] = SAMPLES
    waveforms = torch.randn(3, SAMPLES, generator=generator).to(dtype)
    labels = torch.randint(0, configurations.NUM_CLASSES, (3, num_frames(SAMPLES)), generator=generator)
    return waveforms, labels, lengths


def adamw(objective: nn.Module) -> torch.optim.Optimizer:
    # A rate that float32 holds, as a graph reads it.
    return torch.optim.AdamW(objective.parameters(), 2**-10, fused=True)


def plain_update(objective, optimizer, batches, plans, *, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """One update by hand; returns the loss and the norm of the gradients."""
    scale = 1 / max(1, sum(int(plan.masked.sum()) for plan in plans))
    total = torch.zeros((), dtype=torch.float64)
    optimizer.zero_grad()
    for (waveforms, _, _), plan in zip(batches, plans):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = objective(waveforms, plan=plan).loss
        (loss * scale).backward()
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
    optimizer.step()
    return total, norm


def train_both(
    updates: int,
    accumulate: int,
    *,
    capture: bool = False,
    capacities: Optional[Capacities] = ROOM,
    same_capacity: bool = True,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    prepare: Callable[[nn.Module], Any] = lambda objective: None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    before: Callable[[int, nn.Module, torch.optim.Optimizer], Any] = lambda *_: None,
    batch: Callable[..., tuple[Tensor, Tensor, Tensor]] = data,
    most_graphs: int = 32,
    **changes: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor], GraphedStep]:
    """The weights after ``updates`` by a plain loop and by a graphed step, on the same batches and random numbers.

    ``prepare`` is given each of the two objectives; ``before`` each update, its objective and its optimizer.
    """
    theirs = build(dtype=dtype, **changes)
    prepare(theirs)
    ours = build(dtype=dtype, **changes)
    prepare(ours)
    by_hand, by_graphs = optimizer(theirs), optimizer(ours)
    step = GraphedStep(
        ours,
        by_graphs,
        clip_norm=1.0,
        capacities=capacities,
        autocast=torch.bfloat16 if autocast else None,
        most_graphs=most_graphs,
    )
    stand_in = replace_capture(step) if capture else None
    for update in range(updates):
        before(update, theirs, by_hand)
        before(update, ours, by_graphs)
        batches = [batch(100 * update + i, dtype) for i in range(accumulate)]
        torch.manual_seed(update)
        planned = [step.planner(*each) for each in batches]
        torch.manual_seed(update)
        plans = [
            theirs.plan(
                labels,
                lengths,
                samples=SAMPLES,
                device="cpu",
                rows=each.capacity.rows if same_capacity else None,
                kept=each.capacity.kept if same_capacity else None,
            )
            for (_, labels, lengths), each in zip(batches, planned)
        ]
        torch.manual_seed(1000 + update)
        loss, norm = plain_update(theirs, by_hand, batches, plans, autocast=autocast)
        torch.manual_seed(1000 + update)
        if stand_in is not None:
            stand_in.spoil()
        result = step(planned)
        torch.testing.assert_close(result.loss, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(result.gradient_norm, norm.float(), rtol=1e-6, atol=0)
    return theirs.state_dict(), ours.state_dict(), step


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@pytest.mark.parametrize("capture", [False, True], ids=["as-it-runs", "captured"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_twenty_updates_with_dropout_and_layer_drop_equal_those_of_a_loop_to_the_bit(norm_first, accumulate, capture):
    theirs, ours, _ = train_both(20, accumulate, capture=capture, encoder_layer_norm_first=norm_first, **RANDOM)
    assert_equal(theirs, ours)


CASES = {
    "unmasked frames": dict(unmasked_weight=0.5),
    "channel masks": dict(mask_channel_prob=0.3),
    "padding invariant": dict(padding_invariant=True),
    "layer norm front end": dict(extractor_mode="layer_norm", feature_grad_mult=None),
    "autocast": dict(autocast=True),
    "sizes of their own": dict(capacities=None),
}


@pytest.mark.parametrize("capture", [False, True], ids=["as-it-runs", "captured"])
@pytest.mark.parametrize("name", CASES)
def test_settings_of_the_model_change_nothing_of_that(name, capture):
    theirs, ours, _ = train_both(4, 1, capture=capture, **RANDOM, **CASES[name])
    assert_equal(theirs, ours)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_dead_rows_change_nothing_but_rounding(dtype, tolerance):
    weights = train_both(20, 1, same_capacity=False, dtype=dtype, encoder_layer_drop=0.5)[:2]
    theirs, ours = (torch.cat([each.flatten() for each in state.values()]) for state in weights)
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


def _replace_mask_generator(objective: nn.Module) -> None:
    class Doubling(hubert_fast.models.masking.MaskGenerator):
        def forward(self, x, padding_mask=None, *, mask=None):
            return 2 * super().forward(x, padding_mask, mask=mask)[0], mask

    objective.model.mask_generator.__class__ = Doubling


def _replace_feed_forward(objective: nn.Module) -> None:
    layer = objective.model.wav2vec2.encoder.transformer.layers[1]
    layer.feed_forward = nn.Sequential(layer.feed_forward, nn.Linear(64, 64))


def _share_within_a_layer(objective: nn.Module) -> None:
    attention = objective.model.wav2vec2.encoder.transformer.layers[0].attention
    attention.q_proj.weight = attention.k_proj.weight


@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_changes_nothing(autocast):
    def recompute(objective: nn.Module) -> None:
        for layer in objective.model.wav2vec2.encoder.transformer.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

    theirs, ours, _ = train_both(4, 1, autocast=autocast, prepare=recompute, encoder_layer_drop=0.0)
    assert_equal(theirs, ours)


def _share_between_products(objective: nn.Module) -> None:
    attention = objective.model.wav2vec2.encoder.transformer.layers[0].attention
    attention.out_proj.weight = attention.q_proj.weight


PREPARED = {
    "front end frozen": lambda objective: objective.model.wav2vec2.feature_extractor.requires_grad_(False),
    "head alone trained": lambda objective: (
        objective.requires_grad_(False),
        objective.model.logit_generator.requires_grad_(True),
    ),
    "upper layers and head trained": lambda objective: (
        objective.requires_grad_(False),
        objective.model.logit_generator.requires_grad_(True),
        objective.model.wav2vec2.encoder.transformer.layers[1:].requires_grad_(True),
    ),
    "mask generator replaced": _replace_mask_generator,
    "feed-forward replaced": _replace_feed_forward,
    "parameter shared within a layer": _share_within_a_layer,
    "parameter of two products": _share_between_products,
    "eval": lambda objective: objective.eval(),
}


@pytest.mark.parametrize("name", PREPARED)
def test_frozen_shared_and_replaced_parts_are_trained_as_in_a_loop(name):
    # A module in the place of one of ours draws its dropout masks as it runs: on a CPU from LayerDrop's generator.
    drops = {"encoder_layer_drop": 0.5} if "replaced" in name else RANDOM
    theirs, ours, _ = train_both(6, 1, capture=True, prepare=PREPARED[name], **drops)
    assert_equal(theirs, ours)


def _with_rows_of_no_frame(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    waveforms, labels, lengths = data(seed, dtype)
    return waveforms, labels, torch.tensor([SAMPLES, 0, 399])


BATCHES = {
    "rows without a frame": dict(batch=_with_rows_of_no_frame),
    "nothing masked": dict(mask_prob=0.0),
    "nothing masked, the rest learnt": dict(mask_prob=0.0, unmasked_weight=0.5),
    "nothing masked, sizes of their own": dict(mask_prob=0.0, capacities=None),
    "some fit no capacity": dict(capacities=Capacities(rows=50, sequences=3, max_frames=num_frames(SAMPLES))),
}


@pytest.mark.parametrize("capture", [False, True], ids=["as-it-runs", "captured"])
@pytest.mark.parametrize("name", BATCHES)
def test_batches_out_of_the_ordinary_change_nothing_of_that(name, capture):
    theirs, ours, _ = train_both(8, 2, capture=capture, encoder_layer_drop=0.2, **BATCHES[name])
    assert_equal(theirs, ours)


@pytest.mark.parametrize("mask_prob", [0.8, 0.0])
def test_the_mean_is_over_masked_frames_and_over_one_where_there_is_none(mask_prob):
    objective = build(mask_prob=mask_prob)
    step = GraphedStep(objective, adamw(objective), clip_norm=1.0)
    result = step([step.planner(*data(0)), step.planner(*data(1))])
    assert (result.masked_count > 1) == (mask_prob > 0)
    assert result.mean == result.loss / max(1, int(result.masked_count)) and result.gradient_norm.isfinite()


def _short_and_long_in_turn(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    waveforms, labels, _ = data(seed, dtype)
    return waveforms, labels, torch.tensor([SAMPLES, 6400, 6400] if seed % 200 else [SAMPLES, 3000, 3000])


def test_capacities_above_the_most_graphs_run_eagerly_and_say_so_once(caplog):
    with caplog.at_level(logging.WARNING):
        theirs, ours, step = train_both(6, 1, capture=True, most_graphs=1, batch=_short_and_long_in_turn)
    assert_equal(theirs, ours)
    assert len(step._programs) > 1 and sum(bool(each.captured) for each in step._programs.values()) == 1
    assert [record.message for record in caplog.records if "most_graphs=1" in record.message] == [
        "most_graphs=1 capacities are captured; steps of others run eagerly"
    ]


def _two_groups(objective: nn.Module) -> torch.optim.Optimizer:
    parameters = [*objective.parameters()]
    groups = [{"params": parameters[::2], "lr": 2**-9}, {"params": parameters[1::2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, 2**-10, fused=True)


OPTIMIZERS = {
    "two groups": _two_groups,
    "SGD with momentum": lambda objective: torch.optim.SGD(objective.parameters(), 2**-5, momentum=0.5),
    "fused SGD": lambda objective: torch.optim.SGD(objective.parameters(), 2**-5, fused=True),
    "AdamW that is not fused": lambda objective: torch.optim.AdamW(objective.parameters(), 2**-10),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_as_in_a_loop(name):
    theirs, ours, _ = train_both(8, 1, capture=True, optimizer=OPTIMIZERS[name], encoder_layer_drop=0.5)
    assert_equal(theirs, ours)


def test_learning_rates_and_weight_decay_that_change_reach_a_captured_step():
    def before(update: int, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        scheduler = vars(optimizer).setdefault(
            "scheduler", torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 2.0 ** -(i % 3))
        )
        if update:
            scheduler.step()
        optimizer.param_groups[0]["weight_decay"] = 0.01 if update < 6 else 0.5

    theirs, ours, _ = train_both(12, 1, capture=True, before=before)
    assert_equal(theirs, ours)


def test_states_that_are_loaded_between_updates_are_gone_on_from():
    def before(update: int, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if update == 4:
            objective.saved = copy.deepcopy((objective.state_dict(), optimizer.state_dict()))
        if update == 8:
            model, state = objective.saved
            objective.load_state_dict(model)
            optimizer.load_state_dict(state)

    theirs, ours, _ = train_both(12, 1, capture=True, before=before)
    assert_equal(theirs, ours)


@pytest.mark.parametrize(
    "change",
    [
        lambda objective: objective.load_state_dict(copy.deepcopy(objective.state_dict()), assign=True),
        lambda objective: objective.model.wav2vec2.feature_extractor.requires_grad_(False),
    ],
    ids=["assigned", "frozen"],
)
def test_parameters_that_are_replaced_or_frozen_later_are_refused(change):
    objective = build()
    step = GraphedStep(objective, adamw(objective))
    batch = step.planner(*data(0))
    step([batch])
    change(objective)
    with pytest.raises(RuntimeError, match="make another"):
        step([batch])


def test_a_layer_that_is_left_out_keeps_its_weights_and_its_optimizer_state():
    objective = build(encoder_layer_drop=0.5)
    optimizer = adamw(objective)
    step = GraphedStep(objective, optimizer, capacities=ROOM)
    replace_capture(step)
    transformer = objective.model.wav2vec2.encoder.transformer
    drawn = [False, False, False]
    transformer.draw_dropped_layers = lambda: drawn
    batch = step.planner(*data(0))
    for _ in range(3):
        step([batch])
    drawn = [False, True, False]
    layer = transformer.layers[1]
    for _ in range(3):
        before = copy.deepcopy([(each, optimizer.state[each]) for each in layer.parameters()])
        step([batch])
        for each, (was, state) in zip(layer.parameters(), before):
            assert torch.equal(each, was) and all(torch.equal(state[k], v) for k, v in optimizer.state[each].items())
            assert each.grad is None


def test_a_planner_that_was_pickled_makes_the_same_micro_batch():
    planner = hubert_fast.MicroBatchPlanner(build(**RANDOM), ROOM)
    batches = []
    for each in (planner, pickle.loads(pickle.dumps(planner))):
        torch.manual_seed(0)
        batches.append(each(*data(0)))
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(*batches))


def test_the_last_layer_alone_has_queries_of_kept_rows_alone(monkeypatch):
    seen = []

    def watched(*arguments, **named):
        seen.append(named["query_rows"])
        return masked_attention(*arguments, **named)

    monkeypatch.setattr(encoder_layer, "masked_attention", watched)
    objective = build(encoder_layer_drop=0.0)
    step = GraphedStep(objective, adamw(objective), capacities=ROOM)
    step([step.planner(*data(0))])
    assert [each is None for each in seen] == [True, True, False]


def test_making_a_step_draws_nothing():
    objective = build(**RANDOM)
    before = torch.get_rng_state()
    GraphedStep(objective, adamw(objective), capacities=ROOM)
    assert torch.equal(torch.get_rng_state(), before)


def _hooked() -> nn.Module:
    objective = build()
    objective.model.wav2vec2.encoder.transformer.register_forward_hook(lambda *_: None)
    return objective


WRONG = {
    "transformer must be a Transformer without hooks": dict(objective=_hooked),
    "objective must be a PretrainingObjective.*got Sequential": dict(objective=lambda: nn.Sequential(build())),
    "weight on masked or unmasked frames": dict(
        objective=lambda: hubert_fast.PretrainingObjective(build().model, masked_weight=0.0)
    ),
    "clip_norm must be positive or None; got 0.0": dict(clip_norm=0.0),
    "reduce_dtype must be .*; got torch.float16": dict(reduce_dtype=torch.float16),
    "most_graphs must be at least 0; got -1": dict(most_graphs=-1),
    "autocast must be torch.bfloat16, .*; got 'bf16'": dict(autocast="bf16"),
    "capacities must be Capacities or None; got 8743": dict(capacities=8743),
    "optimizer must step parameters of objective; got one over 1 others": dict(
        optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    ),
    "objective must have parameters to train.*got": dict(objective=lambda: build().requires_grad_(False)),
}


@pytest.mark.parametrize("message", WRONG)
def test_settings_out_of_range_are_named(message):
    settings = {**WRONG[message]}
    objective = settings.pop("objective", build)()
    with pytest.raises(ValueError, match=message):
        GraphedStep(objective, settings.pop("optimizer", adamw(objective)), **settings)


def test_a_planner_names_what_is_not_on_the_cpu_and_a_step_wants_a_micro_batch():
    objective = build()
    step = GraphedStep(objective, adamw(objective))
    waveforms, labels, lengths = data(0)
    with pytest.raises(ValueError, match="labels must be on the CPU; got meta"):
        step.planner(waveforms, labels.to("meta"), lengths)
    with pytest.raises(ValueError, match="micro_batches must be a list of MicroBatch; got MicroBatch"):
        step(step.planner(*data(0)))
    other = Capacities(rows=2000, sequences=3, max_frames=700)
    planned = hubert_fast.MicroBatchPlanner(build(), other)(*data(0))
    with pytest.raises(ValueError, match="micro_batches must be planned with the capacities of the step"):
        step([planned])
    with pytest.raises(ValueError, match="masked_frames must be at least 0 and finite; got nan"):
        step([step.planner(*data(0))], masked_frames=float("nan"))
    with pytest.raises(ValueError, match=r"channel_mask must be bool of shape \[3, 64\]; got torch.bool \(2, 64\)"):
        step.planner(*data(0), channel_mask=torch.zeros(2, 64, dtype=torch.bool))
    with pytest.raises(ValueError, match="rows must be an integer of at least 1; got 1.5"):
        Capacities(rows=1.5, sequences=1, max_frames=1)
    with pytest.raises(ValueError, match="micro_batches must hold one or more; got none"):
        step([])


def test_layer_drop_that_is_switched_on_later_leaves_layers_out():
    objective = build(encoder_layer_drop=0.0)
    step = GraphedStep(objective, adamw(objective), capacities=ROOM)
    replace_capture(step)
    batch = step.planner(*data(0))
    for _ in range(3):
        step([batch])
    transformer = objective.model.wav2vec2.encoder.transformer
    transformer.layer_drop = 1.0
    before = [each.clone() for each in transformer.layers.parameters()]
    step([batch])
    assert all(map(torch.equal, transformer.layers.parameters(), before))
    step.gradients([batch], every_layer=True)
    assert all(each.grad is not None for each in transformer.layers.parameters())


def test_a_step_that_is_let_go_is_freed_though_its_optimizer_lives_on():
    objective = build()
    optimizer = adamw(objective)
    step = weakref.ref(GraphedStep(objective, optimizer))
    gc.collect()
    assert step() is None
    optimizer.load_state_dict(optimizer.state_dict())
