import dataclasses
import itertools
import os
import pickle
import shutil

import numpy as np
import pytest
import soundfile
import torch

from hubert_fast.models.masking import MaskGenerator
from hubert_fast.pretrain.batches import Batch, GlobalBatches, ValidationBatches
from hubert_fast.pretrain.config import DataConfig
from hubert_fast.pretrain.distributed import Process
from hubert_fast.pretrain.frames import num_frames
from hubert_fast.pretrain.left_out import LeftOut, TooManyBadUtterancesError
from hubert_fast.pretrain.manifest import load_manifest
from hubert_fast.pretrain.units import Units
from tests.pretrain.speech_folder import number_units, numbered_folder, scan_folder

LENGTHS = [4000, 4321, 5000, 6400, 7000, 8000, 8123, 9000, 9600, 10_000, 12_000, 16_000, 20_000]
NAMES = [f"{index:03d}.wav" for index in range(len(LENGTHS))]
MASKS = MaskGenerator(8, 0.5, "static", 0.0, 2, False, 1, 0.0, "static", 0.0, 2, False, 1)
CONFIG = DataConfig(batch_seconds=2.0, max_seconds=0.5, min_seconds=0.1, max_bad_utterances=0.5, workers=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbered")
    numbered_folder(folder, LENGTHS)
    return folder


def parts(folder):
    return load_manifest(folder / "manifest", "train"), Units(folder / "units.safetensors")


def stream(folder, *, kind=GlobalBatches, seed=0, rank=0, world_size=1, accumulate=None, **changes):
    config, process = dataclasses.replace(CONFIG, **changes), Process(rank=rank, world_size=world_size)
    split = {} if accumulate is None else {"accumulate": accumulate}
    manifest, units = parts(folder)
    left_out = LeftOut(len(units), config.max_bad_utterances)
    return kind(manifest, units, config, MASKS, left_out, seed=seed, process=process, **split)


def take(batches, count):
    return list(itertools.islice(iter(batches), count))


def rows(micro_batches: list[Batch]) -> dict[str, tuple]:
    """The rows of micro-batches by utterance, as plain values."""
    return {
        batch.ids[row]: tuple(
            tensor[row].numpy().tobytes() for tensor in (batch.waveforms, batch.audio_lengths, batch.labels, batch.mask)
        )
        for batch in micro_batches
        for row in range(len(batch.ids))
    }


def contents(batches):
    """The rows of every global batch."""
    return [rows(micro_batches) for micro_batches in batches]


def test_shapes_dtypes_and_padding(folder):
    for (batch,) in take(stream(folder), 6):
        assert batch.mask.any()
        samples, frames = batch.waveforms.shape[1], batch.labels.shape[1]
        assert batch.waveforms.dtype == torch.float32 and batch.labels.dtype == batch.audio_lengths.dtype == torch.int64
        assert batch.mask.dtype == torch.bool and batch.mask.shape == batch.labels.shape
        assert frames == num_frames(samples)
        assert samples == int(batch.audio_lengths.max()) <= 8000
        assert batch.seconds == pytest.approx(int(batch.audio_lengths.sum()) / 16_000)
        assert len(set(batch.mask.sum(dim=1).tolist())) == 1
        for row, length in enumerate(batch.audio_lengths.tolist()):
            assert (batch.waveforms[row, :length] != 0).all() and not batch.waveforms[row, length:].any()
            assert not batch.labels[row, num_frames(length) :].any() and not batch.mask[row, num_frames(length) :].any()


@pytest.mark.parametrize("kind", [GlobalBatches, ValidationBatches])
def test_labels_belong_to_the_audio_after_a_random_crop(folder, kind):
    starts = set()
    for micro_batches in take(stream(folder, kind=kind), 30):
        for batch in micro_batches:
            for row, length in enumerate(batch.audio_lengths.tolist()):
                frames = num_frames(length)
                number = (batch.waveforms[row, : 320 * frames : 320] * 32_768).long() - 1
                torch.testing.assert_close(batch.labels[row, :frames], number)
                starts.add(int(number[0]))
    assert len(starts) > 5 if kind is GlobalBatches else starts == {0}


def test_an_epoch_holds_every_utterance_once_and_the_next_differs(folder):
    batches = stream(folder)
    epochs = [take(stream_from(folder, epoch), len(batches.epoch_plan(epoch))) for epoch in (0, 1)]
    for epoch in epochs:
        assert sorted(name for (batch,) in epoch for name in batch.ids) == NAMES
    assert [batch.ids for (batch,) in epochs[0]] != [batch.ids for (batch,) in epochs[1]]


def stream_from(folder, epoch, batch=0, **changes):
    batches = stream(folder, **changes)
    batches.load_state_dict({"epoch": epoch, "batch": batch})
    return batches


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, workers):
    assert contents(take(stream(folder, workers=workers), 12)) == contents(take(stream(folder), 12))


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 2), (2, 2), (1, 4)])
def test_ranks_and_accumulation_split_the_same_global_batch(folder, world_size, accumulate):
    whole = take(stream(folder), 10)
    split = {"world_size": world_size, "accumulate": accumulate}
    ranks = [take(stream(folder, rank=rank, **split), 10) for rank in range(world_size)]
    for step, (expected,) in enumerate(whole):
        micro_batches = [batch for rank in ranks for batch in rank[step]]
        assert [len(rank[step]) for rank in ranks] == [accumulate] * world_size
        assert rows(micro_batches) == rows([expected])
        assert sum(batch.seconds for batch in micro_batches) == pytest.approx(expected.seconds)
        sizes = [len(batch.ids) for batch in micro_batches]
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


def test_dividing_anew_goes_on_at_the_same_place(folder):
    expected = contents(take(stream(folder), 6))
    batches = stream(folder)
    iterator = iter(batches)
    assert contents([next(iterator), next(iterator)]) == expected[:2]
    batches.divide(4)
    assert [len(micro_batches) for micro_batches in take(batches, 1)] == [4]
    batches.load_state_dict({"epoch": 0, "batch": 2})
    assert contents(take(batches, 4)) == expected[2:]
    assert len(next(iterator)) == 1  # as it was when it began


@pytest.mark.parametrize("accumulate", [1, 3, 4])
def test_the_largest_micro_batch_is_as_large_as_any(folder, accumulate):
    batches = stream(folder, accumulate=accumulate)
    largest = batches.largest_micro_batch()
    stepped = [batch.waveforms.numel() for micro_batches in take(batches, 40) for batch in micro_batches]
    assert max(stepped) <= largest.waveforms.numel() <= round(batches.seconds() * 16_000)
    assert largest.mask.any() and largest.labels.shape == largest.mask.shape


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_continues_where_the_state_says(folder, workers):
    expected = contents(take(stream(folder), 12))
    batches = stream(folder, workers=workers)
    iterator = iter(batches)
    for step in range(9):
        assert rows(next(iterator)) == expected[step]
        if step in (0, 3, 8):
            resumed = stream(folder)
            resumed.load_state_dict(pickle.loads(pickle.dumps(batches.state_dict())))
            assert contents(take(resumed, 2)) == expected[step + 1 : step + 3]


def test_the_state_after_an_epoch_is_the_start_of_the_next(folder):
    batches = stream(folder)
    assert batches.state_dict() == {"epoch": 0, "batch": 0}
    take(batches, len(batches.epoch_plan(0)))
    assert batches.state_dict() == {"epoch": 1, "batch": 0}


def test_seeds_differ_and_another_visit_crops_and_masks_anew(folder):
    first, second = (rows(take(stream(folder, seed=seed, batch_seconds=100.0), 1)[0]) for seed in (0, 1))
    later = rows(take(stream_from(folder, 1, batch_seconds=100.0), 1)[0])
    for other in (second, later):
        assert all(first[name][3] != other[name][3] for name in first)
        assert first["012.wav"][2] != other["012.wav"][2]


@pytest.mark.parametrize("workers", [0, 1])
def test_iterating_leaves_the_random_streams_of_the_process_alone(folder, workers):
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    take(stream(folder, workers=workers), 3)
    assert torch.equal(torch.rand(3), expected[0]) and np.array_equal(np.random.rand(3), expected[1])


def test_normalised_audio_is_scaled_over_the_whole_utterance_before_the_crop(folder):
    for micro_batches in take(stream(folder, normalize_audio=True), 5):
        for batch in micro_batches:
            for row, (name, length) in enumerate(zip(batch.ids, batch.audio_lengths, strict=True)):
                whole, _ = soundfile.read(folder / "audio" / name, dtype="float64")
                start = 320 * int(batch.labels[row, 0])
                expected = (whole - whole.mean()) / np.sqrt(whole.var() + 1e-5)
                np.testing.assert_allclose(batch.waveforms[row, :length], expected[start : start + length], atol=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [GlobalBatches, ValidationBatches])
def test_what_cannot_be_read_is_left_out_and_changes_nothing_of_the_others(folder, kind, workers, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy2)
    scan_folder(copy, valid_fraction=0.0, seed=1)
    (copy / "audio" / "003.wav").unlink()
    audio, _ = soundfile.read(copy / "audio" / "011.wav")
    soundfile.write(copy / "audio" / "011.wav", np.append(audio, 0.1), 16_000)
    expected, found = (take(stream(each, kind=kind, workers=workers), 12) for each in (folder, copy))
    bad = {"003.wav": "no such file", "011.wav": "changed since the scan"}
    for (whole,), (batch,) in zip(expected, found, strict=True):
        assert {name: row for name, row in rows([whole]).items() if name not in bad} == rows([batch])
        assert set(batch.failed) == set(whole.ids) & set(bad)
        assert all(bad[name] in reason for name, reason in batch.failed.items())
        assert batch.seconds == pytest.approx(int(batch.audio_lengths.sum()) / 16_000)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_audio_that_is_not_finite_names_utterance_and_file(tmp_path, bad):
    audio = np.full(8000, 0.1)
    numbered_folder(tmp_path, [8000, 8000, 8000])
    path = tmp_path / "audio" / "001.wav"
    soundfile.write(path, audio, 16_000, subtype="FLOAT")
    scan_folder(tmp_path, valid_fraction=0.0, seed=1)
    number_units(tmp_path)
    audio[4567], state = bad, path.stat()
    soundfile.write(path, audio, 16_000, subtype="FLOAT")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    failed = {name: reason for (batch,) in take(stream(tmp_path), 3) for name, reason in batch.failed.items()}
    assert failed == {"001.wav": "utterance '001.wav' holds a NaN or an infinity at sample 4567"}


def test_a_micro_batch_of_which_nothing_is_left_has_a_row_of_no_length(folder):
    batches = stream(folder, world_size=2, batch_seconds=1.0)
    batches.left_out.add(dict.fromkeys(NAMES[2:6], "bad"), quiet=True)
    blank = [batch for (batch,) in take(batches, 20) if not batch.ids]
    assert blank
    for batch in blank:
        assert batch.audio_lengths.tolist() == [0] and batch.seconds == 0
        assert not batch.waveforms.any() and not batch.mask.any() and not batch.labels.any()
        assert batch.labels.shape == batch.mask.shape == (1, num_frames(batch.waveforms.shape[1]))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_left_out_on_the_way_is_missing_from_the_next_batch_on(folder, workers):
    expected = contents(take(stream(folder), 12))
    batches = stream(folder, workers=workers)
    for step, update in enumerate(itertools.islice(batches, 12)):
        assert rows(update) == {
            name: row for name, row in expected[step].items() if step <= 5 or name not in ("002.wav", "004.wav")
        }
        if step == 5:
            batches.left_out.add({"002.wav": "bad", "004.wav": "bad"}, quiet=True)


def test_utterances_without_units_or_audio_are_left_out_from_the_start_and_bounded(tmp_path, capsys):
    numbered_folder(tmp_path, [8000] * 5)
    (tmp_path / "audio" / "001.wav").unlink()
    scan_folder(tmp_path, valid_fraction=0.0, seed=1)
    batches = stream(tmp_path, max_bad_utterances=0.01)
    assert batches.left_out.bad["001.wav"].reason.startswith("the manifest has no such utterance")
    assert "utterance '001.wav' is left out: the manifest has no such utterance" in capsys.readouterr().err
    assert {name for (batch,) in take(batches, 3) for name in batch.ids} == {f"00{n}.wav" for n in (0, 2, 3, 4)}
    soundfile.write(tmp_path / "audio" / "002.wav", np.full(8000, 0.1), 16_000)  # as long, and other audio
    scan_folder(tmp_path, valid_fraction=0.0, seed=2)
    with pytest.raises(TooManyBadUtterancesError, match="2 of 5 utterances cannot be used, more than .*=0.01 of them"):
        stream(tmp_path, max_bad_utterances=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_seconds": 1.0, "world_size": 2, "accumulate": 2},
            r"1.0 holds 2 of the longest utterances \(0.50 s\), .* = 4 micro-batches: 2.0 or more is accepted$",
        ),
        (
            {"batch_seconds": 1.0, "world_size": 20},
            "^13 utterances cannot fill world_size x accumulate = 20 micro-batches$",
        ),
    ],
)
def test_settings_that_cannot_work_are_named(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        stream(folder, **changes)


def test_validation_holds_every_utterance_whole_and_is_the_same_every_time(folder):
    batches = stream(folder, kind=ValidationBatches, workers=1)
    passes = [list(batches), list(batches)]
    assert contents(passes[0]) == contents(passes[1])
    names = [name for (batch,) in passes[0] for name in batch.ids]
    lengths = [length for (batch,) in passes[0] for length in batch.audio_lengths.tolist()]
    assert sorted(zip(names, lengths, strict=True)) == list(zip(NAMES, LENGTHS))


def test_validation_is_dealt_out_over_the_ranks_and_its_numbers_do_not_depend_on_them(folder):
    whole, *shares = (
        list(stream(folder, kind=ValidationBatches, rank=rank, world_size=ranks))
        for ranks, rank in [(1, 0), (2, 0), (2, 1)]
    )
    merged = {name: row for share in shares for one in share for name, row in rows(one).items()}
    assert merged == {name: row for one in whole for name, row in rows(one).items()}
    assert sum(len(batch.ids) for share in shares for (batch,) in share) == len(LENGTHS)


def test_capacities_hold_the_rows_of_few_utterances_that_are_dealt_evenly(tmp_path):
    """Five of a length where a batch holds three: one batch of all, beyond the budget."""
    numbered_folder(tmp_path, [8000] * 5)
    batches = stream(tmp_path, batch_seconds=1.5, accumulate=2)
    (micro_batches,) = take(batches, 1)
    capacities = batches.capacities()
    assert [len(batch.ids) for batch in micro_batches] == [3, 2]
    assert capacities.sequences >= 3 and capacities.rows >= 3 * num_frames(8000)
