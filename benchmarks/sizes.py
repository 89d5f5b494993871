"""The shapes that operators are measured and kernels compiled for: a training step of the published models."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
    taps: int = 128
    groups: int = 16
    conv_norm: str = "group_norm"  # of the convolutional front end

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def group_channels(self) -> int:
        return self.dim // self.groups


# 175 s of audio in utterances of up to 15.6 s; row counts that 16 does not divide, as most are not.
_BATCH = {"batch": 14, "frames": 779, "rows": 8743, "kept": 4021, "conv_channels": 512}
_LAYER_NORM = {"conv_norm": "layer_norm"}

SIZES = {
    each.name: each
    for each in (
        Size("base", **_BATCH, dim=768, heads=12, ffn=3072, final_dim=256, classes=500),
        Size("large", **_BATCH, **_LAYER_NORM, dim=1024, heads=16, ffn=4096, final_dim=768, classes=500),
        Size("xlarge", **_BATCH, **_LAYER_NORM, dim=1280, heads=16, ffn=5120, final_dim=1024, classes=500),
    )
}


# For the suite's own tests: milliseconds on any machine.
_TINY = Size(
    "tiny", batch=2, frames=30, rows=47, kept=21, dim=64, heads=2, ffn=128, conv_channels=32, final_dim=32, classes=20, taps=16
)  # fmt: skip


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
