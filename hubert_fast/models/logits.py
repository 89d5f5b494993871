"""The head of masked prediction: frames against label embeddings."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from hubert_fast.models.plain import projection
from hubert_fast.ops.cosine_cross_entropy import cosine_cross_entropy
from hubert_fast.ops.cosine_logits import cosine_logits


class FrameLoss(NamedTuple):
    """The loss of a set of frames."""

    loss: Tensor  # [] float: summed over the frames
    correct: Tensor  # [] int64: frames whose own class scores highest


class LogitGenerator(nn.Module):
    """Projects frames and compares them with the embedding of every class.

    Arguments and parameter names are torchaudio's. ``skip_masked`` and ``skip_nomask`` leave out the logits of the masked
    and of the unmasked frames.
    """

    def __init__(
        self, encoder_embed_dim: int, num_classes: int, final_dim: int, skip_masked: bool, skip_nomask: bool
    ) -> None:
        super().__init__()
        self.label_embeddings = nn.Parameter(torch.empty(num_classes, final_dim).uniform_())
        self.final_proj = nn.Linear(encoder_embed_dim, final_dim)
        self.skip_masked = skip_masked
        self.skip_nomask = skip_nomask
        self._built_classes = num_classes

    @property
    def num_classes(self) -> int:
        # Between calls FSDP1 leaves a flat piece of the embeddings here.
        return len(self.label_embeddings) if self.label_embeddings.ndim == 2 else self._built_classes

    def forward(
        self,
        x: Tensor,  # [..., dim]
        label: Tensor,  # [...] integer
        mask_m: Tensor,  # [...] bool
        mask_u: Tensor,  # [...] bool
    ) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """Logits of the masked and of the unmasked frames, each ``[frames, 1 + num_classes]``, in row order."""
        masked = None if self.skip_masked else self._logits(x[mask_m], label[mask_m])
        unmasked = None if self.skip_nomask else self._logits(x[mask_u], label[mask_u])
        return masked, unmasked

    def _logits(self, rows: Tensor, labels: Tensor) -> Tensor:
        return cosine_logits(projection(self.final_proj, rows), self.label_embeddings, labels.long())

    def cross_entropy(self, rows: Tensor, labels: Tensor) -> FrameLoss:
        """Cross-entropy of the logits against column 0, without the logits.

        ``rows`` is ``[rows, dim]``, ``labels`` ``[rows]`` int64; a row with a negative label is left out.
        """
        return FrameLoss(*cosine_cross_entropy(projection(self.final_proj, rows), self.label_embeddings, labels))
