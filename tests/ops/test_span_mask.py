"""The masks are torchaudio's number for number, and so is the random stream after them."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_fast.ops.span_mask import span_mask
from tests import torchaudio_peer

SELECTIONS = ("static", "uniform", "normal", "poisson")
DRAWS = [  # (frames, valid frames of each row or the number of rows)
    (50, 1),
    (50, 4),
    (499, 3),
    (12, 2),
    (60, [60, 31, 8, 45]),
    (60, [60, 0, 30]),
    (25, [25, 3, 1, 2]),
    (40, [0, 0]),
    (300, [299, 300, 12]),
]


def _draw(
    seed, frames, rows, selection, *, prob=0.65, length=10, other=0.0, min_masks=2, no_overlap=False, min_space=1
):
    """Our mask and torchaudio's from one seed, each with the three numbers drawn next; None where torchaudio raises."""
    lengths = rows if isinstance(rows, list) else None
    batch = len(rows) if lengths else rows
    settings = dict(mask_prob=prob, mask_length=length, mask_other=other, min_masks=min_masks)
    spacing = dict(no_overlap=no_overlap, min_space=min_space)
    padding = None if lengths is None else torch.arange(frames) >= torch.tensor(lengths)[:, None]
    poisson = torchaudio_peer.working_poisson() if selection == "poisson" else contextlib.nullcontext()
    expected = None
    # Where torchaudio finds no room for a span, or no span to place, it fails: there is nothing to compare with.
    with poisson, contextlib.suppress(RuntimeError, IndexError, ValueError):
        torch.manual_seed(seed)
        mask = torchaudio_peer.components._compute_mask_indices(
            (batch, frames), padding, mask_type=selection, **settings, **spacing
        )
        expected = mask, torch.rand(3)
    torch.manual_seed(seed)
    given_lengths = None if lengths is None else torch.tensor(lengths)
    try:
        mask = span_mask((batch, frames), given_lengths, mask_selection=selection, **settings, **spacing)
    except RuntimeError:
        assert expected is None, "torchaudio draws a mask here"
        return None
    return None if expected is None else ((mask, torch.rand(3)), expected)


def _assert_same(drawn):
    (mask, next_numbers), (expected, expected_next) = drawn
    assert mask.dtype == torch.bool and mask.device.type == "cpu"
    assert torch.equal(mask, expected)
    assert torch.equal(next_numbers, expected_next)


@pytest.mark.parametrize("no_overlap", [False, True], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_same_seed_same_masks_and_same_random_stream_afterwards(selection, no_overlap):
    compared = 0
    for frames, rows in DRAWS:
        for seed in range(6):
            for length, other in ((10, 0.0), (3, 1.0), (7, 4.0)):
                drawn = _draw(seed, frames, rows, selection, length=length, other=other, no_overlap=no_overlap)
                if drawn is not None:
                    _assert_same(drawn)
                    compared += 1
    assert compared > 60, "too few of these draws work in torchaudio to say anything"


@settings(max_examples=150)
@given(
    seed=st.integers(0, 1 << 40),
    frames=st.integers(2, 120),
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
    rows = rows if short is None else [int(share * frames) for share in short[:rows]]
    drawn = _draw(
        seed, frames, rows, selection, prob=prob, length=length, other=float(other), min_masks=min_masks,
        no_overlap=no_overlap, min_space=min_space,
    )  # fmt: skip
    if drawn is not None:
        _assert_same(drawn)


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


def test_spans_that_must_not_overlap_keep_their_distance():
    for seed in range(20):
        torch.manual_seed(seed)
        mask = span_mask((1, 200), mask_prob=0.5, mask_length=8, no_overlap=True, min_space=3)[0]
        edges = torch.diff(mask.int(), prepend=torch.zeros(1), append=torch.zeros(1))
        starts, stops = (edges == 1).nonzero().squeeze(1), (edges == -1).nonzero().squeeze(1)
        assert (stops - starts == 8).all()
        assert (starts[1:] - stops[:-1] >= 2).all()  # torchaudio's parts reach one frame into the space before a span


def test_a_drawn_mask_depends_on_the_seed():
    def draw(seed):
        torch.manual_seed(seed)
        return span_mask((2, 100), mask_prob=0.5, mask_length=5)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


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
