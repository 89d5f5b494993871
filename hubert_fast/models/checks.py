"""Checks of what users hand to the models. On a GPU, and in a compiled graph, values are checked without a host sync."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


def check_audio(waveforms: Tensor, audio_lengths: Optional[Tensor]) -> None:
    """Raises ValueError unless ``audio_lengths`` fits ``waveforms``; the operator checks the waveforms themselves."""
    if waveforms.ndim != 2:
        raise ValueError(f"waveforms must be 2-D [batch, samples]; got shape {tuple(waveforms.shape)}")
    if audio_lengths is None:
        return
    batch, samples = waveforms.shape
    if audio_lengths.shape != (batch,):
        raise ValueError(f"audio_lengths must have shape [{batch}], one a row; got {tuple(audio_lengths.shape)}")
    if audio_lengths.is_floating_point() or audio_lengths.is_complex() or audio_lengths.dtype == torch.bool:
        raise ValueError(f"audio_lengths must be integers (samples); got {audio_lengths.dtype}")
    if audio_lengths.device.type != "cpu" and audio_lengths.device != waveforms.device:
        raise ValueError(
            f"audio_lengths must be on the CPU or on the device of waveforms ({waveforms.device}); got {audio_lengths.device}"
        )
    # The number in a message would make a compiler's or an exporter's graph one for this number alone.
    most = "samples" if torch.compiler.is_compiling() else samples
    check_values(
        (audio_lengths >= 0) & (audio_lengths <= samples),
        f"audio_lengths must be within [0, {most}], the samples of waveforms",
        audio_lengths,
    )


def check_labels(labels: Tensor, batch: int, frames: int) -> None:
    """Raises ValueError unless ``labels`` are integers, one for each frame."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers; got {labels.dtype}")
    if labels.shape != (batch, frames):
        raise ValueError(
            f"The length of label must match that of HuBERT model output: labels must have shape [{batch}, {frames}] "
            f"(batch, frames); got {tuple(labels.shape)}"
        )


def check_mask(mask: Tensor, batch: int, frames: int) -> None:
    """Raises ValueError unless ``mask`` is a bool for each frame."""
    if mask.dtype != torch.bool or mask.shape != (batch, frames):
        raise ValueError(f"mask must be bool of shape [{batch}, {frames}]; got {mask.dtype} {tuple(mask.shape)}")


def check_channel_mask(mask: Tensor, batch: int, channels: int) -> None:
    """Raises ValueError unless ``mask`` is a bool for each channel of each sequence."""
    if mask.dtype != torch.bool or mask.shape != (batch, channels):
        raise ValueError(
            f"channel_mask must be bool of shape [{batch}, {channels}]; got {mask.dtype} {tuple(mask.shape)}"
        )


def check_values(good: Tensor, requirement: str, given: Tensor) -> None:
    """Raises ValueError with ``requirement`` where ``good`` is not all True; on a GPU the device itself asserts it."""
    if good.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(good.all()):
            raise ValueError(f"{requirement}; got {given[~good].flatten()[:8].tolist()}")
    elif good.device.type != "meta":
        torch._assert_async(good.all(), requirement)
