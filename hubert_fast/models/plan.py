"""Where a step's rows lie and which of them are masked, worked out on the host ahead of the step.

The step itself then depends on no number that lies on the device: it never waits for it, and with a fixed capacity it can be
captured in a CUDA graph and replayed on other batches.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_fast.exporters import is_exporting
from hubert_fast.models.checks import check_values
from hubert_fast.models.masking import InputMask
from hubert_fast.models.rows import Rows, first_true, valid_rows, whole_grid
from hubert_fast.ops.host_tensors import to_device

_LAYOUT = "index", "offsets", "key_lengths"  # tensors of a layout


class StepPlan(NamedTuple):
    """What `HuBERTPretrainModel.plan` makes of a batch. Tensors lie on the device of the model."""

    layout: Rows
    mask: Tensor  # [rows] bool: rows whose input is the mask embedding
    channel_mask: Optional[Tensor]  # [batch, dim] bool: channels of a sequence that are zeroed
    keep: Optional[Tensor]  # [kept] int64: rows that the last layer gives, fillers last; None: all, kept is rows
    kept_offsets: Optional[Tensor]  # [batch + 1] int64: as of `Rows`; None: no row is left out
    labels: Tensor  # [kept] int64: of these rows; -1 where there is none, as of fillers
    masked: Tensor  # [kept] bool: valid and masked
    unmasked: Tensor  # [kept] bool: valid and not masked, and no filler
    valid_samples: Optional[Tensor]  # [batch] int64, where the feature extractor asks for them

    @property
    def input_mask(self) -> InputMask:
        """The masked frames and channels of the transformer's input."""
        return InputMask(self.mask, self.channel_mask)

    @property
    def kept_layout(self) -> Rows:
        """The layout as the last layer takes it, which gives the rows ``keep`` alone."""
        return self.layout._replace(kept_offsets=self.kept_offsets)

    def copy_(self, other: StepPlan) -> StepPlan:
        """Overwrite the tensors of this plan, which a captured graph reads, with those of another of the same capacity.

        Raises:
            ValueError: if the two have different shapes, or are of another batch or number of frames.
        """
        pairs = list(zip(_tensors(self), _tensors(other)))
        for name, (mine, theirs) in zip((*_LAYOUT, *self._fields[1:]), pairs):
            shapes = [None if each is None else tuple(each.shape) for each in (mine, theirs)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{name} of the plans must have one shape; got {shapes[0]} and {shapes[1]}")
        if self.layout[:2] != other.layout[:2]:
            raise ValueError(f"the plans must be of one (batch, frames); got {self.layout[:2]} and {other.layout[:2]}")
        for mine, theirs in pairs:
            if mine is not None:
                mine.copy_(theirs, non_blocking=True)
        return self


def _tensors(plan: StepPlan) -> list[Optional[Tensor]]:
    return [*(getattr(plan.layout, name) for name in _LAYOUT), *plan[1:]]


class PlanSettings(NamedTuple):
    """Which rows a step computes; the arguments of `HuBERTPretrainModel.plan`."""

    masked_only: bool
    rows: Optional[int] = None
    kept: Optional[int] = None


def make_plan(
    labels: Tensor,  # [batch, frames] integer
    lengths: Optional[Tensor],  # [batch], frames
    mask: Tensor,  # [batch, frames] bool
    channel_mask: Optional[Tensor],  # [batch, dim] bool
    device: torch.device,
    num_classes: Optional[int],  # None: labels are not held against it
    settings: PlanSettings,
) -> StepPlan:
    """The plan of a batch, for a model on ``device``, without ``valid_samples``.

    Lengths on the CPU leave out the padding; with a mask there too, ``masked_only`` leaves out all but the masked rows from the
    queries of the last layer on. What lies on a GPU may not decide about shapes: then the whole grid, or all rows, are
    computed. So it is in a compiled graph that makes its own plan.

    Raises:
        ValueError: for labels out of range, a capacity (``rows``, ``kept``) that is too small or too large, or one without
            what it needs on the CPU.
    """
    batch, frames = labels.shape
    masked_only, rows, kept = settings
    fixed = torch.compiler.is_compiling() or is_exporting()
    if fixed or not _on_host(lengths):
        if rows is not None:
            raise ValueError("rows, a capacity, needs audio_lengths on the CPU, or None")
        layout = whole_grid(batch, frames, lengths, device)
    else:
        layout = valid_rows(batch, frames, lengths, device, rows)
    labels, valid = _checked_labels(layout, labels, lengths, device, num_classes)
    keep = kept_offsets = None
    if masked_only and not fixed and _on_host(mask) and _on_host(lengths):
        wanted = mask if lengths is None else mask & (torch.arange(frames) < lengths[:, None])
        wanted_rows = wanted.flatten() if layout.host_index is None else wanted.flatten()[layout.host_index]
        keep = to_device(first_true(wanted_rows, kept, "kept"), device)
        kept_offsets = to_device(F.pad(wanted.sum(1).cumsum(0), (1, 0)), device)
    elif kept is not None:
        raise ValueError("kept, a capacity, needs masked_only, and mask and audio_lengths on the CPU")
    mask = layout.pack(to_device(mask, device)) & valid
    masked, unmasked = mask, ~mask & valid
    if keep is not None:
        masked = masked.index_select(0, keep)
        labels, unmasked = labels.index_select(0, keep).where(masked, -1), torch.zeros_like(masked)
    if channel_mask is not None:
        channel_mask = to_device(channel_mask, device)
    # Wrappers such as FSDP bring whatever lies on the host to the device, and the host would wait for it.
    layout = layout._replace(host_index=None)
    return StepPlan(layout, mask, channel_mask, keep, kept_offsets, labels, masked, unmasked, None)


def _on_host(x: Optional[Tensor]) -> bool:
    return x is None or x.device.type == "cpu"


def _checked_labels(
    layout: Rows, labels: Tensor, lengths: Optional[Tensor], device: torch.device, num_classes: Optional[int]
) -> tuple[Tensor, Tensor]:
    """(the rows' labels, -1 where a row is not valid; which rows are valid)."""
    labels = layout.pack(to_device(labels, device).long())
    if layout.key_lengths is not None:
        valid = ~layout.padding()
    else:
        valid = torch.arange(len(labels), device=device) < layout.offsets[-1]
    within = labels >= 0 if num_classes is None else (labels >= 0) & (labels < num_classes)
    check_values(within | ~valid, f"labels must be in [0, {'classes' if num_classes is None else num_classes})", labels)
    return labels.where(valid, -1), valid
