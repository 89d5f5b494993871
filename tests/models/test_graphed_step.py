"""A graphed step gives the weights of a plain training loop."""

from __future__ import annotations

from typing import Any, Optional

import pytest
import torch
from torch import Tensor, nn

import hubert_fast
from hubert_fast import Capacities, GraphedStep
from tests.models import configurations
from tests.models.graph_stand_in import replace_capture
from tests.models.twins import num_frames

SAMPLES = 8000  # 24 frames
ROOM = Capacities(rows=64, sequences=3, max_frames=num_frames(SAMPLES))
DROPOUTS = ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout")
RANDOM = {"encoder_layer_drop": 0.5, **{f"encoder_{name}": 0.1 for name in DROPOUTS}}


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
    scale = 1 / sum(int(plan.masked.sum()) for plan in plans)
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
    **changes: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor], GraphedStep]:
    """The weights after ``updates`` by a plain loop and by a graphed step, on the same batches and random numbers."""
    theirs, ours = build(dtype=dtype, **changes), build(dtype=dtype, **changes)
    by_hand, optimizer = adamw(theirs), adamw(ours)
    step = GraphedStep(
        ours, optimizer, clip_norm=1.0, capacities=capacities, autocast=torch.bfloat16 if autocast else None
    )
    stand_in = replace_capture(step) if capture else None
    for update in range(updates):
        batches = [data(100 * update + i, dtype) for i in range(accumulate)]
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
