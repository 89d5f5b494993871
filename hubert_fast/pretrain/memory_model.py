"""Bytes that a training step takes on a GPU, in closed form from shapes, for the kernels that run there.

Counted are weights, their gradients and AdamW's moments; what the forward keeps for the backward, each tensor once, as the
backends "triton" and "cuda" keep it; and the buffers of the backward. Nothing is measured: what the allocator, libraries and
captured graphs take besides is left to the caller's share for safety.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple, Optional

from hubert_fast.cuda_backend.conv_frontend import rows_of_layers
from hubert_fast.pretrain.config import ModelConfig
from hubert_fast.pretrain.frames import num_frames

_WIDE = 4  # bytes of float32
_INDEX = 8  # and of int64
# The most parts of a convolution's weight gradient, and the fewest frames that a part of layer 0's sums up.
_WEIGHT_PARTS, _FIRST_LAYER_FRAMES = 32, 256
# An allowance for the buffers of NCCL, which takes them from the GPU itself.
_COMMUNICATION = 2**30


class Size(NamedTuple):
    """Sizes of a micro-batch, from which its memory follows."""

    batch: int  # utterances
    samples: int  # of each, padding included
    rows: int  # valid frames
    kept: Optional[int]  # rows that are wanted after the last layer; None: all, the loss counts unmasked ones too


@dataclass(frozen=True)
class MemoryModel:
    """Bytes by the size of a micro-batch, on one of ``world_size`` GPUs.

    ``parameters``: of the model; ``autocast``: to bfloat16, otherwise all is float32; ``masked_only``: only masked frames
    have a weight in the loss; ``hidden_once``: the CUDA extension's products are there, which in 16 bits keep of a
    feed-forward block without dropout the values before GELU alone.
    """

    model: ModelConfig
    parameters: int
    autocast: bool
    masked_only: bool = True
    world_size: int = 1
    hidden_once: bool = True

    def largest(self, batch: int, samples: int) -> Size:
        """The size of a micro-batch without padding, of as many masked frames as there can be (spans may overlap)."""
        frames = num_frames(samples)
        masked = min(frames, ceil(self.model.mask_prob * frames) + self.model.mask_length)
        return Size(batch, samples, batch * frames, batch * masked if self.masked_only else None)

    def peak(self, size: Size) -> int:
        """Bytes of a step at their most.

        The buffers of the front end's backward count beside those of the transformer's: these lie in a captured graph,
        which leaves nothing of its memory to others.
        """
        return self.state() + self.kept(size) + self._layer_buffers(size) + self._front_end_buffers(size)

    def state(self) -> int:
        """Bytes that do not depend on the batch: weights, gradients, both moments; buffers of the communication."""
        return 4 * _WIDE * self.parameters + (_COMMUNICATION if self.world_size > 1 else 0)

    def kept(self, size: Size) -> int:
        """Bytes that the forward keeps for the backward: activations, and the weights in the dtype of the products."""
        layers = self.model.encoder_num_layers - 1
        encoder = layers * self._layer(size.rows, size.rows) + self._last_layer(size)
        return self._front_end(size) + self._embedding(size) + encoder + self._head(size) + self._weights()

    @property
    def _narrow(self) -> int:
        """Bytes of a value in the dtype of the products."""
        return 2 if self.autocast else _WIDE

    @property
    def _stream(self) -> int:
        """Bytes of a value of the residual stream: a post-norm stream is made of LayerNorm's results, which are float32."""
        return self._narrow if self.model.encoder_layer_norm_first else _WIDE

    def _front_end(self, size: Size) -> int:
        """The waveforms, the convolutions' outputs but layer 0's, the features; for the penalty these in float32."""
        channels = self.model.extractor_conv_layer_config[-1][0]
        rows = sum(self._convolution_rows(size)[1:])
        features = size.batch * num_frames(size.samples) * channels
        copy = features * _WIDE if self._narrow != _WIDE else 0
        return size.batch * size.samples * _WIDE + (rows * channels + features) * self._narrow + copy

    def _convolution_rows(self, size: Size) -> list[int]:
        """Rows of the buffer of each convolution."""
        return [size.batch * rows for rows in rows_of_layers(_frames_of_layers(self.model, size.samples))]

    def _embedding(self, size: Size) -> int:
        """Normalised features, the positional convolution's input and its output before GELU, what precedes layer 1."""
        channels, dim = self.model.extractor_conv_layer_config[-1][0], self.model.encoder_embed_dim
        values = channels + 2 * dim + (0 if self.model.encoder_layer_norm_first else dim)
        flags = dim if self.model.mask_channel_prob > 0 else 1
        statistics = 4 * _WIDE
        return size.rows * (values * self._narrow + _INDEX + flags + statistics)

    def _layer(self, rows: int, kept: int) -> int:
        """Bytes that a layer keeps of ``rows`` keys and values, and of ``kept`` rows that have queries and go on from there."""
        model, narrow, stream = self.model, self._narrow, self._stream
        dim, fused = model.encoder_embed_dim, self.hidden_once and self.autocast and not model.encoder_ff_interm_dropout
        hidden = (1 if fused else 2) * model.encoder_ff_interm_features * narrow
        attended = dim * narrow + model.encoder_num_heads * _WIDE  # attention's output, each softmax's logarithm
        norm = dim * stream + 2 * _WIDE  # what it reads, and each row's statistics
        of_rows = 4 * dim * narrow  # attention's input; queries, keys, values
        of_kept = attended + norm + dim * narrow + hidden
        if model.encoder_layer_norm_first:  # the other one comes before attention
            of_rows += norm
        else:
            of_kept += norm
        return rows * of_rows + kept * of_kept

    def _last_layer(self, size: Size) -> int:
        if size.kept is None:
            return self._layer(size.rows, size.rows)
        return self._layer(size.rows, size.kept) + size.kept * _INDEX

    def _head(self, size: Size) -> int:
        """The last LayerNorm where it comes last, the projection and the loss; twice where unmasked frames count too."""
        dim, losses = self.model.encoder_embed_dim, 2 if size.kept is None else 1
        of_kept = losses * (self.model.final_dim * self._narrow + _INDEX + 2 * _WIDE)
        of_kept += dim * self._narrow * (losses if self._narrow != _WIDE else 1)
        if self.model.encoder_layer_norm_first:
            of_kept += dim * self._stream + 2 * _WIDE
        return (size.rows if size.kept is None else size.kept) * of_kept

    def _weights(self) -> int:
        """Copies of weights: all linear ones in bfloat16; in any dtype the concatenated queries, keys and values, and the
        filters of the positional convolution.
        """
        model, dim = self.model, self.model.encoder_embed_dim
        filters = dim * dim // model.encoder_pos_conv_groups * model.encoder_pos_conv_kernel
        concatenated = model.encoder_num_layers * 3 * dim * dim
        linear = model.encoder_num_layers * dim * (dim + 2 * model.encoder_ff_interm_features)
        linear += dim * (model.extractor_conv_layer_config[-1][0] + model.final_dim)
        return self._narrow * (filters + concatenated + (linear if self._narrow != _WIDE else 0))

    def _layer_buffers(self, size: Size) -> int:
        """A layer's backward at the feed-forward: gradients of the stream, of both products' results and of a weight."""
        dim, hidden = self.model.encoder_embed_dim, self.model.encoder_ff_interm_features
        of_rows = 2 * dim * self._stream + (dim + 2 * hidden) * self._narrow
        return size.rows * of_rows + dim * hidden * (_WIDE + self._narrow)

    def _front_end_buffers(self, size: Size) -> int:
        """The front end's backward at layer 1: its gradient, layer 0's activations; the parts of two weight gradients."""
        channels, taps = self.model.extractor_conv_layer_config[0][:2]
        rows = self._convolution_rows(size)
        features = 2 * size.batch * num_frames(size.samples) * channels * _WIDE
        parts = _WEIGHT_PARTS * 3 * channels * channels + rows[0] // _FIRST_LAYER_FRAMES * (taps + 2) * channels
        return (rows[0] + rows[1]) * channels * self._narrow + features + parts * _WIDE


def _frames_of_layers(model: ModelConfig, samples: int) -> Sequence[int]:
    frames = [samples]
    for _, kernel, stride in model.extractor_conv_layer_config:
        frames.append((frames[-1] - kernel) // stride + 1)
    return frames[1:]
