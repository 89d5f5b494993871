"""What a training step is predicted to take on an H100, part by part: arithmetic, made before anything ran on a GPU.

HuBERT Base, 175 s of audio (8,743 rows), bfloat16, 500 classes; matrix products at 798 TFLOP/s, copies at 3.0 TB/s. Times are
of the GPU, in milliseconds. The steps that are measured do not clip gradients, which a part of the predicted ones does. How each
was counted is in NOTES.md; ``scripts/gpu-check`` prints what it measures beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

TFLOPS, COPY_TB_PER_S = 798.0, 3.0


@dataclass(frozen=True)
class Part:
    """A part of the step.

    ``floor_ms``: bytes over bandwidth or FLOPs over rate, whichever is larger. ``launches`` and ``predicted_ms``: before the
    changes of "Nothing moved twice" in NOTES.md; ``improved_ms``: with them. ``operators``: how the
    profiler's names of what belongs to it begin, a backward's like its forward's; `part_of` knows other products by themselves.
    """

    name: str
    launches: int
    floor_ms: float
    predicted_ms: float
    improved_ms: float
    operators: tuple[str, ...] = ()


# GELU in the epilogue of a product counts here, and not as a pass of its own.
LINEAR = Part("linear products", 150, 5.4, 8.3, 8.1, ("hubert_fast::feed_forward",))
REST = Part("casts, adds, concatenations, sums", 237, 0.0, 2.25, 0.3)

# What computes the linear layers; autocast's casts lie around it.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")

PARTS = (
    Part("conv front end", 100, 3.2, 5.75, 5.5, ("hubert_fast::conv_frontend",)),
    Part("attention", 48, 0.9, 2.9, 2.3, ("hubert_fast::masked_attention",)),
    Part("residual LayerNorm", 80, 1.5, 2.05, 2.05,
         ("hubert_fast::residual_layer_norm", "hubert_fast::bias_dropout_residual")),
    Part("bias + GELU", 36, 0.0, 1.25, 0.5, ("hubert_fast::bias_gelu_dropout",)),
    Part("positional convolution", 14, 0.31, 0.88, 0.6, ("hubert_fast::positional_conv",)),
    Part("loss, mask, penalty", 50, 0.1, 0.33, 0.3,
         ("hubert_fast::cosine_cross_entropy", "hubert_fast::cosine_logits", "hubert_fast::mask_fill")),
    Part("AdamW, clipping", 15, 0.9, 1.35, 0.95, ("Optimizer.", "aten::_foreach_", "aten::_fused_adamw_")),
    LINEAR,
    REST,
)  # fmt: skip

# Between the kernels of one CUDA graph, and all of it, before those changes and with them; `Update` has what several graphs add.
GAPS_MS = (0.6, 0.5)
STEP_MS = (25.3, 21.5)
STEP_RANGE_MS = (22.5, 29.0)  # of the first

# Milliseconds that the host needs for a step: without a graph (lowest, highest), and to launch one.
HOST_MS = (45.0, 55.0)
GRAPH_HOST_MS = 5.0


@dataclass(frozen=True)
class Update:
    """An update of `hubert_fast.GraphedStep` on the host, as `benchmarks.host` counts and times it without a GPU.

    ``host_ms``, a median, is what calls cost on the CPU of NOTES.md; a driver that does something takes more.
    """

    host_ms: float
    launches: int  # of graphs
    front_end: int  # calls of the extension and kernels of PyTorch outside of graphs

    @property
    def gaps_ms(self) -> float:
        """Between one graph and the next, beyond the gaps between kernels (`GAPS_MS`)."""
        return self.launches * _BETWEEN_GRAPHS_MS


_BETWEEN_GRAPHS_MS = 0.003

# By the name of the item of ``scripts/gpu-check``; the second at a LayerDrop of 0.05.
UPDATES = {"time": Update(1.6, 2, 75), "time, LayerDrop": Update(2.2, 28, 75)}

# Milliseconds of a step that each flag of `hubert_fast.switches` saves.
SWITCHES = {
    "narrow_copies": 1.15, "gelu_epilogues": 0.75, "attention_bias_gradient": 0.25, "weight_copies": 0.45,
    "folded_filters": 0.1, "last_queries": 0.1, "wide_weight_gradients": 0.5,
}  # fmt: skip

AIM_MS = 22.4  # 7,800 seconds of audio a second


def part_of(names: list[str]) -> Part:
    """The part that a kernel belongs to.

    Args:
        names: of the profiler's events around its launch, the innermost first.
    """
    for part in PARTS:
        if any(name.startswith(part.operators) for name in names):
            return part
    return LINEAR if names and names[0] in _PRODUCTS else REST
