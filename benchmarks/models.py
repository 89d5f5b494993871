"""Peers' models: each checked once and built once for all cases of its kind, and gone when they are not needed."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

import hubert_fast

from .architecture import Architecture
from .lost_device import answers
from .peers.agreement import DifferentWork, check
from .peers.peer import Peer, PeerModel, Setting
from .training import TrainingStep


class Models:
    """Models on one device, by peer, architecture and number of classes; all of one architecture have the same weights.

    Attributes:
        checked: what `peers.agreement.check` said, by peer, architecture and dtype.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._weights: dict[tuple[Architecture, int], dict[str, Tensor]] = {}
        self.checked: dict[tuple[str, Architecture, torch.dtype], dict[str, float]] = {}
        self._rejected: dict[tuple[str, Architecture, torch.dtype], DifferentWork] = {}
        self._built: dict[tuple[str, Architecture, int], tuple[PeerModel, TrainingStep]] = {}

    def check(self, peer: Peer, setting: Setting) -> dict[str, float]:
        """`peers.agreement.check`, or what it said before."""
        known = self.known_check(peer, setting)
        if known is None:
            key = (peer.name, setting.architecture, setting.dtype)
            if key in self._rejected:
                raise self._rejected[key]
            try:
                known = self.checked[key] = check(peer, setting)
            except DifferentWork as error:
                self._rejected[key] = error
                raise
            finally:
                self._release_memory()
        return known

    def known_check(self, peer: Peer, setting: Setting) -> dict[str, float] | None:
        """A check for a 16-bit dtype compares in float32 too, but for compiled peers."""
        dtypes = [setting.dtype]
        if setting.dtype == torch.float32 and not peer.compiled:
            dtypes += [torch.bfloat16, torch.float16]
        found = (self.checked.get((peer.name, setting.architecture, dtype)) for dtype in dtypes)
        return next((each for each in found if each is not None), None)

    def build(self, peer: Peer, setting: Setting) -> tuple[PeerModel, TrainingStep]:
        key = _key(peer, setting)
        if key not in self._built:
            weights = self.weights(setting)
            with self.device:
                model = peer.build(setting, weights)
            self._built[key] = model, TrainingStep(model)
        return self._built[key]

    def is_built(self, peer: Peer, setting: Setting) -> bool:
        return _key(peer, setting) in self._built

    def weights(self, setting: Setting) -> dict[str, Tensor]:
        key = (setting.architecture, setting.num_classes)
        if key not in self._weights:
            torch.manual_seed(0)
            arguments = setting.architecture.factory_arguments(setting.num_classes)
            with self.device:
                self._weights = {key: hubert_fast.hubert_pretrain_model(**arguments).state_dict()}
        return self._weights[key]

    def forget(self, peer: Peer, setting: Setting) -> None:
        """What it holds may be what the others lack."""
        self._built.pop(_key(peer, setting), None)
        self._release_memory()

    def forget_all(self, but: tuple[Architecture, int] | None = None) -> None:
        """Models that are not of the architecture and number of classes that come next."""
        dropped = [key for key in self._built if key[1:] != but]
        for key in dropped:
            del self._built[key]
        if dropped:
            self._release_memory()

    def _release_memory(self) -> None:
        if answers(self.device):  # or what is raised here would hide what went wrong
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def _key(peer: Peer, setting: Setting) -> tuple[str, Architecture, int]:
    return peer.name, setting.architecture, setting.num_classes
