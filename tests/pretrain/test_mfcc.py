import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks.torchaudio_peer import import_models, installed
from hubert_fast.pretrain.frames import num_frames
from hubert_fast.pretrain.mfcc import mfcc39


def noise(samples, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def test_there_is_one_feature_vector_for_every_hubert_frame():
    waveform = noise(2000)
    for samples in [0, 1, 399, *range(400, 2000, 7), 719, 720, 721, 1039, 1040]:
        features = mfcc39(waveform[:samples])
        assert features.shape == (num_frames(samples), 39) and features.dtype == np.float32


def test_equal_to_kaldi_in_torchaudio_with_deltas_at_10_ms():
    if not installed():
        pytest.skip("torchaudio is not installed")
    import_models()  # its compiled library does not load beside a CPU build of torch
    from torchaudio.compliance import kaldi
    from torchaudio.functional import compute_deltas

    waveform = torch.from_numpy(noise(8_123))
    cepstra = kaldi.mfcc(waveform[None], sample_frequency=16_000, use_energy=False).T
    deltas = compute_deltas(cepstra)
    expected = torch.cat([cepstra, deltas, compute_deltas(deltas)]).T[::2]
    np.testing.assert_allclose(mfcc39(waveform.numpy()), expected.numpy(), rtol=1e-4, atol=2e-3)


def test_silence_is_finite_and_the_same_everywhere():
    features = mfcc39(np.zeros(4000, dtype=np.float32))
    assert np.isfinite(features).all()
    np.testing.assert_allclose(features, np.broadcast_to(features[0], features.shape), atol=1e-5)


def test_the_data_stages_work_without_torchaudio():
    script = (
        "import sys; sys.modules['torchaudio'] = None\n"
        "import numpy as np\n"
        "import hubert_fast.pretrain.batches, hubert_fast.pretrain.features\n"
        "from hubert_fast.pretrain.mfcc import mfcc39\n"
        "assert mfcc39(np.zeros(400, dtype=np.float32)).shape == (1, 39)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
