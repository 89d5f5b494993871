"""The encoder that HuBERT pre-trains, with the interface of torchaudio's ``Wav2Vec2Model``."""

from __future__ import annotations

from typing import Optional

from torch import Tensor, nn

from hubert_fast.models.encoder import Encoder
from hubert_fast.models.feature_extractor import FeatureExtractor
from hubert_fast.ops.host_tensors import on_host, to_device


class Wav2Vec2Model(nn.Module):
    """Feature extractor, transformer encoder and, optionally, a head.

    Where lengths are given the encoder computes the valid frames alone; lengths on a GPU are copied to the host for that, once,
    and the host waits. A compiled, exported, traced or captured call computes the whole grid. Padded frames come out as 0.

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
        mask_generator: Optional[nn.Module] = None,
        mask: Optional[Tensor] = None,  # [batch, frames] bool
    ) -> tuple[Tensor, Optional[Tensor]]:
        """The encoder's output and the valid frames of each row.

        Args:
            waveforms: ``[batch, samples]`` float, 16 kHz.
            lengths: ``[batch]`` whole numbers, integer or float: valid samples of each row. None: all. A length
                beyond the audio counts as the whole row, with a warning, the first time.
            mask_generator: masks the transformer's input, as in fine-tuning, in eval mode too. None: nothing is masked.
            mask: ``[batch, frames]`` bool, the frames that it masks. None: it draws them.

        Returns:
            ``[batch, frames, dim]``, 0 in the padding (or what ``aux`` makes of it), and ``[batch]`` frames in the dtype of
            ``lengths``, or None where that is.

        Raises:
            ValueError: for a wrong rank, dtype or length, an empty batch, or audio shorter than one frame.
        """
        x, frames = self._features(waveforms, lengths)
        if mask_generator is None and mask is None:
            x = self.encoder(x, frames)
        else:
            x = self.encoder(x, frames, mask_generator=mask_generator, mask=mask)
        if self.aux is not None:
            x = self.aux(x)
        return x, _beside(lengths, frames)

    def extract_features(
        self, waveforms: Tensor, lengths: Optional[Tensor] = None, num_layers: Optional[int] = None
    ) -> tuple[list[Tensor], Optional[Tensor]]:
        """The outputs of the transformer's layers, before the last LayerNorm.

        Args:
            waveforms: ``[batch, samples]`` float, 16 kHz.
            lengths: ``[batch]`` whole numbers, integer or float: valid samples of each row. None: all. A length
                beyond the audio counts as the whole row, with a warning, the first time.
            num_layers: stop after this many layers, in [1, number of layers]. None: all.

        Returns:
            A list of ``[batch, frames, dim]``, one a layer, 0 in the padding, and ``[batch]`` frames in the dtype of
            ``lengths``, or None where that is.

        Raises:
            ValueError: as `forward`, and for ``num_layers`` out of range.
        """
        x, frames = self._features(waveforms, lengths)
        return self.encoder.extract_features(x, frames, num_layers), _beside(lengths, frames)

    def _features(self, waveforms: Tensor, lengths: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
        """Features ``[batch, frames, channels]`` and the valid frames of each row, on the CPU where the encoder is to pack."""
        ours = isinstance(self.encoder, Encoder) and isinstance(self.feature_extractor, FeatureExtractor)
        if lengths is not None and ours:
            lengths = on_host(lengths)  # before the extractor is started, so that nobody waits for it
        return self.feature_extractor(waveforms, lengths)


def _beside(lengths: Optional[Tensor], frames: Optional[Tensor]) -> Optional[Tensor]:
    """``frames`` on the device of ``lengths``."""
    return frames if lengths is None or frames is None else to_device(frames, lengths.device)
