"""The transformer encoder. Names and shapes of parameters are torchaudio's; the layers run on `Rows`."""

from __future__ import annotations

import itertools
from typing import Iterator, NamedTuple, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_hook_of_all_modules
from torch.nn.utils import parametrizations, parametrize

from hubert_fast import cpu
from hubert_fast.exporters import is_exporting
from hubert_fast.models.masking import MaskGenerator
from hubert_fast.models.plain import (
    Stream,
    Update,
    add,
    add_and_normalize,
    add_then_normalize,
    before_dropout,
    composes,
    drop,
    gelu_of_product,
    is_fusable,
    is_plain,
    normalize,
    normalized_stream,
    product,
    projection,
    rate,
)
from hubert_fast.models.plan import StepPlan
from hubert_fast.models.ranks import as_built, await_every_gradient, beside, gathers
from hubert_fast.models.rows import Rows, valid_rows, whole_grid
from hubert_fast.ops.arguments import SEED_RANGE, autocast_dtype
from hubert_fast.ops.bias_gelu_dropout import bias_gelu_dropout
from hubert_fast.ops.feed_forward import feed_forward
from hubert_fast.ops.host_tensors import may_decide_shapes
from hubert_fast.ops.linear import linear
from hubert_fast.ops.mask_fill import mask_fill
from hubert_fast.ops.masked_attention import bias_of_heads, dropout_columns, masked_attention
from hubert_fast.ops.operator import is_plain_call
from hubert_fast.ops.positional_conv import positional_conv
from hubert_fast.switches import switches

_MASKS = 4  # of dropout in a layer, as `LayerSeeds` names them


class LayerSeeds(NamedTuple):
    """Seeds of the dropout masks of a layer, each ``[]`` int64; None: drawn where it is needed, if at all."""

    attention: Optional[Tensor] = None  # on the attention weights
    attended: Optional[Tensor] = None  # after the attention
    hidden: Optional[Tensor] = None  # inside the feed-forward
    output: Optional[Tensor] = None  # after it
    columns: Optional[Tensor] = None  # [frames or more] int32: `dropout_columns` of the first


class Seeds(NamedTuple):
    """Seeds of the dropout masks of a step, each ``[]`` int64; None: drawn where it is needed, if at all."""

    projection: Optional[Tensor] = None
    embedding: Optional[Tensor] = None  # of the transformer's input
    attention: Optional[Tensor] = None  # [layers] int64: the first of each layer
    layers: Optional[Sequence[LayerSeeds]] = None

    @classmethod
    def of(cls, drawn: Optional[Tensor]) -> Seeds:
        """The seeds in ``drawn``, ``[2 + 4 * layers]`` int64."""
        if drawn is None:
            return cls()
        projection, embedding = drawn[:2].unbind()
        by_place = drawn[2:].view(_MASKS, -1)
        return cls(projection, embedding, by_place[0], [LayerSeeds(*each.unbind()) for each in by_place.unbind(1)])

    def of_layer(self, i: int) -> Optional[LayerSeeds]:
        """The seeds of layer ``i``, if there are any."""
        return None if self.layers is None else self.layers[i]


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
        self.conv = parametrizations.weight_norm(conv, name="weight", dim=2)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.shape[1]
        x = self._convolved(x.transpose(1, 2))[:, :, :frames]  # an even kernel gives one frame more than it is given
        return F.gelu(x).transpose(1, 2)

    def _convolved(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x.device) or x.dtype
        wide = cpu.convolution_dtype(x.device, dtype, self.embed_dim // self.conv.groups)
        if wide == dtype or not torch.is_autocast_enabled(x.device.type):
            return self.conv(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.conv(x.to(wide)).to(dtype)

    def add_to(self, x: Tensor, layout: Rows) -> Tensor:
        """Rows plus their positional embedding: ``[rows, channels] -> [rows, channels]``."""
        if is_exporting() or not (is_plain(self, ConvolutionalPositionalEmbedding) and _is_plain_conv(self.conv)):
            return x + layout.pack(self(layout.unpack(x)))
        weight, gain = _filters(self.conv)
        return positional_conv(
            x, weight, self.conv.bias, layout.offsets, groups=self.conv.groups, max_frames=layout.frames, gain=gain
        )


def _is_plain_conv(conv: nn.Module) -> bool:
    """Whether ``conv`` is a convolution as `ConvolutionalPositionalEmbedding` makes it, parametrized or not."""
    kind = type(conv).__base__ if parametrize.is_parametrized(conv) else type(conv)
    return kind is nn.Conv1d and is_plain(conv, type(conv)) and conv.bias is not None


def _filters(conv: nn.Conv1d) -> tuple[Tensor, Optional[Tensor]]:
    """The filters and, where they are weight-normalised over dim 2, the gain: asking for ``conv.weight`` would compute them."""
    if parametrize.is_parametrized(conv, "weight"):
        steps = conv.parametrizations.weight
        if len(steps) == 1 and type(steps[0]) is parametrizations._WeightNorm and steps[0].dim == 2:
            return steps.original1, steps.original0
    return conv.weight, None


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
        """``keep`` ([kept] int64) names the rows whose output is wanted, see ``kept_offsets`` of `Rows`; None wants all."""
        return self.out_proj(self.heads(x, layout, keep))

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
        """Whether `_attend_grid` may do it: on a CPU, where nothing is padded and nothing dropped, and for exporters."""
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
        settings = {"attn_mask": layout.key_mask(), "dropout_p": self.dropout if self.training else 0.0}
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
        x: Union[Tensor, Stream],  # [rows, dim]
        layout: Rows,
        keep: Optional[Tensor] = None,  # [kept] int64
        seeds: Optional[LayerSeeds] = None,
    ) -> Union[Tensor, Stream]:
        """``[rows, dim] -> [rows, dim]``, or ``[kept, dim]`` where ``keep`` says which rows are wanted.

        Given a `Stream` it gives one. ``seeds``: of this layer's dropout masks; None: each is drawn where it is needed.
        """
        if not isinstance(x, Stream):
            return self.forward(Stream(x), layout, keep, seeds).x
        seeds = seeds or LayerSeeds()
        if self.layer_norm_first:
            normed = Stream(normalize(self.layer_norm, x.x))
            attended = self._attend(normed, layout, keep, seeds)
            normed, stream = add_and_normalize(self.final_layer_norm, x.x, attended, keep)
            return Stream(add(stream, self._feed_forward(Stream(normed), seeds)))
        attended = self._attend(x, layout, keep, seeds)
        x = add_then_normalize(self.layer_norm, x.x, attended, keep)
        return add_then_normalize(self.final_layer_norm, x.x, self._feed_forward(x, seeds))

    def _attend(self, x: Stream, layout: Rows, keep: Optional[Tensor], seeds: LayerSeeds) -> Update:
        attention = self.attention
        if is_plain(attention, SelfAttention):
            value, bias = product(attention.out_proj, attention.heads(x.operand, layout, keep, seeds))
        else:
            value, bias = attention(x.x, layout, keep), None
        return before_dropout(self.dropout, value, bias, seeds.attended)

    def _feed_forward(self, x: Stream, seeds: LayerSeeds) -> Update:
        block = self.feed_forward
        if not is_plain(block, FeedForward):
            return Update(block(x.x), None, 0.0, None)
        value, bias = block.update(x.operand, seeds.hidden)
        return before_dropout(block.output_dropout, value, bias, seeds.output)


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
        x: Tensor,  # [rows, dim], or [batch, frames, dim] without a layout
        layout: Optional[Rows] = None,
        keep: Optional[Tensor] = None,  # [kept] int64, rows of the layout
        seeds: Optional[Seeds] = None,
    ) -> Tensor:
        """The rows after the last layer: ``[rows, dim]``, or ``[kept, dim]``.

        Without a layout every frame is valid and a row, and the result has the shape of ``x``. Without ``seeds`` they are
        drawn here.
        """
        if layout is None:
            rows = self.forward(x.flatten(0, 1), whole_grid(*x.shape[:2], None, x.device))
            return rows.reshape(x.shape)
        return self.stream(x, layout, keep, seeds).x

    def stream(self, x: Tensor, layout: Rows, keep: Optional[Tensor] = None, seeds: Optional[Seeds] = None) -> Stream:
        """The result of `forward` on a layout, with its copy for a product where layers make one."""
        seeds = Seeds.of(self.draw_seeds(x.device)) if seeds is None else seeds
        seeds = self.with_columns(seeds, layout)
        stream = self.embed(x, layout, seeds.embedding)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            wanted = keep if i == last else None
            stream = self._drop_or_run(layer, stream, layout, wanted, seeds.of_layer(i))
        return self.finish(stream)

    def intermediate_outputs(self, x: Tensor, layout: Rows, num_layers: Optional[int] = None) -> Iterator[Tensor]:
        """The rows after each of the first ``num_layers`` layers; LayerDrop and the last LayerNorm do not take part."""
        if num_layers is not None and not 0 < num_layers <= len(self.layers):
            raise ValueError(f"num_layers must be in [1, {len(self.layers)}]; got {num_layers}")
        stream = self.embed(x, layout)
        for layer in self.layers[:num_layers]:
            stream = run_layer(layer, stream, layout)
            yield stream.x

    def embed(self, x: Tensor, layout: Rows, seed: Optional[Tensor] = None) -> Stream:
        """The first layer's input: rows plus their positional embedding, normalised before pre-norm layers."""
        embedding = self.pos_conv_embed
        if isinstance(embedding, ConvolutionalPositionalEmbedding):
            x = embedding.add_to(x, layout)
        else:
            x = x + layout.pack(embedding(layout.unpack(x)))
        if self.layer_norm_first:
            return normalized_stream(self.layer_norm, x, self.dropout, seed)
        return Stream(drop(self.dropout, x, seed))

    def finish(self, stream: Stream) -> Stream:
        """The output, given the stream after the last layer."""
        return stream if self.layer_norm_first else normalized_stream(self.layer_norm, stream.x)

    def draw_seeds(self, device: torch.device) -> Optional[Tensor]:
        """Random numbers for `Seeds.of`, from the default generator of ``device``; None where nothing is dropped."""
        if not self.training or not (_drops(self) or any(map(_drops, self.layers))):
            return None
        return self.new_seeds(device)

    def new_seeds(self, device: torch.device) -> Tensor:
        """Random numbers for `Seeds.of`: ``[2 + 4 * layers]`` int64."""
        return torch.randint(*SEED_RANGE, (self.seed_count,), device=device)

    def with_columns(self, seeds: Seeds, layout: Rows) -> Seeds:
        """``seeds`` with the columns of the attention masks of all layers, made in one launch where there is a use for them."""
        attentions = [getattr(layer, "attention", None) for layer in self.layers]
        if seeds.layers is None or not any(
            type(each) is SelfAttention and each.training and each.dropout > 0.0 for each in attentions
        ):
            return seeds
        columns = dropout_columns(seeds.attention, layout.frames)
        if columns is None:
            return seeds
        layers = [each._replace(columns=own) for each, own in zip(seeds.layers, columns.unbind())]
        return seeds._replace(layers=layers)

    @property
    def seed_count(self) -> int:
        """How many seeds a step has."""
        return 2 + _MASKS * len(self.layers)

    def draw_dropped_layers(self) -> list[bool]:
        """Whether LayerDrop leaves out each layer: a number a layer from torch's default generator on the CPU."""
        return [torch.rand(1).item() <= self.layer_drop and self.layer_drop > 0.0 for _ in self.layers]

    def _drop_or_run(
        self, layer: nn.Module, stream: Stream, layout: Rows, keep: Optional[Tensor], seeds: Optional[LayerSeeds]
    ) -> Stream:
        arguments = (stream, layout, keep) if seeds is None else (stream, layout, keep, seeds)
        if not self.training:
            return run_layer(layer, *arguments)
        compiling = torch.compiler.is_compiling()
        capturing = not compiling and _is_capturing(stream.x)
        # Drawn whatever layer_drop is: torchaudio draws too, and the random numbers that follow are to be the same.
        draw = torch.rand(1, device=stream.x.device if capturing else None)
        if self.layer_drop == 0.0:
            return run_layer(layer, *arguments)
        if compiling or capturing:
            # A graph cannot skip a layer on a number drawn as it runs, so a dropped layer is computed and not used.
            dropped = (draw <= self.layer_drop).to(stream.x.device, non_blocking=True)
            (before, narrow), after = wanted_rows(stream, keep), run_layer(layer, *arguments)
            both = narrow is not None and after.narrow is not None
            return Stream(
                torch.where(dropped, before, after.x), torch.where(dropped, narrow, after.narrow) if both else None
            )
        if draw.item() > self.layer_drop:
            return run_layer(layer, *arguments)
        before = wanted_rows(stream, keep)
        if gathers(layer):
            # Other ranks wait for this one to gather the layer's weights with them, so it is computed and not used.
            return before._replace(
                x=beside(before.x, [each for each in run_layer(layer, *arguments) if each is not None])
            )
        if await_every_gradient():
            return before._replace(x=beside(before.x, layer.parameters()))
        return before


def run_layer(
    layer: nn.Module,
    stream: Stream,
    layout: Rows,
    keep: Optional[Tensor] = None,
    seeds: Optional[LayerSeeds] = None,
) -> Stream:
    """The stream after ``layer``; one that is not as it was built is given a tensor and gives one."""
    arguments = (layout, keep) if seeds is None else (layout, keep, seeds)
    if is_plain(layer, EncoderLayer) and not has_hook_of_all_modules():
        return layer(stream, *arguments)
    return Stream(layer(stream.x, *arguments))


def wanted_rows(stream: Stream, keep: Optional[Tensor]) -> Stream:
    """The rows of a stream that ``keep`` ([kept] int64) names; None: all."""
    if keep is None:
        return stream
    return Stream(*(None if each is None else each.index_select(0, keep) for each in stream))


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _drops(module: nn.Module) -> bool:
    """Whether a transformer's input or a layer has a use for seeds."""
    module, kind = as_built(module)
    if kind is Transformer:
        dropouts: list[nn.Module] = [module.dropout]
    elif kind is EncoderLayer:
        feed_forward, attention = module.feed_forward, module.attention
        dropouts = [module.dropout]
        if type(feed_forward) is FeedForward:
            dropouts += [feed_forward.intermediate_dropout, feed_forward.output_dropout]
        if type(attention) is SelfAttention and attention.dropout > 0.0:
            return True
    else:
        return False  # what stands in a layer's place draws for itself
    return any(type(each) is nn.Dropout and rate(each) > 0.0 for each in dropouts)


class Encoder(nn.Module):
    """Feature projection and transformer."""

    def __init__(self, feature_projection: FeatureProjection, transformer: Transformer) -> None:
        super().__init__()
        self.feature_projection = feature_projection
        self.transformer = transformer

    def draw_seeds(self, device: torch.device) -> Optional[Tensor]:
        """Random numbers for `Seeds.of`, from the default generator of ``device``; None where nothing is dropped."""
        projection = self.feature_projection
        if not hasattr(self.transformer, "draw_seeds"):
            return None  # what stands in the transformer's place draws for itself
        if self.training and as_built(projection)[1] is FeatureProjection and type(projection.dropout) is nn.Dropout:
            if rate(projection.dropout) > 0.0:
                return self.transformer.new_seeds(device)
        return self.transformer.draw_seeds(device)

    def masked_stream(self, features: Tensor, plan: StepPlan, mask_generator: MaskGenerator) -> Stream:
        """The transformer's output on the rows that the plan keeps: ``[batch, frames, features] -> [kept, dim]``."""
        drawn = self.draw_seeds(features.device)
        seeds = Seeds.of(drawn)
        x = self.masked_rows(features, plan, mask_generator, seeds.projection)
        arguments = (x, plan.kept_layout, plan.keep) if drawn is None else (x, plan.kept_layout, plan.keep, seeds)
        if is_plain(self.transformer, Transformer) and not has_hook_of_all_modules():
            return self.transformer.stream(*arguments)
        return Stream(self.transformer(*arguments))

    def masked_rows(
        self,
        features: Tensor,  # [batch, frames, features], or [rows, features]
        plan: StepPlan,
        mask_generator: MaskGenerator,
        seed: Optional[Tensor] = None,
    ) -> Tensor:
        """The transformer's input for masked prediction: ``[rows, dim]``."""
        layout = plan.layout
        if not is_plain(mask_generator, MaskGenerator):
            grid, mask = layout.unpack(self._rows(_packed(features, layout), layout)), layout.unpack(plan.mask)
            return layout.pack(mask_generator(grid, mask=mask)[0])
        value, bias, dropout_p, seed = self._project(features, layout, seed)
        x = mask_fill(
            value,
            bias,
            mask_generator.mask_embedding,
            plan.mask,
            padding=layout.padding(),
            dropout_p=dropout_p,
            seed=seed,
        )
        if plan.channel_mask is None:
            return x
        return x.masked_fill(plan.channel_mask[layout.sequence(x.device)], 0.0)

    def _project(
        self, features: Tensor, layout: Rows, seed: Optional[Tensor] = None, *, passes_follow: bool = True
    ) -> Update:
        """The projected features; the bias is added already where there is nothing to drop and no pass that could add it."""
        module = self.feature_projection
        if not is_plain(module, FeatureProjection):
            return Update(module(_packed(features, layout)), None, 0.0, None)
        index = layout.index if features.ndim == 3 else None
        x = normalize(module.layer_norm, features.flatten(0, -2), index)
        if not passes_follow and is_fusable(module.dropout) and rate(module.dropout) == 0.0:
            return before_dropout(module.dropout, projection(module.projection, x), None)
        return before_dropout(module.dropout, *product(module.projection, x), seed)

    def forward(
        self,
        features: Tensor,  # [batch, frames, features]
        lengths: Optional[Tensor] = None,  # [batch], frames
        *,
        plan: Optional[StepPlan] = None,
        mask_generator: Optional[MaskGenerator] = None,
    ) -> Tensor:  # [batch, frames, dim]; 0 in the padding
        """The transformer's output, ``[batch, frames, dim]``; ``lengths`` (``[batch]``, frames) tell the padding.

        With ``plan`` and ``mask_generator`` it is the rows of `masked_stream`.
        """
        if plan is not None:
            return self.masked_stream(features, plan, mask_generator).x
        layout = _layout(features, lengths)
        return layout.unpack(self.transformer(self._rows(layout.pack(features), layout), layout))

    def extract_features(
        self, features: Tensor, lengths: Optional[Tensor] = None, num_layers: Optional[int] = None
    ) -> list[Tensor]:
        """The outputs of the first ``num_layers`` transformer layers (None: all), each ``[batch, frames, dim]``.

        They are 0 in the padding, which ``lengths`` (``[batch]``, frames) tell.
        """
        layout = _layout(features, lengths)
        return [layout.unpack(each) for each in self.layer_rows(layout.pack(features), layout, last=num_layers)]

    def layer_rows(
        self,
        features: Tensor,  # [rows, features]
        layout: Rows,
        *,
        first: int = 1,
        last: Optional[int] = None,
    ) -> list[Tensor]:
        """The outputs of transformer layers ``first`` to ``last`` on packed features, each ``[rows, dim]``.

        Nothing waits for a device and no shape depends on the numbers of ``layout``, so the call may be captured in a CUDA
        graph that serves all layouts of as many rows and sequences.

        Args:
            features: ``[rows, features]``, the extractor's.
            layout: where the rows lie.
            first, last: layers, counted from 1; the others' outputs are not kept. None: up to the model's last.

        Raises:
            ValueError: for a layer that the model does not have.
        """
        most = len(self.transformer.layers) if last is None else last
        if not 1 <= first <= max(most, 1):
            raise ValueError(f"first must be in [1, {most}]; got {first}")
        outputs = self.transformer.intermediate_outputs(self._rows(features, layout), layout, last)
        return list(itertools.islice(outputs, first - 1, None))

    def _rows(self, features: Tensor, layout: Rows) -> Tensor:
        """Projected features, with 0 in the padding: ``[rows, features] -> [rows, dim]``."""
        x = add(None, self._project(features, layout, passes_follow=False))
        padding = layout.padding()
        return x if padding is None else x.masked_fill(padding[:, None], 0.0)


def _layout(features: Tensor, lengths: Optional[Tensor]) -> Rows:
    """The valid frames; all of them where ``lengths`` may not decide about shapes. Lengths on a device are waited for."""
    batch, frames = features.shape[:2]
    if lengths is None or not may_decide_shapes(lengths):
        return whole_grid(batch, frames, lengths, features.device)
    return valid_rows(batch, frames, lengths.cpu().clamp(0, frames), features.device)


def _packed(features: Tensor, layout: Rows) -> Tensor:
    """``[batch, frames, features]`` as the rows of ``layout``; rows are left as they are."""
    return layout.pack(features) if features.ndim == 3 else features
