"""Factories with torchaudio's names, arguments, order and defaults, and one keyword more: ``padding_invariant``.

The same torch seed gives the same initial weights as torchaudio's factories: of the `hubert_pretrain_*` those of HuBERT's
pre-training, of the others the defaults of PyTorch's modules.
"""

from __future__ import annotations

import math
from typing import Any, List, Optional, Tuple

from torch import nn

from hubert_fast.models.encoder import Encoder, FeatureProjection
from hubert_fast.models.encoder_layer import EncoderLayer, FeedForward, SelfAttention
from hubert_fast.models.feature_extractor import ConvLayerBlock, FeatureExtractor
from hubert_fast.models.hubert import HuBERTPretrainModel
from hubert_fast.models.logits import LogitGenerator
from hubert_fast.models.masking import MaskGenerator
from hubert_fast.models.positional_embedding import ConvolutionalPositionalEmbedding
from hubert_fast.models.transformer import Transformer
from hubert_fast.models.wav2vec2 import Wav2Vec2Model

_STANDARD_CONV_LAYERS = [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2


def wav2vec2_model(
    extractor_mode: str,
    extractor_conv_layer_config: Optional[List[Tuple[int, int, int]]],
    extractor_conv_bias: bool,
    encoder_embed_dim: int,
    encoder_projection_dropout: float,
    encoder_pos_conv_kernel: int,
    encoder_pos_conv_groups: int,
    encoder_num_layers: int,
    encoder_num_heads: int,
    encoder_attention_dropout: float,
    encoder_ff_interm_features: int,
    encoder_ff_interm_dropout: float,
    encoder_dropout: float,
    encoder_layer_norm_first: bool,
    encoder_layer_drop: float,
    aux_num_out: Optional[int],
    *,
    padding_invariant: bool = False,
) -> Wav2Vec2Model:
    """A custom encoder of HuBERT or wav2vec 2.0.

    Args:
        extractor_mode: ``"group_norm"`` (a norm after the first convolution) or ``"layer_norm"`` (after each).
        extractor_conv_layer_config: (channels, kernel, stride) of each convolution. None: the standard seven.
        extractor_conv_bias: whether the convolutions have a bias.
        encoder_embed_dim: width of the transformer.
        encoder_projection_dropout: dropout after the projection of the features.
        encoder_pos_conv_kernel, encoder_pos_conv_groups: taps and groups of the positional convolution.
        encoder_num_layers, encoder_num_heads: of the transformer; heads divide the width.
        encoder_attention_dropout: dropout on the attention weights.
        encoder_ff_interm_features, encoder_ff_interm_dropout: width and dropout inside the feed-forward.
        encoder_dropout: dropout after attention, after the feed-forward, and after the positional embedding.
        encoder_layer_norm_first: LayerNorm before (True) or after (False) attention and feed-forward.
        encoder_layer_drop: probability of leaving a layer out in training.
        aux_num_out: outputs of a Linear on top, `Wav2Vec2Model.aux`, for example of one a letter. None: there is none.
        padding_invariant: take the group-norm statistics over each row's valid samples only, so that its features do not
            depend on its batch's padding. torchaudio takes them over the padding too.

    Raises:
        ValueError: for an unknown mode, no layers, or a width that the heads do not divide.
    """
    if encoder_num_layers < 1:
        raise ValueError(f"encoder_num_layers must be at least 1; got {encoder_num_layers}")
    shapes = _STANDARD_CONV_LAYERS if extractor_conv_layer_config is None else extractor_conv_layer_config
    feature_extractor = FeatureExtractor(
        extractor_mode, shapes, extractor_conv_bias, padding_invariant=padding_invariant
    )
    # Modules are built in torchaudio's order: each draws its initial weights from the generator as it is built.
    projection = FeatureProjection(shapes[-1][0], encoder_embed_dim, encoder_projection_dropout)
    positional = ConvolutionalPositionalEmbedding(encoder_embed_dim, encoder_pos_conv_kernel, encoder_pos_conv_groups)
    layers = nn.ModuleList()
    for _ in range(encoder_num_layers):
        attention = SelfAttention(encoder_embed_dim, encoder_num_heads, encoder_attention_dropout)
        feed_forward = FeedForward(
            encoder_embed_dim, encoder_ff_interm_features, encoder_ff_interm_dropout, encoder_dropout
        )
        layers.append(EncoderLayer(attention, encoder_dropout, encoder_layer_norm_first, feed_forward))
    # The norm of the whole stack stands on the other side of that of its layers: before them in post-norm models.
    transformer = Transformer(positional, encoder_dropout, layers, not encoder_layer_norm_first, encoder_layer_drop)
    aux = None if aux_num_out is None else nn.Linear(encoder_embed_dim, aux_num_out)
    return Wav2Vec2Model(feature_extractor, Encoder(projection, transformer), aux)


def hubert_pretrain_model(
    extractor_mode: str,
    extractor_conv_layer_config: Optional[List[Tuple[int, int, int]]],
    extractor_conv_bias: bool,
    encoder_embed_dim: int,
    encoder_projection_dropout: float,
    encoder_pos_conv_kernel: int,
    encoder_pos_conv_groups: int,
    encoder_num_layers: int,
    encoder_num_heads: int,
    encoder_attention_dropout: float,
    encoder_ff_interm_features: int,
    encoder_ff_interm_dropout: float,
    encoder_dropout: float,
    encoder_layer_norm_first: bool,
    encoder_layer_drop: float,
    mask_prob: float,
    mask_selection: str,
    mask_other: float,
    mask_length: int,
    no_mask_overlap: bool,
    mask_min_space: int,
    mask_channel_prob: float,
    mask_channel_selection: str,
    mask_channel_other: float,
    mask_channel_length: int,
    no_mask_channel_overlap: bool,
    mask_channel_min_space: int,
    skip_masked: bool,
    skip_nomask: bool,
    num_classes: int,
    final_dim: int,
    feature_grad_mult: Optional[float],
    *,
    padding_invariant: bool = False,
) -> HuBERTPretrainModel:
    """A custom model for pre-training.

    Args:
        extractor_mode, extractor_conv_layer_config, extractor_conv_bias, padding_invariant, encoder_embed_dim and all that
            begins with encoder_: as those of `wav2vec2_model`.
        mask_prob, mask_selection, mask_other, mask_length, no_mask_overlap, mask_min_space: spans of masked frames; see
            `hubert_fast.models.masking.span_mask`. ``mask_prob`` is the share of frames, before overlaps.
        mask_channel_prob, mask_channel_selection, mask_channel_other, mask_channel_length, no_mask_channel_overlap,
            mask_channel_min_space: the same for spans of zeroed channels.
        skip_masked, skip_nomask: leave out the logits of the masked, of the unmasked frames.
        num_classes: classes of the labels.
        final_dim: width in which frames and label embeddings are compared.
        feature_grad_mult: scales the gradient of the feature extractor, in (0, 1); None leaves it.

    Raises:
        ValueError: for an unknown mode, no layers, a width that the heads do not divide, or ``feature_grad_mult`` out of range.
    """
    wav2vec2 = wav2vec2_model(
        extractor_mode=extractor_mode,
        extractor_conv_layer_config=extractor_conv_layer_config,
        extractor_conv_bias=extractor_conv_bias,
        encoder_embed_dim=encoder_embed_dim,
        encoder_projection_dropout=encoder_projection_dropout,
        encoder_pos_conv_kernel=encoder_pos_conv_kernel,
        encoder_pos_conv_groups=encoder_pos_conv_groups,
        encoder_num_layers=encoder_num_layers,
        encoder_num_heads=encoder_num_heads,
        encoder_attention_dropout=encoder_attention_dropout,
        encoder_ff_interm_features=encoder_ff_interm_features,
        encoder_ff_interm_dropout=encoder_ff_interm_dropout,
        encoder_dropout=encoder_dropout,
        encoder_layer_norm_first=encoder_layer_norm_first,
        encoder_layer_drop=encoder_layer_drop,
        aux_num_out=None,
        padding_invariant=padding_invariant,
    )
    mask_generator = MaskGenerator(
        encoder_embed_dim,
        mask_prob,
        mask_selection,
        mask_other,
        mask_length,
        no_mask_overlap,
        mask_min_space,
        mask_channel_prob,
        mask_channel_selection,
        mask_channel_other,
        mask_channel_length,
        no_mask_channel_overlap,
        mask_channel_min_space,
    )
    logit_generator = LogitGenerator(encoder_embed_dim, num_classes, final_dim, skip_masked, skip_nomask)
    model = HuBERTPretrainModel(wav2vec2, mask_generator, logit_generator, feature_grad_mult)
    model.apply(_initialize)
    return model


def _initialize(module: nn.Module) -> None:
    """torchaudio's initialisation for pre-training, draw for draw; children come before their parents."""
    if isinstance(module, ConvLayerBlock):
        nn.init.kaiming_normal_(module.conv.weight)
    elif isinstance(module, ConvolutionalPositionalEmbedding):
        # torchaudio's draw goes to the weight computed from the parametrization, which is thrown away: the convolution keeps the
        # default initialisation of nn.Conv1d. The draw is made all the same, so that what follows sees the same numbers.
        nn.init.normal_(module.conv.weight, 0.0, math.sqrt(4.0 / (module.embed_dim * module.kernel_size)))
        nn.init.zeros_(module.conv.bias)
    elif isinstance(module, SelfAttention):
        # Drawn for the numbers that follow alone: the transformer's own draw replaces these weights.
        for projection in (module.k_proj, module.v_proj, module.q_proj, module.out_proj):
            nn.init.xavier_uniform_(projection.weight)
    elif isinstance(module, Transformer):
        # Every Linear from N(0, 0.02), as BERT (Devlin et al. 2019).
        for child in module.modules():
            if isinstance(child, nn.Linear):
                nn.init.normal_(child.weight, 0.0, 0.02)
                nn.init.zeros_(child.bias)


def _size(
    width: int, layers: int, heads: int, mode: str = "layer_norm", bias: bool = False, norm_first: bool = True
) -> dict[str, Any]:
    """A published size, as arguments of `wav2vec2_model`."""
    return {
        "extractor_mode": mode,
        "extractor_conv_layer_config": None,
        "extractor_conv_bias": bias,
        "encoder_embed_dim": width,
        "encoder_pos_conv_kernel": 128,
        "encoder_pos_conv_groups": 16,
        "encoder_num_layers": layers,
        "encoder_num_heads": heads,
        "encoder_ff_interm_features": 4 * width,
        "encoder_layer_norm_first": norm_first,
    }


# The published sizes. Factories add their own arguments, which are all that is in `locals()` there.
_BASE = _size(768, 12, 12, "group_norm", norm_first=False)
_LARGE_POST_NORM = _size(1024, 24, 16, "group_norm", norm_first=False)
_LARGE = _size(1024, 24, 16)
_LARGE_BIASED = _size(1024, 24, 16, bias=True)
_XLARGE = _size(1280, 48, 16)
_XLARGE_BIASED = _size(1280, 48, 16, bias=True)
_XLSR_2B = _size(1920, 48, 16, bias=True)
_PRETRAIN = dict(
    mask_selection="static",
    mask_other=0.0,
    mask_length=10,
    no_mask_overlap=False,
    mask_min_space=1,
    mask_channel_selection="static",
    mask_channel_other=0.0,
    no_mask_channel_overlap=False,
    mask_channel_min_space=1,
    skip_masked=False,
    skip_nomask=False,
)


def wav2vec2_base(
    encoder_projection_dropout: float = 0.1,
    encoder_attention_dropout: float = 0.1,
    encoder_ff_interm_dropout: float = 0.1,
    encoder_dropout: float = 0.1,
    encoder_layer_drop: float = 0.1,
    aux_num_out: Optional[int] = None,
    *,
    padding_invariant: bool = False,
) -> Wav2Vec2Model:
    """wav2vec 2.0 Base (Baevski et al. 2020): 12 layers of width 768. Arguments as those of `wav2vec2_model`."""
    return wav2vec2_model(**locals(), **_BASE)


def wav2vec2_large(
    encoder_projection_dropout: float = 0.1,
    encoder_attention_dropout: float = 0.1,
    encoder_ff_interm_dropout: float = 0.1,
    encoder_dropout: float = 0.1,
    encoder_layer_drop: float = 0.1,
    aux_num_out: Optional[int] = None,
    *,
    padding_invariant: bool = False,
) -> Wav2Vec2Model:
    """wav2vec 2.0 Large with the norms of Base (LibriSpeech): 24 layers of width 1024. Arguments as those of `wav2vec2_model`."""
    return wav2vec2_model(**locals(), **_LARGE_POST_NORM)


def wav2vec2_large_lv60k(
    encoder_projection_dropout: float = 0.1,
    encoder_attention_dropout: float = 0.0,
    encoder_ff_interm_dropout: float = 0.1,
    encoder_dropout: float = 0.0,
    encoder_layer_drop: float = 0.1,
    aux_num_out: Optional[int] = None,
    *,
    padding_invariant: bool = False,
) -> Wav2Vec2Model:
    """wav2vec 2.0 Large (Libri-Light): 24 layers of width 1024. Arguments as those of `wav2vec2_model`."""
    return wav2vec2_model(**locals(), **_LARGE_BIASED)


def wav2vec2_xlsr_300m(
    encoder_projection_dropout: float = 0.0,
    encoder_attention_dropout: float = 0.0,
    encoder_ff_interm_dropout: float = 0.0,
    encoder_dropout: float = 0.0,
    encoder_layer_drop: float = 0.0,
    aux_num_out: Optional[int] = None,
    *,
    padding_invariant: bool = False,
) -> Wav2Vec2Model:
    """XLS-R (Babu et al. 2021) of 300 million parameters: 24 layers of width 1024. Arguments as those of `wav2vec2_model`."""
    return wav2vec2_model(**locals(), **_LARGE_BIASED)


def wav2vec2_xlsr_1b(
    encoder_projection_dropout: float = 0.1,
    encoder_attention_dropout: float = 0.0,
    encoder_ff_interm_dropout: float = 0.0,
    encoder_dropout: float = 0.0,
    encoder_layer_drop: float = 0.0,
    aux_num_out: Optional[int] = None,
    *,
    padding_invariant: bool = False,
) -> Wav2Vec2Model:
    """XLS-R of 1 billion parameters: 48 layers of width 1280. Arguments as those of `wav2vec2_model`."""
    return wav2vec2_model(**locals(), **_XLARGE_BIASED)


def wav2vec2_xlsr_2b(
    encoder_projection_dropout: float = 0.1,
    encoder_attention_dropout: float = 0.0,
    encoder_ff_interm_dropout: float = 0.0,
    encoder_dropout: float = 0.0,
    encoder_layer_drop: float = 0.0,
    aux_num_out: Optional[int] = None,
    *,
    padding_invariant: bool = False,
) -> Wav2Vec2Model:
    """XLS-R of 2 billion parameters: 48 layers of width 1920. Arguments as those of `wav2vec2_model`."""
    return wav2vec2_model(**locals(), **_XLSR_2B)


def hubert_base(
    encoder_projection_dropout: float = 0.1,
    encoder_attention_dropout: float = 0.1,
    encoder_ff_interm_dropout: float = 0.0,
    encoder_dropout: float = 0.1,
    encoder_layer_drop: float = 0.05,
    aux_num_out: Optional[int] = None,
    *,
    padding_invariant: bool = False,
) -> Wav2Vec2Model:
    """HuBERT Base (Hsu et al. 2021), the encoder alone: 12 layers of width 768. Arguments as those of `wav2vec2_model`."""
    return wav2vec2_model(**locals(), **_BASE)


def hubert_large(
    encoder_projection_dropout: float = 0.0,
    encoder_attention_dropout: float = 0.0,
    encoder_ff_interm_dropout: float = 0.0,
    encoder_dropout: float = 0.0,
    encoder_layer_drop: float = 0.0,
    aux_num_out: Optional[int] = None,
    *,
    padding_invariant: bool = False,
) -> Wav2Vec2Model:
    """HuBERT Large, the encoder alone: 24 layers of width 1024. Arguments as those of `wav2vec2_model`."""
    return wav2vec2_model(**locals(), **_LARGE)


def hubert_xlarge(
    encoder_projection_dropout: float = 0.0,
    encoder_attention_dropout: float = 0.0,
    encoder_ff_interm_dropout: float = 0.0,
    encoder_dropout: float = 0.0,
    encoder_layer_drop: float = 0.0,
    aux_num_out: Optional[int] = None,
    *,
    padding_invariant: bool = False,
) -> Wav2Vec2Model:
    """HuBERT X-Large, the encoder alone: 48 layers of width 1280. Arguments as those of `wav2vec2_model`."""
    return wav2vec2_model(**locals(), **_XLARGE)


def hubert_pretrain_base(
    encoder_projection_dropout: float = 0.1,
    encoder_attention_dropout: float = 0.1,
    encoder_ff_interm_dropout: float = 0.0,
    encoder_dropout: float = 0.1,
    encoder_layer_drop: float = 0.05,
    mask_prob: float = 0.8,
    mask_channel_prob: float = 0.0,
    mask_channel_length: int = 10,
    feature_grad_mult: Optional[float] = 0.1,
    num_classes: int = 100,
    *,
    padding_invariant: bool = False,
) -> HuBERTPretrainModel:
    """HuBERT Base: 12 layers of width 768. Arguments as those of `hubert_pretrain_model`."""
    return hubert_pretrain_model(**locals(), **_BASE, **_PRETRAIN, final_dim=256)


def hubert_pretrain_large(
    encoder_projection_dropout: float = 0.0,
    encoder_attention_dropout: float = 0.0,
    encoder_ff_interm_dropout: float = 0.0,
    encoder_dropout: float = 0.0,
    encoder_layer_drop: float = 0.0,
    mask_prob: float = 0.8,
    mask_channel_prob: float = 0.0,
    mask_channel_length: int = 10,
    feature_grad_mult: Optional[float] = None,
    *,
    padding_invariant: bool = False,
) -> HuBERTPretrainModel:
    """HuBERT Large: 24 layers of width 1024, 500 classes. Arguments as those of `hubert_pretrain_model`."""
    return hubert_pretrain_model(**locals(), **_LARGE, **_PRETRAIN, final_dim=768, num_classes=500)


def hubert_pretrain_xlarge(
    encoder_projection_dropout: float = 0.0,
    encoder_attention_dropout: float = 0.0,
    encoder_ff_interm_dropout: float = 0.0,
    encoder_dropout: float = 0.0,
    encoder_layer_drop: float = 0.0,
    mask_prob: float = 0.8,
    mask_channel_prob: float = 0.0,
    mask_channel_length: int = 10,
    feature_grad_mult: Optional[float] = None,
    *,
    padding_invariant: bool = False,
) -> HuBERTPretrainModel:
    """HuBERT X-Large: 48 layers of width 1280, 500 classes. Arguments as those of `hubert_pretrain_model`."""
    return hubert_pretrain_model(**locals(), **_XLARGE, **_PRETRAIN, final_dim=1024, num_classes=500)
