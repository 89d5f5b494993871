"""The model's masking: torchaudio's for every setting, or a mask made ahead."""

import contextlib

import pytest
import torch

from tests import torchaudio_peer
from tests.models import configurations
from tests.models.twins import LENGTHS, assert_outputs_match, batch, objective_of, seeded, twins, valid_frames

SELECTIONS = ("static", "uniform", "normal", "poisson")


def _masks_of(model, data, seed):
    """The masked frames of a forward pass, read off the mask generator's output."""
    seen = []
    with model.mask_generator.register_forward_hook(lambda module, arguments, output: seen.append(output)):
        with torch.no_grad():
            outputs = seeded(model, data, seed)
    return seen[0], outputs


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all-valid", "lengths"])
@pytest.mark.parametrize("no_overlap", [False, True], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_frame_and_channel_masks_equal_torchaudios(selection, no_overlap, lengths):
    settings = dict(
        mask_selection=selection, mask_other=2.0, mask_length=4, no_mask_overlap=no_overlap,
        mask_channel_prob=0.3, mask_channel_selection=selection, mask_channel_other=3.0, mask_channel_length=9,
        no_mask_channel_overlap=no_overlap,
    )  # fmt: skip
    theirs, ours = twins(configurations.base(**settings), torch.float64)
    data = batch(torch.float64, lengths)
    for seed in range(3):
        with torchaudio_peer.working_poisson() if selection == "poisson" else contextlib.nullcontext():
            (expected_x, expected_mask), expected = _masks_of(theirs, data, seed)
        (x, mask), outputs = _masks_of(ours, data, seed)
        assert torch.equal(mask, expected_mask)
        assert torch.equal(x == 0, expected_x == 0), "channel masks"
        assert_outputs_match(outputs, expected, 1e-10)


def test_a_row_has_two_spans_at_least_as_in_torchaudio():
    theirs, ours = twins(configurations.base(mask_prob=0.01, mask_length=4), torch.float64)
    data = batch(torch.float64, LENGTHS)
    for seed in range(3):
        (_, expected), (_, mask) = (_masks_of(model, data, seed)[0] for model in (theirs, ours))
        assert torch.equal(mask, expected) and mask.any(1).all()


def test_torchaudio_itself_cannot_draw_poisson_masks():
    """The day it can, the comparison above should use it unpatched."""
    theirs, _ = twins(configurations.base(mask_selection="poisson"))
    with pytest.raises(TypeError):
        theirs(*batch())


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all-valid", "lengths"])
def test_a_mask_made_ahead_gives_what_drawing_it_inside_gives(lengths):
    objective, data = objective_of(configurations.base()), batch(torch.float64, lengths)
    torch.manual_seed(7)
    frames = None if lengths is None else valid_frames(lengths).sum(1)
    ahead = objective.model.mask_generator.draw(*data.labels.shape, frames)
    for given, wanted in zip(objective.model(*data, mask=ahead), seeded(objective.model, data, 7), strict=True):
        assert torch.equal(given, wanted)
    assert torch.equal(objective(*data, mask=ahead).loss, seeded(objective, data, 7).loss)


def test_a_mask_made_ahead_draws_no_random_numbers():
    _, ours = twins(configurations.base())
    data = batch()
    mask = torch.zeros(data.labels.shape, dtype=torch.bool)
    mask[:, 3:9] = True
    ours.eval()
    state = torch.get_rng_state()
    masked, unmasked, _ = ours(*data, mask=mask)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(masked) == 3 * 6 and len(unmasked) == data.labels.numel() - 3 * 6


def test_masked_frames_may_differ_in_number_between_rows():
    objective, data, valid = objective_of(configurations.base()), batch(torch.float64, LENGTHS), valid_frames(LENGTHS)
    mask = valid & (torch.rand(valid.shape, generator=torch.Generator().manual_seed(0)) < 0.4)
    masked, unmasked, _ = objective.model(*data, mask=mask)
    assert len(masked) == int(objective(*data, mask=mask).masked_count) == int(mask.sum())
    assert len(unmasked) == int((~mask & valid).sum())


def test_masked_frames_in_the_padding_do_not_count_and_do_not_matter():
    objective, data, valid = objective_of(configurations.base()), batch(torch.float64, LENGTHS), valid_frames(LENGTHS)
    mask = torch.zeros_like(valid)
    mask[:, 2:8] = True
    clean, spilt = objective(*data, mask=mask), objective(*data, mask=mask | ~valid)
    assert int(clean.masked_count) == int(spilt.masked_count)
    torch.testing.assert_close(spilt.loss, clean.loss, rtol=1e-10, atol=0)


def test_no_frame_is_masked_where_the_probability_is_zero():
    _, ours = twins(configurations.base(mask_prob=0.0))
    masked, unmasked, _ = ours(*batch())
    assert len(masked) == 0 and len(unmasked) == batch().labels.numel()
