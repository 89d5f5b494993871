"""What is clustered: MFCC, or a transformer layer of the model of the iteration before.

A source of features is called with a list of waveforms (float32 ``[samples]`` at 16 kHz) and returns, in their order,
an array of float32 ``[num_frames(samples), dim]`` for each; its ``assign`` returns their units in a codebook instead, int32
``[num_frames(samples)]``. ``settings`` tells what decides its numbers, ``call_seconds`` how much audio it works on at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubert_fast import Capacities
from hubert_fast.models.capture import CudaCapture
from hubert_fast.models.graphed_rows import GraphedRows
from hubert_fast.models.rows import Rows
from hubert_fast.ops.host_tensors import to_device
from hubert_fast.pretrain.audio import normalized
from hubert_fast.pretrain.codebook import Codebook, nearest_centroids
from hubert_fast.pretrain.config import ModelConfig
from hubert_fast.pretrain.frames import FRAME_SHIFT, SAMPLE_RATE, num_frames
from hubert_fast.pretrain.like_length import batches_of_like_length
from hubert_fast.pretrain.mfcc import MFCC_DIM, mfcc39
from hubert_fast.pretrain.tensor_files import naming

if TYPE_CHECKING:
    from hubert_fast import HuBERTPretrainModel

# Audio of a call, padding included: enough to fill the device, few enough to read ahead.
_GPU_CALL_SECONDS = 300.0
_CPU_CALL_SECONDS = 60.0
# Utterances up to this length share graphs, and a call has up to so many.
_LONGEST_SECONDS, _MOST_UTTERANCES = 60.0, 512


class MfccFeatures:
    """39-dimensional MFCC (`mfcc39`)."""

    name = "mfcc"
    dim = MFCC_DIM
    call_seconds = _CPU_CALL_SECONDS

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"source": self.name}

    def __call__(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        return [mfcc39(waveform) for waveform in waveforms]

    def assign(self, waveforms: list[np.ndarray], codebook: Codebook) -> list[np.ndarray]:
        return [codebook.assign(features) for features in self(waveforms)]


class _OnItsWay(NamedTuple):
    """A tensor on the CPU, and the event after which its numbers are there."""

    tensor: Tensor
    copied: torch.cuda.Event | None

    def wait(self) -> np.ndarray:
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensor.numpy()


class ModelLayers:
    """The outputs of a trained model's transformer layers, without masking.

    Layers are counted from 1, as `Wav2Vec2Model.extract_features` does. Utterances are run in batches of like length, of which
    the encoder computes the valid frames alone, and a GPU works on one while the host handles what came of that before. The
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
        on_gpu = self._device.type == "cuda"
        self.call_seconds = _GPU_CALL_SECONDS if on_gpu else _CPU_CALL_SECONDS
        self._capture = CudaCapture(self._device) if on_gpu else None
        self._graphed: dict[tuple[Any, ...], GraphedRows] = {}
        self._centroids: dict[int, tuple[Codebook, Tensor]] = {}

    def __call__(
        self, waveforms: list[np.ndarray], *, first: int = 1, last: int | None = None
    ) -> list[list[np.ndarray]]:
        """Layers ``first`` to ``last`` (None: of the model), ``result[layer - first][utterance]``: float32 ``[frames, dim]``."""
        key, encoder = ("layers", first, last), self.model.wav2vec2.encoder

        def work(rows: Tensor, layout: Rows) -> Tensor:
            layers = encoder.layer_rows(rows, layout, first=first, last=last)
            return torch.stack([layer.float() for layer in layers])

        return self._results(waveforms, self._graphs_of(key, work))

    def assign(self, waveforms: list[np.ndarray], codebooks: Mapping[int, Codebook]) -> dict[int, list[np.ndarray]]:
        """The units of the layers that have codebooks, ``result[layer][utterance]``: int32 ``[frames]``.

        On a GPU the features never leave it; on a CPU they are `Codebook.assign`'s.
        """
        first, last = min(codebooks), max(codebooks)
        if self._device.type == "cpu":
            layers = self(waveforms, first=first, last=last)
            return {n: [codebook.assign(each) for each in layers[n - first]] for n, codebook in codebooks.items()}
        return self._assign_on_device(waveforms, codebooks, first, last)

    def _assign_on_device(
        self, waveforms: list[np.ndarray], codebooks: Mapping[int, Codebook], first: int, last: int
    ) -> dict[int, list[np.ndarray]]:
        centroids = {n: self._on_device(each) for n, each in codebooks.items()}
        encoder = self.model.wav2vec2.encoder

        def work(rows: Tensor, layout: Rows) -> Tensor:
            layers = encoder.layer_rows(rows, layout, first=first, last=last)
            return torch.stack([nearest_centroids(layers[n - first], each) for n, each in centroids.items()])

        key = "units", *((n, id(each)) for n, each in centroids.items())
        return dict(zip(centroids, self._results(waveforms, self._graphs_of(key, work)), strict=True))

    def _on_device(self, codebook: Codebook) -> Tensor:
        """The centroids, the same memory for the same codebook: graphs read it."""
        if id(codebook) not in self._centroids:
            centroids = to_device(torch.from_numpy(codebook.centroids), self._device)
            self._centroids[id(codebook)] = codebook, centroids  # kept, so that its id stays its own
        return self._centroids[id(codebook)][1]

    def _graphs_of(self, key: tuple[Any, ...], work: Callable[[Tensor, Rows], Tensor]) -> GraphedRows:
        """``work`` in graphs, which are those of the ``work`` that came first with this ``key``.

        It must not refer to this object: in a cycle, memory of the GPU would wait for Python's collector.
        """
        if key not in self._graphed:
            frames = round(self.call_seconds * SAMPLE_RATE) // FRAME_SHIFT
            longest = round(_LONGEST_SECONDS * SAMPLE_RATE) // FRAME_SHIFT
            room = Capacities(rows=frames, sequences=_MOST_UTTERANCES, max_frames=longest)
            self._graphed[key] = GraphedRows(self._in_autocast(work), room, self._capture)
        return self._graphed[key]

    def _in_autocast(self, work: Callable[[Tensor, Rows], Tensor]) -> Callable[[Tensor, Rows], Tensor]:
        device, enabled = self._device.type, self.autocast

        def run(rows: Tensor, layout: Rows) -> Tensor:
            # Without its cache: what a graph finds there would be a constant of it.
            with torch.autocast(device, torch.bfloat16, enabled=enabled, cache_enabled=False):
                return work(rows, layout)

        return run

    def _results(self, waveforms: list[np.ndarray], work: GraphedRows) -> list[list[np.ndarray]]:
        """Results of ``work`` for each layer and utterance, ``result[layer][utterance]``: ``[frames, ...]``."""
        result: list[list[np.ndarray]] = []
        for indices, layers in self._calls(waveforms, work):
            if not result:
                result = [[np.empty(0)] * len(waveforms) for _ in layers]
            ends = np.cumsum([num_frames(len(waveforms[index])) for index in indices])
            for utterances, layer in zip(result, layers, strict=True):
                for index, rows in zip(indices, np.split(layer, ends[:-1]), strict=True):
                    utterances[index] = rows.copy()
        return result

    def _calls(self, waveforms: list[np.ndarray], work: GraphedRows) -> Iterator[tuple[list[int], np.ndarray]]:
        """Utterances of each call, and ``work``'s ``[layers, rows, ...]`` of them, while the next call runs."""
        before: tuple[list[int], _OnItsWay] | None = None
        samples = [len(waveform) for waveform in waveforms]
        for indices in batches_of_like_length(samples, self.call_seconds * SAMPLE_RATE):
            started = indices, self._start([waveforms[index] for index in indices], work)
            if before is not None:
                yield before[0], before[1].wait()
            before = started
        if before is not None:
            yield before[0], before[1].wait()

    @torch.inference_mode()
    def _start(self, waveforms: list[np.ndarray], work: GraphedRows) -> _OnItsWay:
        """Run a call; a GPU is not waited for."""
        if self.normalize_audio:
            waveforms = [normalized(waveform) for waveform in waveforms]
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        padded = padded_audio(waveforms, pinned=self._device.type == "cuda")
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False):
            extractor = self.model.wav2vec2.feature_extractor
            features, frames = extractor(padded.to(self._device, non_blocking=True), lengths)
        return _sent_to_host(work(features, frames))


def padded_audio(waveforms: list[np.ndarray], *, pinned: bool) -> Tensor:
    """The waveforms, each float32 ``[samples]``, as one tensor ``[batch, most samples]`` with zeros behind them, page-locked if
    ``pinned``.
    """
    padded = torch.empty(len(waveforms), max(map(len, waveforms)), pin_memory=pinned)
    for row, waveform in zip(padded.numpy(), waveforms, strict=True):
        row[: len(waveform)], row[len(waveform) :] = waveform, 0.0
    return padded


def _sent_to_host(x: Tensor) -> _OnItsWay:
    if not x.is_cuda:
        return _OnItsWay(x.clone(), None)  # the next call may use its memory
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(x.device))
    return _OnItsWay(host, copied)


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
        self.call_seconds = self._layers.call_seconds

    def __call__(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        return self._layers(waveforms, first=self._layer, last=self._layer)[0]

    def assign(self, waveforms: list[np.ndarray], codebook: Codebook) -> list[np.ndarray]:
        return self._layers.assign(waveforms, {self._layer: codebook})[self._layer]


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
