"""Checkpoints: written whole or not at all, verified when read, compared with the run that wants to go on from them.

A checkpoint is a dict of tensors and plain values, so that it loads with ``weights_only=True``. `save_checkpoint` and
`load_checkpoint` do not care what is in it; `require_same_run` reads its ``model_config`` (JSON), ``num_classes`` and
``settings`` (JSON).
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from hubert_fast.pretrain.atomic import atomic_path
from hubert_fast.pretrain.config_file import differences

_FILE_NAME = re.compile(r"step-(\d{8,})\.pt")


class CorruptCheckpointError(RuntimeError):
    """A checkpoint file that cannot be read back as it was written."""


class CheckpointMismatchError(RuntimeError):
    """A checkpoint or weights file of another model or of other settings than the run asks for."""


class DiskFullError(OSError):
    """There was no room for a file; files written before it are untouched."""


def checkpoint_path(directory: Path, step: int) -> Path:
    return Path(directory) / f"step-{step:08d}.pt"


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of ``directory``, oldest first."""
    found = [
        (int(match[1]), path)
        for path in Path(directory).glob("step-*.pt")
        if (match := _FILE_NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def save_checkpoint(directory: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write ``state`` as the checkpoint of ``step`` and delete all but the ``keep`` newest.

    Raises:
        DiskFullError: when there is no room; the checkpoints that exist are untouched.
    """
    path = checkpoint_path(directory, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(leaf.nbytes for leaf in tree_leaves(dict(state)) if isinstance(leaf, torch.Tensor))
    try:
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(errno.ENOSPC, "No space left on device")
        # An open file, because torch.save to a path hides the cause of a failure.
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(dict(state), file)
    except (OSError, RuntimeError) as error:
        if not _is_full_disk(error):
            raise
        raise _disk_full(path, needed) from error
    for old in list_checkpoints(directory)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that was saved at ``path``, on the CPU.

    Raises:
        CorruptCheckpointError: when the file is truncated, altered or not a checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums it stores
            altered = archive.testzip()
        if altered is not None:
            raise zipfile.BadZipFile(f"checksum of {altered} does not match")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CorruptCheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def newest_checkpoint(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of ``directory`` that can be read, and its state; None where there is no checkpoint.

    Warns about each newer one that cannot be read, and raises `CorruptCheckpointError` if none can.
    """
    paths = list_checkpoints(directory)
    for path in reversed(paths):
        try:
            return path, load_checkpoint(path)
        except CorruptCheckpointError as error:
            warnings.warn(f"{error}; going back to the checkpoint before it", RuntimeWarning, stacklevel=2)
    if paths:
        raise CorruptCheckpointError(
            f"no checkpoint in {directory} can be read; delete the folder to start from step 0"
        )
    return None


def require_same_run(path: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise `CheckpointMismatchError` naming every field in which two descriptions of a run differ, with both values.

    ``path`` is the file that ``stored`` was read from. Both have ``model_config`` (JSON), ``num_classes`` and ``settings``
    (JSON: seed, optimizer, data and so on).
    """
    model = _said(_model_description(stored), _model_description(given))
    if model:
        raise CheckpointMismatchError(f"{path} is of another model than this run's: {'; '.join(model)}")
    settings = _said(json.loads(stored["settings"]), json.loads(given["settings"]))
    if settings:
        raise CheckpointMismatchError(
            f"{path} was trained with other settings than this run's: {'; '.join(settings)}. "
            "Resume with the settings it was started with, or start another run"
        )


def remove_leftovers(directory: Path) -> None:
    """Delete the half-written temporary files that a killed process left in ``directory``."""
    for path in Path(directory).glob(".tmp-*"):
        path.unlink(missing_ok=True)


def _model_description(run: Mapping[str, Any]) -> dict[str, Any]:
    return {**json.loads(run["model_config"]), "num_classes": int(run["num_classes"])}


def _said(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    return [f"{name} is {there} there and {here} here" for name, there, here in differences(stored, given)]


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether a full disk caused ``error``: torch.save fails once more closing the archive, and raises that one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        error = error.__cause__ or error.__context__
    return False


def _disk_full(path: Path, needed: int) -> DiskFullError:
    earlier = list_checkpoints(path.parent)
    survivor = f"the earlier checkpoint {earlier[-1]} is untouched" if earlier else "there is no earlier checkpoint"
    free = shutil.disk_usage(path.parent).free
    return DiskFullError(
        errno.ENOSPC,
        f"disk full: checkpoint needs {needed} bytes, {free} are free; {survivor}; free space and resume",
        str(path),
    )
