"""Leaving the padding out, and all but the masked frames out of the last layer, changes no number."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hubert_fast
from hubert_fast import backend
from hubert_fast.models import plan
from hubert_fast.models.rows import whole_grid
from tests.models import configurations
from tests.models.twins import (
    LENGTHS,
    Batch,
    assert_gradients_match,
    assert_outputs_match,
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


def _run(model, packed, lengths=LENGTHS, name="auto", **weights):
    """The objective with packed rows, or with every frame of the grid a row and padding merely no key."""
    rows = plan.valid_rows if packed else _every_frame
    with backend.using(name), mock.patch.object(plan, "valid_rows", rows):
        return step(hubert_fast.PretrainingObjective(model, **weights), batch(torch.float64, lengths))


@pytest.mark.parametrize("unmasked_weight", [0.0, 0.5])
@pytest.mark.parametrize("name", ["base", "xlarge-bias", "base-channel-masks"])
def test_packed_rows_give_what_the_padded_grid_gives(name, unmasked_weight):
    _, model = twins(configurations.ALL[name], torch.float64)
    packed, padded = (_run(model, each, unmasked_weight=unmasked_weight) for each in (True, False))
    assert_outputs_match(packed[0], padded[0], 1e-12)
    assert_gradients_match(packed[1], padded[1], 1e-10)


@given(lengths=st.lists(st.sampled_from([0, 399, 400, 401, 1000]) | st.integers(0, 12400), min_size=3, max_size=3))
def test_packed_rows_give_what_the_plain_padded_formulas_give_for_any_lengths(lengths):
    """Rows of length 0 too, but not all of them: one row is as long as the batch."""
    lengths = torch.tensor([*lengths[:2], 12400])
    _, model = twins(configurations.base(), torch.float64)
    packed = _run(model, True, lengths, unmasked_weight=0.5)
    assert_steps_match(packed, _run(model, False, lengths, "reference", unmasked_weight=0.5), 1e-10)


def test_the_last_layer_computes_the_masked_rows_alone_where_no_others_are_wanted():
    _, model = twins(configurations.base(), torch.float64)
    sizes = []
    layers = model.wav2vec2.encoder.transformer.layers
    with layers[-1].feed_forward.register_forward_hook(lambda module, inputs, output: sizes.append(len(output))):
        masked_only, _ = _run(model, True)
        everything, _ = _run(model, True, unmasked_weight=0.5)
    assert sizes == [int(masked_only.masked_count), int(valid_frames(LENGTHS).sum())] and sizes[0] < sizes[1]
    assert relative_error(masked_only.masked_loss, everything.masked_loss) <= 1e-12


def test_samples_in_the_padding_do_not_matter_under_layer_norm():
    waveforms, labels, lengths = batch(torch.float64, LENGTHS)
    objective = objective_of(configurations.large(), feature_weight=0.0)  # the penalty does see the padding
    padding = torch.arange(waveforms.shape[1]) >= lengths[:, None]
    batches = [Batch(waveforms.masked_fill(padding, filler), labels, lengths) for filler in (0.0, 3.0)]
    zeros, threes = (seeded(objective, each).loss for each in batches)
    assert relative_error(threes, zeros) <= 1e-12
