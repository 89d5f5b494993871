"""Named configurations: the paper's recipes, and one that finishes on two CPU cores.

Sources: HuBERT (Hsu et al. 2021), section IV-B and table II for base, large and xlarge. Batches are the paper's for all its
GPUs together; on fewer, ``data.micro_batch_seconds`` divides them into as many micro-batches as fit the memory.
"""

from __future__ import annotations

from dataclasses import replace

from hubert_fast.pretrain.config import (
    DataConfig,
    EvaluationConfig,
    IterationConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PretrainConfig,
    UnitsConfig,
)

_BASE = PretrainConfig()

_LARGE_MODEL = ModelConfig(
    extractor_mode="layer_norm",
    encoder_embed_dim=1024,
    encoder_projection_dropout=0.0,
    encoder_num_layers=24,
    encoder_num_heads=16,
    encoder_attention_dropout=0.0,
    encoder_ff_interm_features=4096,
    encoder_dropout=0.0,
    encoder_layer_norm_first=True,
    encoder_layer_drop=0.0,
    final_dim=768,
    feature_grad_mult=None,
)

_XLARGE_MODEL = replace(
    _LARGE_MODEL, encoder_embed_dim=1280, encoder_num_layers=48, encoder_ff_interm_features=5120, final_dim=1024
)


def _after_base(model: ModelConfig, learning_rate: float, batch_seconds: float) -> PretrainConfig:
    """The paper's order: two iterations of Base, then the big model once, on units of the second Base's layer 9. Only the
    big model takes utterances of zero mean and unit variance."""
    third = IterationConfig(
        units=UnitsConfig(clusters=500, layer=9),
        model=model,
        optimizer=OptimizerConfig(steps=400_000, learning_rate=learning_rate, clip_norm=1.0),
        batch_seconds=batch_seconds,
        normalize_audio=True,
    )
    return replace(_BASE, third=third)


# Two CPU cores pre-train this twice on ten minutes of speech in a few minutes. It keeps Base's frame grid and masks. What
# differs serves learning in few updates: pre-norm layers, hardly any dropout, and a loss on the unmasked frames too (the
# paper's alpha below 1), which teaches the lower layers what a unit sounds like before masked frames can be told.
_TINY_MODEL = ModelConfig(
    extractor_conv_layer_config=((128, 10, 5),) + ((128, 3, 2),) * 4 + ((128, 2, 2),) * 2,
    encoder_embed_dim=192,
    encoder_projection_dropout=0.0,
    encoder_pos_conv_kernel=64,
    encoder_num_layers=4,
    encoder_num_heads=3,
    encoder_attention_dropout=0.0,
    encoder_ff_interm_features=768,
    encoder_dropout=0.05,
    encoder_layer_norm_first=True,
    encoder_layer_drop=0.0,
    final_dim=128,
)
_TINY_FIRST = IterationConfig(
    units=UnitsConfig(clusters=50, init_attempts=3),
    model=_TINY_MODEL,
    optimizer=OptimizerConfig(steps=600, learning_rate=2e-3, warmup_fraction=0.1, clip_norm=1.0),
    objective=ObjectiveConfig(unmasked_weight=1.0),
)

_TINY = PretrainConfig(
    data=DataConfig(batch_seconds=20.0, max_seconds=8.0, min_seconds=1.0, valid_fraction=0.1, workers=1),
    logging=LoggingConfig(log_every=20, valid_every=200, save_every=200),
    first=_TINY_FIRST,
    second=replace(_TINY_FIRST, units=UnitsConfig(clusters=100, layer=3, init_attempts=3)),
    evaluation=EvaluationConfig(clusters=100, fit_frames=20_000, init_attempts=2),
)

PRESETS: dict[str, PretrainConfig] = {
    "base": _BASE,
    "large": _after_base(_LARGE_MODEL, 1.5e-3, 128 * 56.25),
    "xlarge": _after_base(_XLARGE_MODEL, 3e-3, 256 * 22.5),
    "tiny": _TINY,
}
