"""Leaving the padding out, and all but the masked frames out of the last layer, changes no number."""

from unittest import mock

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
    with layers[-1].feed_forward.register_forward_hook(lambda module, inputs, output: sizes.append(len(output))):
        masked_only, everything = (
            seeded(hubert_fast.PretrainingObjective(model, unmasked_weight=weight), batch(torch.float64, LENGTHS))
            for weight in (0.0, 0.5)
        )
    assert sizes == [int(masked_only.masked_count), int(valid_frames(LENGTHS).sum())] and sizes[0] < sizes[1]
    assert relative_error(masked_only.masked_loss, everything.masked_loss) <= 1e-12


def test_samples_in_the_padding_do_not_matter_under_layer_norm():
    waveforms, labels, lengths = batch(torch.float64, LENGTHS)
    objective = objective_of(configurations.large(), feature_weight=0.0)  # the penalty does see the padding
    padding = torch.arange(waveforms.shape[1]) >= lengths[:, None]
    batches = [Batch(waveforms.masked_fill(padding, filler), labels, lengths) for filler in (0.0, 3.0)]
    zeros, threes = (seeded(objective, each).loss for each in batches)
    assert relative_error(threes, zeros) <= 1e-12
