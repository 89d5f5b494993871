"""The implementations that are measured, each behind one adapter."""

from __future__ import annotations

from .minimal_hubert import MinimalHubert
from .ours import HubertFast, HubertFastSwappedIn
from .ours_graph import HubertFastGraph
from .peer import Peer
from .torchaudio import Torchaudio, TorchaudioCompiled, TorchaudioMaskedOnly
from .transformers import TransformersFlash, TransformersSdpa

# In the order of tables.
PEERS: tuple[Peer, ...] = (
    HubertFast(),
    HubertFastGraph(),
    HubertFastSwappedIn(),
    Torchaudio(),
    TorchaudioMaskedOnly(),
    TorchaudioCompiled(),
    TransformersSdpa(),
    TransformersFlash(),
    MinimalHubert(),
)


def by_name(name: str) -> Peer:
    """The peer that tables call ``name``.

    Raises:
        ValueError: if there is none, naming those that there are.
    """
    for peer in PEERS:
        if peer.name == name:
            return peer
    raise ValueError(f"peer {name!r} does not exist; there are {[peer.name for peer in PEERS]}")
