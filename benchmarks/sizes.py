"""The shapes that operators are measured and kernels compiled for: a training step of the published models."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .architecture import ARCHITECTURES


@dataclass(frozen=True)
class Size:
    name: str  # of the model
    batch: int  # utterances
    frames: int  # of the longest
    rows: int  # valid frames of the batch
    kept: int  # masked frames of the batch
    dim: int
    heads: int
    ffn: int
    conv_channels: int
    final_dim: int
    classes: int
    groups: int
    conv_norm: str  # of the convolutional front end
    taps: int = 128

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def group_channels(self) -> int:
        return self.dim // self.groups


def _of(model: str, **batch: int) -> Size:
    architecture = ARCHITECTURES[model]
    return Size(
        model,
        dim=architecture.dim,
        heads=architecture.heads,
        ffn=architecture.ffn,
        conv_channels=architecture.convolutions[-1][0],
        final_dim=architecture.final_dim,
        groups=architecture.groups,
        conv_norm=architecture.norm,
        **batch,
    )


# 175 s of audio in utterances of up to 15.6 s; row counts that 16 does not divide, as most are not.
SIZES = {
    model: _of(model, batch=14, frames=779, rows=8743, kept=4021, classes=500) for model in ("base", "large", "xlarge")
}

# For the suite's own tests: milliseconds on any machine.
_TINY = _of("tiny", batch=2, frames=30, rows=47, kept=21, classes=20, taps=16)


def size_on(device: str, name: str) -> Size:
    """The size of model ``name`` for operators on ``device``: a CPU gets 14 s of audio in utterances of up to 8 s.

    Raises:
        ValueError: where there is no such model.
    """
    if name == _TINY.name:
        return _TINY
    if name not in SIZES:
        raise ValueError(f"size must be one of {sorted(SIZES)}; got {name!r}")
    return replace(SIZES[name], batch=2, frames=399, rows=719, kept=331) if device == "cpu" else SIZES[name]
