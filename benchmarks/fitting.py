"""Estimates of the time and memory that cases need; measured times replace them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .cases import Case
from .flops import inference_flops, step_flops
from .machine import available_bytes, memory_bytes
from .peers.peer import Peer

# Seconds that building, checking and (where a peer is compiled) compiling take, until they are known better.
_PREPARING = {"cpu": 6.0, "cuda": 6.0}
_COMPILING = {"cpu": (40.0, 9.0), "cuda": (20.0, 5.0)}  # once, and for each layer

# Sides run at this share of the rate of products, until they are known better.
_USUAL_SHARE = 0.3

# Of the free memory that broadcast logits may take: there is more in a step than they.
_MEMORY_SHARE = 0.7


@dataclass
class Pace:
    """How long cases take, by how long those did that were measured."""

    device: torch.device
    _known: dict[tuple[str, torch.dtype, str], float] = field(default_factory=dict)  # seconds a FLOP

    def learn(self, case: Case, peer: Peer, seconds: float, flops: float) -> None:
        """A call of ``flops`` took ``seconds``, with nothing to compile in it."""
        self._known[peer.name, case.dtype, case.kind] = seconds / flops

    def seconds(
        self, case: Case, peer: Peer, calls: int, flops_per_second: float, *, checked: bool, built: bool
    ) -> float:
        """Seconds that ``calls`` calls take, with all that comes before them.

        Args:
            flops_per_second: of products in the case's dtype.
            checked, built: whether the peer was.
        """
        usual = 1.0 / (_USUAL_SHARE * flops_per_second)
        # Inference and scaling go at the pace of steps until they have one of their own.
        pace = self._known.get(
            (peer.name, case.dtype, case.kind), self._known.get((peer.name, case.dtype, "step"), usual)
        )
        padding = case.grid_seconds / case.audio_seconds
        flops = sum(step_flops(case.architecture, each, case.num_classes) for each in case.lengths)
        if case.kind == "inference":
            flops = sum(inference_flops(case.architecture, each) for each in case.lengths)
        seconds = calls * pace * padding * flops
        if not checked:
            seconds += _PREPARING[self.device.type]
        if peer.compiled and not built:
            once, layer = _COMPILING[self.device.type]
            seconds += once + layer * case.architecture.layers
        return seconds


def why_too_large(case: Case, peer: Peer, device: torch.device) -> str | None:
    """Logits by broadcasting hold about seven float32 tensors [classes + 1, frames, final_dim]; the system would kill us."""
    if device.type == "cuda" or not peer.broadcasts_logits or case.kind == "inference":
        return None  # running out of a GPU's memory is an error that can be caught
    frames = max(len(each) * case.architecture.frames_of(max(each)) for each in case.lengths)
    needed = 7 * 4 * (case.num_classes + 1) * frames * case.architecture.final_dim
    available = available_bytes(device)
    if available is None or needed < _MEMORY_SHARE * available:
        return None
    free = f"{_MEMORY_SHARE:.0%} of the {available / 1e9:.0f} GB that are free"
    return f"its broadcast logits need about {needed / 1e9:.0f} GB, more than {free}"


def hold_together(parameters: int, peers: int, device: torch.device) -> bool:
    """Whether the device holds so many models at once: weights, gradients, Adam's two moments."""
    memory = memory_bytes(device)
    return memory is None or 16 * parameters * peers < 0.6 * memory
