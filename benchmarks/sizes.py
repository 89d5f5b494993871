"""The shapes that operators are measured and kernels compiled for: a training step of the published models."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .architecture import ARCHITECTURES, Architecture


@dataclass(frozen=True, kw_only=True)
class Size(Architecture):
    """A model with the batch of a training step."""

    batch: int  # utterances
    frames: int  # of the longest
    rows: int  # valid frames of the batch
    kept: int  # masked frames of the batch
    classes: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def group_channels(self) -> int:
        return self.dim // self.groups

    @property
    def conv_channels(self) -> int:
        return self.convolutions[-1][0]


# 175 s of audio in utterances of up to 15.6 s; row counts that 16 does not divide, as most are not.
SIZES = {
    model: Size(**vars(ARCHITECTURES[model]), batch=14, frames=779, rows=8743, kept=4021, classes=500)
    for model in ("base", "large", "xlarge")
}

# For the suite's own tests: milliseconds on any machine.
_TINY = Size(**vars(ARCHITECTURES["tiny"].changed(taps=16)), batch=2, frames=30, rows=47, kept=21, classes=20)


def size_on(device: str, name: str) -> Size:
    """The size of model ``name`` for operators on ``device``: a CPU gets 14 s of audio in utterances of up to 8 s."""
    if name == _TINY.name:
        return _TINY
    return replace(SIZES[name], batch=2, frames=399, rows=719, kept=331) if device == "cpu" else SIZES[name]
