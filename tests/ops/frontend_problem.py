"""Problems for the convolutional front end: layers, parameters and audio of any size."""

import torch

from hubert_fast.ops.conv_frontend import Arguments
from hubert_fast.reference import conv_frontend as reference

HUBERT = [(10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)]


class Problem:
    """Random parameters and audio, and what the reference makes of them."""

    def __init__(self, shapes, *, norm, bias=True, batch=2, samples=3000, channels=8, valid=None, seed=0, dtype=None):
        self.shapes, self.norm, self.valid = shapes, norm, valid
        self.dtype = dtype or torch.float64
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        norms = 1 if norm == "group_norm" else len(shapes)
        widths = [1] + [channels] * len(shapes)
        self.groups = [
            [
                randn(out, into, kernel) * (2 / (into * kernel)) ** 0.5
                for into, out, (kernel, _) in zip(widths, widths[1:], shapes)
            ],
            [0.1 * randn(channels) for _ in shapes] if bias else [],
            [1 + 0.2 * randn(channels) for _ in range(norms)],
            [0.3 * randn(channels) for _ in range(norms)],
        ]
        self.waveforms = randn(batch, samples)
        self.strides = [stride for _, stride in shapes]
        self.direction = randn(batch, reference.output_length(samples, *zip(*shapes)), channels)

    def reference(self, dtype=torch.float64):
        """The features and every gradient in ``dtype``."""
        groups = [[each.to(dtype).requires_grad_() for each in group] for group in self.groups]
        features = reference.conv_frontend(
            self.waveforms.to(dtype), *groups, strides=self.strides, norm=self.norm, valid_samples=self.valid
        )
        leaves = [each for group in groups for each in group]
        grads = torch.autograd.grad(features, leaves, self.direction.to(dtype), allow_unused=True)
        return [features.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads))]

    def arguments(self):
        """In the problem's dtype."""
        groups = [[each.to(self.dtype) for each in group] for group in self.groups]
        return Arguments(self.waveforms.to(self.dtype), *groups, self.strides, self.norm, self.valid, self.dtype)
