import io
import random

import numpy as np
import torch

from hubert_fast.pretrain.random_state import (
    preserved_random_state,
    random_state,
    restore_random_state,
    seed_everything,
)


def draw():
    return random.random(), random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist()


def test_every_generator_goes_on_from_a_state_that_was_saved_and_loaded():
    seed_everything(3, 0)
    draw()
    file = io.BytesIO()
    torch.save(random_state(), file)
    expected = [draw(), draw()]
    file.seek(0)
    restore_random_state(torch.load(file, weights_only=True))
    assert [draw(), draw()] == expected


def test_seed_and_rank_give_streams_of_their_own():
    streams = []
    for entropy in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seed_everything(*entropy)
        streams.append(draw())
    assert streams[0] == streams[3]
    assert len({str(stream) for stream in streams}) == 3


def test_what_is_drawn_inside_does_not_shift_what_is_drawn_after():
    seed_everything(0)
    expected = draw()
    seed_everything(0)
    with preserved_random_state():
        draw()
    assert draw() == expected
