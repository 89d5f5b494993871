"""The error of audio that cannot be used."""

from __future__ import annotations


class AudioError(ValueError):
    """Audio that cannot be used: ``path`` and ``reason``."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"
