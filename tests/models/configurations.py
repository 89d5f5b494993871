"""Scaled-down models: the published sizes with fewer channels, layers and classes, and every dropout at 0."""

from __future__ import annotations

from typing import Any

from benchmarks.architecture import ARCHITECTURES

NUM_CLASSES = 20

_SMALL = ARCHITECTURES["tiny"].changed(dim=128, ffn=192, taps=16, groups=4).without_dropout()


def base(**changes: Any) -> dict[str, Any]:
    """Group norm, post-norm, heads of 64."""
    return {**_SMALL.factory_arguments(NUM_CLASSES), **changes}


def large(**changes: Any) -> dict[str, Any]:
    """Layer norm in the extractor, pre-norm, heads of 64, full gradient into the extractor."""
    size = dict(extractor_mode="layer_norm", encoder_layer_norm_first=True, feature_grad_mult=None)
    return base(**{**size, **changes})


def xlarge(**changes: Any) -> dict[str, Any]:
    """As large, with heads of 80."""
    return large(**{"encoder_embed_dim": 160, **changes})


ALL = {
    "base": base(),
    "base-bias": base(extractor_conv_bias=True),
    "large": large(),
    "large-bias": large(extractor_conv_bias=True),
    "xlarge": xlarge(),
    "xlarge-bias": xlarge(extractor_conv_bias=True),
    "base-prenorm": base(encoder_layer_norm_first=True, feature_grad_mult=None),
    "base-channel-masks": base(mask_channel_prob=0.3),
    "large-postnorm": large(encoder_layer_norm_first=False, feature_grad_mult=0.5),
}
