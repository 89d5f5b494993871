"""The models that are measured, as numbers: from them every peer builds the same model, and FLOPs are counted."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from hubert_fast.pretrain.config import ModelConfig

_STANDARD_CONVOLUTIONS = ((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2)


@dataclass(frozen=True)
class Architecture:
    """A HuBERT; the defaults are HuBERT Base (Hsu et al. 2021, table 1). Dropouts are probabilities."""

    name: str = "base"
    norm: str = "group_norm"  # of the convolutions: "group_norm" after the first, "layer_norm" after each
    convolutions: tuple[tuple[int, int, int], ...] = _STANDARD_CONVOLUTIONS  # (channels, taps, stride)
    dim: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    pre_norm: bool = False  # LayerNorm before attention and feed-forward
    final_dim: int = 256
    taps: int = 128  # of the positional convolution
    groups: int = 16
    projection_dropout: float = 0.1
    attention_dropout: float = 0.1
    ffn_dropout: float = 0.0
    dropout: float = 0.1
    feature_grad_mult: float | None = 0.1

    def without_dropout(self) -> Architecture:
        nothing = dict.fromkeys(("projection_dropout", "attention_dropout", "ffn_dropout", "dropout"), 0.0)
        return self.changed(**nothing)

    def changed(self, **fields: Any) -> Architecture:
        return replace(self, **fields)

    def frames_of(self, samples: int) -> int:
        """Frames that the convolutions make of ``samples``."""
        for _, taps, stride in self.convolutions:
            samples = max(0, (samples - taps) // stride + 1)
        return samples

    def factory_arguments(self, num_classes: int) -> dict[str, Any]:
        """Keyword arguments of ``hubert_pretrain_model``, ours and torchaudio's alike.

        LayerDrop is 0: it would leave other layers out on each side, and that is not the same work.
        """
        return {
            "extractor_mode": self.norm,
            "extractor_conv_layer_config": list(self.convolutions),
            "extractor_conv_bias": False,
            "encoder_embed_dim": self.dim,
            "encoder_projection_dropout": self.projection_dropout,
            "encoder_pos_conv_kernel": self.taps,
            "encoder_pos_conv_groups": self.groups,
            "encoder_num_layers": self.layers,
            "encoder_num_heads": self.heads,
            "encoder_attention_dropout": self.attention_dropout,
            "encoder_ff_interm_features": self.ffn,
            "encoder_ff_interm_dropout": self.ffn_dropout,
            "encoder_dropout": self.dropout,
            "encoder_layer_norm_first": self.pre_norm,
            "encoder_layer_drop": 0.0,
            **{each.name: each.default for each in fields(ModelConfig) if "mask" in each.name},  # the recipe's
            "skip_masked": False,
            "skip_nomask": False,
            "num_classes": num_classes,
            "final_dim": self.final_dim,
            "feature_grad_mult": self.feature_grad_mult,
        }


_NO_DROPOUT = {"projection_dropout": 0.0, "attention_dropout": 0.0, "dropout": 0.0}
_PRE_NORM = {"norm": "layer_norm", "pre_norm": True, "feature_grad_mult": None, **_NO_DROPOUT}

ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture(),
        Architecture("large", dim=1024, layers=24, heads=16, ffn=4096, final_dim=768, **_PRE_NORM),
        Architecture("xlarge", dim=1280, layers=48, heads=16, ffn=5120, final_dim=1024, **_PRE_NORM),
        # For the suite's own tests: seconds on any machine. Its groups have 16 channels, because on some processors PyTorch's
        # convolution is wrong for fewer (hubert_fast/cpu.py, convolution_dtype).
        Architecture(
            "tiny", convolutions=tuple((32, *shape[1:]) for shape in _STANDARD_CONVOLUTIONS), dim=64, layers=2, heads=2, groups=4,
            ffn=128, final_dim=32,
        ),
    )
}  # fmt: skip
