"""Scaled-down models: the published sizes with fewer channels, layers and classes, and every dropout at 0."""

from __future__ import annotations

from typing import Any

NUM_CLASSES = 20
CONV_LAYERS = [(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2

_BASE: dict[str, Any] = dict(
    extractor_mode="group_norm",
    extractor_conv_layer_config=CONV_LAYERS,
    extractor_conv_bias=False,
    encoder_embed_dim=128,
    encoder_projection_dropout=0.0,
    encoder_pos_conv_kernel=16,
    encoder_pos_conv_groups=4,
    encoder_num_layers=2,
    encoder_num_heads=2,
    encoder_attention_dropout=0.0,
    encoder_ff_interm_features=192,
    encoder_ff_interm_dropout=0.0,
    encoder_dropout=0.0,
    encoder_layer_norm_first=False,
    encoder_layer_drop=0.0,
    mask_prob=0.8,
    mask_selection="static",
    mask_other=0.0,
    mask_length=10,
    no_mask_overlap=False,
    mask_min_space=1,
    mask_channel_prob=0.0,
    mask_channel_selection="static",
    mask_channel_other=0.0,
    mask_channel_length=10,
    no_mask_channel_overlap=False,
    mask_channel_min_space=1,
    skip_masked=False,
    skip_nomask=False,
    num_classes=NUM_CLASSES,
    final_dim=32,
    feature_grad_mult=0.1,
)


def base(**changes: Any) -> dict[str, Any]:
    """Group norm, post-norm, heads of 64."""
    return {**_BASE, **changes}


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
