"""Fast HuBERT pre-training: a drop-in replacement for ``torchaudio.models.HuBERTPretrainModel``."""

from hubert_fast import backend, models, source_tree  # noqa: F401  (the latter makes the kernels of a source tree importable)
from hubert_fast._version import __version__
from hubert_fast.interop.acceleration import Acceleration, accelerate, patch_torchaudio, unaccelerate
from hubert_fast.models import *  # noqa: F403
from hubert_fast.models.capacities import Capacities
from hubert_fast.models.graphed_step import GraphedStep, UpdateResult
from hubert_fast.models.micro_batch import MicroBatch, MicroBatchPlanner
from hubert_fast.models.objective import PretrainingLoss, PretrainingObjective

__all__ = [
    "Acceleration",
    "Capacities",
    "GraphedStep",
    "MicroBatch",
    "MicroBatchPlanner",
    "PretrainingLoss",
    "PretrainingObjective",
    "UpdateResult",
    "__version__",
    "accelerate",
    "backend",
    "patch_torchaudio",
    "unaccelerate",
]
__all__ += models.__all__
