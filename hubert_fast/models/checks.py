"""Checks of what users hand to the models. On a GPU, and in a compiled graph, values are checked without a host sync."""

from __future__ import annotations

import warnings
from typing import Optional

import torch
from torch import Tensor

from hubert_fast.ops.host_tensors import may_decide_shapes


def check_audio(waveforms: Tensor, audio_lengths: Optional[Tensor]) -> None:
    """Raises ValueError unless ``audio_lengths`` fits ``waveforms``; the operator checks the waveforms themselves."""
    _check_shapes(waveforms, audio_lengths, "audio_lengths")
    if audio_lengths is None:
        return
    if not _is_integer(audio_lengths):
        raise ValueError(f"audio_lengths must be integers (samples); got {audio_lengths.dtype}")
    # The number in a message would make a compiler's or an exporter's graph one for this number alone.
    samples = waveforms.shape[1]
    most = "samples" if torch.compiler.is_compiling() else samples
    check_values(
        (audio_lengths >= 0) & (audio_lengths <= samples),
        f"audio_lengths must be within [0, {most}], the samples of waveforms",
        audio_lengths,
    )


def usable_lengths(waveforms: Tensor, lengths: Optional[Tensor]) -> Optional[Tensor]:
    """``lengths`` as torchaudio takes them, floats among them, where more than there are samples counts as all.

    The first time that is so it is said in a UserWarning. Where values may not be looked at, as in a compiled graph or on a GPU,
    numbers out of range are taken into it without a word.

    Raises:
        ValueError: for a wrong shape, dtype or device, and for numbers that are negative or not whole.
    """
    _check_shapes(waveforms, lengths, "lengths")
    if lengths is None:
        return None
    if not (_is_integer(lengths) or lengths.is_floating_point()):
        raise ValueError(f"lengths must be whole numbers (samples), integer or float; got {lengths.dtype}")
    samples = waveforms.shape[1]
    if lengths.device.type != "cpu" or not may_decide_shapes(lengths):
        return lengths.long().clamp(0, samples).to(lengths.dtype)
    given = lengths.tolist()
    if wrong := [each for each in given if not (each >= 0 and each % 1 == 0)]:
        raise ValueError(f"lengths must be whole numbers (samples), none of them negative; got {wrong[:8]}")
    if max(given, default=0) <= samples:
        return lengths
    _say_once_that_lengths_are_cut([each for each in given if each > samples][:8], samples)
    return lengths.clamp(max=samples)


_said = False


def _say_once_that_lengths_are_cut(given: list[float], samples: int) -> None:
    global _said
    if not _said:
        _said = True
        warnings.warn(
            f"lengths beyond the {samples} samples of waveforms count as all of them; got {given}. This is said once."
        )


def _check_shapes(waveforms: Tensor, lengths: Optional[Tensor], name: str) -> None:
    """Raises ValueError unless ``lengths``, which the message calls ``name``, are one a row and lie where they can be used."""
    if waveforms.ndim != 2:
        raise ValueError(f"waveforms must be 2-D [batch, samples]; got shape {tuple(waveforms.shape)}")
    if lengths is None:
        return
    if lengths.shape != waveforms.shape[:1]:
        raise ValueError(f"{name} must have shape [{len(waveforms)}], one a row; got {tuple(lengths.shape)}")
    if lengths.device.type != "cpu" and lengths.device != waveforms.device:
        raise ValueError(
            f"{name} must be on the CPU or on the device of waveforms ({waveforms.device}); got {lengths.device}"
        )


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def check_labels(labels: Tensor, batch: int, frames: int) -> None:
    """Raises ValueError unless ``labels`` are integers, one for each frame."""
    if not _is_integer(labels):
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
