"""The configuration of a pre-training run: frozen dataclasses, read from TOML, overridden on the command line.

Durations are in seconds of audio, counts of optimizer updates in steps, ``layer`` counts transformer layers from 1.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Optional, Tuple, Union

if TYPE_CHECKING:
    from hubert_fast import HuBERTPretrainModel

ConvLayers = Tuple[Tuple[int, int, int], ...]

STANDARD_CONV_LAYERS: ConvLayers = ((512, 10, 5),) + ((512, 3, 2),) * 4 + ((512, 2, 2),) * 2


@dataclass(frozen=True)
class ModelConfig:
    """The arguments of `hubert_fast.hubert_pretrain_model`, less ``num_classes`` (the units decide it). Defaults: HuBERT Base."""

    extractor_mode: Literal["group_norm", "layer_norm"] = "group_norm"
    extractor_conv_layer_config: ConvLayers = STANDARD_CONV_LAYERS
    """(channels, kernel, stride) of each conv layer; the kernels and strides fix the frame grid: only channels are free"""
    extractor_conv_bias: bool = False
    encoder_embed_dim: int = 768
    encoder_projection_dropout: float = 0.1
    encoder_pos_conv_kernel: int = 128
    encoder_pos_conv_groups: int = 16
    encoder_num_layers: int = 12
    encoder_num_heads: int = 12
    encoder_attention_dropout: float = 0.1
    encoder_ff_interm_features: int = 3072
    encoder_ff_interm_dropout: float = 0.0
    encoder_dropout: float = 0.1
    encoder_layer_norm_first: bool = False
    encoder_layer_drop: float = 0.05
    mask_prob: float = 0.8
    mask_selection: Literal["static", "uniform", "normal", "poisson"] = "static"
    mask_other: float = 0.0
    mask_length: int = 10
    no_mask_overlap: bool = False
    mask_min_space: int = 1
    mask_channel_prob: float = 0.0
    mask_channel_selection: Literal["static", "uniform", "normal", "poisson"] = "static"
    mask_channel_other: float = 0.0
    mask_channel_length: int = 10
    no_mask_channel_overlap: bool = False
    mask_channel_min_space: int = 1
    final_dim: int = 256
    feature_grad_mult: Optional[float] = 0.1
    padding_invariant: bool = False
    """take layer 0's GroupNorm statistics over the valid samples only, so that padding changes no feature"""

    def __post_init__(self) -> None:
        grid = [(kernel, stride) for _, kernel, stride in self.extractor_conv_layer_config]
        standard = [(kernel, stride) for _, kernel, stride in STANDARD_CONV_LAYERS]
        if grid != standard:
            raise ValueError(
                f"extractor_conv_layer_config has (kernel, stride) pairs {grid}; pre-training needs {standard}, "
                "because units and crops are made on that frame grid (320 samples). Channel counts are free."
            )

    def build(self, num_classes: int) -> HuBERTPretrainModel:
        """A freshly initialised model with ``num_classes`` classes, drawn from torch's default generator."""
        from hubert_fast import hubert_pretrain_model

        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        arguments["extractor_conv_layer_config"] = [tuple(layer) for layer in self.extractor_conv_layer_config]
        return hubert_pretrain_model(**arguments, skip_masked=False, skip_nomask=False, num_classes=num_classes)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        values = json.loads(text)
        values["extractor_conv_layer_config"] = tuple(tuple(layer) for layer in values["extractor_conv_layer_config"])
        return cls(**values)


@dataclass(frozen=True)
class DataConfig:
    """How utterances become batches."""

    batch_seconds: float = 2800.0
    """audio of a global batch: all ranks and all accumulated micro-batches together, padding included"""
    micro_batch_seconds: Union[Literal["auto"], float] = "auto"
    """audio of a micro-batch of one rank, padding included; auto: as a GPU's memory allows, on a CPU its whole share"""
    max_seconds: float = 15.6
    """longer utterances are cropped to this, at random, on a frame boundary"""
    min_seconds: float = 2.0
    """shorter utterances are left out by the scan"""
    channel: Union[Literal["mix"], int] = "mix"
    """what is taken of recordings of several channels: the mean of all (mix), or the channel of this number, the first
    being 1; the scan leaves out a recording whose channels cancel in the mean, or that has no channel of the number"""
    valid_fraction: float = 0.05
    """share of the files that is held out where the corpus does not name its own split"""
    max_bad_utterances: float = 0.01
    """largest share of the utterances that a run leaves out where their audio cannot be read any more, or is not what was
    scanned. Those of one recording may always be left out, unless this is 0"""
    workers: int = 4
    """data-loader worker processes of each rank"""
    normalize_audio: bool = False
    """scale each utterance to zero mean and unit variance"""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and linear decay to 0."""

    steps: int = 250_000
    """optimizer updates; 0 leaves the iteration out"""
    learning_rate: float = 5e-4
    """its peak"""
    warmup_fraction: float = 0.08
    """share of the steps that warms up"""
    betas: Tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip_norm: float = 10.0
    """largest gradient norm, of the mean loss over masked frames"""
    accumulate: Optional[int] = None
    """micro-batches of each rank that make one update; none: as many as ``data.micro_batch_seconds`` asks for"""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the loss (HuBERT paper, eq. 2, and the feature penalty of the released recipe)."""

    masked_weight: float = 1.0
    unmasked_weight: float = 0.0
    feature_weight: float = 10.0


@dataclass(frozen=True)
class UnitsConfig:
    """What is clustered into the units that an iteration predicts."""

    clusters: int = 100
    layer: int = 0
    """0: MFCC; otherwise the transformer layer of the previous iteration's model"""
    fit_frames: int = 1_000_000
    """frames that k-means is fitted on, drawn at random from the training part; they are held in memory. The paper takes a
    tenth of its 960 hours from the second iteration on, which is 17 million frames of 768 float32, 53 GB: a million
    (3 GB) still leaves 2,000 frames to each of 500 clusters"""
    init_attempts: int = 20
    """k-means++ starts, of which the best is kept"""
    min_perplexity: float = 1.5
    """units of a lower perplexity, which are nearly all the same one, end the run: of silence, or of the wrong folder, there is
    nothing to learn. 1: never"""


@dataclass(frozen=True)
class IterationConfig:
    """One iteration: make units, train a model on them."""

    units: UnitsConfig = UnitsConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    batch_seconds: Optional[float] = None
    """audio of a global batch where it differs from ``data.batch_seconds``"""
    normalize_audio: Optional[bool] = None
    """whether utterances are scaled where it differs from ``data.normalize_audio``; also wherever its model is used"""


@dataclass(frozen=True)
class EvaluationConfig:
    """How representations are scored on the held-out part, where it has phone alignments."""

    clusters: int = 100
    """k-means clusters of every layer; scores are only comparable at the same number"""
    fit_frames: int = 100_000
    init_attempts: int = 5


@dataclass(frozen=True)
class LoggingConfig:
    """How often the trainer speaks, checks and saves, in steps."""

    log_every: int = 100
    valid_every: int = 5_000
    save_every: int = 5_000
    keep_checkpoints: int = 2
    """newest checkpoints that are kept"""


@dataclass(frozen=True)
class PretrainConfig:
    """A whole run: corpus -> units -> iteration 1 -> units -> iteration 2 (-> iteration 3) -> report."""

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    autocast: bool = True
    """bfloat16 autocast in training and feature extraction"""
    graphs: Literal["auto", "off"] = "auto"
    """auto: training steps on a GPU run in CUDA graphs; off: eagerly, to the same numbers but for rounding and for
    which channels are masked, where ``mask_channel_prob`` is not 0"""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype in which gradients are summed over GPUs, where steps run in graphs"""
    data: DataConfig = DataConfig()
    logging: LoggingConfig = LoggingConfig()
    first: IterationConfig = IterationConfig()
    second: IterationConfig = IterationConfig(
        units=UnitsConfig(clusters=500, layer=6), optimizer=OptimizerConfig(steps=400_000)
    )
    third: IterationConfig = IterationConfig(optimizer=OptimizerConfig(steps=0))
    evaluation: EvaluationConfig = EvaluationConfig()

    def iterations(self) -> list[IterationConfig]:
        """The iterations that are to be run, in order."""
        return [iteration for iteration in (self.first, self.second, self.third) if iteration.optimizer.steps > 0]

    def data_of(self, iteration: IterationConfig) -> DataConfig:
        """The data settings of one iteration."""
        own = {"batch_seconds": iteration.batch_seconds, "normalize_audio": iteration.normalize_audio}
        return dataclasses.replace(self.data, **{name: value for name, value in own.items() if value is not None})


def config_path(run: Path) -> Path:
    """Where a run keeps its settings."""
    return Path(run) / "config.toml"
