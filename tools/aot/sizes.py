"""The shapes that kernels are compiled for: a training step of the published models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
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

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def group_channels(self) -> int:
        return self.dim // self.groups


# 175 s of audio in utterances of up to 15.6 s; row counts that 16 does not divide, as most are not.
_BATCH = {"batch": 14, "frames": 779, "rows": 8743, "kept": 4021, "conv_channels": 512}

SIZES = {
    "base": Size(**_BATCH, dim=768, heads=12, ffn=3072, final_dim=256, classes=500),
    "large": Size(**_BATCH, dim=1024, heads=16, ffn=4096, final_dim=768, classes=500),
    "xlarge": Size(**_BATCH, dim=1280, heads=16, ffn=5120, final_dim=1024, classes=500),
}
