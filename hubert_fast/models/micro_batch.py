"""Micro-batches with all that decides about their shapes worked out ahead, in a data-loader worker."""

from __future__ import annotations

import copy
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from hubert_fast.models.capacities import Capacities, Capacity
from hubert_fast.models.checks import check_audio, check_channel_mask, check_labels, check_mask
from hubert_fast.models.feature_extractor import output_lengths
from hubert_fast.models.masking import MaskGenerator
from hubert_fast.models.objective import PretrainingObjective
from hubert_fast.models.plain import is_plain
from hubert_fast.models.plan import PlanSettings, make_plan
from hubert_fast.models.plan_tensors import packed


class MicroBatch(NamedTuple):
    """A batch and its plan, made by `MicroBatchPlanner`. Its tensors lie on the CPU."""

    waveforms: Tensor  # [batch, samples] float
    valid_samples: Optional[Tensor]  # [batch] int64, where the feature extractor asks for them
    plan: Tensor  # [bytes] uint8, for `PlanTensors.in_memory`
    capacity: Capacity
    fits: bool  # whether the capacity is one of those that batches share; else it is this batch's own
    valid_frames: int
    masked_frames: int
    masked_channels: int  # of the mask of channels; 0 without one

    def pin_memory(self) -> MicroBatch:
        """Page-locked copies, which a GPU fetches by itself. (The data loader calls it.)"""
        valid_samples = None if self.valid_samples is None else self.valid_samples.pin_memory()
        return self._replace(
            waveforms=self.waveforms.pin_memory(), valid_samples=valid_samples, plan=self.plan.pin_memory()
        )


class MicroBatchPlanner:
    """Makes micro-batches for `GraphedStep`, in data-loader workers too: it has no weights.

    Args:
        objective: that of the step. Its settings are read here, once.
        capacities: those of the step, sizes that batches are rounded up to. None: every batch has the size that it needs.
    """

    def __init__(self, objective: PretrainingObjective, capacities: Optional[Capacities] = None) -> None:
        model = objective.model
        extractor = model.wav2vec2.feature_extractor
        self.capacities = capacities
        # On the CPU: what lies on a GPU a forked worker must not touch.
        self._masks = copy.deepcopy(model.mask_generator).cpu()
        self._layers = [(block.kernel_size, block.stride) for block in extractor.conv_layers]
        self._needs_samples = extractor.padding_invariant
        self._classes = model.logit_generator.num_classes
        self._masked_only = objective.unmasked_weight == 0

    def __call__(
        self,
        waveforms: Tensor,  # [batch, samples] float
        labels: Tensor,  # [batch, frames] integer
        audio_lengths: Optional[Tensor] = None,  # [batch], samples
        *,
        mask: Optional[Tensor] = None,  # [batch, frames] bool
        channel_mask: Optional[Tensor] = None,  # [batch, dim] bool
    ) -> MicroBatch:
        """The micro-batch of a padded batch on the CPU; arguments and errors as those of `HuBERTPretrainModel.forward`.

        ``channel_mask`` is one made ahead by ``mask_generator.draw_channels``; None: drawn here, if at all.

        Raises:
            ValueError: also for a tensor that is not on the CPU.
        """
        given = {"waveforms": waveforms, "labels": labels, "audio_lengths": audio_lengths, "mask": mask}
        given["channel_mask"] = channel_mask
        for name, tensor in given.items():
            if tensor is not None and tensor.device.type != "cpu":
                raise ValueError(f"{name} must be on the CPU; got {tensor.device}")
        check_audio(waveforms, audio_lengths)
        batch, samples = waveforms.shape
        frames = int(output_lengths(torch.tensor(samples), self._layers))
        check_labels(labels, batch, frames)
        lengths = None if audio_lengths is None else output_lengths(audio_lengths.long(), self._layers)
        if mask is None:
            mask = self._masks.draw(batch, frames, lengths)
        else:
            check_mask(mask, batch, frames)
        if channel_mask is not None:
            check_channel_mask(channel_mask, batch, len(self._masks.mask_embedding))
        elif is_plain(self._masks, MaskGenerator):
            channel_mask = self._masks.draw_channels(batch)
        settings = PlanSettings(self._masked_only)
        plan = make_plan(labels, lengths, mask, channel_mask, torch.device("cpu"), self._classes, settings)
        valid = int(plan.layout.offsets[-1])
        kept = None if plan.keep is None else len(plan.keep)
        longest = frames if lengths is None else max(1, int(lengths.max()))
        need = Capacity(valid, kept, batch, longest)
        capacity = None if self.capacities is None else self.capacities.room_for(need)
        return MicroBatch(
            waveforms,
            audio_lengths if self._needs_samples else None,
            packed(plan, capacity or need),
            capacity or need,
            capacity is not None,
            valid,
            int(plan.masked.sum()),
            0 if channel_mask is None else channel_mask.shape[1],
        )
