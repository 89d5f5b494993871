"""k-means over frames: the centroids that turn features into units."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hubert_fast.pretrain.atomic import write_with

_FRAMES_AT_ONCE = 16_384


@dataclass(frozen=True)
class Codebook:
    """Centroids of the clusters; ``metadata`` says what they were made of and travels with the file."""

    centroids: np.ndarray  # [clusters, dim] float32
    metadata: dict[str, str] = field(default_factory=dict)

    def assign(self, features: np.ndarray) -> np.ndarray:
        """The nearest centroid of each frame (the lowest index on a tie).

        ||x - c||^2 = ||x||^2 - 2 x.c + ||c||^2, whose first term does not matter: one matrix product for all distances.

        Args:
            features: ``[frames, dim]``, any float type.

        Returns:
            int32 ``[frames]``.
        """
        features = self._checked(features)
        half_norms = 0.5 * np.einsum("kd,kd->k", self.centroids, self.centroids)
        units = np.empty(len(features), dtype=np.int32)
        for first in range(0, len(features), _FRAMES_AT_ONCE):
            chunk = features[first : first + _FRAMES_AT_ONCE]
            units[first : first + len(chunk)] = np.argmin(half_norms - chunk @ self.centroids.T, axis=1)
        return units

    def inertia(self, features: np.ndarray) -> float:
        """Mean squared distance of ``features`` ``[frames, dim]`` to their nearest centroids."""
        features = self._checked(features)
        total = 0.0
        for first in range(0, len(features), _FRAMES_AT_ONCE):
            chunk = features[first : first + _FRAMES_AT_ONCE]
            total += float(np.square(chunk - self.centroids[self.assign(chunk)]).sum(dtype=np.float64))
        return total / max(1, len(features))

    def save(self, path: Path) -> None:
        from safetensors.numpy import save_file

        metadata = {name: str(value) for name, value in self.metadata.items()}
        centroids = np.ascontiguousarray(self.centroids, dtype=np.float32)
        write_with(Path(path), lambda target: save_file({"centroids": centroids}, target, metadata=metadata))

    @classmethod
    def load(cls, path: Path) -> Codebook:
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            return cls(file.get_tensor("centroids"), dict(file.metadata() or {}))

    def _checked(self, features: np.ndarray) -> np.ndarray:
        features = np.asarray(features, dtype=np.float32)
        dim = self.centroids.shape[1]
        if features.ndim != 2 or features.shape[1] != dim:
            raise ValueError(f"features has shape {features.shape}; [frames, {dim}] is accepted by this codebook")
        return features


def fit_codebook(
    features: Iterable[np.ndarray],
    clusters: int,
    *,
    seed: int,
    init_attempts: int = 20,
    batch_frames: int = 10_000,
    max_passes: int = 100,
) -> Codebook:
    """Mini-batch k-means with k-means++ starts, set up as HuBERT's (no cluster is ever re-seeded; stops when it
    stalls).

    The same features and seed give the same codebook, bit for bit, on the same machine.

    Args:
        features: arrays ``[frames, dim]``, held in memory together as float32.
        clusters: number of centroids, at most the number of frames.
        init_attempts: k-means++ starts, of which the best is kept.

    Raises:
        ValueError: too few frames, or features that are not finite.
    """
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    arrays = [np.asarray(array, dtype=np.float32) for array in features]
    frames = sum(len(array) for array in arrays)
    if not 1 <= clusters <= frames:
        raise ValueError(f"clusters={clusters} must lie between 1 and the number of frames to cluster, {frames}")
    data = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    if not np.isfinite(data).all():
        raise ValueError("features hold a NaN or an infinity, which no cluster can be near to")
    kmeans = MiniBatchKMeans(
        n_clusters=clusters,
        init="k-means++",
        batch_size=batch_frames,
        n_init=init_attempts,
        max_iter=max_passes,
        tol=0.0,
        max_no_improvement=100,
        reassignment_ratio=0.0,
        compute_labels=False,
        random_state=seed,
    )
    # OpenMP adds up the threads' shares of the inertia in whatever order they finish, and the inertia decides when to
    # stop: with more than one thread, two runs could differ.
    with threadpool_limits(limits=1, user_api="openmp"):
        kmeans.fit(data)
    return Codebook(np.ascontiguousarray(kmeans.cluster_centers_, dtype=np.float32))
