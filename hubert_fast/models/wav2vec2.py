"""The encoder that HuBERT pre-trains, with the interface of torchaudio's ``Wav2Vec2Model``."""

from __future__ import annotations

from typing import Optional

from torch import Tensor, nn

from hubert_fast.models.checks import check_audio
from hubert_fast.models.encoder import Encoder
from hubert_fast.models.feature_extractor import FeatureExtractor


class Wav2Vec2Model(nn.Module):
    """Feature extractor, transformer encoder and, optionally, a head.

    Args:
        feature_extractor: raw audio to features.
        encoder: features to the transformer's outputs.
        aux: applied to the encoder's output where given, for example a linear layer over letters.
    """

    def __init__(self, feature_extractor: FeatureExtractor, encoder: Encoder, aux: Optional[nn.Module] = None) -> None:
        super().__init__()
        self.feature_extractor = feature_extractor
        self.encoder = encoder
        self.aux = aux

    def forward(
        self,
        waveforms: Tensor,  # [batch, samples]
        lengths: Optional[Tensor] = None,  # [batch], samples
    ) -> tuple[Tensor, Optional[Tensor]]:
        """The encoder's output and the valid frames of each row.

        Args:
            waveforms: ``[batch, samples]`` float, 16 kHz.
            lengths: ``[batch]`` integer: valid samples of each row. None: all.

        Returns:
            ``[batch, frames, dim]`` (or what ``aux`` makes of it), and ``[batch]`` frames or None where ``lengths`` is None.

        Raises:
            ValueError: for a wrong rank, dtype or length, an empty batch, or audio shorter than one frame.
        """
        check_audio(waveforms, lengths)
        x, lengths = self.feature_extractor(waveforms, lengths)
        x = self.encoder(x, lengths)
        if self.aux is not None:
            x = self.aux(x)
        return x, lengths

    def extract_features(
        self, waveforms: Tensor, lengths: Optional[Tensor] = None, num_layers: Optional[int] = None
    ) -> tuple[list[Tensor], Optional[Tensor]]:
        """The outputs of the transformer's layers, before the last LayerNorm.

        Args:
            waveforms: ``[batch, samples]`` float, 16 kHz.
            lengths: ``[batch]`` integer: valid samples of each row. None: all.
            num_layers: stop after this many layers, in [1, number of layers]. None: all.

        Returns:
            A list of ``[batch, frames, dim]``, one a layer, and ``[batch]`` frames or None where ``lengths`` is None.

        Raises:
            ValueError: as `forward`, and for ``num_layers`` out of range.
        """
        check_audio(waveforms, lengths)
        x, lengths = self.feature_extractor(waveforms, lengths)
        return self.encoder.extract_features(x, lengths, num_layers), lengths
