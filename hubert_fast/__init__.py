"""Fast HuBERT pre-training: a drop-in replacement for ``torchaudio.models.HuBERTPretrainModel``."""

from hubert_fast import backend, source_tree  # noqa: F401  (the latter makes the kernels of a source tree importable)
from hubert_fast._version import __version__
from hubert_fast.interop.acceleration import Acceleration, accelerate, patch_torchaudio, unaccelerate
from hubert_fast.models.capacities import Capacities
from hubert_fast.models.factories import (
    hubert_pretrain_base,
    hubert_pretrain_large,
    hubert_pretrain_model,
    hubert_pretrain_xlarge,
)
from hubert_fast.models.graphed_step import GraphedStep, UpdateResult
from hubert_fast.models.hubert import HuBERTPretrainModel
from hubert_fast.models.micro_batch import MicroBatch, MicroBatchPlanner
from hubert_fast.models.objective import PretrainingLoss, PretrainingObjective
from hubert_fast.models.wav2vec2 import Wav2Vec2Model

__all__ = [
    "Acceleration",
    "Capacities",
    "GraphedStep",
    "HuBERTPretrainModel",
    "MicroBatch",
    "MicroBatchPlanner",
    "PretrainingLoss",
    "PretrainingObjective",
    "UpdateResult",
    "Wav2Vec2Model",
    "__version__",
    "accelerate",
    "backend",
    "hubert_pretrain_base",
    "hubert_pretrain_large",
    "hubert_pretrain_model",
    "hubert_pretrain_xlarge",
    "patch_torchaudio",
    "unaccelerate",
]
