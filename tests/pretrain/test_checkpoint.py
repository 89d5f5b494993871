import errno
import io
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from hubert_fast.pretrain.checkpoint import (
    CheckpointMismatchError,
    CorruptCheckpointError,
    DiskFullError,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    remove_leftovers,
    require_same_run,
    save_checkpoint,
)
from hubert_fast.pretrain.random_state import random_state


def state_of(step):
    return {"step": step, "weights": torch.full((100, 100), float(step)), "random": random_state()}


def test_loads_what_was_saved_and_keeps_the_newest(tmp_path):
    for step in (5, 10, 200, 1_000_000_000):
        save_checkpoint(tmp_path, step, state_of(step), keep=2)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 200), checkpoint_path(tmp_path, 1_000_000_000)]
    path, state = newest_checkpoint(tmp_path)
    assert path == checkpoint_path(tmp_path, 1_000_000_000)
    assert state["step"] == 1_000_000_000 and torch.equal(state["weights"], state_of(1_000_000_000)["weights"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000200.pt", "step-1000000000.pt"]


def truncate(data):
    return data[: len(data) // 2]


def flip_a_byte_of_a_tensor(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_byte_of_a_tensor, lambda data: b"", lambda data: b"not a checkpoint"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, damage):
    good, bad = (save_checkpoint(tmp_path, step, state_of(step), keep=2) for step in (1, 2))
    bad.write_bytes(damage(bad.read_bytes()))
    with pytest.raises(CorruptCheckpointError, match="step-00000002.pt cannot be read"):
        load_checkpoint(bad)
    with pytest.warns(RuntimeWarning, match="step-00000002.pt cannot be read.*going back"):
        path, state = newest_checkpoint(tmp_path)
    assert path == good and state["step"] == 1


def test_never_starts_over_silently_when_every_checkpoint_is_damaged(tmp_path):
    save_checkpoint(tmp_path, 1, state_of(1), keep=1).write_bytes(b"")
    with pytest.warns(RuntimeWarning), pytest.raises(CorruptCheckpointError, match="no checkpoint in"):
        newest_checkpoint(tmp_path)


def fill_disk_before_writing(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))


def fill_disk_while_writing(monkeypatch):
    class FullDisk(io.BufferedWriter):
        def write(self, data):
            if self.tell() + len(data) > 20_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(Path, "open", lambda path, mode: FullDisk(io.FileIO(path, mode)))


@pytest.mark.parametrize("fill_disk", [fill_disk_before_writing, fill_disk_while_writing])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_so(tmp_path, monkeypatch, fill_disk):
    earlier = save_checkpoint(tmp_path, 1, state_of(1), keep=1)
    with monkeypatch.context() as patched:
        fill_disk(patched)
        message = r"needs \d{5} bytes, \d+ are free; the earlier checkpoint .*00001.pt"
        with pytest.raises(DiskFullError, match=message) as error:
            save_checkpoint(tmp_path, 2, state_of(2), keep=1)
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [earlier]
    assert newest_checkpoint(tmp_path)[1]["step"] == 1


def test_other_disk_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def save(state, file):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="input/output error") as error:
        save_checkpoint(tmp_path, 2, state_of(2), keep=1)
    assert not isinstance(error.value, DiskFullError)


def test_half_written_files_are_removed_and_nothing_else(tmp_path):
    path = save_checkpoint(tmp_path, 1, state_of(1), keep=1)
    (tmp_path / ".tmp-abc-step-00000002.pt").write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_another_number_of_classes_is_another_model(tmp_path):
    stored = {"model_config": "{}", "num_classes": "50", "settings": "{}"}
    require_same_run(tmp_path, stored, stored | {"num_classes": 50})
    with pytest.raises(CheckpointMismatchError, match="of another model .*num_classes is 50 there and 100 here"):
        require_same_run(tmp_path, stored, stored | {"num_classes": 100})
