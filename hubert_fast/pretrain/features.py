"""What is clustered: MFCC, or a transformer layer of the model of the iteration before.

A source of features is called with a list of waveforms (float32 ``[samples]`` at 16 kHz) and returns, in their order,
an array of float32 ``[num_frames(samples), dim]`` for each. ``settings`` tells what decides its numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hubert_fast.pretrain.audio import normalized
from hubert_fast.pretrain.config import ModelConfig
from hubert_fast.pretrain.frames import SAMPLE_RATE, num_frames
from hubert_fast.pretrain.like_length import batches_of_like_length
from hubert_fast.pretrain.mfcc import MFCC_DIM, mfcc39
from hubert_fast.pretrain.tensor_files import naming

if TYPE_CHECKING:
    from hubert_fast import HuBERTPretrainModel

_BATCH_SECONDS = 60.0


class MfccFeatures:
    """39-dimensional MFCC (`mfcc39`)."""

    name = "mfcc"
    dim = MFCC_DIM

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"source": self.name}

    def __call__(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        return [mfcc39(waveform) for waveform in waveforms]


class ModelLayers:
    """The outputs of a trained model's transformer layers, without masking.

    Layers are counted from 1, as `Wav2Vec2Model.extract_features` does. Utterances are run in batches of like length. The
    numbers do not depend on the batch (``padding_invariant`` is on), but for the rounding of ``autocast`` (bfloat16).

    Args:
        normalize_audio: the model was trained on utterances of zero mean and unit variance.
    """

    def __init__(
        self,
        weights: Path,
        *,
        device: str | torch.device = "cpu",
        autocast: bool = False,
        normalize_audio: bool = False,
    ) -> None:
        self.model = load_model(weights).to(device)
        self.autocast, self.normalize_audio = autocast, normalize_audio
        self._device = torch.device(device)

    def __call__(
        self, waveforms: list[np.ndarray], *, first: int = 1, last: int | None = None
    ) -> list[list[np.ndarray]]:
        """Layers ``first`` to ``last`` (None: of the model), ``result[layer - first][utterance]``: float32 ``[frames, dim]``."""
        if self.normalize_audio:
            waveforms = [normalized(waveform) for waveform in waveforms]
        result: list[list[np.ndarray]] = []
        samples = [len(waveform) for waveform in waveforms]
        for indices in batches_of_like_length(samples, _BATCH_SECONDS * SAMPLE_RATE):
            layers = self._run([waveforms[index] for index in indices], last)[first - 1 :]
            if not result:
                result = [[np.empty(0)] * len(waveforms) for _ in layers]
            for utterances, layer in zip(result, layers, strict=True):
                rows = layer.float().cpu().numpy()
                for row, index in zip(rows, indices, strict=True):
                    utterances[index] = row[: num_frames(len(waveforms[index]))].copy()
        return result

    @torch.inference_mode()
    def _run(self, waveforms: list[np.ndarray], last: int | None) -> list[Tensor]:
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        padded = pad_sequence([torch.from_numpy(waveform) for waveform in waveforms], batch_first=True)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.autocast):
            encoder = self.model.wav2vec2
            return encoder.extract_features(padded.to(self._device), lengths.to(self._device), num_layers=last)[0]


class HubertFeatures:
    """The output of one layer of `ModelLayers`, whose arguments ``options`` are."""

    def __init__(self, weights: Path, layer: int, **options: Any) -> None:
        self._layers, self._layer = ModelLayers(weights, **options), layer
        self.name = f"layer{layer}"
        self.dim = self._layers.model.wav2vec2.encoder.transformer.layers[0].final_layer_norm.normalized_shape[0]
        self.settings: dict[str, Any] = {
            "source": self.name,
            "weights_sha256": file_sha256(weights),
            "autocast": self._layers.autocast,
            "normalize_audio": self._layers.normalize_audio,
        }

    def __call__(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        return self._layers(waveforms, first=self._layer, last=self._layer)[0]


FeatureSource = MfccFeatures | HubertFeatures


def load_model(weights: Path) -> HuBERTPretrainModel:
    """The model in a ``model.safetensors`` of the trainer, on the CPU and in evaluation mode.

    It is padding invariant, whatever it was in training: an utterance's features do not depend on the padding that its
    batch gives it, which is what extraction wants. The weights are the same.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    with naming(weights), safe_open(weights, framework="pt") as file:
        metadata = file.metadata() or {}
    missing = {"model_config", "num_classes"} - set(metadata)
    if missing:
        raise ValueError(
            f"weights={str(weights)!r} lacks the metadata {sorted(missing)}: the trainer's model.safetensors has it"
        )
    config = dataclasses.replace(ModelConfig.from_json(metadata["model_config"]), padding_invariant=True)
    model = config.build(int(metadata["num_classes"]))
    model.load_state_dict(load_file(weights))
    return model.eval()


def file_sha256(path: Path) -> str:
    """The hash of a file's content, which tells the weights that features come of."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
