"""Small models to export, the programs that `torch.export` makes of them, and what both are compared on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import hubert_fast
from hubert_fast import backend
from tests.models import configurations

# One layer after three convolutions: exporters and compilers take their time for every operation. A frame is 30 samples long
# and starts 20 after the one before.
SMALL = {"extractor_conv_layer_config": [(64, 10, 5), (64, 3, 2), (64, 2, 2)], "encoder_num_layers": 1}

# (samples, rows) of a batch: the one that is exported, and others on which the program runs, down to two frames.
EXPORTED, OTHERS = (500, 2), [(500, 2), (770, 3), (50, 1)]


@functools.cache
def encoder(name: str, **changes: Any) -> nn.Module:
    """`Wav2Vec2Model` of one of `configurations.ALL`, made small, in eval mode."""
    return _model(name, **changes).wav2vec2


def _model(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return hubert_fast.hubert_pretrain_model(**{**configurations.ALL[name], **SMALL, **changes}).eval()


class Pretraining(nn.Module):
    """The logits and the penalty of `HuBERTPretrainModel`, given the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _model("base")

    def forward(self, waveforms: Tensor, lengths: Tensor, labels: Tensor, mask: Tensor) -> tuple[Optional[Tensor], ...]:
        return self.model(waveforms, labels, lengths, mask=mask)


class Layers(nn.Module):
    """`Wav2Vec2Model.extract_features`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder("base")

    def forward(self, waveforms: Tensor, lengths: Tensor) -> list[Tensor]:
        return self.encoder.extract_features(waveforms, lengths)[0]


def waveforms(samples: int, rows: int) -> tuple[Tensor]:
    return (torch.randn(rows, samples, generator=torch.Generator().manual_seed(samples)),)


def padded(samples: int, rows: int) -> tuple[Tensor, ...]:
    """Waveforms, and lengths of which the last of three is 0."""
    return *waveforms(samples, rows), torch.tensor([samples, samples * 3 // 4, 0])[:rows]


def labelled(samples: int, rows: int) -> tuple[Tensor, ...]:
    """`padded`, and labels and mask of every frame."""
    shape, generator = (rows, (samples - 30) // 20 + 1), torch.Generator().manual_seed(samples)
    labels = torch.randint(0, configurations.NUM_CLASSES, shape, generator=generator)
    return *padded(samples, rows), labels, torch.rand(shape, generator=generator) < 0.5


def dynamic(arguments: Sequence[Tensor], dim: Any = Dim.AUTO) -> tuple[dict[int, Any], ...]:
    """Every dimension of every argument may change."""
    return tuple(dict.fromkeys(range(each.ndim), dim) for each in arguments)


@functools.cache
def program(name: str, make: Callable[..., tuple[Tensor, ...]], chosen: str = backend.AUTO) -> ExportedProgram:
    """The program of `encoder` ``name`` called with what ``make`` makes, exported while ``chosen`` was the backend."""
    arguments = make(*EXPORTED)
    with backend.using(chosen):
        return torch.export.export(encoder(name), arguments, dynamic_shapes=dynamic(arguments))


def assert_agrees(
    run: Callable[..., Any], model: nn.Module, make: Callable[..., tuple[Tensor, ...]], sizes: Any = tuple(OTHERS)
) -> None:
    """``run`` gives what ``model`` gives in eager mode, to 1e-4, for batches of all ``sizes``, padding included."""
    for samples, rows in sizes:
        arguments = make(samples, rows)
        with torch.no_grad():
            found, expected = (torch.utils._pytree.tree_leaves(each(*arguments)) for each in (run, model))
        expected = [each for each in expected if each is not None]
        for given, wanted in zip([each for each in found if each is not None], expected, strict=True):
            torch.testing.assert_close(given, wanted, atol=1e-4, rtol=0.0)


def ours(program: ExportedProgram) -> list[str]:
    """The operators of a program that are this project's."""
    return [str(node.target) for node in program.graph.nodes if "hubert_fast" in str(node.target)]
