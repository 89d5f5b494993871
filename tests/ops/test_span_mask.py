"""The masks are torchaudio's number for number, and so is the random stream after them."""

import contextlib

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hubert_fast.ops.span_mask import span_mask
from tests import torchaudio_peer

SELECTIONS = ("static", "uniform", "normal", "poisson")


@settings(max_examples=400)
@given(
    seed=st.integers(0, 1 << 40),
    frames=st.integers(2, 120) | st.integers(300, 500),
    rows=st.integers(1, 5),
    short=st.lists(st.floats(0, 1), min_size=5, max_size=5) | st.none(),
    selection=st.sampled_from(SELECTIONS),
    prob=st.floats(0.05, 1.0),
    length=st.integers(1, 15),
    other=st.integers(0, 6),
    min_masks=st.integers(0, 3),
    no_overlap=st.booleans(),
    min_space=st.integers(0, 3),
)
def test_any_settings_give_torchaudios_mask(
    seed, frames, rows, short, selection, prob, length, other, min_masks, no_overlap, min_space
):
    lengths = None if short is None else torch.tensor([int(share * frames) for share in short[:rows]])
    padding = None if lengths is None else torch.arange(frames) >= lengths[:, None]
    settings = dict(mask_prob=prob, mask_length=length, mask_other=float(other), min_masks=min_masks)
    settings |= dict(no_overlap=no_overlap, min_space=min_space)
    poisson = torchaudio_peer.working_poisson() if selection == "poisson" else contextlib.nullcontext()
    expected = None
    # Where torchaudio finds no room for a span, or no span to place, it fails: there is nothing to compare with.
    with poisson, contextlib.suppress(RuntimeError, IndexError, ValueError):
        torch.manual_seed(seed)
        mask = torchaudio_peer.components._compute_mask_indices(
            (rows, frames), padding, mask_type=selection, **settings
        )
        expected = mask, torch.rand(3)
    torch.manual_seed(seed)
    try:
        mask = span_mask((rows, frames), lengths, mask_selection=selection, **settings)
    except RuntimeError:
        assert expected is None, "torchaudio draws a mask here"
    assume(expected is not None)
    assert mask.dtype == torch.bool and mask.device.type == "cpu"
    assert torch.equal(mask, expected[0])
    assert torch.equal(torch.rand(3), expected[1])


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    frames=st.integers(1, 80),
    rows=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    selection=st.sampled_from(SELECTIONS),
    no_overlap=st.booleans(),
)
def test_every_row_has_as_many_masked_frames_and_none_in_its_padding(seed, frames, rows, selection, no_overlap):
    lengths = torch.tensor([round(share * frames) for share in rows])
    torch.manual_seed(seed)
    mask = span_mask(
        (len(rows), frames), lengths, mask_prob=0.7, mask_length=6, mask_selection=selection, no_overlap=no_overlap
    )
    assert mask.shape == (len(rows), frames)
    assert len(mask.sum(1).unique()) == 1
    assert not (mask & (torch.arange(frames) >= lengths[:, None])).any()


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("mask_selection", dict(mask_selection="gamma")),
        ("lengths", dict(lengths=torch.tensor([5, 5, 5]))),
        ("lengths", dict(lengths=torch.tensor([5, 41]))),
        ("lengths", dict(lengths=torch.tensor([-1, 40]))),
    ],
)
def test_bad_arguments_are_named(argument, arguments):
    with pytest.raises(ValueError, match=f"{argument} must .*; got "):
        span_mask((2, 40), **{"lengths": None, "mask_prob": 0.5, "mask_length": 4, **arguments})


def test_the_registered_operator_passes_opcheck():
    arguments = (2, 40, torch.tensor([40, 20]), 0.5, 4, "static", 0.0, 2, False, 1)
    torch.library.opcheck(
        torch.ops.hubert_fast.span_mask.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
