"""Building a peer's model without drawing the weights that are thrown away for those of the measurement."""

from __future__ import annotations

from collections.abc import Mapping
from unittest import mock

from torch import Tensor, nn

from .peer import Peer, PeerModel, Setting

# Drawing takes longer than all else: a second for HuBERT Base on a CPU.
_DRAWN_BY = (
    "uniform_",
    "normal_",
    "trunc_normal_",
    "xavier_uniform_",
    "xavier_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
)


def build(peer: Peer, setting: Setting, weights: Mapping[str, Tensor]) -> PeerModel:
    """``peer.build(setting, weights)``; parameters that ``weights`` would leave out hold whatever was in memory."""
    peer.prepare()
    undrawn = {name: lambda tensor, *_, **__: tensor for name in _DRAWN_BY}
    with setting.device, mock.patch.multiple(nn.init, **undrawn):
        return peer.build(setting, weights)
