"""Layer 0 under group norm in closed form: what its norm and its gradients need follows from moments of the waveform.

With X[t] the window of frame t, m its mean and C its covariance over the frames of a row, channel c of the convolution has mean
w_c . m and variance w_c^T C w_c, so convolution and norm are z = g r (w . (X - m)) + b with r = 1 / sqrt(w^T C w + eps).
All in float64: there are only as many numbers as filters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hubert_fast.reference.conv_frontend import NORM_EPS


class Statistics(NamedTuple):
    """Of a batch of rows."""

    window_mean: Tensor  # m: [batch, taps]
    covariance: Tensor  # C: [batch, taps, taps]
    rstd: Tensor  # r: [batch, channels]


def statistics(filters: Tensor, window_mean: Tensor, covariance: Tensor) -> Statistics:
    """``filters`` is [channels, taps]."""
    filters = filters.double()
    variance = ((filters @ covariance) * filters).sum(2)
    return Statistics(window_mean, covariance, torch.rsqrt(variance + NORM_EPS))


def scaled_filters(filters: Tensor, norm_weight: Tensor, rstd: Tensor) -> Tensor:
    """g r w, which is applied to X - m: w . X - w . m would cancel where the signal has an offset. [batch, channels, taps]"""
    return (norm_weight.double() * rstd)[:, :, None] * filters.double()


class Gradients(NamedTuple):
    filters: Tensor  # [channels, taps]
    norm_weight: Tensor  # [channels]
    norm_bias: Tensor  # [channels]


def gradients(
    filters: Tensor,  # [channels, taps]
    norm_weight: Tensor,  # [channels]
    of: Statistics,
    totals: Tensor,  # S0 = sum_t dz: [batch, channels]
    products: Tensor,  # P = sum_t dz (X[t] - m): [batch, channels, taps]
) -> Gradients:
    """Gradients through the norm from two sums over the frames, added up over the batch.

    With z = g r (w . X - mean) + b: db = S0, dg = Sx = r w . P, dw = g r (P - Sx r C w). The same holds for statistics over the
    valid frames only, because sums run over every frame that has a gradient.
    """
    filters, norm_weight = filters.double(), norm_weight.double()
    norm_weight_gradient = of.rstd * (filters * products).sum(2)
    correction = (norm_weight_gradient * of.rstd)[:, :, None] * (filters @ of.covariance)
    filter_gradient = (norm_weight * of.rstd)[:, :, None] * (products - correction)
    return Gradients(filter_gradient.sum(0), norm_weight_gradient.sum(0), totals.sum(0))
