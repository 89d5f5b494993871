"""Leaving the padding out, and all but the masked frames out of the last layer, changes no number."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hubert_fast
from hubert_fast import backend
from hubert_fast.models import plan
from hubert_fast.models import rows as rows_module
from hubert_fast.models.rows import valid_rows, whole_grid
from tests.models import configurations
from tests.models.twins import (
    LENGTHS,
    Batch,
    assert_steps_match,
    batch,
    objective_of,
    relative_error,
    seeded,
    step,
    twins,
    valid_frames,
)


def _every_frame(batch, frames, lengths, device, capacity):
    return whole_grid(batch, frames, lengths, device)


@given(lengths=st.lists(st.sampled_from([0, 399, 400, 401, 1000]) | st.integers(0, 12400), min_size=3, max_size=3))
def test_packed_rows_give_what_the_plain_padded_formulas_give_for_any_lengths(lengths):
    """Rows of length 0 too, but not all of them: one row is as long as the batch."""
    data = batch(torch.float64, torch.tensor([*lengths[:2], 12400]))
    objective = objective_of(configurations.base(), unmasked_weight=0.5)
    packed = step(objective, data)
    with backend.using("reference"), mock.patch.object(plan, "valid_rows", _every_frame):
        assert_steps_match(packed, step(objective, data), 1e-10)


def test_the_last_layer_computes_the_masked_rows_alone_where_no_others_are_wanted():
    _, model = twins(configurations.base(), torch.float64)
    sizes = []
    layers = model.wav2vec2.encoder.transformer.layers
    with layers[-1].feed_forward.output_dense.register_forward_hook(
        lambda module, inputs, output: sizes.append(len(output))
    ):
        masked_only, everything = (
            seeded(hubert_fast.PretrainingObjective(model, unmasked_weight=weight), batch(torch.float64, LENGTHS))
            for weight in (0.0, 0.5)
        )
    assert sizes == [int(masked_only.masked_count), int(valid_frames(LENGTHS).sum())] and sizes[0] < sizes[1]
    assert relative_error(masked_only.masked_loss, everything.masked_loss) <= 1e-12


@pytest.mark.parametrize("change", [None, "layer", "pos_conv_embed", "feature projection"])
def test_the_encoder_computes_valid_frames_alone_and_gives_what_whole_rows_give(change):
    encoder = twins(configurations.large(), torch.float64)[1].wav2vec2
    transformer, sizes = encoder.encoder.transformer, []
    if change is not None:  # what is hooked is called as a module
        hooked = {"layer": transformer.layers[0], "pos_conv_embed": transformer.pos_conv_embed}
        hooked.get(change, encoder.encoder.feature_projection).register_forward_hook(lambda *call: None)
    waveforms, _, lengths = batch(torch.float64, LENGTHS)
    product = transformer.layers[1].feed_forward.output_dense
    with product.register_forward_hook(lambda _, inputs, output: sizes.append(len(output))):
        packed = [encoder(waveforms, lengths)[0], *encoder.extract_features(waveforms, lengths)[0]]
        with mock.patch.object(rows_module, "may_decide_shapes", lambda lengths: False):
            whole = [encoder(waveforms, lengths)[0], *encoder.extract_features(waveforms, lengths)[0]]
    valid = valid_frames(lengths)
    assert sizes == [int(valid.sum())] * 2 + [valid.numel()] * 2
    for ours, wanted in zip(packed, whole, strict=True):
        assert relative_error(ours[valid], wanted[valid]) <= 1e-12


def packed_features(encoder, waveforms, lengths):
    grid, frames = encoder.feature_extractor(waveforms, lengths)
    layout = valid_rows(*grid.shape[:2], frames, grid.device)
    return layout.pack(grid), layout


def test_rows_of_a_range_of_layers_are_the_valid_frames_of_those_layers():
    encoder = twins(configurations.base(encoder_num_layers=3), torch.float64)[1].wav2vec2
    waveforms, _, lengths = batch(torch.float64, LENGTHS)
    layers, frames = encoder.extract_features(waveforms, lengths)
    features, layout = packed_features(encoder, waveforms, lengths)
    assert layout.offsets.tolist() == [0, *frames.cumsum(0).tolist()]
    for first, last in ((1, None), (2, 3), (2, 2)):
        rows = encoder.encoder.layer_rows(features, layout, first=first, last=last)
        for ours, wanted in zip(rows, layers[first - 1 : last], strict=True):
            assert torch.equal(ours, wanted[valid_frames(lengths)])
    for wrong in ({"first": 0}, {"first": 4}, {"first": 2, "last": 1}):
        with pytest.raises(ValueError, match=r"first must be in \[1, [13]\]; got"):
            encoder.encoder.layer_rows(features, layout, **wrong)


def test_dead_rows_reach_no_layer_of_a_valid_one():
    encoder = twins(configurations.base(), torch.float64)[1].wav2vec2
    waveforms, _, lengths = batch(torch.float64, LENGTHS)
    features, layout = packed_features(encoder, waveforms, lengths)
    with_room = valid_rows(layout.batch, layout.frames, layout.offsets.diff(), torch.device("cpu"), len(features) + 9)
    grid = encoder.feature_extractor(waveforms, None)[0]
    layers = encoder.encoder.layer_rows(with_room.pack(grid), with_room)
    for rows, wanted in zip(layers, encoder.encoder.layer_rows(features, layout), strict=True):
        assert len(rows) == len(wanted) + 9 and rows.isfinite().all()
        assert relative_error(rows[: len(wanted)], wanted) <= 1e-12


@pytest.mark.parametrize("where", ["fake", "traced"])
def test_lengths_decide_about_no_shape_where_the_call_is_traced(where):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    encoder = twins(configurations.base())[1].wav2vec2.encoder.eval()
    features, frames = torch.randn(3, 38, encoder.feature_projection.projection.in_features), torch.tensor([38, 5, 0])
    if where == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            output = encoder(mode.from_tensor(features), mode.from_tensor(frames))
    else:
        traced, other = make_fx(encoder)(features, frames), torch.tensor([7, 38, 1])
        output = traced(features, other)
        assert relative_error(output, encoder(features, other)) <= 1e-5
    assert output.shape == (3, 38, 128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_lengths_and_mask_on_a_gpu_give_what_those_on_the_cpu_give():
    model = twins(configurations.base(skip_nomask=True))[1].cuda().eval()
    data, sizes = batch(lengths=LENGTHS), []
    data = data._replace(waveforms=data.waveforms.cuda())
    mask = model.mask_generator.draw(3, 38, model.wav2vec2.feature_extractor.output_lengths(LENGTHS))
    expected = model(*data, mask=mask), model.wav2vec2(data.waveforms, data.lengths)
    layer = model.wav2vec2.encoder.transformer.layers[0]
    with layer.feed_forward.output_dense.register_forward_hook(lambda _, inputs, output: sizes.append(len(output))):
        logits = model(data.waveforms, data.labels.cuda(), data.lengths.cuda(), mask=mask.cuda())
        output, frames = model.wav2vec2(data.waveforms, data.lengths.cuda())
    assert sizes == [int(valid_frames(LENGTHS).sum())] * 2
    assert torch.equal(logits[0], expected[0][0]) and torch.equal(output, expected[1][0])
    assert frames.is_cuda and torch.equal(frames.cpu(), expected[1][1])


def test_samples_in_the_padding_do_not_matter_under_layer_norm():
    waveforms, labels, lengths = batch(torch.float64, LENGTHS)
    objective = objective_of(configurations.large(), feature_weight=0.0)  # the penalty does see the padding
    padding = torch.arange(waveforms.shape[1]) >= lengths[:, None]
    batches = [Batch(waveforms.masked_fill(padding, filler), labels, lengths) for filler in (0.0, 3.0)]
    zeros, threes = (seeded(objective, each).loss for each in batches)
    assert relative_error(threes, zeros) <= 1e-12
