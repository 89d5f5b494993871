"""Recordings that the user took out of a run, which a speaker may ask for: ``RUN/forgotten.jsonl``.

They stay in manifest and units, so that the plan of the batches, and with it all checkpoints, stay as they are; nothing reads
their audio again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from hubert_fast.pretrain.atomic import write_text
from hubert_fast.pretrain.manifest import SPLITS, Manifest, load_manifest, recording_of
from hubert_fast.pretrain.run_record import now
from hubert_fast.pretrain.run_summary import parsed_lines
from hubert_fast.pretrain.units import Units


def forgotten(run: Path) -> frozenset[str]:
    """The paths of the recordings that ``run`` has forgotten, relative to its folder of audio."""
    return frozenset(line["path"] for line in _lines(run))


def forget(run: Path, files: Sequence[str]) -> list[str]:
    """Take recordings out of a run; returns the paths of those that are new.

    Whatever comes after (units, training, evaluation, a scan) goes on without them. A training that runs learns of it when it is
    resumed. What was made of them before stays: units, and weights that learned from them.

    Args:
        files: paths of recordings or of folders of them, absolute, relative to the current folder or to the run's folder of
            audio. The files need not be there any more.

    Raises:
        ValueError: no file is named, or the run has no recording of that name.
    """
    if not files:
        raise ValueError("files: name at least one recording or folder to forget")
    run = Path(run)
    manifests = [load_manifest(run / "manifest", split) for split in SPLITS]
    known = sorted(_recordings(run, manifests) | forgotten(run))
    chosen: set[str] = set()
    for file in files:
        found, name = [], ""
        for name in dict.fromkeys([_relative(str(Path(file).absolute()), manifests[0].audio), Path(file).as_posix()]):
            found = found or [path for path in known if path == name or path.startswith(f"{name}/")]
        if not found:
            raise ValueError(
                f"file={file!r}: {run} has no recording {name!r} and none in a folder of that name; paths relative to "
                f"{manifests[0].audio}, or to the current folder, are accepted, such as {known[0]!r}"
            )
        chosen.update(found)
    new = sorted(chosen - forgotten(run))
    lines = [*_lines(run), *({"path": path, "date": now()} for path in new)]
    write_text(_path(run), "".join(json.dumps(line) + "\n" for line in lines))
    return new


def _recordings(run: Path, manifests: Sequence[Manifest]) -> set[str]:
    """The paths of all recordings of a run: those of its manifest, and those that it makes units of or trains on."""
    known = {path for manifest in manifests for path in manifest.recording_paths()}
    for file in run.glob("iteration*/units/*.safetensors"):
        if file.stem in SPLITS:
            known.update(map(recording_of, Units(file).ids))
    return known


def not_forgotten(manifest: Manifest, recordings: Collection[str]) -> np.ndarray:
    """The utterances of ``manifest`` without those of ``recordings`` (paths): int64 indices."""
    indices = np.arange(len(manifest))
    if not recordings:
        return indices
    gone = np.array([path in recordings for path in manifest.recording_paths()], dtype=bool)
    return indices[~gone[manifest.recordings(indices)]]


def forgotten_ids(ids: Sequence[str], recordings: Collection[str]) -> list[str]:
    """Those of ``ids`` that are utterances of ``recordings`` (paths)."""
    return [each for each in ids if recording_of(each) in recordings] if recordings else []


def _relative(file: str, audio: Path) -> str:
    path = Path(os.path.normpath(file))
    return (path.relative_to(audio) if path.is_relative_to(audio) else path).as_posix()


def _lines(run: Path) -> list[dict[str, str]]:
    path = _path(run)
    expected = '{"path": ..., "date": ...}'
    return list(parsed_lines(path, json.loads, expected)) if path.is_file() else []


def _path(run: Path) -> Path:
    return Path(run) / "forgotten.jsonl"
