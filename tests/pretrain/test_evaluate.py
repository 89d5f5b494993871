import json

import numpy as np
import pytest
import soundfile
import torch

from hubert_fast.pretrain import evaluate as evaluation
from hubert_fast.pretrain.config import DataConfig, EvaluationConfig, IterationConfig, PretrainConfig, UnitsConfig
from hubert_fast.pretrain.features import MfccFeatures
from hubert_fast.pretrain.frames import SAMPLE_RATE, num_frames
from hubert_fast.pretrain.left_out import LeftOut, TooManyBadUtterancesError
from hubert_fast.pretrain.make_units import make_units
from hubert_fast.pretrain.manifest import load_manifest
from hubert_fast.pretrain.mfcc import mfcc39
from tests.pretrain.fabricated_run import save_tiny_weights, write_json_lines
from tests.pretrain.speech_folder import scan_folder

PITCH = {"low": 300, "mid": 1100, "high": 3000, "sil": 0}
HELD_OUT = ["d.wav", "e.wav"]


def write_corpus(folder):
    """Five utterances of four phones that any spectrum tells apart."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for name in "abcde":
        symbols = rng.choice(list(PITCH), size=16)
        durations = rng.uniform(0.08, 0.25, size=16)
        starts = np.concatenate([[0.0], np.cumsum(durations)[:-1]])
        pieces = [
            np.sin(2 * np.pi * PITCH[symbol] * np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE)
            for symbol, seconds in zip(symbols, durations, strict=True)
        ]
        waveform = 0.3 * np.concatenate(pieces)
        soundfile.write(folder / f"{name}.wav", waveform + rng.normal(0, 1e-3, waveform.shape), SAMPLE_RATE)
        phones = list(zip(map(str, symbols), starts, durations, strict=True))
        lines.append({"path": f"{name}.wav", "phones": phones})
    (folder / "splits.json").write_text(json.dumps({"valid": HELD_OUT}), encoding="utf-8")
    write_json_lines(folder / "alignments.jsonl", lines)


class FakeUnits(dict):
    num_classes = 2

    @property
    def known(self):
        return np.ones(len(self), dtype=bool)

    def places_in(self, manifest):
        return np.arange(len(manifest))


class FakeLayers:
    """Layer 1 knows nothing, layer 2 is MFCC, the phones in all but name."""

    call_seconds = 60.0

    def __call__(self, waveforms):
        rng = np.random.default_rng(len(waveforms[0]))
        noise = [rng.normal(size=(num_frames(len(waveform)), 5)).astype(np.float32) for waveform in waveforms]
        return [noise, [mfcc39(waveform) for waveform in waveforms]]

    def assign(self, waveforms, codebooks):
        layers = self(waveforms)
        return {n: [codebook.assign(each) for each in layers[n - 1]] for n, codebook in codebooks.items()}


@pytest.fixture
def manifest(tmp_path):
    write_corpus(tmp_path / "audio")
    scan_folder(tmp_path, min_seconds=0.5)
    return tmp_path / "manifest"


@pytest.fixture
def iteration(tmp_path, manifest, monkeypatch):
    """An iteration directory beside the manifest; the model and the training units are stand-ins."""
    directory = tmp_path / "iteration1"
    lines = [
        {"step": 1, "loss": 5.0, "masked_accuracy": 0.1},
        {"step": 9, "valid_loss": 4.0, "valid_masked_accuracy": 0.2},
    ]
    write_json_lines(directory / "train" / "metrics.jsonl", lines)
    (directory / "train" / "model.safetensors").write_bytes(b"weights")
    samples = load_manifest(manifest, "valid").samples
    units = FakeUnits(
        {index: np.arange(frames, dtype=np.int32) % 2 for index, frames in enumerate(num_frames(samples))}
    )
    monkeypatch.setattr(evaluation, "ModelLayers", lambda weights, **options: FakeLayers())
    monkeypatch.setattr(evaluation, "Units", lambda path: units)
    return directory


def run(iteration, *, autocast=False, normalize_audio=False, max_bad_utterances=0.01, forgotten=(), **settings):
    config = PretrainConfig(
        autocast=autocast,
        data=DataConfig(max_bad_utterances=max_bad_utterances),
        evaluation=EvaluationConfig(**{"clusters": 8} | settings),
    )
    own, options = IterationConfig(normalize_audio=normalize_audio), {"forgotten": forgotten, "progress": False}
    return evaluation.evaluate(iteration, iteration.parent / "manifest", config, own, **options)


def by_name(result):
    return {each["name"]: each for each in result["representations"]}


def test_features_that_know_the_phone_score_high_and_noise_scores_chance(iteration):
    result = run(iteration)
    scores = by_name(result)
    assert list(scores) == ["mfcc", "layer1", "layer2", "training_units"]
    assert [each["layer"] for each in scores.values()] == [0, 1, 2, None]
    assert [each["clusters"] for each in scores.values()] == [8, 8, 8, 2]
    assert scores["mfcc"]["pnmi"] > 0.7 and scores["mfcc"]["phone_purity"] > 0.8
    assert scores["layer2"] == scores["mfcc"] | {"name": "layer2", "layer": 2}
    assert scores["layer1"]["pnmi"] < scores["layer1"]["chance_pnmi"] + 0.05
    assert scores["training_units"]["unit_perplexity"] == pytest.approx(2, rel=1e-3)
    assert result["training"]["valid_loss"] == 4.0 and result["training"]["last_loss"] == 5.0


def test_only_held_out_frames_are_scored_and_only_training_frames_fitted(iteration):
    result = run(iteration)
    manifests = {split: load_manifest(iteration.parent / "manifest", split) for split in ("train", "valid")}
    frames = {split: num_frames(manifest.samples).sum() for split, manifest in manifests.items()}
    assert list(manifests["valid"].ids()) == HELD_OUT
    assert result["utterances"] == 2 and result["frames"] == frames["valid"] == sum(result["phone_frames"].values())
    assert result["fit_frames"] == frames["train"]
    assert set(result["phone_frames"]) == set(PITCH)


def test_a_second_call_returns_the_first_result_without_work(iteration, monkeypatch):
    first = run(iteration)
    assert json.loads((iteration / "evaluation.json").read_text()) == first
    monkeypatch.setattr(evaluation, "ModelLayers", lambda *_, **__: pytest.fail("worked again"))
    assert run(iteration) == first


@pytest.mark.parametrize("change", ["weights", "clusters"])
def test_an_evaluation_of_other_weights_or_settings_is_made_anew(iteration, change):
    first = run(iteration)
    if change == "weights":
        (iteration / "train" / "model.safetensors").write_bytes(b"other weights")
    second = run(iteration, clusters=8 if change == "weights" else 5)
    assert second["settings"] != first["settings"]
    assert (second["representations"] == first["representations"]) == (change == "weights")


def test_the_same_seed_gives_the_same_result(iteration, monkeypatch):
    monkeypatch.setattr(FakeLayers, "call_seconds", 1.0)
    first = run(iteration, fit_frames=150)
    assert 150 <= first["fit_frames"] < 160, "the frames of an utterance are rounded up"
    (iteration / "evaluation.json").unlink()
    assert run(iteration, fit_frames=150) == first


def test_frames_are_a_share_of_utterances_drawn_in_random_order(manifest):
    table = load_manifest(manifest, "train")
    audio = evaluation._Audio(table, np.arange(len(table)), LeftOut(0, 0.0), progress=False)
    order = np.random.default_rng(0).permutation(len(table))
    assert list(order) != sorted(order)
    chosen, share = evaluation._choose_utterances(audio, 200, np.random.default_rng(0))
    assert chosen.indices.tolist() == order.tolist()
    assert share == pytest.approx(200 / (50 * table.samples.sum() / SAMPLE_RATE), rel=1e-6)
    few, share = evaluation._choose_utterances(audio, 10, np.random.default_rng(0))
    assert few.indices.tolist() == order[:1].tolist()
    assert share == pytest.approx(10 / (50 * table.samples[order[0]] / SAMPLE_RATE), rel=1e-6)


def test_frames_are_limited_by_memory_but_never_below_what_the_clusters_need(iteration, monkeypatch):
    bytes_per_frame = 4 * (39 + 5 + 39)
    monkeypatch.setattr(evaluation, "_FIT_BYTES", 200 * bytes_per_frame)
    assert 200 <= run(iteration)["fit_frames"] < 210
    (iteration / "evaluation.json").unlink()
    monkeypatch.setattr(evaluation, "_FIT_BYTES", 1)
    assert 160 <= run(iteration)["fit_frames"] < 170


def test_without_alignments_it_says_so_and_still_reports_the_training(iteration, tmp_path, monkeypatch):
    (tmp_path / "audio" / "alignments.jsonl").unlink()
    scan_folder(tmp_path, min_seconds=0.4)
    monkeypatch.setattr(evaluation, "ModelLayers", lambda *_, **__: pytest.fail("there is nothing to score"))
    result = run(iteration)
    assert result["representations"] == [] and "no phone alignments" in result["note"]
    assert result["training"]["valid_masked_accuracy"] == 0.2


def test_what_cannot_be_read_was_forgotten_or_has_no_units_takes_no_part_and_is_listed(
    iteration, tmp_path, monkeypatch
):
    whole = run(iteration)
    (tmp_path / "audio" / "a.wav").unlink()
    (tmp_path / "audio" / "d.wav").write_bytes(b"RIFF")
    (iteration / "evaluation.json").unlink()
    with pytest.raises(TooManyBadUtterancesError, match="2 of 5 utterances cannot be used"):
        run(iteration)
    result = run(iteration, max_bad_utterances=0.4)
    assert result["left_out"] == {
        "a.wav": "there is no such file (it was there when the manifest was made)",
        "d.wav": "the file changed since the scan",
    }
    assert (
        result["utterances"] == 1 and result["frames"] < whole["frames"] and result["fit_frames"] < whole["fit_frames"]
    )
    forgotten = run(iteration, forgotten=["a.wav", "d.wav"])
    assert forgotten["representations"] == result["representations"] and not forgotten["left_out"]
    monkeypatch.setattr(FakeUnits, "known", np.array([False, True]))
    (iteration / "evaluation.json").unlink()
    assert run(iteration, forgotten=["a.wav"])["representations"] == result["representations"]


@pytest.mark.parametrize("gone", ["abc", "de"])
def test_where_nothing_can_be_read_any_more_it_says_so(iteration, tmp_path, gone):
    for name in gone:
        (tmp_path / "audio" / f"{name}.wav").unlink()
    result = run(iteration, max_bad_utterances=0.6)
    assert result["representations"] == [] and "no utterance that counts could be read" in result["note"]
    assert set(result["left_out"]) == {f"{name}.wav" for name in gone} and result["training"]["last_loss"] == 5.0


def test_a_real_model_and_real_units_are_scored(tmp_path, manifest):
    directory = tmp_path / "iteration1"
    config = UnitsConfig(clusters=6, init_attempts=2)
    make_units(manifest, MfccFeatures(), config, directory / "units", seed=0, progress=False)
    torch.manual_seed(0)
    save_tiny_weights(directory / "train" / "model.safetensors")
    scores = by_name(run(directory, clusters=6, autocast=True, normalize_audio=True))
    assert list(scores) == ["mfcc", "layer1", "layer2", "training_units"]
    assert scores["training_units"]["pnmi"] > 0.6 and scores["training_units"]["clusters"] == 6
    assert all(each["frames"] == scores["mfcc"]["frames"] for each in scores.values())
