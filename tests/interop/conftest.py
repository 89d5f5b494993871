"""Whether accelerated models run on layers of ours."""

import pytest

from hubert_fast.models.encoder_layer import EncoderLayer


@pytest.fixture
def rows(monkeypatch):
    """How many rows layers of ours were given, call by call."""
    seen, stream = [], EncoderLayer.stream

    def noting(layer, x, *arguments):
        seen.append(len(x.x))
        return stream(layer, x, *arguments)

    monkeypatch.setattr(EncoderLayer, "stream", noting)
    return seen
