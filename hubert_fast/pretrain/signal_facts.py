"""What is wrong with a recording whatever was said in it: silence, a constant, clipping, channels that cancel."""

from __future__ import annotations

import numpy as np

_STEP = 2.0**-15  # of 16 bits: what never leaves one step is silence, or a constant, in a 16-bit file
_FULL_SCALE = 1 - _STEP
_CLIPPED_SHARE = 1e-3
_CANCELLED_SHARE = 0.01


class SignalFacts:
    """Gathers, block by block, what a recording is like.

    ``channel`` is the one that is taken, counted from 0, or None for the mean of all.
    """

    def __init__(self, channel: int | None) -> None:
        self._channel = channel
        self._low, self._high = np.inf, -np.inf
        self._values = self._at_full_scale = 0
        self._origin: np.ndarray | None = None
        self._channel_sums: np.ndarray | float = 0.0
        self._samples, self._squares, self._mean_squares = 0, 0.0, 0.0

    def add(self, block: np.ndarray) -> bool:
        """Take in float32 ``[samples, channels]``; False, and nothing, where it holds a NaN or an infinity."""
        low, high = float(block.min()), float(block.max())
        if not np.isfinite(high - low):
            return False
        if self._channel is not None and block.shape[1] > 1:
            block = block[:, self._channel : self._channel + 1]
            low, high = float(block.min()), float(block.max())
        if max(high, -low) >= _FULL_SCALE:
            self._at_full_scale += int(np.count_nonzero(np.abs(block) >= _FULL_SCALE))
        self._values += block.size
        if block.shape[1] > 1:
            low, high = self._add_channels(block)
        self._low, self._high = min(self._low, low), max(self._high, high)
        return True

    def _add_channels(self, block: np.ndarray) -> tuple[float, float]:
        """Take in what tells whether channels cancel; returns the range of their mean."""
        samples, channels = block.shape
        sums = np.ones(samples, np.float32) @ block
        if self._origin is None:
            # Sums of squares are taken around it, so that a constant offset does not drown the sound.
            self._origin = sums / samples
        shifted = block - self._origin
        mean = shifted @ np.full(channels, 1 / channels, np.float32)
        flat = shifted.reshape(-1)
        self._squares += float(flat @ flat)
        self._mean_squares += float(mean @ mean)
        self._channel_sums = self._channel_sums + (sums.astype(np.float64) - samples * self._origin)
        self._samples += samples
        offset = float(self._origin.mean())
        return float(mean.min()) + offset, float(mean.max()) + offset

    @property
    def silent(self) -> bool:
        """No sample of what is taken reaches one step of 16 bits."""
        return max(self._high, -self._low) < _STEP

    @property
    def constant(self) -> bool:
        """It stays within one step of 16 bits, and is not silent."""
        return self._high - self._low < _STEP and not self.silent

    @property
    def clipped(self) -> bool:
        """More than one sample in a thousand is at full scale."""
        return self._at_full_scale > _CLIPPED_SHARE * self._values and not self.constant

    @property
    def kept_share(self) -> float:
        """Energy of the channels' mean as a share of the channels' mean energy, constant offsets apart; 1 where there is
        one channel or no sound.
        """
        if self._samples == 0:
            return 1.0
        offsets = np.asarray(self._channel_sums) / self._samples
        energy = self._squares / (self._samples * offsets.size) - float((offsets**2).mean())
        mean_energy = self._mean_squares / self._samples - float(offsets.mean() ** 2)
        return max(0.0, mean_energy) / energy if energy > _STEP**2 else 1.0

    @property
    def cancelled(self) -> bool:
        """The mean of the channels has less than a hundredth of their energy."""
        return self.kept_share < _CANCELLED_SHARE
