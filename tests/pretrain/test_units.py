import json
import pickle

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from hubert_fast.pretrain import units as module
from hubert_fast.pretrain.audio import AudioError, load_audio, utterance_samples
from hubert_fast.pretrain.codebook import Codebook
from hubert_fast.pretrain.config import UnitsConfig
from hubert_fast.pretrain.features import HubertFeatures, MfccFeatures
from hubert_fast.pretrain.frames import num_frames
from hubert_fast.pretrain.manifest import load_manifest
from hubert_fast.pretrain.mfcc import mfcc39
from hubert_fast.pretrain.units import Units, choose_utterances, make_units
from tests.pretrain.fabricated_run import save_tiny_weights
from tests.pretrain.speech_folder import scan_folder, write_audio, write_units

SMALL = UnitsConfig(clusters=6, init_attempts=1)


class CountingMfcc(MfccFeatures):
    seconds = 0.0

    def __call__(self, waveforms):
        self.seconds += sum(map(len, waveforms)) / 16_000
        return super().__call__(waveforms)


@pytest.fixture
def folder(tmp_path):
    for index in range(6):
        write_audio(tmp_path / "audio" / f"{index}.wav", 0.4 + 0.1 * index, seed=index)
    scan_folder(tmp_path)
    return tmp_path


def make(folder, config=SMALL, source=None, name="units", **changes):
    arguments = {"seed": 0, "progress": False, **changes}
    make_units(folder / "manifest", source or MfccFeatures(), config, folder / name, **arguments)
    return folder / name


def read_codebook(out):
    with safe_open(out / "codebook.safetensors", framework="numpy") as file:
        return Codebook(file.get_tensor("centroids")), file.metadata()


def test_every_utterance_gets_the_nearest_centroid_of_each_of_its_frames(folder):
    out = make(folder)
    codebook, metadata = read_codebook(out)
    for split in ("train", "valid"):
        units = Units(out / f"{split}.safetensors")
        cuts = list(load_manifest(folder / "manifest", split))
        assert sorted(units.ids) == sorted(cut.id for cut in cuts) and cuts
        assert units.num_classes == 6
        for cut in cuts:
            assert units[cut.id].dtype == np.int32
            assert len(units[cut.id]) == units.frames(cut.id) == num_frames(utterance_samples(cut))
            np.testing.assert_array_equal(units[cut.id], codebook.assign(mfcc39(load_audio(cut))))
    assert metadata["source"] == "mfcc" and metadata["layer"] == "0"


def test_each_utterance_is_read_once_and_k_means_sees_no_more_than_it_asked_for(folder):
    source = CountingMfcc()
    out = make(folder, UnitsConfig(clusters=6, fit_frames=50, init_attempts=1), source)
    cuts = [cut for split in ("train", "valid") for cut in load_manifest(folder / "manifest", split)]
    assert source.seconds == pytest.approx(sum(cut.duration for cut in cuts))
    assert 50 <= json.loads((out / "summary.json").read_text())["fit_frames"] < 50 + 45


def test_small_groups_of_utterances_change_nothing(folder, monkeypatch):
    expected = make(folder)
    monkeypatch.setattr(MfccFeatures, "call_seconds", 0.5 / module._CALLS_AHEAD)
    grouped = make(folder, name="grouped", workers=1)
    for name in ("train", "valid"):
        assert (expected / f"{name}.safetensors").read_bytes() == (grouped / f"{name}.safetensors").read_bytes()
    (one, of_one), (other, of_other) = (read_codebook(out) for out in (expected, grouped))
    np.testing.assert_array_equal(one.centroids, other.centroids)
    assert of_one == of_other


def test_summary_describes_the_units(folder):
    out = make(folder)
    summary = json.loads((out / "summary.json").read_text())
    units = Units(out / "train.safetensors")
    values = np.concatenate([units[cut_id] for cut_id in units.ids])
    assert summary["clusters"] == 6 and summary["source"] == "mfcc" and summary["dim"] == 39
    assert summary["frames"]["train"] == len(values) and summary["frames"]["valid"] > 0
    assert summary["units_used"] == len(set(values.tolist()))
    assert 1 < summary["perplexity"] <= 6 and summary["perplexity"] == pytest.approx(2 ** summary["entropy_bits"])
    assert summary["inertia"] > 0


def test_units_are_kept_where_settings_and_utterances_are_the_same_and_made_anew_where_not(folder):
    out = make(folder)
    before = (out / "summary.json").read_bytes()
    source = CountingMfcc()
    make(folder, source=source)
    assert source.seconds == 0
    (out / "valid.safetensors").unlink()
    make(folder, source=source)
    assert source.seconds > 0 and (out / "summary.json").read_bytes() == before
    make(folder, seed=1)
    assert (out / "summary.json").read_bytes() != before
    write_audio(folder / "audio" / "7.wav", 0.5)
    scan_folder(folder, seed=2)
    make(folder, seed=1, source=(source := CountingMfcc()))
    assert source.seconds > 0


def test_the_utterances_k_means_sees_are_random_but_reproducible(folder):
    cuts = list(load_manifest(folder / "manifest", "train"))
    chosen = {seed: [cut.id for cut in choose_utterances(cuts, 40, seed)] for seed in range(6)}
    assert chosen[0] == [cut.id for cut in choose_utterances(cuts, 40, 0)]
    assert len({tuple(ids) for ids in chosen.values()}) > 1
    assert choose_utterances(cuts, 10**9, 0) == cuts
    with pytest.raises(ValueError, match="no training utterance"):
        choose_utterances([], 40, 0)


def test_features_that_do_not_fit_the_audio_name_the_utterance(folder):
    class Short(MfccFeatures):
        def __call__(self, waveforms):
            return [features[:-1] for features in super().__call__(waveforms)]

    with pytest.raises(ValueError, match=r"shape \(\d+, 39\) for utterance '\d.wav', whose audio has \d+ frames"):
        make(folder, source=Short())

    class ShortUnits(MfccFeatures):
        def assign(self, waveforms, codebook):
            return [units[:-1] for units in super().assign(waveforms, codebook)]

    with pytest.raises(ValueError, match=r"units of shape \(\d+,\) for utterance '\d.wav', whose audio has \d+ frames"):
        make(folder, UnitsConfig(clusters=6, fit_frames=50, init_attempts=1), source=ShortUnits())


def test_units_of_a_layer_are_the_nearest_centroids_of_its_features_whoever_was_fitted(folder, tmp_path):
    torch.manual_seed(0)
    save_tiny_weights(tmp_path / "model.safetensors")
    source = HubertFeatures(tmp_path / "model.safetensors", 2)
    out = make(folder, UnitsConfig(clusters=6, layer=2, fit_frames=50, init_attempts=1), source)
    codebook, _ = read_codebook(out)
    cuts = [cut for split in ("train", "valid") for cut in load_manifest(folder / "manifest", split)]
    units = {split: Units(out / f"{split}.safetensors") for split in ("train", "valid")}
    of_cuts = {cut_id: part[cut_id] for part in units.values() for cut_id in part.ids}
    features = source([load_audio(cut) for cut in cuts])
    for cut, each in zip(cuts, features, strict=True):
        assert of_cuts[cut.id].dtype == np.int32
        assert (of_cuts[cut.id] == codebook.assign(each)).mean() > 0.95  # other batches round otherwise


def test_audio_that_vanished_stops_it_and_leaves_no_complete_units(folder):
    (folder / "audio" / "3.wav").unlink()
    with pytest.raises(AudioError, match="3.wav: there is no such file"):
        make(folder)
    assert not (folder / "units" / "summary.json").exists()


def test_missing_files_and_files_of_something_else_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no units at '.*nowhere.safetensors': `hubert-fast units` makes them"):
        Units(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="holds no train.jsonl.gz: `hubert-fast scan` makes it"):
        load_manifest(tmp_path, "train")
    save_file({"a": np.arange(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors' is no file of units: it lacks the metadata num_classes"):
        Units(tmp_path / "other.safetensors")


def test_units_of_an_unknown_utterance_are_named(tmp_path):
    write_units(tmp_path / "units.safetensors", {"a": np.arange(3, dtype=np.int32)}, num_classes=4)
    units = pickle.loads(pickle.dumps(Units(tmp_path / "units.safetensors")))
    assert units["a"].tolist() == [0, 1, 2] and units.num_classes == 4
    with pytest.raises(KeyError, match="'b'"):
        units["b"]
