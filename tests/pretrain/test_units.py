import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from hubert_fast.pretrain import make_units as module
from hubert_fast.pretrain.audio import load_audio
from hubert_fast.pretrain.codebook import Codebook
from hubert_fast.pretrain.config import UnitsConfig
from hubert_fast.pretrain.features import HubertFeatures, MfccFeatures
from hubert_fast.pretrain.frames import num_frames
from hubert_fast.pretrain.left_out import TooManyBadUtterancesError, read_left_out
from hubert_fast.pretrain.make_units import choose_utterances, make_units
from hubert_fast.pretrain.manifest import load_manifest
from hubert_fast.pretrain.mfcc import mfcc39
from hubert_fast.pretrain.unit_usage import DegenerateUnitsError
from hubert_fast.pretrain.units import Units
from tests.pretrain.fabricated_run import save_tiny_weights
from tests.pretrain.speech_folder import scan_folder, write_audio

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
        manifest = load_manifest(folder / "manifest", split)
        assert list(units.ids) == list(manifest.ids()) and len(manifest) and units.known.all()
        assert units.num_classes == 6
        units.verify()
        for index, utterance in enumerate(manifest):
            assert len(units[index]) == num_frames(utterance.samples)
            np.testing.assert_array_equal(units[index], codebook.assign(mfcc39(load_audio(utterance))))
    assert metadata["source"] == "mfcc" and metadata["layer"] == "0"


def test_each_utterance_is_read_once_and_k_means_sees_no_more_than_it_asked_for(folder):
    source = CountingMfcc()
    out = make(folder, UnitsConfig(clusters=6, fit_frames=50, init_attempts=1), source)
    samples = sum(load_manifest(folder / "manifest", split).samples.sum() for split in ("train", "valid"))
    assert source.seconds == pytest.approx(samples / 16_000)
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
    values = np.concatenate([units[index] for index in range(len(units))])
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
    samples = load_manifest(folder / "manifest", "train").samples
    everyone = np.arange(len(samples))
    chosen = {seed: choose_utterances(samples, everyone, 40, seed).tolist() for seed in range(6)}
    assert chosen[0] == choose_utterances(samples, everyone, 40, 0).tolist()
    assert len(set(map(tuple, chosen.values()))) > 1
    assert choose_utterances(samples, everyone, 10**9, 0).tolist() == everyone.tolist()
    with pytest.raises(ValueError, match="no training utterance"):
        choose_utterances(samples, everyone[:0], 40, 0)


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
    for split in ("train", "valid"):
        units, manifest = Units(out / f"{split}.safetensors"), load_manifest(folder / "manifest", split)
        for index, each in enumerate(source([load_audio(utterance) for utterance in manifest])):
            assert (units[index] == codebook.assign(each)).mean() > 0.95  # other batches round otherwise


def test_audio_that_vanished_or_changed_has_no_units_and_is_listed(folder):
    (folder / "audio" / "3.wav").unlink()
    write_audio(folder / "audio" / "1.wav", 0.5, seed=9)
    with pytest.raises(
        TooManyBadUtterancesError, match="2 of 6 utterances .*=0.1 of them: .*'1.wav': .*changed since the scan"
    ):
        make(folder, max_bad_utterances=0.1)
    assert not (folder / "units" / "summary.json").exists()
    out = make(folder, max_bad_utterances=0.4)
    units = [Units(out / f"{split}.safetensors") for split in ("train", "valid")]
    assert {name for each in units for name, known in zip(each.ids, each.known) if not known} == {"1.wav", "3.wav"}
    assert {line["id"]: line["reason"] for line in read_left_out(out)} == {
        "1.wav": "the file changed since the scan",
        "3.wav": "there is no such file (it was there when the manifest was made)",
    }
    summary = json.loads((out / "summary.json").read_text())
    assert sum(summary["frames"].values()) == sum(num_frames(each.samples)[each.known].sum() for each in units)


def test_a_first_bad_recording_stops_it_only_where_none_is_allowed(folder):
    (folder / "audio" / "3.wav").unlink()
    with pytest.raises(TooManyBadUtterancesError, match="1 of 6 utterances cannot be used"):
        make(folder, max_bad_utterances=0.0)
    make(folder, max_bad_utterances=1e-9)


def test_recordings_that_were_forgotten_are_not_read(folder):
    (folder / "audio" / "3.wav").unlink()
    out = make(folder, forgotten=["3.wav"])
    known = {name: known for split in ("train", "valid") for name, known in known_units(out, split)}
    assert known == {f"{index}.wav": index != 3 for index in range(6)} and not read_left_out(out)


class OneUnit(MfccFeatures):
    """Units that are all the same but for the first ``others`` frames of each utterance."""

    others = 0

    def __call__(self, waveforms):
        return [
            np.where(np.arange(len(each))[:, None] < self.others, np.float32(9), 0 * each)
            for each in super().__call__(waveforms)
        ]


def test_units_that_are_all_the_same_stop_it_at_once_unless_allowed(folder, capsys):
    config = dataclasses.replace(SMALL, fit_frames=50)
    with pytest.raises(
        DegenerateUnitsError,
        match="are nearly all the same: 1 of 6 units are used, their perplexity is 1.00, the commonest has 100.0%",
    ):
        make(folder, config, OneUnit())
    assert not (folder / "units" / "train.safetensors").exists(), "the rest of the corpus was not looked at"
    make(folder, dataclasses.replace(config, min_perplexity=1.0), OneUnit())
    assert "warning: units that say little: 1 of 6 units are used" in capsys.readouterr().err


def test_units_that_say_little_are_warned_of(folder, capsys, monkeypatch):
    make(folder)
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(OneUnit, "others", 4)
    make(folder, dataclasses.replace(SMALL, min_perplexity=1.2), OneUnit(), name="weak")
    said = capsys.readouterr().err
    assert "warning: units that say little: 2 of 6 units are used, their perplexity is 1.39" in said


def known_units(out, split):
    units = Units(out / f"{split}.safetensors")
    return zip(units.ids, units.known.tolist())


def test_units_that_a_model_was_trained_on_outlive_their_manifest(folder):
    out = make(folder)
    before = Units(out / "train.safetensors")
    (folder / "audio" / f"{before.ids[1]}").unlink()
    write_audio(folder / "audio" / "0_new.wav", 0.5)
    scan_folder(folder, seed=2, valid_fraction=0.0)
    make(folder, trained=True)
    kept, manifest = Units(out / "train.safetensors"), load_manifest(folder / "manifest", "train")
    assert kept.sha256 == before.sha256
    places = kept.places_in(manifest)
    assert [None if place < 0 else manifest.id(place) for place in places] == [
        None if index == 1 else name for index, name in enumerate(kept.ids)
    ]
    make(folder)
    assert Units(out / "train.safetensors").sha256 != before.sha256


def test_missing_files_and_files_of_something_else_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no units at '.*nowhere.safetensors': `hubert-fast units` makes them"):
        Units(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="holds no train.safetensors: `hubert-fast scan` makes it"):
        load_manifest(tmp_path, "train")
    save_file({"a": np.arange(3)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match="other.safetensors' is no file of units of this version: it lacks the metadata num_classes"
    ):
        Units(tmp_path / "other.safetensors")


def test_units_can_be_sent_to_another_process(folder):
    units = Units(make(folder) / "train.safetensors")
    sent = pickle.dumps(units)
    assert len(sent) < 1000 and pickle.loads(sent)[0].tolist() == units[0].tolist()
