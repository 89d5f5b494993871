"""The generator of dropout masks: what the kernels draw is what the twin draws, and it looks random."""

import math

import pytest
import torch
import triton
import triton.language as tl

from hubert_fast.kernels import dropout
from hubert_fast.kernels.launch import Blocks, launch
from tests.kernels import dropout_twin
from tests.kernels.device import DEVICE

ROWS, COLUMNS = 512, 1024


@triton.jit
def _draw(kept, seed, threshold, first_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    bits = dropout.row_bits(tl.load(seed), first_row + rows)[:, None]
    mask = dropout.keep(bits, dropout.column_bits(tl.load(seed), columns)[None], threshold)
    tl.store(kept + rows[:, None] * COLUMNS + columns[None], mask)


def _kept(seed, p, first_row=0):
    kept = torch.empty(ROWS, COLUMNS, dtype=torch.bool, device=DEVICE)
    arguments = {"kept": kept, "seed": torch.tensor(seed, device=DEVICE), "threshold": dropout.threshold(p)}
    constants = {"first_row": first_row, "ROWS": ROWS, "COLUMNS": COLUMNS}
    launch(_draw, lambda _: (1,), arguments | constants, [Blocks()])
    return kept.cpu()


@pytest.mark.parametrize("seed", [0, 1, -1, 12345678901234567, -(1 << 63), (1 << 63) - 1])
@pytest.mark.parametrize("first_row", [0, (1 << 31) - 512])
def test_the_twin_draws_the_same(seed, first_row):
    rows = torch.arange(first_row, first_row + ROWS)[:, None]
    assert torch.equal(_kept(seed, 0.1, first_row), dropout_twin.keep(seed, rows, torch.arange(COLUMNS), 0.1))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.99])
def test_the_share_dropped_is_p_in_every_row_column_and_seed(p):
    kept = torch.stack([_kept(seed, p) for seed in range(8)]).double()
    sigma = math.sqrt(p * (1 - p))
    assert abs(kept.mean() - (1 - p)) <= 5 * sigma / math.sqrt(kept.numel())
    for dims in ((1, 2), (0, 2), (0, 1)):
        means = kept.mean(dims)
        assert (means - (1 - p)).abs().max() <= 5.5 * sigma / math.sqrt(kept.numel() / len(means))
    assert abs(dropout.scale(p) * (1 - p) - 1) < 1e-7


def test_rows_columns_and_seeds_are_independent():
    p = 0.1
    for first, second in ((1, 2), (1, 1 ^ 0x5851F42D4C957F2D), (7, 7 + (1 << 32))):
        a, b = (_kept(seed, p).double() - (1 - p) for seed in (first, second))
        assert abs((a * b).mean()) <= 5 * p * (1 - p) / math.sqrt(a.numel())
    x = a / math.sqrt(p * (1 - p))
    # A random matrix of this size has no singular value far beyond sqrt(rows) + sqrt(columns); shared structure would.
    assert torch.linalg.svdvals(x)[0] < 1.02 * (math.sqrt(ROWS) + math.sqrt(COLUMNS))
    for shift in (1, 2, 3, 4, 8, 16, 32, 64, 128):
        for dim in (0, 1):
            assert abs((x * x.roll(shift, dim)).mean()) <= 5 / math.sqrt(x.numel())


def test_neighbouring_seeds_give_other_masks():
    """Not those with rows exchanged either: then the rows' shares would be the same numbers."""
    shares = [_kept(seed, 0.5).double().mean(1).sort().values for seed in (0, 1, 1 << 31, 1 << 32)]
    assert all(not torch.equal(first, second) for i, first in enumerate(shares) for second in shares[:i])
    masks = [_kept(seed, 0.5) for seed in (10, 11, 10 + (1 << 32))]
    for i in range(3):
        for j in range(i):
            assert 0.49 < (masks[i] == masks[j]).double().mean() < 0.51
