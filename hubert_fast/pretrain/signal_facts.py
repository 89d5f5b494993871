"""What is wrong with a recording whatever was said in it: silence, a constant, clipping, channels that cancel."""

from __future__ import annotations

import numpy as np

_STEP = 2.0**-15  # of 16 bits: what never leaves one step is silence, or a constant, in a 16-bit file
_FULL_SCALE = 1 - _STEP
_CLIPPED_SHARE = 1e-3
_CANCELLED_SHARE = 0.01
_EVERY = 29  # samples; enough of them to know the energy of channels and of their mean


class SignalFacts:
    """Gathers, block by block, what a recording is like.

    ``channel`` is the one that is taken, counted from 0, or None for the mean of all.
    """

    def __init__(self, channel: int | None) -> None:
        self._channel = channel
        self._low, self._high = np.inf, -np.inf
        self._values = self._at_full_scale = 0
        self._sampled = 0
        self._sums: np.ndarray | float = 0.0
        self._products: np.ndarray | float = 0.0  # of every two channels

    def add(self, block: np.ndarray) -> bool:
        """Take in float32 ``[samples, channels]``; False, and nothing, where it holds a NaN or an infinity."""
        low, high = float(block.min()), float(block.max())
        if not np.isfinite(high - low):
            return False
        if block.shape[1] > 1:
            if self._channel is None:
                self._add_channels(block[::_EVERY].astype(np.float64))
            else:
                block = block[:, self._channel]
                low, high = float(block.min()), float(block.max())
        if max(high, -low) >= _FULL_SCALE:
            self._at_full_scale += int(np.count_nonzero(np.abs(block) >= _FULL_SCALE))
        self._values += block.size
        self._low, self._high = min(self._low, low), max(self._high, high)
        return True

    def _add_channels(self, samples: np.ndarray) -> None:
        self._sampled += len(samples)
        self._sums = self._sums + np.ones(len(samples)) @ samples
        self._products = self._products + samples.T @ samples

    @property
    def silent(self) -> bool:
        """No sample reaches one step of 16 bits."""
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
        if self._sampled == 0:
            return 1.0
        means = np.asarray(self._sums) / self._sampled
        covariance = self._products / self._sampled - np.outer(means, means)
        energy = covariance.diagonal().mean()
        return max(0.0, float(covariance.mean() / energy)) if energy > _STEP**2 else 1.0

    @property
    def cancelled(self) -> bool:
        """The mean of the channels has less than a hundredth of their energy."""
        return self.kept_share < _CANCELLED_SHARE
