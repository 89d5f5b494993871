"""A transformer layer. Names and shapes of parameters are torchaudio's.

Its modules take torchaudio's grids, ``[batch, frames, dim]``, from whoever calls them, and `Rows` with ``layout=`` from this
package. What somebody hooked or put in a module's place is called with grids, as torchaudio calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_fast import cpu
from hubert_fast.exporters import is_exporting
from hubert_fast.models.attention_mask import attention_mask as mask_of_lengths
from hubert_fast.models.attention_mask import grid_layout
from hubert_fast.models.plain import (
    Stream,
    Update,
    add,
    add_and_normalize,
    add_then_normalize,
    before_dropout,
    composes,
    gelu_of_product,
    is_fusable,
    is_plain,
    normalize,
    product,
    projection,
    rate,
    wanted_rows,
)
from hubert_fast.models.rows import Rows
from hubert_fast.models.wrappers import takes_rows
from hubert_fast.ops.arguments import autocast_dtype
from hubert_fast.ops.bias_gelu_dropout import bias_gelu_dropout
from hubert_fast.ops.feed_forward import feed_forward
from hubert_fast.ops.linear import linear
from hubert_fast.ops.masked_attention import bias_of_heads, masked_attention
from hubert_fast.ops.operator import is_plain_call
from hubert_fast.switches import switches


class LayerSeeds(NamedTuple):
    """Seeds of the dropout masks of a layer, each ``[]`` int64; None: drawn where it is needed, if at all."""

    attention: Optional[Tensor] = None  # on the attention weights
    attended: Optional[Tensor] = None  # after the attention
    hidden: Optional[Tensor] = None  # inside the feed-forward
    output: Optional[Tensor] = None  # after it
    columns: Optional[Tensor] = None  # [frames or more] int32: `dropout_columns` of the first


def on_grid(
    call: Callable[[Tensor], Tensor],  # [batch, frames, dim] -> [batch, frames, dim]
    x: Tensor,  # [rows, dim]
    layout: Rows,
    keep: Optional[Tensor] = None,  # [kept] int64
) -> Tensor:  # [rows, dim], or [kept, dim]
    """Rows through ``call``, which is given the grid; that is 0 where there is no row."""
    rows = layout.pack(call(layout.unpack(x)))
    return rows if keep is None else rows.index_select(0, keep)


def mask_of_grid(layout: Rows, x: Tensor) -> Optional[Tensor]:
    """torchaudio's attention mask of a layout, ``[batch, 1, frames, frames]`` in the dtype of ``x``; None: all keys."""
    if layout.mask is not None or (lengths := layout.lengths()) is None:
        return layout.mask
    return mask_of_lengths(lengths, layout.frames, x.dtype, x.device)


class SelfAttention(nn.Module):
    """Multi-head self-attention, with torchaudio's interface."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be divisible by num_heads; got {embed_dim} and {num_heads}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = dropout
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        x: Tensor,  # [batch, frames, embed_dim]
        attention_mask: Optional[Tensor] = None,  # [batch, 1, frames, frames]
        position_bias: Optional[Tensor] = None,
        key_padding_mask: Optional[Tensor] = None,
        *,
        layout: Optional[Rows] = None,
        keep: Optional[Tensor] = None,  # [kept] int64
    ) -> Union[tuple[Tensor, None], Tensor]:
        """``([batch, frames, embed_dim], None)``; ``attention_mask`` is added to the scores.

        ``position_bias`` and ``key_padding_mask`` are WavLM's, and not read, as in torchaudio.

        With a ``layout`` ``x`` is its rows, and so is the result, ``[rows, embed_dim]``; ``keep`` names those that are wanted,
        see ``kept_offsets`` of `Rows`.

        Raises:
            ValueError: for a grid of another width, or a mask of another shape.
        """
        if layout is not None:
            return self.out_proj(self.heads(x, layout, keep))
        if x.ndim != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(f"x must be [batch, frames, {self.embed_dim}]; got shape {tuple(x.shape)}")
        rows = self.out_proj(self.heads(x.flatten(0, 1), grid_layout(x, attention_mask)))
        return rows.view(x.shape), None

    def heads(
        self,
        x: Tensor,  # [rows, embed_dim]
        layout: Rows,
        keep: Optional[Tensor] = None,  # [kept] int64
        seeds: LayerSeeds = LayerSeeds(),
    ) -> Tensor:  # [rows, embed_dim], or [kept, embed_dim]
        """The output projection's input: the heads side by side."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if self._composes(x, layout):
            out = self._attend_grid(*(projection(each, x) for each in projections), layout)
            return out if keep is None else out.index_select(0, keep)
        if all(is_plain(each, nn.Linear) and each.bias is not None for each in projections):
            weights, biases = ([getattr(each, name) for each in projections] for name in ("weight", "bias"))
            # Attention knows the gradient of every row in its registers; a product would read it again for the biases.
            elsewhere = switches.attention_bias_gradient and torch.is_grad_enabled() and is_plain_call((x, *biases))
            qkv = linear(x, weights, biases, learn_biases=not elsewhere)
            qkv_bias = bias_of_heads(biases, self.num_heads) if elsewhere else None
        else:
            qkv, qkv_bias = torch.cat([each(x) for each in projections], dim=1), None
        alone = keep is not None and layout.kept_offsets is not None and switches.last_queries
        out = masked_attention(
            qkv.unflatten(1, (3, self.num_heads, self.head_dim)),
            layout.offsets,
            layout.key_lengths,
            max_frames=layout.frames,
            dropout_p=self.dropout if self.training else 0.0,
            seed=seeds.attention,
            qkv_bias=qkv_bias,
            columns=seeds.columns,
            query_rows=keep if alone else None,
            query_offsets=layout.kept_offsets if alone else None,
        ).flatten(1)
        return out if keep is None or alone else out.index_select(0, keep)

    def _composes(self, x: Tensor, layout: Rows) -> bool:
        """Whether `_attend_grid` does it: on a CPU where nothing is padded or dropped, for exporters, and with a mask."""
        if layout.mask is not None:
            return True  # which no operator takes
        if layout.index is not None:
            return False
        whole = layout.key_lengths is None and (self.dropout == 0.0 or not self.training)
        if whole and composes(x) and cpu.product_dtype(x.device, autocast_dtype(x.device) or x.dtype) == x.dtype:
            return True
        return is_exporting()

    def _attend_grid(self, query: Tensor, key: Tensor, value: Tensor, layout: Rows) -> Tensor:
        """Attention of all frames of each sequence: ``[rows, embed_dim] -> [rows, embed_dim]``."""
        shape = layout.batch, layout.frames, self.num_heads, self.head_dim
        heads = (each.view(shape).transpose(1, 2) for each in (query, key, value))
        mask = layout.key_mask() if layout.mask is None else layout.mask
        settings = {"attn_mask": mask, "dropout_p": self.dropout if self.training else 0.0}
        return F.scaled_dot_product_attention(*heads, **settings).transpose(1, 2).reshape(-1, self.embed_dim)


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
        return self.output_dropout(self.output_dense(self._hidden(x.flatten(0, -2)))).reshape(x.shape)

    def update(self, x: Tensor, seed: Optional[Tensor] = None) -> tuple[Tensor, Optional[Tensor]]:
        """The second product less its bias, and the bias: ``[rows, io_features] -> [rows, io_features]``."""
        first, second, dropout = self.intermediate_dense, self.output_dense, self.intermediate_dropout
        plain = is_fusable(dropout) and all(is_plain(each, nn.Linear) for each in (first, second))
        if plain and first.bias is not None and not composes(x):
            value = feed_forward(x, first.weight, first.bias, second.weight, dropout_p=rate(dropout), seed=seed)
            return value, second.bias
        return product(second, self._hidden(x, seed))

    def _hidden(self, x: Tensor, seed: Optional[Tensor] = None) -> Tensor:
        """The second product's input: ``[rows, io_features] -> [rows, intermediate_features]``."""
        first, dropout = self.intermediate_dense, self.intermediate_dropout
        if is_fusable(dropout) and rate(dropout) == 0.0 and composes(x):
            return gelu_of_product(first, x)
        value, bias = product(first, x)
        if is_fusable(dropout):
            return bias_gelu_dropout(value, bias, dropout_p=rate(dropout), seed=seed)
        return dropout(bias_gelu_dropout(value, bias))


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each with a residual and a LayerNorm before (``layer_norm_first``) or after it.

    Between the products there is at most one pass over memory each: bias, GELU and dropout; bias, dropout, residual and
    LayerNorm.
    """

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

    def forward(
        self,
        x: Tensor,  # [batch, frames, dim]
        attention_mask: Optional[Tensor] = None,  # [batch, 1, frames, frames]
        position_bias: Optional[Tensor] = None,
        key_padding_mask: Optional[Tensor] = None,
        *,
        layout: Optional[Rows] = None,
        keep: Optional[Tensor] = None,  # [kept] int64
        seeds: Optional[LayerSeeds] = None,
    ) -> Union[tuple[Tensor, None], Tensor]:
        """``([batch, frames, dim], None)``, with arguments as those of `SelfAttention`.

        With a ``layout`` the rows of `stream`, ``[rows, dim]`` or ``[kept, dim]``.
        """
        if layout is not None:
            return self.stream(Stream(x), layout, keep, seeds).x
        return self.stream(Stream(x.flatten(0, 1)), grid_layout(x, attention_mask)).x.view(x.shape), None

    def stream(
        self,
        x: Stream,  # [rows, dim]
        layout: Rows,
        keep: Optional[Tensor] = None,  # [kept] int64
        seeds: Optional[LayerSeeds] = None,
    ) -> Stream:  # [rows, dim], or [kept, dim]
        """The stream after the layer, on the rows that ``keep`` names; None: all.

        ``seeds``: of this layer's dropout masks; None: each is drawn where it is needed.
        """
        if keep is not None and not takes_rows(self.feed_forward, FeedForward):
            return wanted_rows(self.stream(x, layout, None, seeds), keep)  # it is to see all frames
        seeds = seeds or LayerSeeds()
        if self.layer_norm_first:
            normed = Stream(normalize(self.layer_norm, x.x))
            attended = self._attend(normed, layout, keep, seeds)
            normed, stream = add_and_normalize(self.final_layer_norm, x.x, attended, keep)
            return Stream(add(stream, self._feed_forward(Stream(normed), layout, seeds)))
        attended = self._attend(x, layout, keep, seeds)
        x = add_then_normalize(self.layer_norm, x.x, attended, keep)
        return add_then_normalize(self.final_layer_norm, x.x, self._feed_forward(x, layout, seeds))

    def _attend(self, x: Stream, layout: Rows, keep: Optional[Tensor], seeds: LayerSeeds) -> Update:
        attention = self.attention
        if is_plain(attention, SelfAttention):
            value, bias = product(attention.out_proj, attention.heads(x.operand, layout, keep, seeds))
        elif takes_rows(attention, SelfAttention):
            value, bias = attention(x.x, layout=layout, keep=keep), None
        else:
            value, bias = on_grid(lambda grid: self._call_attention(grid, layout), x.x, layout, keep), None
        return before_dropout(self.dropout, value, bias, seeds.attended)

    def _call_attention(self, grid: Tensor, layout: Rows) -> Tensor:
        """Call a hooked or replaced attention as torchaudio does: ``[batch, frames, dim] -> [batch, frames, dim]``."""
        mask = mask_of_grid(layout, grid)
        return self.attention(grid, attention_mask=mask, position_bias=None, key_padding_mask=None)[0]

    def _feed_forward(self, x: Stream, layout: Rows, seeds: LayerSeeds) -> Update:
        block = self.feed_forward
        if is_plain(block, FeedForward):
            value, bias = block.update(x.operand, seeds.hidden)
            return before_dropout(block.output_dropout, value, bias, seeds.output)
        whole = takes_rows(block, FeedForward)
        return Update(block(x.x) if whole else on_grid(block, x.x, layout), None, 0.0, None)
