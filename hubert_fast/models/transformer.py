"""The transformer. Names and shapes of parameters are torchaudio's; the layers run on `Rows`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_hook_of_all_modules

from hubert_fast.models.attention_mask import grid_layout, valid_frames
from hubert_fast.models.encoder_layer import EncoderLayer, FeedForward, LayerSeeds, SelfAttention, mask_of_grid, on_grid
from hubert_fast.models.plain import Stream, drop, is_plain, normalized_stream, rate, wanted_rows
from hubert_fast.models.positional_embedding import ConvolutionalPositionalEmbedding
from hubert_fast.models.ranks import await_every_gradient, beside
from hubert_fast.models.rows import Rows, rows_of, whole_grid
from hubert_fast.models.wrappers import as_built, gathers, runs_as, takes_rows
from hubert_fast.ops.arguments import SEED_RANGE
from hubert_fast.ops.masked_attention import dropout_columns

_MASKS = 4  # of dropout in a layer, as `LayerSeeds` names them


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
        attention_mask: Optional[Tensor] = None,  # [batch, 1, frames, frames]
        position_bias: Optional[Tensor] = None,
        *,
        layout: Optional[Rows] = None,
        keep: Optional[Tensor] = None,  # [kept] int64, rows of the layout
        seeds: Optional[Seeds] = None,
    ) -> Tensor:
        """The output of the last layer, ``[batch, frames, dim]``; ``attention_mask`` is added to the scores.

        Where the mask is one of `Encoder` or another that hides nothing but padding, layers leave the padding out, and the
        output is 0 there. ``position_bias`` is WavLM's, and not read, as in torchaudio.

        With a ``layout`` ``x`` is its rows, ``[rows, dim]``, and the result those of `stream`.

        Raises:
            ValueError: for a mask of another shape.
        """
        if layout is not None:
            return self.stream(x, layout, keep, seeds).x
        seeds = Seeds.of(self.draw_seeds(x.device))
        stream, layout = self._embed_grid(x, attention_mask, seeds.embedding)
        return layout.unpack(self.finish(self._run_layers(stream, layout, None, seeds)).x)

    def get_intermediate_outputs(
        self,
        x: Tensor,  # [batch, frames, dim]
        attention_mask: Optional[Tensor] = None,  # [batch, 1, frames, frames]
        num_layers: Optional[int] = None,
    ) -> list[Tensor]:
        """The outputs of the first ``num_layers`` layers (None: all), each ``[batch, frames, dim]``; see `forward`."""
        self._check_layers(num_layers)
        stream, layout = self._embed_grid(x, attention_mask)
        return [layout.unpack(each) for each in self._outputs(stream, layout, num_layers)]

    def _preprocess(self, x: Tensor) -> Tensor:
        """The first layer's input, ``[batch, frames, dim]``, both: torchaudio's method of this name."""
        layout = whole_grid(*x.shape[:2], None, x.device)
        return self.embed(x.flatten(0, 1), layout).x.view(x.shape)

    def _embed_grid(
        self, x: Tensor, attention_mask: Optional[Tensor], seed: Optional[Tensor] = None
    ) -> tuple[Stream, Rows]:
        """The first layer's input, and which frames it is of. The embedding sees what stands in the padding."""
        batch, frames = x.shape[:2]
        layout = grid_layout(x, attention_mask)
        stream = self.embed(x.flatten(0, 1), whole_grid(batch, frames, None, x.device), seed)
        if layout.key_lengths is None:
            return stream, layout
        layout = rows_of(batch, frames, valid_frames(attention_mask), x.device)
        return wanted_rows(stream, layout.index), layout

    def stream(self, x: Tensor, layout: Rows, keep: Optional[Tensor] = None, seeds: Optional[Seeds] = None) -> Stream:
        """The rows after the last layer, ``[rows, dim]`` or ``[kept, dim]``, with their copy for a product where layers make one.

        Without ``seeds`` they are drawn here.
        """
        seeds = Seeds.of(self.draw_seeds(x.device)) if seeds is None else seeds
        return self.finish(self._run_layers(self.embed(x, layout, seeds.embedding), layout, keep, seeds))

    def _run_layers(self, stream: Stream, layout: Rows, keep: Optional[Tensor], seeds: Seeds) -> Stream:
        seeds = self.with_columns(seeds, layout)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            stream = self._drop_or_run(layer, stream, layout, keep if i == last else None, seeds.of_layer(i))
        return stream

    def intermediate_outputs(self, x: Tensor, layout: Rows, num_layers: Optional[int] = None) -> Iterator[Tensor]:
        """The rows after each of the first ``num_layers`` layers; LayerDrop and the last LayerNorm do not take part."""
        self._check_layers(num_layers)
        return self._outputs(self.embed(x, layout), layout, num_layers)

    def _check_layers(self, num_layers: Optional[int]) -> None:
        if num_layers is not None and not 0 < num_layers <= len(self.layers):
            raise ValueError(f"num_layers must be in [1, {len(self.layers)}]; got {num_layers}")

    def _outputs(self, stream: Stream, layout: Rows, num_layers: Optional[int]) -> Iterator[Tensor]:
        for layer in self.layers[:num_layers]:
            stream = self.run_layer(layer, stream, layout)
            yield stream.x

    def run_layer(
        self,
        layer: nn.Module,
        stream: Stream,
        layout: Rows,
        keep: Optional[Tensor] = None,
        seeds: Optional[LayerSeeds] = None,
    ) -> Stream:
        """The stream after ``layer``; one that is not as it was built is called, with a grid where somebody looks at it."""
        if is_plain(layer, EncoderLayer) and not has_hook_of_all_modules():
            return layer.stream(stream, layout, keep, seeds)
        if takes_rows(layer, EncoderLayer):
            return Stream(layer(stream.x, layout=layout, keep=keep, seeds=seeds))
        return Stream(on_grid(lambda grid: self._call_layer(layer, grid, layout), stream.x, layout, keep))

    def _call_layer(self, layer: nn.Module, grid: Tensor, layout: Rows) -> Tensor:
        """Call a hooked or replaced layer as torchaudio does: ``[batch, frames, dim] -> [batch, frames, dim]``."""
        return layer(grid, mask_of_grid(layout, grid), position_bias=None)[0]

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
            runs_as(type(each)) is SelfAttention and each.training and each.dropout > 0.0 for each in attentions
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
        arguments = stream, layout, keep, seeds
        if not self.training:
            return self.run_layer(layer, *arguments)
        compiling = torch.compiler.is_compiling()
        capturing = not compiling and _is_capturing(stream.x)
        # Drawn whatever layer_drop is: torchaudio draws too, and the random numbers that follow are to be the same.
        draw = torch.rand(1, device=stream.x.device if capturing else None)
        if self.layer_drop == 0.0:
            return self.run_layer(layer, *arguments)
        if compiling or capturing:
            # A graph cannot skip a layer on a number drawn as it runs, so a dropped layer is computed and not used.
            dropped = self._is_dropped(draw).to(stream.x.device, non_blocking=True)
            (before, narrow), after = wanted_rows(stream, keep), self.run_layer(layer, *arguments)
            both = narrow is not None and after.narrow is not None
            return Stream(
                torch.where(dropped, before, after.x), torch.where(dropped, narrow, after.narrow) if both else None
            )
        if not self._is_dropped(draw.item()):
            return self.run_layer(layer, *arguments)
        before = wanted_rows(stream, keep)
        if gathers(layer):
            # Other ranks wait for this one to gather the layer's weights with them, so it is computed and not used.
            return before._replace(
                x=beside(before.x, [each for each in self.run_layer(layer, *arguments) if each is not None])
            )
        if await_every_gradient():
            return before._replace(x=beside(before.x, layer.parameters()))
        return before

    def _is_dropped(self, draw: Any) -> Any:
        """Whether a number of [0, 1), a float or a tensor, drops a layer."""
        return draw <= self.layer_drop


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
        if runs_as(type(feed_forward)) is FeedForward:
            dropouts += [feed_forward.intermediate_dropout, feed_forward.output_dropout]
        if runs_as(type(attention)) is SelfAttention and attention.dropout > 0.0:
            return True
    else:
        return False  # what stands in a layer's place draws for itself
    return any(type(each) is nn.Dropout and rate(each) > 0.0 for each in dropouts)
