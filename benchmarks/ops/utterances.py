"""The batch of operators on packed rows: utterances of different lengths one after another, beside the same on a padded grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sizes import Size


@dataclass(frozen=True)
class Utterances:
    """``lengths`` in frames, on the host."""

    lengths: Tensor  # [batch] int64
    frames: int  # of the padded grid
    device: str

    @staticmethod
    def of(size: Size, device: str, *, padded: bool) -> Utterances:
        """Lengths spread evenly around the mean of the size; without padding all of the longest."""
        lengths = torch.full((size.batch,), size.frames)
        if padded:
            shortest = 2 * size.rows / size.batch - size.frames
            lengths = torch.linspace(shortest, size.frames, size.batch).round().long()
        return Utterances(lengths, size.frames, device)

    @property
    def rows(self) -> int:
        return int(self.lengths.sum())

    @property
    def squares(self) -> float:
        return float(self.lengths.double().square().sum())

    @property
    def padded(self) -> bool:
        return self.rows < len(self.lengths) * self.frames

    @property
    def description(self) -> str:
        share = self.rows / (len(self.lengths) * self.frames)
        return f"{len(self.lengths)} x {self.frames} frames, {share:.0%} valid"

    @property
    def shape(self) -> dict[str, int]:
        return {"utterances": len(self.lengths), "frames": self.frames, "rows": self.rows}

    def offsets(self) -> Tensor:
        """[batch + 1], where each begins among the packed rows."""
        return F.pad(self.lengths.cumsum(0), (1, 0)).to(self.device)

    def valid(self) -> Tensor:
        """[batch, frames] bool."""
        return (torch.arange(self.frames) < self.lengths[:, None]).to(self.device)
