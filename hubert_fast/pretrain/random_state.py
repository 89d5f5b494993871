"""The random number generators of a process, as plain values that load with ``weights_only=True``."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_STATE_WORDS = 3


def seed_everything(*entropy: int) -> None:
    """Seed python's, numpy's and torch's generators (CPU and GPU) from non-negative integers: seed, rank, ..."""
    words = np.random.SeedSequence(entropy).generate_state(_STATE_WORDS)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def random_state() -> dict[str, Any]:
    """The states of all generators of this process: of the CPU and, where it has been used, of the current GPU."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [version, list(words), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue every generator where `random_state` found it."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """What the block draws does not shift what is drawn after it."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)
