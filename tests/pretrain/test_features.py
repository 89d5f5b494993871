import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hubert_fast.pretrain import features as module
from hubert_fast.pretrain.audio import normalized
from hubert_fast.pretrain.codebook import Codebook
from hubert_fast.pretrain.features import HubertFeatures, MfccFeatures, ModelLayers, load_model
from hubert_fast.pretrain.frames import num_frames
from tests.models.graph_stand_in import StandInCapture
from tests.pretrain.fabricated_run import save_tiny_weights
from tests.pretrain.train_tiny import MODEL

CONFIG = dataclasses.replace(MODEL, encoder_num_layers=3, encoder_layer_drop=0.5, encoder_dropout=0.5)
LENGTHS = [5_000, 16_000, 400, 9_999]


def waveforms(seed=0):
    rng = np.random.default_rng(seed)
    return [(0.1 * rng.standard_normal(samples)).astype(np.float32) for samples in LENGTHS]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_tiny_weights(path, config=CONFIG)
    return path


def test_a_loaded_model_is_the_saved_one(weights):
    model = load_model(weights)
    torch.manual_seed(0)
    expected = CONFIG.build(7).state_dict()
    assert not model.training and list(model.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_weights_without_their_configuration_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors.*lacks the metadata.*model_config"):
        load_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("call_seconds", [0.1, 1.5, 60.0])
def test_features_are_the_layer_of_the_model_without_batch_and_padding(weights, monkeypatch, call_seconds):
    monkeypatch.setattr(module, "_CPU_CALL_SECONDS", call_seconds)
    model = CONFIG.build(7).eval()
    model.load_state_dict(load_file(weights))
    source = HubertFeatures(weights, 2)
    features = source(waveforms())
    assert source.name == "layer2" and source.dim == 32
    for waveform, got in zip(waveforms(), features, strict=True):
        with torch.inference_mode():
            expected = model.wav2vec2.extract_features(torch.from_numpy(waveform)[None])[0][1][0]
        assert got.shape == (num_frames(len(waveform)), 32) and got.dtype == np.float32
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_all_layers_are_those_of_each_source(weights):
    layers = ModelLayers(weights)(waveforms())
    assert len(layers) == 3
    for number, layer in enumerate(layers, start=1):
        for got, expected in zip(layer, HubertFeatures(weights, number)(waveforms()), strict=True):
            np.testing.assert_array_equal(got, expected)


def _codebook(features, clusters=9):
    return Codebook(np.concatenate(features)[:: len(np.concatenate(features)) // clusters][:clusters].copy())


def test_units_are_those_of_the_features_to_the_bit(weights):
    source = HubertFeatures(weights, 2)
    features = source(waveforms())
    codebook = _codebook(features)
    for units, each in zip(source.assign(waveforms(), codebook), features, strict=True):
        assert units.dtype == np.int32
        np.testing.assert_array_equal(units, codebook.assign(each))


@pytest.mark.parametrize("call_seconds", [0.1, 60.0])
def test_a_device_assigns_the_units_of_several_layers_without_their_features(weights, monkeypatch, call_seconds):
    """Distances are rounded otherwise than on the CPU, where the nearest two are far enough apart for that."""
    monkeypatch.setattr(module, "_CPU_CALL_SECONDS", call_seconds)
    layers = ModelLayers(weights)
    codebooks = {3: _codebook(layers(waveforms())[2]), 1: _codebook(layers(waveforms())[0], clusters=4)}
    units = layers._assign_on_device(waveforms(), codebooks, 1, 3)
    assert list(units) == [3, 1]
    for layer, utterances in layers.assign(waveforms(), codebooks).items():
        for got, expected in zip(units[layer], utterances, strict=True):
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_a_gpu_gives_the_features_and_the_units_of_the_cpu(weights, monkeypatch):
    monkeypatch.setattr(module, "_GPU_CALL_SECONDS", 0.7)  # several calls, one under way while another is read
    sources = [HubertFeatures(weights, 2, device=device) for device in ("cpu", "cuda")]
    expected, features = (np.concatenate(source(waveforms())) for source in sources)
    np.testing.assert_allclose(features, expected, atol=1e-2)
    codebook = _codebook([expected])
    expected, units = (np.concatenate(source.assign(waveforms(), codebook)) for source in sources)
    assert units.dtype == np.int32 and (units == expected).mean() > 0.95


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_a_call_is_started_without_waiting_for_the_gpu(weights):
    layers = ModelLayers(weights, device="cuda", autocast=True)
    work = layers._graphs_of(
        ("test",), lambda rows, layout: torch.stack(layers.model.wav2vec2.encoder.layer_rows(rows, layout))
    )
    # The first compiles the kernels, the second captures them.
    expected = [layers._start(waveforms(), work).wait().copy() for _ in range(2)][0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        started = layers._start(waveforms(), work)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_array_equal(started.wait(), expected)


def test_calls_in_graphs_give_the_same_features_and_units(weights, monkeypatch):
    monkeypatch.setattr(module, "_CPU_CALL_SECONDS", 0.7)  # calls of several capacities
    plain, graphed = ModelLayers(weights), ModelLayers(weights)
    graphed._capture = StandInCapture()
    given = waveforms()
    expected = plain(given, first=2)
    codebooks = {2: _codebook(expected[0]), 3: _codebook(expected[1])}
    units = plain.assign(given, codebooks)
    for _ in range(3):  # as they run, captured, and again after others have used the memory
        graphed._capture.spoil()
        for layer, utterances in zip(graphed(given, first=2), expected, strict=True):
            np.testing.assert_allclose(np.concatenate(layer), np.concatenate(utterances), atol=1e-5)
        graphed._capture.spoil()
        found = graphed._assign_on_device(given, codebooks, 2, 3)
        for n in codebooks:
            np.testing.assert_array_equal(np.concatenate(found[n]), np.concatenate(units[n]))
    assert graphed._capture.graphs > 2


def test_features_are_deterministic_and_autocast_still_gives_float32(weights):
    source = HubertFeatures(weights, 3)
    one, same = source(waveforms()), source(waveforms())
    rounded = HubertFeatures(weights, 3, autocast=True)(waveforms())
    for a, b, c in zip(one, same, rounded, strict=True):
        np.testing.assert_array_equal(a, b)
        assert c.dtype == np.float32 and 0 < np.abs(a - c).max() < 0.2


def test_normalize_audio_scales_each_utterance(weights):
    given = HubertFeatures(weights, 1, normalize_audio=True)(waveforms())
    scaled = HubertFeatures(weights, 1)([normalized(waveform) for waveform in waveforms()])
    for got, expected in zip(given, scaled, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_settings_tell_one_source_from_another(weights, tmp_path):
    changed = tmp_path / "model.safetensors"
    torch.manual_seed(1)
    save_tiny_weights(changed, config=dataclasses.replace(CONFIG, encoder_dropout=0.1))
    sources = [
        MfccFeatures(),
        HubertFeatures(weights, 1),
        HubertFeatures(weights, 2),
        HubertFeatures(changed, 1),
        HubertFeatures(weights, 1, normalize_audio=True),
        HubertFeatures(weights, 1, autocast=True),
    ]
    assert len({str(source.settings) for source in sources}) == len(sources)
    assert HubertFeatures(weights, 1).settings == sources[1].settings


def test_graphs_and_weights_of_extraction_are_freed_with_it(weights):
    layers = ModelLayers(weights)
    codebook = _codebook(layers(waveforms())[0])
    layers._assign_on_device(waveforms(), {1: codebook}, 1, 1)
    model = weakref.ref(layers.model)
    gc.disable()
    try:
        del layers
        assert model() is None
    finally:
        gc.enable()
