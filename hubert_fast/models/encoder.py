"""The transformer encoder. Names and shapes of parameters are torchaudio's; the layers run on `Rows`."""

from __future__ import annotations

import math
from typing import Iterator, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_fast.models.rows import Rows, whole_grid
from hubert_fast.ops.masked_attention import masked_attention


class FeatureProjection(nn.Module):
    """From the extractor's features to the encoder's width: LayerNorm, Linear, dropout. ``[..., in] -> [..., out]``."""

    def __init__(self, in_features: int, out_features: int, dropout: float) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(in_features)
        self.projection = nn.Linear(in_features, out_features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.projection(self.layer_norm(x)))


class ConvolutionalPositionalEmbedding(nn.Module):
    """A grouped convolution over time whose output says where a frame stands (wav2vec 2.0, section 2).

    ``[batch, frames, channels] -> [batch, frames, channels]``
    """

    def __init__(self, embed_dim: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.kernel_size = kernel_size
        conv = nn.Conv1d(embed_dim, embed_dim, kernel_size, padding=kernel_size // 2, groups=groups)
        self.conv = nn.utils.parametrizations.weight_norm(conv, name="weight", dim=2)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.shape[1]
        x = self.conv(x.transpose(1, 2))[:, :, :frames]  # an even kernel gives one frame more than it is given
        return F.gelu(x).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention on rows: ``[rows, embed_dim] -> [rows, embed_dim]``."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be divisible by num_heads; got {embed_dim} and {num_heads}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, layout: Rows, keep: Optional[Tensor] = None) -> Tensor:
        """``keep`` ([kept] int64) names the rows whose output is wanted; None wants all."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if all(_is_plain_linear(each) for each in projections):
            weight = torch.cat([each.weight for each in projections])
            qkv = F.linear(x, weight, torch.cat([each.bias for each in projections]))
        else:
            qkv = torch.cat([each(x) for each in projections], dim=1)
        qkv = qkv.unflatten(1, (3, self.num_heads, self.head_dim))
        dropout = self.dropout if self.training else 0.0
        out = masked_attention(qkv, layout.offsets, layout.key_lengths, max_frames=layout.frames, dropout_p=dropout)
        out = out.flatten(1)
        return self.out_proj(out if keep is None else out.index_select(0, keep))


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether calling the module is just its product: not an adapter in its place, not hooked, not sharded by itself."""
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks


class FeedForward(nn.Module):
    """Linear, GELU, dropout, Linear, dropout: ``[..., io_features] -> [..., io_features]``."""

    def __init__(
        self, io_features: int, intermediate_features: int, intermediate_dropout: float, output_dropout: float
    ) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(io_features, intermediate_features)
        self.intermediate_dropout = nn.Dropout(intermediate_dropout)
        self.output_dense = nn.Linear(intermediate_features, io_features)
        self.output_dropout = nn.Dropout(output_dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.intermediate_dropout(F.gelu(self.intermediate_dense(x)))
        return self.output_dropout(self.output_dense(x))


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each with a residual and a LayerNorm before (``layer_norm_first``) or after it."""

    def __init__(
        self, attention: SelfAttention, dropout: float, layer_norm_first: bool, feed_forward: FeedForward
    ) -> None:
        super().__init__()
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(attention.embed_dim)
        self.layer_norm_first = layer_norm_first
        self.feed_forward = feed_forward
        self.final_layer_norm = nn.LayerNorm(attention.embed_dim)

    def forward(self, x: Tensor, layout: Rows, keep: Optional[Tensor] = None) -> Tensor:
        """``[rows, dim] -> [rows, dim]``, or ``[kept, dim]`` where ``keep`` ([kept] int64) says which rows are wanted."""
        residual = x if keep is None else x.index_select(0, keep)
        if self.layer_norm_first:
            x = self.layer_norm(x)
        x = residual + self.dropout(self.attention(x, layout, keep))
        if self.layer_norm_first:
            return x + self.feed_forward(self.final_layer_norm(x))
        x = self.layer_norm(x)
        return self.final_layer_norm(x + self.feed_forward(x))


class Transformer(nn.Module):
    """Positional embedding, layers with LayerDrop (Fan et al. 2020), and the LayerNorm before or after them."""

    def __init__(
        self,
        pos_conv_embed: ConvolutionalPositionalEmbedding,
        dropout: float,
        layers: nn.ModuleList,
        layer_norm_first: bool,
        layer_drop: float,
    ) -> None:
        super().__init__()
        self.pos_conv_embed = pos_conv_embed
        self.layer_norm = nn.LayerNorm(pos_conv_embed.embed_dim)
        self.layer_norm_first = layer_norm_first
        self.layer_drop = layer_drop
        self.dropout = nn.Dropout(dropout)
        self.layers = layers

    def forward(
        self,
        x: Tensor,  # [batch, frames, dim]
        layout: Optional[Rows] = None,
        keep: Optional[Tensor] = None,  # [kept] int64, rows of the layout
    ) -> Tensor:
        """The rows of ``layout`` after the last layer: ``[rows, dim]``, or ``[kept, dim]``.

        Without a layout every frame is valid and a row, and the result has the shape of ``x``.
        """
        if layout is None:
            return self.forward(x, whole_grid(*x.shape[:2], None, x.device)).unflatten(0, x.shape[:2])
        x = self._preprocess(x, layout)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            wanted = keep if i == last else None
            x = self._drop_or_run(layer, x, layout, wanted)
        return x if self.layer_norm_first else self.layer_norm(x)

    def intermediate_outputs(self, x: Tensor, layout: Rows, num_layers: Optional[int] = None) -> Iterator[Tensor]:
        """The rows after each of the first ``num_layers`` layers; LayerDrop and the last LayerNorm do not take part."""
        if num_layers is not None and not 0 < num_layers <= len(self.layers):
            raise ValueError(f"num_layers must be in [1, {len(self.layers)}]; got {num_layers}")
        x = self._preprocess(x, layout)
        for layer in self.layers[:num_layers]:
            x = layer(x, layout)
            yield x

    def _preprocess(self, x: Tensor, layout: Rows) -> Tensor:
        x = layout.pack(x + self.pos_conv_embed(x))
        if self.layer_norm_first:
            x = self.layer_norm(x)
        return self.dropout(x)

    def _drop_or_run(self, layer: EncoderLayer, x: Tensor, layout: Rows, keep: Optional[Tensor]) -> Tensor:
        if not self.training:
            return layer(x, layout, keep)
        # Drawn whatever layer_drop is: torchaudio draws too, and the random numbers that follow are to be the same.
        draw = torch.rand(1)
        if torch.compiler.is_compiling():
            # A graph cannot skip a layer on a number drawn as it runs, so a dropped layer is computed and not used.
            if self.layer_drop == 0.0:
                return layer(x, layout, keep)
            dropped = (draw <= self.layer_drop).to(x.device)
            return torch.where(dropped, x if keep is None else x.index_select(0, keep), layer(x, layout, keep))
        if draw.item() <= self.layer_drop:
            return x if keep is None else x.index_select(0, keep)
        return layer(x, layout, keep)


class Encoder(nn.Module):
    """Feature projection and transformer."""

    def __init__(self, feature_projection: FeatureProjection, transformer: Transformer) -> None:
        super().__init__()
        self.feature_projection = feature_projection
        self.transformer = transformer

    def project(self, features: Tensor, layout: Rows) -> Tensor:
        """Projected features on the grid, with 0 in the padding: ``[batch, frames, dim]``."""
        if layout.index is not None:
            return layout.unpack(self.feature_projection(layout.pack(features)))
        x = self.feature_projection(features)
        if layout.key_lengths is None:
            return x
        padding = torch.arange(layout.frames, device=x.device) >= layout.key_lengths.to(x.device)[:, None]
        return x.masked_fill(padding[:, :, None], 0.0)

    def forward(
        self,
        features: Tensor,  # [batch, frames, features]
        lengths: Optional[Tensor] = None,  # [batch], frames
    ) -> Tensor:  # [batch, frames, dim]
        layout = whole_grid(*features.shape[:2], lengths, features.device)
        return self.transformer(self.project(features, layout), layout).unflatten(0, features.shape[:2])

    def extract_features(
        self, features: Tensor, lengths: Optional[Tensor] = None, num_layers: Optional[int] = None
    ) -> list[Tensor]:
        """The outputs of the first ``num_layers`` transformer layers (None: all), each ``[batch, frames, dim]``."""
        layout = whole_grid(*features.shape[:2], lengths, features.device)
        x = self.project(features, layout)
        outputs = self.transformer.intermediate_outputs(x, layout, num_layers)
        return [each.unflatten(0, features.shape[:2]) for each in outputs]


def initialize_positional_embedding(module: ConvolutionalPositionalEmbedding) -> None:
    """torchaudio's initialisation, draw for draw.

    Its normal draw goes to the weight computed from the parametrization, which is thrown away: the convolution keeps the
    default initialisation of ``nn.Conv1d``. The draw is made all the same, so that what follows sees the same numbers.
    """
    std = math.sqrt(4.0 / (module.embed_dim * module.kernel_size))
    with torch.no_grad():
        module.conv.weight.normal_(0.0, std)
        module.conv.bias.zero_()


def initialize_attention(module: SelfAttention) -> None:
    for projection in (module.k_proj, module.v_proj, module.q_proj):
        nn.init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2))
    nn.init.xavier_uniform_(module.out_proj.weight)
    nn.init.zeros_(module.out_proj.bias)


def initialize_transformer(module: Transformer) -> None:
    """Every Linear from N(0, 0.02), as BERT (Devlin et al. 2019)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, 0.0, 0.02)
            nn.init.zeros_(child.bias)
