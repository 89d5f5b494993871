"""What an implementation has to offer to be measured: the same model from the same weights, its loss and its features."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..architecture import Architecture
from ..batches import Batch


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """What computes in ``dtype``: nothing to be done for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@dataclass(frozen=True)
class Setting:
    """What a model is built for."""

    architecture: Architecture
    num_classes: int
    device: torch.device
    dtype: torch.dtype  # float32, or the 16-bit dtype of autocast
    padded: bool = False  # whether batches have padding


class PeerModel(ABC):
    """One peer's model on its device. The caller says train() or eval(), and puts `autocast` around `loss` and `features`."""

    module: nn.Module  # everything that is trained
    overwrites_gradients: ClassVar[bool] = (
        False  # a replayed CUDA graph writes into the same tensors: never set them to None
    )

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """torchaudio's recipe's loss of ``batch``, a scalar: cross-entropies of the masked frames summed, and 10 times the mean
        square of the features times the number of masked frames. With dropout off and ``torch.manual_seed(batch.seed)`` before
        it the mask is ``batch.mask``; peers that cannot be handed a mask draw it."""

    @abstractmethod
    def features(self, batch: Batch) -> Tensor:
        """The last layer's output ``[utterances, frames, dim]``, made by whatever returns the outputs of all layers."""

    def forward_backward(self, batch: Batch, dtype: torch.dtype) -> None:
        """Leave the gradients of `loss`, computed in ``dtype``, in ``.grad`` of the parameters."""
        with autocast(batch.waveforms.device, dtype):
            loss = self.loss(batch)
        loss.backward()


class Peer(ABC):
    """An implementation that can be measured."""

    name: ClassVar[str]
    package: ClassVar[str]  # whose version tables show
    compiled: ClassVar[bool] = False  # the first call takes minutes
    broadcasts_logits: ClassVar[bool] = (
        False  # needs several float32 tensors [classes + 1, frames, final_dim] at a time
    )

    def version(self) -> str:
        """Of the library behind it."""
        return importlib.metadata.version(self.package)

    @abstractmethod
    def why_not(self, setting: Setting) -> str | None:
        """A sentence that says why it cannot run ``setting``, or None."""

    @abstractmethod
    def build(self, setting: Setting, weights: Mapping[str, Tensor]) -> PeerModel:
        """The model, with ``weights`` (a `HuBERTPretrainModel`'s ``state_dict``), on the device, in training mode.

        It is called with the device as the default one, where drawing weights that are thrown away takes least.
        """


def why_not_compile(device: torch.device) -> str | None:
    """A sentence that says why torch.compile has no code generator for ``device``, or None."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "torch.compile needs Triton, which is not installed"
    compilers = [os.environ.get("CXX", "c++").split()[0], "g++", "clang++"]
    found = any(shutil.which(each) for each in compilers)
    return None if found else f"torch.compile needs a C++ compiler, and there is none of {', '.join(compilers)}"


def quiet_dynamo() -> None:
    """Keep warnings about graph breaks and recompilations off the terminal: they say the same every time."""
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
