"""Features to the transformer's output. Names and shapes of parameters are torchaudio's."""

from __future__ import annotations

import itertools
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_hook_of_all_modules

from hubert_fast.models.attention_mask import attention_mask
from hubert_fast.models.encoder_layer import mask_of_grid, on_grid
from hubert_fast.models.masking import InputMask, MaskGenerator, draw_masks
from hubert_fast.models.plain import (
    Stream,
    Update,
    add,
    before_dropout,
    is_fusable,
    is_plain,
    normalize,
    product,
    projection,
    rate,
)
from hubert_fast.models.plan import StepPlan
from hubert_fast.models.rows import Rows, padding_mask, rows_of
from hubert_fast.models.transformer import Seeds, Transformer
from hubert_fast.models.wrappers import as_built, takes_rows
from hubert_fast.ops.mask_fill import mask_fill


class FeatureProjection(nn.Module):
    """From the extractor's features to the encoder's width: LayerNorm, Linear, dropout. ``[..., in] -> [..., out]``."""

    def __init__(self, in_features: int, out_features: int, dropout: float) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(in_features)
        self.projection = nn.Linear(in_features, out_features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.projection(self.layer_norm(x)))


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
        seeds = self._seeds(features.device)
        projection_seed = None if seeds is None else seeds.projection
        x = self.masked_rows(features, plan.layout, plan.input_mask, mask_generator, projection_seed)
        return self.transform(x, plan.kept_layout, plan.keep, seeds)

    def _seeds(self, device: torch.device) -> Optional[Seeds]:
        drawn = self.draw_seeds(device)
        return None if drawn is None else Seeds.of(drawn)

    def masked_rows(
        self,
        features: Tensor,  # [batch, frames, features], or [rows, features]
        layout: Rows,
        masked: InputMask,
        mask_generator: MaskGenerator,
        seed: Optional[Tensor] = None,
    ) -> Tensor:
        """The transformer's input for masked prediction: ``[rows, dim]``."""
        if not is_plain(mask_generator, MaskGenerator):
            grid, mask = layout.unpack(self._rows(_packed(features, layout), layout)), layout.unpack(masked.frames)
            return layout.pack(mask_generator(grid, layout.padding_mask(), mask=mask)[0])
        value, bias, dropout_p, seed = self._project(features, layout, seed)
        x = mask_fill(
            value,
            bias,
            mask_generator.mask_embedding,
            masked.frames,
            padding=layout.padding(),
            dropout_p=dropout_p,
            seed=seed,
        )
        if masked.channels is None:
            return x
        return x.masked_fill(masked.channels[layout.sequence(x.device)], 0.0)

    def _project(
        self, features: Tensor, layout: Rows, seed: Optional[Tensor] = None, *, passes_follow: bool = True
    ) -> Update:
        """The projected features; the bias is added already where there is nothing to drop and no pass that could add it."""
        module = self.feature_projection
        if not is_plain(module, FeatureProjection):
            if takes_rows(module, FeatureProjection):
                return Update(module(_packed(features, layout)), None, 0.0, None)
            grid = features if features.ndim == 3 else layout.unpack(features)
            return Update(layout.pack(module(grid)), None, 0.0, None)
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
        mask_generator: Optional[nn.Module] = None,
        mask: Optional[Tensor] = None,  # [batch, frames] bool
        plan: Optional[StepPlan] = None,
    ) -> Tensor:  # [batch, frames, dim]; 0 in the padding
        """The transformer's output, ``[batch, frames, dim]``, 0 in the padding.

        Args:
            features: ``[batch, frames, features]``, the extractor's.
            lengths: ``[batch]`` frames: what is valid of each row. None: all.
            mask_generator: masks the transformer's input, in eval mode too. None: nothing is masked.
            mask: the frames that it masks, ``[batch, frames]`` bool. None: it draws them.
            plan: where given, with ``mask_generator``, the result is the rows of `masked_stream`.

        Raises:
            ValueError: for a mask of another shape or dtype, or without a generator of ours.
        """
        if plan is not None:
            return self.masked_stream(features, plan, mask_generator).x
        batch, frames = features.shape[:2]
        ours = mask_generator is not None and as_built(mask_generator)[1] is MaskGenerator
        if mask is not None and not ours:
            raise ValueError("mask needs mask_generator, a MaskGenerator of this package")
        if mask_generator is not None and not ours:
            x, added = self._preprocess(features, lengths)
            padding = None if lengths is None else padding_mask(lengths.to(x.device), frames)
            return self.transformer(mask_generator(x, padding)[0], attention_mask=added)
        layout = rows_of(batch, frames, lengths, features.device)
        seeds = self._seeds(features.device)
        seed = None if seeds is None else seeds.projection
        if ours:
            masked = InputMask(*draw_masks(mask_generator, batch, frames, lengths, mask)).to_rows(layout)
            x = self.masked_rows(features, layout, masked, mask_generator, seed)
        else:
            x = self._rows(layout.pack(features), layout, seed)
        return layout.unpack(self.transform(x, layout, None, seeds).x)

    def _preprocess(
        self,
        features: Tensor,  # [batch, frames, features]
        lengths: Optional[Tensor] = None,  # [batch], frames
    ) -> tuple[Tensor, Optional[Tensor]]:
        """The transformer's input, ``[batch, frames, dim]``, 0 in the padding, and its attention mask, None without ``lengths``.

        torchaudio's method of this name, which code that fine-tunes calls. `Transformer` given the mask leaves the padding out.
        """
        batch, frames = features.shape[:2]
        layout = rows_of(batch, frames, lengths, features.device)
        x = layout.unpack(self._rows(layout.pack(features), layout))
        if lengths is None:
            return x, None
        return x, attention_mask(lengths, frames, features.dtype, features.device)

    def transform(
        self,
        x: Tensor,  # [rows, dim]
        layout: Rows,
        keep: Optional[Tensor] = None,  # [kept] int64
        seeds: Optional[Seeds] = None,
    ) -> Stream:  # [rows, dim], or [kept, dim]
        """`Transformer.stream`; one that is not as it was built is called, with a grid where somebody looks at it."""
        transformer = self.transformer
        if is_plain(transformer, Transformer) and not has_hook_of_all_modules():
            return transformer.stream(x, layout, keep, seeds)
        if takes_rows(transformer, Transformer):
            return Stream(transformer(x, layout=layout, keep=keep, seeds=seeds))
        return Stream(
            on_grid(lambda grid: transformer(grid, attention_mask=mask_of_grid(layout, grid)), x, layout, keep)
        )

    def extract_features(
        self, features: Tensor, lengths: Optional[Tensor] = None, num_layers: Optional[int] = None
    ) -> list[Tensor]:
        """The outputs of the first ``num_layers`` transformer layers (None: all), each ``[batch, frames, dim]``.

        They are 0 in the padding, which ``lengths`` (``[batch]``, frames) tell.
        """
        layout = rows_of(*features.shape[:2], lengths, features.device)
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

    def _rows(self, features: Tensor, layout: Rows, seed: Optional[Tensor] = None) -> Tensor:
        """Projected features, with 0 in the padding: ``[rows, features] -> [rows, dim]``."""
        x = add(None, self._project(features, layout, seed, passes_follow=False))
        padding = layout.padding()
        return x if padding is None else x.masked_fill(padding[:, None], 0.0)


def _packed(features: Tensor, layout: Rows) -> Tensor:
    """``[batch, frames, features]`` as the rows of ``layout``; rows are left as they are."""
    return layout.pack(features) if features.ndim == 3 else features
