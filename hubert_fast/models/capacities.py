"""Capacities: the few sizes to which the rows of batches are rounded up, so that few graphs serve all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional

_MULTIPLE = 16  # of rows: kernels are compiled for multiples of 16 and for other numbers


class Capacity(NamedTuple):
    """The sizes that one graph has room for."""

    rows: int  # valid frames
    kept: Optional[int]  # rows after the last layer; None: all
    sequences: int
    max_frames: int  # of the longest sequence

    def holds(self, need: Capacity) -> bool:
        """Whether a batch that needs ``need`` fits."""
        return (self.kept is None) == (need.kept is None) and all(
            mine is None or mine >= wanted for mine, wanted in zip(self, need)
        )


@dataclass(frozen=True)
class Capacities:
    """Rounds up what a batch needs, so that few sizes serve all batches.

    Rows go up to multiples of 1/32 of ``rows``, rows that are kept to sixteenths of the rows, sequences to powers of 2, none
    above the most there are. Added rows are computed and thrown away; docs/cuda-graphs.md counts them.

    Args:
        rows: valid frames of the largest micro-batch; ``n`` samples at 16 kHz have ``(n - 400) // 320 + 1``.
        sequences: utterances of the micro-batch with most of them.
        max_frames: frames of the longest utterance.

    Raises:
        ValueError: for a number below 1.
    """

    rows: int
    sequences: int
    max_frames: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")

    @property
    def largest_rows(self) -> int:
        """Rows of the largest capacity."""
        return _rounded(self.rows, _MULTIPLE)

    @property
    def _row_step(self) -> int:
        return _rounded(-(-self.rows // 32), _MULTIPLE)

    def room_for(self, need: Capacity) -> Optional[Capacity]:
        """The capacity of a batch that needs ``need``; None where there is none so large."""
        if need.rows > self.rows or need.sequences > self.sequences or need.max_frames > self.max_frames:
            return None
        rows = min(_rounded(max(need.rows, 1), self._row_step), self.largest_rows)
        kept = (
            None if need.kept is None else min(rows, _rounded(max(need.kept, 1), _rounded(-(-rows // 16), _MULTIPLE)))
        )
        sequences = min(1 << (need.sequences - 1).bit_length(), self.sequences)
        # Dead rows take places of the grid [sequences, max_frames] in which no frame is.
        sequences = max(sequences, -(-rows // self.max_frames))
        return Capacity(rows, kept, sequences, self.max_frames)


def _rounded(count: int, step: int) -> int:
    """``count``, rounded up to a multiple of ``step``."""
    return -(-count // step) * step
