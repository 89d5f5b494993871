"""What is clustered: MFCC, or a transformer layer of the model of the iteration before.

A source of features is called with a list of waveforms (float32 ``[samples]`` at 16 kHz) and returns, in their order,
an array of float32 ``[num_frames(samples), dim]`` for each. ``settings`` tells what decides its numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hubert_fast.pretrain.audio import normalized
from hubert_fast.pretrain.config import ModelConfig
from hubert_fast.pretrain.frames import SAMPLE_RATE, num_frames
from hubert_fast.pretrain.like_length import batches_of_like_length
from hubert_fast.pretrain.mfcc import MFCC_DIM, mfcc39

if TYPE_CHECKING:
    from hubert_fast import HuBERTPretrainModel

_BATCH_SECONDS = 60.0


class FeatureSource(Protocol):
    """See the module's text."""

    name: str
    dim: int
    settings: dict[str, Any]

    def __call__(self, waveforms: list[np.ndarray]) -> list[np.ndarray]: ...


class MfccFeatures:
    """39-dimensional MFCC (`mfcc39`)."""

    name = "mfcc"
    dim = MFCC_DIM

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"source": self.name}

    def __call__(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        return [mfcc39(waveform) for waveform in waveforms]


class HubertFeatures:
    """The output of one transformer layer, counted from 1 as `Wav2Vec2Model.extract_features` does, without masking.

    Utterances are run in batches of like length. The numbers do not depend on the batch (``padding_invariant`` is on),
    but for the rounding of ``autocast`` (bfloat16).
    """

    def __init__(
        self,
        weights: Path,
        layer: int,
        *,
        device: str | torch.device = "cpu",
        autocast: bool = False,
        normalize_audio: bool = False,
    ) -> None:
        self._model = load_model(weights).to(device).eval()
        layers = len(self._model.wav2vec2.encoder.transformer.layers)
        if not 1 <= layer <= layers:
            raise ValueError(f"layer={layer}: the model in {str(weights)!r} has layers 1 to {layers}")
        self.name = f"layer{layer}"
        self.dim = self._model.wav2vec2.encoder.transformer.layers[0].final_layer_norm.normalized_shape[0]
        self.settings: dict[str, Any] = {
            "source": self.name,
            "weights_sha256": file_sha256(weights),
            "autocast": autocast,
            "normalize_audio": normalize_audio,
        }
        self._layer, self._autocast, self._normalize = layer, autocast, normalize_audio
        self._device = torch.device(device)

    def __call__(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        if not waveforms:
            return []
        if self._normalize:
            waveforms = [normalized(waveform) for waveform in waveforms]
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._autocast):
            return _layers(self._model, waveforms, self._device, num_layers=self._layer, first=self._layer)[0]


def all_layers(
    model: HuBERTPretrainModel, waveforms: list[np.ndarray], device: str | torch.device
) -> list[list[np.ndarray]]:
    """Every transformer layer's output for every utterance: ``result[layer - 1][utterance]`` is float32 ``[frames,
    dim]``.

    ``model`` is on ``device``; it is run as in evaluation, whatever its mode. Waveforms are taken as they are.
    """
    was_training = model.training
    model.eval()
    try:
        return _layers(model, waveforms, torch.device(device), num_layers=None, first=1)
    finally:
        model.train(was_training)


def load_model(weights: Path, *, padding_invariant: bool = True) -> HuBERTPretrainModel:
    """The model in a ``model.safetensors`` of the trainer, on the CPU and in evaluation mode.

    Args:
        padding_invariant: whether an utterance's features are independent of the padding its batch gives it, which is
            what extraction wants; False builds the model as it was trained. The weights are the same.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata() or {}
    missing = {"model_config", "num_classes"} - set(metadata)
    if missing:
        raise ValueError(
            f"weights={str(weights)!r} lacks the metadata {sorted(missing)}: the trainer's model.safetensors has it"
        )
    config = ModelConfig.from_json(metadata["model_config"])
    config = dataclasses.replace(config, padding_invariant=padding_invariant or config.padding_invariant)
    model = config.build(int(metadata["num_classes"]))
    model.load_state_dict(load_file(weights))
    return model.eval()


def _layers(
    model: HuBERTPretrainModel, waveforms: list[np.ndarray], device: torch.device, *, num_layers: int | None, first: int
) -> list[list[np.ndarray]]:
    """Layers ``first`` to ``num_layers`` (None: the last): ``result[layer - first][utterance]``."""
    result: list[list[np.ndarray]] = []
    samples = [len(waveform) for waveform in waveforms]
    for indices in batches_of_like_length(samples, _BATCH_SECONDS * SAMPLE_RATE):
        padded, lengths = _padded([waveforms[index] for index in indices])
        with torch.inference_mode():
            layers, _ = model.wav2vec2.extract_features(padded.to(device), lengths.to(device), num_layers=num_layers)
        layers = layers[first - 1 :]
        if not result:
            result = [[np.empty(0)] * len(waveforms) for _ in layers]
        for utterances, layer in zip(result, layers, strict=True):
            rows = layer.float().cpu().numpy()
            for row, index in zip(rows, indices, strict=True):
                utterances[index] = row[: num_frames(len(waveforms[index]))].copy()
    return result


def _padded(waveforms: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    padded = torch.zeros(len(waveforms), int(lengths.max()))
    for row, waveform in zip(padded, waveforms, strict=True):
        row[: len(waveform)] = torch.from_numpy(waveform)
    return padded, lengths


def file_sha256(path: Path) -> str:
    """The hash of a file's content, which tells the weights that features come of."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
