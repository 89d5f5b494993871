"""The speech corpus that comes with the package, so that pre-training runs with no data and no network."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def embedded_corpus() -> Path:
    """The folder of the embedded corpus: 16 kHz mono Ogg Vorbis files, ``alignments.jsonl`` and ``splits.json``.

    Its README.md says how it was made and what the files hold.
    """
    return Path(str(files("hubert_fast.pretrain"))) / "embedded_corpus"
