import numpy as np
import pytest
from safetensors import safe_open

from hubert_fast.pretrain.codebook import Codebook, fit_codebook


def blobs(frames=600, dim=5, clusters=8, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 10, (clusters, dim))
    which = rng.integers(0, clusters, frames)
    return (centres[which] + 0.1 * rng.standard_normal((frames, dim))).astype(np.float32), which


def test_clusters_that_are_far_apart_are_found():
    features, which = blobs()
    units = fit_codebook(features, 8, seed=0, init_attempts=5).assign(features)
    assert units.dtype == np.int32
    assert len({(a, b) for a, b in zip(which, units, strict=True)}) == 8 == len(set(units))


@pytest.mark.parametrize("frames", [0, 1, 20_000])
def test_assign_equals_scikit_learn(frames):
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(1)
    fitted = KMeans(50, n_init=1, max_iter=2, random_state=0).fit(rng.standard_normal((500, 39)).astype(np.float32))
    features = (3 + rng.standard_normal((frames, 39))).astype(np.float32)
    units = Codebook(fitted.cluster_centers_).assign(features)
    expected = fitted.predict(features) if frames else []
    np.testing.assert_array_equal(units, expected)


def test_inertia_is_the_mean_squared_distance_to_the_nearest_centroid():
    features, _ = blobs()
    codebook = fit_codebook(features, 4, seed=0, init_attempts=1)
    distances = np.square(features[:, None] - codebook.centroids).sum(axis=2).min(axis=1)
    assert codebook.inertia(features) == pytest.approx(distances.mean(), rel=1e-5)


def test_the_same_seed_gives_the_same_codebook_bit_for_bit():
    features, _ = blobs(frames=2000)
    one, same, other = (fit_codebook(features, 20, seed=seed, init_attempts=2).centroids for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_a_saved_codebook_is_the_same_with_its_metadata(tmp_path):
    features, _ = blobs()
    codebook = fit_codebook(features, 8, seed=0)
    codebook.save(tmp_path / "codebook.safetensors", source="mfcc", clusters=8)
    with safe_open(tmp_path / "codebook.safetensors", framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("centroids"), codebook.centroids)
        assert file.metadata() == {"source": "mfcc", "clusters": "8"}
    assert [path.name for path in tmp_path.iterdir()] == ["codebook.safetensors"]


def test_more_clusters_than_frames_is_an_error_that_names_both():
    with pytest.raises(ValueError, match="clusters=11 must lie between 1 and the number of frames to cluster, 10"):
        fit_codebook(blobs(frames=10)[0], 11, seed=0)
