"""k-means over frames: the centroids that turn features into units."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubert_fast import tf32
from hubert_fast.pretrain.atomic import write_with

_FRAMES_AT_ONCE = 16_384


@dataclass(frozen=True)
class Codebook:
    """Centroids of the clusters."""

    centroids: np.ndarray  # [clusters, dim] float32

    def assign(self, features: np.ndarray) -> np.ndarray:
        """The nearest centroid of each frame (the lowest index on a tie).

        ||x - c||^2 = ||x||^2 - 2 x.c + ||c||^2, whose first term does not matter: one matrix product for all distances.

        Args:
            features: float32 ``[frames, dim]``.

        Returns:
            int32 ``[frames]``.
        """
        half_norms = 0.5 * np.einsum("kd,kd->k", self.centroids, self.centroids)
        units = np.empty(len(features), dtype=np.int32)
        for first in range(0, len(features), _FRAMES_AT_ONCE):
            chunk = features[first : first + _FRAMES_AT_ONCE]
            units[first : first + len(chunk)] = np.argmin(half_norms - chunk @ self.centroids.T, axis=1)
        return units

    def inertia(self, features: np.ndarray) -> float:
        """Mean squared distance of ``features`` ``[frames, dim]`` to their nearest centroids."""
        total = 0.0
        for first in range(0, len(features), _FRAMES_AT_ONCE):
            chunk = features[first : first + _FRAMES_AT_ONCE]
            total += float(np.square(chunk - self.centroids[self.assign(chunk)]).sum(dtype=np.float64))
        return total / max(1, len(features))

    def save(self, path: Path, **metadata: Any) -> None:
        """Write a safetensors file; ``metadata``, which says what the centroids were made of, travels with it as text."""
        from safetensors.numpy import save_file

        metadata = {name: str(value) for name, value in metadata.items()}
        centroids = np.ascontiguousarray(self.centroids, dtype=np.float32)
        write_with(Path(path), lambda target: save_file({"centroids": centroids}, target, metadata=metadata))


def nearest_centroids(rows: Tensor, centroids: Tensor) -> Tensor:
    """`Codebook.assign` on the device of its arguments, by the same formula in float32; the host does not wait.

    Sums of products are rounded in another order than numpy's, so a frame as near to two centroids as rounding can tell may
    get the other one.

    Args:
        rows: ``[rows, dim]`` float.
        centroids: ``[clusters, dim]`` float32.

    Returns:
        int32 ``[rows]``.
    """
    half_norms = 0.5 * centroids.square().sum(dim=1)
    # Autocast would keep 2 digits of the distances, TF32 3.
    with torch.autocast(rows.device.type, enabled=False), tf32.allowed(False) if rows.is_cuda else nullcontext():
        distances = torch.addmm(half_norms, rows.float(), centroids.T, alpha=-1)
    return distances.argmin(dim=1).to(torch.int32)


def fit_codebook(features: np.ndarray, clusters: int, *, seed: int, init_attempts: int = 20) -> Codebook:
    """Mini-batch k-means with k-means++ starts, set up as HuBERT's (no cluster is ever re-seeded; stops when it
    stalls).

    The same features and seed give the same codebook, bit for bit, on the same machine.

    Args:
        features: float32 ``[frames, dim]``.
        clusters: number of centroids, at most the number of frames.
        init_attempts: k-means++ starts, of which the best is kept.

    Raises:
        ValueError: too few frames, or features that are not finite.
    """
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    frames = len(features)
    if clusters > frames:
        raise ValueError(f"clusters={clusters} must be at most the number of frames to cluster, {frames}")
    if not np.isfinite(features).all():
        raise ValueError("features hold a NaN or an infinity, which no cluster can be near to")
    kmeans = MiniBatchKMeans(
        n_clusters=clusters,
        init="k-means++",
        batch_size=10_000,
        n_init=init_attempts,
        max_iter=100,
        tol=0.0,
        max_no_improvement=100,
        reassignment_ratio=0.0,
        compute_labels=False,
        random_state=seed,
    )
    # OpenMP adds up the threads' shares of the inertia in whatever order they finish, and the inertia decides when to
    # stop: with more than one thread, two runs could differ.
    with threadpool_limits(limits=1, user_api="openmp"):
        kmeans.fit(features)
    return Codebook(np.ascontiguousarray(kmeans.cluster_centers_, dtype=np.float32))
