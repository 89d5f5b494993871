"""Errors of safetensors files in the user's terms: the library's own say neither which file nor are they OSErrors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn a SafetensorError of the block into an OSError that names ``path``, a file or a folder of them."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(
            f"{path} cannot be read or written as safetensors: {error}; a damaged file is made anew once it is deleted"
        ) from error
