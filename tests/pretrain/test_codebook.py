import numpy as np
import pytest
import torch

from hubert_fast.pretrain.codebook import Codebook, fit_codebook, nearest_centroids

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


def noise(frames=600):
    return np.random.default_rng(0).standard_normal((frames, 5)).astype(np.float32)


@pytest.mark.parametrize("frames", [0, 1, 20_000])
def test_assign_equals_scikit_learn(frames):
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(1)
    fitted = KMeans(50, n_init=1, max_iter=2, random_state=0).fit(rng.standard_normal((500, 39)).astype(np.float32))
    features = (3 + rng.standard_normal((frames, 39))).astype(np.float32)
    units = Codebook(fitted.cluster_centers_).assign(features)
    expected = fitted.predict(features) if frames else []
    np.testing.assert_array_equal(units, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_a_device_assigns_the_nearest_centroid_too_and_the_lowest_index_on_a_tie(device):
    features = noise(frames=5000)
    centroids = np.concatenate([features[:40], features[:40], np.zeros((1, 5), np.float32)])
    with torch.autocast(device, torch.bfloat16):  # as extraction calls it
        units = nearest_centroids(torch.from_numpy(features).to(device), torch.from_numpy(centroids).to(device))
    distances = np.square(features[:, None].astype(np.float64) - centroids[:40]).sum(axis=2)
    distances = np.concatenate([distances, np.square(features.astype(np.float64)).sum(axis=1, keepdims=True)], axis=1)
    expected = distances.argmin(axis=1)
    expected[expected == 40] = 80  # the origin stands behind the copies of the first 40
    nearest_two = np.sort(distances, axis=1)[:, :2]
    clear = nearest_two[:, 1] - nearest_two[:, 0] > 1e-4
    assert units.dtype == torch.int32 and clear.mean() > 0.99 and (expected == 80).any()
    np.testing.assert_array_equal(units.cpu().numpy()[clear], expected[clear])
    np.testing.assert_array_equal(Codebook(centroids).assign(features)[clear], expected[clear])


def test_inertia_is_the_mean_squared_distance_to_the_nearest_centroid():
    features = noise()
    codebook = fit_codebook(features, 4, seed=0, init_attempts=1)
    distances = np.square(features[:, None] - codebook.centroids).sum(axis=2).min(axis=1)
    assert codebook.inertia(features) == pytest.approx(distances.mean(), rel=1e-5)


def test_the_same_seed_gives_the_same_codebook_bit_for_bit():
    features = noise(frames=2000)
    one, same, other = (fit_codebook(features, 20, seed=seed, init_attempts=2).centroids for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_more_clusters_than_frames_is_an_error_that_names_both():
    with pytest.raises(ValueError, match="clusters=11 must be at most the number of frames to cluster, 10"):
        fit_codebook(noise(frames=10), 11, seed=0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused_in_a_line(value):
    features = noise()
    features[3, 2] = value
    with pytest.raises(ValueError, match="^features hold a NaN or an infinity, which no cluster can be near to$"):
        fit_codebook(features, 4, seed=0)
