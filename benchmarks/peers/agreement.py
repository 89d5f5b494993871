"""Whether a peer does the same work as the reference. One that does not is not timed.

The truth is `PretrainingObjective` on the plain formulas (backend "reference"), in float32, on a batch with padding. Loss,
gradient and features are compared, without dropout, from weights in which nothing is left at 0 or 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

import hubert_fast
from hubert_fast import tf32

from ..batches import SAMPLE_RATE, Batch, make
from ..report import dtype_name
from .ours import ObjectiveModel, build_model
from .peer import Peer, PeerModel, Setting, autocast

# How large relative differences may be: of the loss; of the norms of the gradient's parts; of the features, in norm.
_IN_FLOAT32 = {"loss": 1e-4, "gradient": 1e-3, "features": 1e-3}
_IN_16_BITS = {"loss": 2e-2, "gradient": 0.1, "features": 5e-2}

# Parts of small gradient, which would not show in the norm of all. So every peer's names of parameters have them.
_PARTS = ("feature_extractor", "mask", "label_embeddings")

_SECONDS = (1.2, 0.8)  # of the two utterances
_LAYERS_OF_COMPILED = 2


class DifferentWork(Exception):
    """A peer does not compute what the reference computes."""


def check(peer: Peer, setting: Setting) -> dict[str, float]:
    """How far ``peer``, built for ``setting``, is from the reference.

    It is compared in float32 without autocast and TF32 and, where ``setting`` has a 16-bit dtype, its loss once more under
    autocast. One that cannot compute in float32 is compared in the setting's dtype alone. So is a compiled one, on a model cut
    to 2 layers: compiling takes minutes at full size, and it is the same adapter whatever the size.

    Random numbers and settings of torch are afterwards what they were.

    Returns:
        The relative differences by ``"loss"``, ``"gradient"`` (of the norms of its parts, the largest) and ``"features"`` (of
        valid frames), and ``"loss in <dtype>"`` where that was compared too.

    Raises:
        DifferentWork: if one is too large, or not a number: which, by how much, and how much is allowed.
    """
    architecture = setting.architecture.without_dropout()
    if peer.compiled:
        architecture = architecture.changed(layers=min(architecture.layers, _LAYERS_OF_COMPILED))
    setting = replace(setting, architecture=architecture, padded=True)
    exact = replace(setting, dtype=torch.float32)
    devices = [setting.device] if setting.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), tf32.allowed(False):
        truth = _truth(exact)
        weights, batch = weights_of(exact), _batch(setting, seed=1)
        if peer.compiled or peer.why_not(exact) is not None:
            return _compare(peer, setting, weights, batch, truth, _IN_FLOAT32)
        differences = _compare(peer, exact, weights, batch, truth, _IN_FLOAT32)
        if setting.dtype != torch.float32:
            again = _compare(peer, setting, weights, batch, truth, ["loss", "gradient"])
            differences |= {f"{name} in {dtype_name(setting.dtype)}": each for name, each in again.items()}
        return differences


def _compare(
    peer: Peer,
    setting: Setting,
    weights: Mapping[str, Tensor],
    batch: Batch,
    truth: Mapping[str, Tensor],
    names: Collection[str],
) -> dict[str, float]:
    with setting.device:
        model = peer.build(setting, weights)
    if model.overwrites_gradients:  # what is replayed must not remember the batch that it was captured on
        other = _batch(setting, seed=2)
        _gradient(model, setting, replace(batch, waveforms=other.waveforms, labels=other.labels))
    computed = {name: _COMPUTE[name](model, setting, batch) for name in names}
    if "gradient" in names:
        _assert_all_trained(peer, model)
    limits = _IN_FLOAT32 if setting.dtype == torch.float32 else _IN_16_BITS
    truth = dict(truth)
    if setting.dtype != torch.float32 and "gradient" in computed:  # roundings to 16 bits do not cancel in sums
        computed["gradient"], truth["gradient"] = computed["gradient"][:1], truth["gradient"][:1]
    differences = {name: _MEASURE[name](value, truth[name]) for name, value in computed.items()}
    for name, difference in differences.items():
        if not difference <= limits[name]:  # not a number is none
            raise DifferentWork(
                f"{peer.name} does other work than the reference: {name} differs by {difference:.2%} in "
                f"{dtype_name(setting.dtype)}, and {limits[name]:.2%} is allowed"
            )
    return differences


def _assert_all_trained(peer: Peer, model: PeerModel) -> None:
    """A bias without a gradient would not show in the norms."""
    without = [name for name, parameter in model.module.named_parameters() if parameter.grad is None]
    if without:
        raise DifferentWork(f"{peer.name} does other work than the reference: no gradient reaches {without[0]}")


@functools.lru_cache(maxsize=4)
def _truth(setting: Setting) -> dict[str, Tensor]:
    """The same for all peers."""
    with hubert_fast.backend.using("reference"):
        model, batch = ObjectiveModel(build_model(setting, weights_of(setting))), _batch(setting, seed=1)
        return {name: compute(model, setting, batch) for name, compute in _COMPUTE.items()}


def _loss(model: PeerModel, setting: Setting, batch: Batch) -> Tensor:
    model.module.train()
    torch.manual_seed(batch.seed)
    with autocast(setting.device, setting.dtype):
        return model.loss(batch).detach().double()


def _gradient(model: PeerModel, setting: Setting, batch: Batch) -> Tensor:
    """Norms and sums over the parameters of each of `_PARTS`, and over all others: the same however a peer divides the rest.

    ``[2, parts]``. Gradients of the wrong sign have the right norms.
    """
    model.module.train()
    torch.manual_seed(batch.seed)
    model.forward_backward(batch, setting.dtype)
    squares, sums = torch.zeros(2, len(_PARTS) + 1, dtype=torch.float64)
    for name, parameter in model.module.named_parameters():
        if parameter.grad is not None:
            part = next((i for i, part in enumerate(_PARTS) if part in name), len(_PARTS))
            squares[part] += float(parameter.grad.double().square().sum())
            sums[part] += float(parameter.grad.double().sum())
    return torch.stack([squares.sqrt(), sums])


def _features(model: PeerModel, setting: Setting, batch: Batch) -> Tensor:
    """Of the valid frames: ``[frames, dim]``."""
    model.module.eval()
    with torch.no_grad(), autocast(setting.device, setting.dtype):
        features = model.features(batch)
    frames = [setting.architecture.frames_of(samples) for samples in batch.samples]
    return torch.cat([each[:count] for each, count in zip(features, frames)]).double()


_COMPUTE = {"loss": _loss, "gradient": _gradient, "features": _features}


def _difference(value: Tensor, expected: Tensor) -> float:
    if value.shape != expected.shape:
        return math.inf
    return float((value - expected).norm() / expected.norm())


def _largest_difference(values: Tensor, expected: Tensor) -> float:
    """Relative to the norms, of which the sums of numbers that cancel are no measure."""
    return float(((values - expected).abs() / expected[0]).max())


_MEASURE = {"loss": _difference, "gradient": _largest_difference, "features": _difference}


@functools.lru_cache(maxsize=1)
def weights_of(setting: Setting) -> dict[str, Tensor]:
    """A state dict. Fresh weights have norms at 1, biases at 0 and classes that all look alike, which would hide a mix-up."""
    torch.manual_seed(0)
    model = hubert_fast.hubert_pretrain_model(**setting.architecture.factory_arguments(setting.num_classes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        nn.init.normal_(model.logit_generator.label_embeddings)
    return model.state_dict()


def _batch(setting: Setting, seed: int) -> Batch:
    lengths = [round(seconds * SAMPLE_RATE) for seconds in _SECONDS]
    return make(lengths, setting.architecture, setting.num_classes, seed=seed).to(setting.device)
