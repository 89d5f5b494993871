"""``span_mask`` beside torchaudio's: on the CPU whatever the device, as the model draws its mask while the GPU is at work.

    python -m benchmarks.ops.bench_span_mask

There is no floor: neither bytes nor FLOPs decide.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import hubert_fast
from hubert_fast.ops.span_mask import span_mask

from ..machine import version
from ..sizes import Size
from ..torchaudio_peer import import_components, installed
from .case import OURS, Inputs, OperatorCase, Side, Tensors, Work
from .command_line import main
from .utterances import Utterances

OPERATOR = "span_mask"

_SETTINGS = {"mask_prob": 0.8, "mask_length": 10}


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    lengths = Utterances.of(size, "cpu", padded=True).lengths
    sides = {OURS: Side(_ours, f"{hubert_fast.__version__}, on the host")}
    if installed():
        sides["torchaudio"] = Side(_torchaudio, version("torchaudio"))
    yield OperatorCase(
        name=f"{size.name}, {size.batch} x {size.frames} frames",
        shape={"model": size.name, "utterances": size.batch, "frames": size.frames, **_SETTINGS},
        device="cpu",
        dtype=torch.float32,
        draw=lambda seed: Inputs((lengths, torch.arange(size.frames) >= lengths[:, None]), ()),
        sides=sides,
        truth=sides.get("torchaudio", sides[OURS]),
        least=Work(),
        tolerance=0.0,  # the same random numbers give the same mask
        on_host=True,
    )


def _ours(tensors: Tensors, dropout_p: float) -> Tensors:
    lengths, padding = tensors
    return (span_mask(tuple(padding.shape), lengths, min_masks=2, **_SETTINGS),)


def _torchaudio(tensors: Tensors, dropout_p: float) -> Tensors:
    _, padding = tensors
    return (import_components()._compute_mask_indices(tuple(padding.shape), padding, min_masks=2, **_SETTINGS),)


if __name__ == "__main__":
    main(OPERATOR)
