"""Phones of utterances, one by one and as columns of a file."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from hubert_fast.pretrain.columns import Strings


class Phone(NamedTuple):
    """A phone of an alignment; times in seconds."""

    symbol: str
    start: float
    duration: float

    def within(self, first: float, last: float) -> Phone | None:
        """The part of it in ``[first, last)`` seconds, counted from ``first``; None if nothing."""
        start, end = max(self.start, first), min(self.start + self.duration, last)
        return Phone(self.symbol, start - first, end - start) if end > start else None


class PhoneColumns(NamedTuple):
    """The phones of all utterances, one behind the other."""

    ends: np.ndarray  # [utterances] int64, where the phones of each end
    symbols: np.ndarray  # [phones] int32, places in ``names``
    starts: np.ndarray  # [phones] float64, seconds
    durations: np.ndarray  # [phones] float64, seconds
    names: Strings

    @classmethod
    def of(cls, utterances: Iterable[list[Phone]]) -> PhoneColumns:
        """Columns of the phones of each utterance."""
        places: dict[str, int] = {}
        counts, symbols, starts, durations = array("q"), array("i"), array("d"), array("d")
        for phones in utterances:
            counts.append(len(phones))
            for phone in phones:
                symbols.append(places.setdefault(phone.symbol, len(places)))
                starts.append(phone.start)
                durations.append(phone.duration)
        numbers = (np.array(each) for each in (symbols, starts, durations))
        return cls(np.cumsum(np.array(counts)), *numbers, Strings.of(list(places)))

    def columns(self) -> dict[str, np.ndarray]:
        """As columns of a file."""
        return {
            "phone_ends": self.ends,
            "phone_symbols": self.symbols,
            "phone_starts": self.starts,
            "phone_durations": self.durations,
            "symbols": self.names.text,
            "symbol_ends": self.names.ends,
        }

    @classmethod
    def read(cls, columns: Mapping[str, np.ndarray]) -> PhoneColumns:
        names = Strings(columns["symbols"], columns["symbol_ends"])
        return cls(*(columns[f"phone_{name}"] for name in ("ends", "symbols", "starts", "durations")), names)

    @property
    def counts(self) -> np.ndarray:
        """Phones of each utterance: int64 ``[utterances]``."""
        return np.diff(self.ends, prepend=0)

    def __getitem__(self, index: int) -> list[Phone]:
        first = int(self.ends[index - 1]) if index else 0
        rows = slice(first, int(self.ends[index]))
        columns = (each[rows].tolist() for each in (self.symbols, self.starts, self.durations))
        return [Phone(self.names[symbol], start, duration) for symbol, start, duration in zip(*columns)]
