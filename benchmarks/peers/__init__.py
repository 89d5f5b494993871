"""The implementations that are measured, each behind one adapter."""

from __future__ import annotations

from .minimal_hubert import MinimalHubert
from .ours import HubertFast, HubertFastSwappedIn
from .ours_graph import HubertFastGraph
from .peer import Peer
from .torchaudio import Torchaudio, TorchaudioCompiled, TorchaudioMaskedOnly
from .transformers import TransformersFlash, TransformersSdpa

# By the name that tables have, in their order.
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
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
}
