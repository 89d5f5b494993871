"""The installed torchaudio as the tests' truth; see `benchmarks.torchaudio_peer` for how it is imported."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.torchaudio_peer import import_models, installed

if not installed():
    pytest.skip("torchaudio, the peer of these tests, is not installed", allow_module_level=True)

models = import_models()
components = importlib.import_module("torchaudio.models.wav2vec2.components")

_installed_at = Path(importlib.util.find_spec("torchaudio").origin).parent
for _each in (models.HuBERTPretrainModel, models.Wav2Vec2Model, components.MaskGenerator, components.LogitGenerator):
    assert _installed_at in Path(inspect.getsourcefile(_each)).parents, f"{_each} is not torchaudio's own"


@contextlib.contextmanager
def in_double_precision() -> Iterator[None]:
    """Makes torchaudio compute in float64 throughout.

    It takes the feature penalty and the logits through ``Tensor.float()``: without this a float64 model would still
    carry float32 rounding (1e-7), and no comparison at 1e-10 would be possible.
    """
    with mock.patch.object(torch.Tensor, "float", lambda self: self):
        yield


def precise(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """`in_double_precision` where ``dtype`` is float64, else nothing."""
    return in_double_precision() if dtype == torch.float64 else contextlib.nullcontext()


@contextlib.contextmanager
def working_poisson() -> Iterator[None]:
    """Lets torchaudio's ``torch.poisson(mask_length, size=...)`` draw what it means; as it stands it is a TypeError."""
    poisson = torch.poisson

    def draw(mean, size=None):
        return poisson(torch.full(size, float(mean))) if size is not None else poisson(mean)

    with mock.patch.object(torch, "poisson", draw):
        yield
