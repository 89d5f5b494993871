"""A step whose shapes were decided ahead: the same numbers, no shape that depends on data, one graph for every batch."""

import pytest
import torch

from hubert_fast.models import encoder_layer
from hubert_fast.models.capacities import Capacity
from hubert_fast.models.plan_tensors import PlanTensors, packed
from hubert_fast.ops.masked_attention import masked_attention
from hubert_fast.switches import switched
from tests.models import configurations
from tests.models.test_dropout import DROPOUTS
from tests.models.twins import LENGTHS, assert_steps_match, batch, gradients, num_frames, objective_of, step

FRAMES = num_frames(12400)


def _objective(name="base", **settings):
    return objective_of(configurations.ALL[name] | settings)


def _plan(objective, data, **capacities):
    device = next(objective.parameters()).device
    return objective.plan(data.labels, data.lengths, samples=data.waveforms.shape[1], device=device, **capacities)


def _planned_step(objective, data, plan, run=None, seed=0):
    return step(objective, data._replace(labels=None), run, plan=plan, seed=seed)


@pytest.mark.parametrize(
    "lengths", [None, LENGTHS, torch.tensor([12400, 5000, 5100])], ids=["full", "lengths", "short"]
)
@pytest.mark.parametrize("capacities", [{}, {"rows": 3 * FRAMES, "kept": 3 * FRAMES}, "tight"], ids=str)
@pytest.mark.parametrize("name", ["base", "xlarge-bias", "base-channel-masks"])
def test_a_planned_step_is_the_step_with_and_without_dead_rows(name, capacities, lengths):
    objective, data = _objective(name), batch(torch.float64, lengths)
    wanted = step(objective, data)
    torch.manual_seed(0)
    plan = _plan(objective, data)
    if capacities:
        rows, kept = len(plan.mask), len(plan.labels)
        capacities = {"rows": min(rows + 5, 3 * FRAMES), "kept": kept + 1} if capacities == "tight" else capacities
        torch.manual_seed(0)
        plan = _plan(objective, data, **capacities)
        assert (len(plan.mask), len(plan.labels)) == tuple(capacities.values())
    assert_steps_match(_planned_step(objective, data, plan), wanted, 1e-10)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kept", [None, 3 * FRAMES])
@pytest.mark.parametrize("name", ["base", "large"])
def test_attention_of_the_last_layer_alone_has_queries_of_masked_rows_alone(name, kept, p, monkeypatch):
    objective, data = _objective(name, **{each: p for each in DROPOUTS}), batch(torch.float64, LENGTHS)
    plan = _plan(objective, data) if kept is None else _plan(objective, data, rows=kept, kept=kept)
    sequences = plan.layout.sequence(torch.device("cpu"))[plan.keep[plan.masked]]
    assert plan.kept_offsets.tolist() == [int((sequences < each).sum()) for each in range(4)]
    seen = []

    def watched(*arguments, **named):
        seen.append(named["query_rows"])
        return masked_attention(*arguments, **named)

    monkeypatch.setattr(encoder_layer, "masked_attention", watched)
    ours = _planned_step(objective, data, plan)
    layers = len(objective.model.wav2vec2.encoder.transformer.layers)
    assert len(seen) == layers > 1 and seen[-1] is plan.keep and set(seen[:-1]) == {None}
    with switched(last_queries=False):
        assert_steps_match(ours, _planned_step(objective, data, plan), 1e-10)
    assert seen[-1] is None


def test_a_plan_keeps_no_masked_padding_and_gives_fillers_no_label():
    objective, data = _objective(), batch(torch.float64, LENGTHS)
    frames = objective.model.wav2vec2.feature_extractor.output_lengths(LENGTHS)
    everywhere = torch.ones_like(data.labels, dtype=torch.bool)
    assert _plan(objective, data, mask=everywhere).kept_offsets.tolist() == [0, *frames.cumsum(0).tolist()]
    nowhere = everywhere.logical_not()
    nowhere[1, 3:7] = True
    plan = _plan(objective, data, mask=nowhere, kept=9)
    assert plan.kept_offsets.tolist() == [0, 0, 4, 4] and len(plan.keep) == 9
    assert plan.masked.tolist() == [True] * 4 + [False] * 5 and not plan.unmasked.any()
    assert (plan.labels >= 0).tolist() == plan.masked.tolist()


def test_the_plan_of_a_capacity_tells_attention_of_kept_rows_and_empty_sequences():
    plan = _plan(_objective(), batch(torch.float64, LENGTHS))
    capacity = Capacity(rows=3 * FRAMES, kept=2 * FRAMES, sequences=5, max_frames=FRAMES)
    held = PlanTensors.in_memory(packed(plan, capacity), capacity, 0).step_plan(capacity)
    offsets = plan.kept_offsets.tolist()
    assert held.kept_layout.kept_offsets.tolist() == [*offsets, offsets[-1], offsets[-1]]
    assert torch.equal(held.keep[: offsets[-1]], plan.keep) and held.layout.kept_offsets is None


def test_any_rows_in_any_order_may_be_asked_of_a_transformer():
    objective, data = _objective(), batch(torch.float64, LENGTHS)
    plan, transformer = _plan(objective, data), objective.model.wav2vec2.encoder.transformer.eval()
    x = torch.randn(len(plan.mask), transformer.pos_conv_embed.embed_dim, dtype=torch.float64)
    rows = torch.tensor([40, 5, 5])
    torch.testing.assert_close(transformer.stream(x, plan.layout, rows).x, transformer.stream(x, plan.layout).x[rows])


def test_a_compiled_step_that_is_given_its_plan_leaves_out_padding_and_unmasked_rows():
    torch._dynamo.reset()
    objective, data = _objective(), batch(torch.float64, LENGTHS)
    plan = _plan(objective, data)
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager", dynamic=True)
    sizes = []
    layer = objective.model.wav2vec2.encoder.transformer.layers[-1]
    with layer.feed_forward.output_dense.register_forward_hook(lambda _, inputs, output: sizes.append(len(output))):
        _planned_step(objective, data, plan)
    assert sizes == [int(plan.masked.sum())]
    assert_steps_match(_planned_step(objective, data, plan, compiled), _planned_step(objective, data, plan), 1e-10)
    other = batch(torch.float64, LENGTHS - 900)
    plan = _plan(objective, other)
    assert_steps_match(_planned_step(objective, other, plan, compiled), _planned_step(objective, other, plan), 1e-10)


def test_one_plan_takes_the_tensors_of_another_of_its_capacity():
    objective = _objective("base-channel-masks")
    capacities = {"rows": 3 * FRAMES, "kept": 2 * FRAMES}
    first, second = (batch(torch.float64, lengths) for lengths in (LENGTHS, torch.tensor([12400, 8000, 5000])))
    held = _plan(objective, first, **capacities)

    def addresses():
        tensors = held.mask, held.labels, held.keep, held.kept_offsets, held.layout.index, held.layout.offsets
        return [each.data_ptr() for each in tensors]

    before = addresses()
    plan = _plan(objective, second, **capacities)
    wanted = _planned_step(objective, second, plan)
    assert held.copy_(plan) is held
    assert_steps_match(_planned_step(objective, second, held, seed=1), wanted, 1e-12)
    assert addresses() == before
    with pytest.raises(ValueError, match=r"index of the plans must have one shape; got \(114,\) and \(113,\)"):
        held.copy_(_plan(objective, second, rows=3 * FRAMES - 1, kept=2 * FRAMES))


@pytest.mark.parametrize(
    ("message", "capacities"),
    [
        (r"rows must be at least \d+, what this batch needs, and at most 114; got 3", {"rows": 3}),
        (r"rows must be at least \d+, what this batch needs, and at most 114; got 115", {"rows": 115}),
        (r"kept must be at least \d+, what this batch needs, and at most \d+; got 1", {"kept": 1}),
    ],
)
def test_a_capacity_that_does_not_fit_is_refused(message, capacities):
    with pytest.raises(ValueError, match=message):
        _plan(_objective(), batch(torch.float64, LENGTHS), **capacities)


def test_a_plan_of_another_batch_is_refused():
    objective, data = _objective(), batch(torch.float64, LENGTHS)
    plan = _plan(objective, data)
    with pytest.raises(ValueError, match=r"plan must be of the 2 x 38 frames of waveforms; it is of 3 x 38"):
        objective(data.waveforms[:2], audio_lengths=data.lengths[:2], plan=plan)
    for arguments in ({}, {"labels": data.labels, "plan": plan}, {"mask": data.labels > 0, "plan": plan}):
        with pytest.raises(ValueError, match="give either labels, and a mask if you have one, or a plan"):
            objective(data.waveforms, **arguments)


@pytest.mark.parametrize("name", ["base", "xlarge-bias"])
def test_no_shape_and_no_branch_of_a_planned_step_depends_on_data(name):
    """Fake tensors have no data: whatever asked for some would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    objective, data = _objective(name, **DROPOUTS | {"encoder_layer_drop": 0.0}), batch(torch.float64, LENGTHS)
    plan = _plan(objective, data, rows=3 * FRAMES, kept=3 * FRAMES)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, plan)
        result = objective(mode.from_tensor(data.waveforms), plan=fake)
        result.loss.backward()
    assert all(p.grad is not None for p in objective.model.wav2vec2.encoder.parameters())


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["base", "large"])
def test_a_step_on_a_gpu_never_waits_for_it(name):
    objective = _objective(name, **DROPOUTS).float().cuda()
    optimizer = torch.optim.AdamW(objective.parameters(), fused=True)
    data = batch(torch.float32, LENGTHS)
    waveforms = data.waveforms.cuda()
    for repetition in range(3):
        torch.cuda.set_sync_debug_mode("error" if repetition else "default")  # the first compiles the kernels
        try:
            with torch.autocast("cuda", torch.bfloat16):
                result = objective(waveforms, data.labels, data.lengths)
            result.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert result.loss.isfinite()


@pytest.mark.gpu
@needs_gpu
def test_a_captured_step_replays_on_other_batches():
    objective = _objective("base").float().cuda()
    capacities = {"rows": 3 * FRAMES, "kept": 3 * FRAMES}
    batches = [batch(torch.float32, lengths) for lengths in (LENGTHS, torch.tensor([12400, 6000, 0]))]
    batches = [data._replace(waveforms=data.waveforms.cuda()) for data in batches]
    plans = [_plan(objective, data, **capacities) for data in batches]
    wanted = [_planned_step(objective, data, plan) for data, plan in zip(batches, plans)]
    held, waveforms = _plan(objective, batches[0], **capacities), batches[0].waveforms.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            objective.zero_grad(set_to_none=True)
            objective(waveforms, plan=held).loss.backward()
    torch.cuda.current_stream().wait_stream(side)
    objective.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = objective(waveforms, plan=held).loss
        loss.backward()
    for data, plan, (expected, grads) in zip(batches, plans, wanted):
        held.copy_(plan)
        waveforms.copy_(data.waveforms)
        graph.replay()
        assert torch.equal(loss, expected.loss)
        assert all(torch.equal(gradients(objective)[key], each) for key, each in grads.items())
