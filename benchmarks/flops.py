"""FLOPs of the model by formula, as model FLOPs utilisation counts them (Chowdhery et al. 2022, appendix B).

Counted are products and convolutions, 2 FLOPs a multiply-add, over valid frames: neither padding, nor what an implementation
computes again in its backward or computes in vain, nor norms, activations and softmaxes. So every implementation of a case has
the same FLOPs, and one that leaves out what the loss does not need gains utilisation by it. The head, which is the final
projection and the logits, is counted for the masked frames, because the recipe's loss gives the others no weight.
"""

from __future__ import annotations

from collections.abc import Sequence

from .architecture import Architecture

# The stages of a model that have products, in the order of the forward pass; `stages` measures the same ones.
FRONT_END = "convolutional front end"
PROJECTION = "projection and masking"
POSITIONAL = "positional convolution"
ATTENTION = "attention"
FEED_FORWARD = "feed-forward"
LOSS = "loss"


def step_flops(
    architecture: Architecture, lengths: Sequence[int], num_classes: int, masked_frames: int | None = None
) -> float:
    """FLOPs of a training step, forward and backward; arguments as those of `step_flops_by_stage`."""
    return sum(step_flops_by_stage(architecture, lengths, num_classes, masked_frames).values())


def step_flops_by_stage(
    architecture: Architecture, lengths: Sequence[int], num_classes: int, masked_frames: int | None = None
) -> dict[str, float]:
    """FLOPs of a training step by stage.

    A product's backward is two products of its size. The first convolution has one of them: audio needs no gradient.

    Args:
        lengths: samples of each utterance, without padding.
        num_classes: units.
        masked_frames: of the whole batch. None: all valid frames are.
    """
    if masked_frames is None:
        masked_frames = sum(architecture.frames_of(each) for each in lengths)
    step = {stage: 3.0 * flops for stage, flops in _encoder(architecture, lengths).items()}
    step[FRONT_END] -= sum(convolution_flops(architecture, each)[0] for each in lengths)
    step[LOSS] = 3.0 * 2.0 * masked_frames * architecture.final_dim * (architecture.dim + num_classes)
    return step


def inference_flops(architecture: Architecture, lengths: Sequence[int]) -> float:
    """FLOPs of the outputs of all layers for utterances of ``lengths`` samples; there is no head."""
    return sum(_encoder(architecture, lengths).values())


def _encoder(architecture: Architecture, lengths: Sequence[int]) -> dict[str, float]:
    """Of the forward pass up to the last layer's output."""
    dim, layers = architecture.dim, architecture.layers
    counts = [architecture.frames_of(each) for each in lengths]
    frames, pairs = float(sum(counts)), float(sum(count * count for count in counts))
    projections = 4 * 2.0 * dim * dim * frames  # query, key, value and output
    scores_and_values = 2 * 2.0 * dim * pairs
    return {
        FRONT_END: sum(sum(convolution_flops(architecture, each)) for each in lengths),
        PROJECTION: 2.0 * architecture.convolutions[-1][0] * dim * frames,
        POSITIONAL: 2.0 * dim * (dim // architecture.groups) * architecture.taps * frames,
        ATTENTION: layers * (projections + scores_and_values),
        FEED_FORWARD: layers * 2 * 2.0 * dim * architecture.ffn * frames,
    }


def convolution_flops(architecture: Architecture, samples: int) -> list[float]:
    """Of the forward pass of each convolution of the front end over one utterance."""
    flops, length, channels_in = [], samples, 1
    for channels, taps, stride in architecture.convolutions:
        length = max(0, (length - taps) // stride + 1)
        flops.append(2.0 * channels_in * channels * taps * length)
        channels_in = channels
    return flops
