"""The same model twice, torchaudio's and this project's, with the same batch, loss and error measure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hubert_fast
from tests import torchaudio_peer
from tests.models.configurations import NUM_CLASSES

SAMPLES = 12400  # 38 frames
LENGTHS = torch.tensor([12400, 7000, 9876])


class Batch(NamedTuple):
    waveforms: Tensor  # [batch, samples]
    labels: Tensor  # [batch, frames]
    lengths: Optional[Tensor]  # [batch], samples


def batch(dtype: torch.dtype = torch.float32, lengths: Optional[Tensor] = None, seed: int = 0) -> Batch:
    """Three rows of noise with random labels."""
    generator = torch.Generator().manual_seed(seed)
    waveforms = torch.randn(3, SAMPLES, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, NUM_CLASSES, (3, num_frames(SAMPLES)), generator=generator)
    return Batch(waveforms, labels, lengths)


_layer_norm = F.layer_norm


def float32_layer_norm(
    x: Tensor,
    shape: Any,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
) -> Tensor:
    """In place of `F.layer_norm`: as CUDA's autocast has it, which a CPU's has not."""
    with torch.autocast("cpu", enabled=False):
        return _layer_norm(x.float(), shape, weight, bias, eps)


def num_frames(samples: int) -> int:
    """Frames of the standard front end."""
    return max((samples - 400) // 320 + 1, 0)


def twins(config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """torchaudio's model and ours, with the same weights.

    Norms and biases start at 1 and 0, where many gradients vanish or coincide; here they are moved away from that.
    """
    torch.manual_seed(seed)
    theirs = torchaudio_peer.models.hubert_pretrain_model(**config)
    ours = hubert_fast.hubert_pretrain_model(**config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype), ours.to(dtype)


def objective_of(config: dict[str, Any], **weights: float) -> hubert_fast.PretrainingObjective:
    """Our objective over our model of `twins`, in float64."""
    return hubert_fast.PretrainingObjective(twins(config, torch.float64)[1], **weights)


def seeded(model: nn.Module, data: Batch, seed: int = 0, **arguments: Any) -> Any:
    """What ``model`` gives for ``data`` after that seed; torchaudio's in float64 throughout where ``data`` is."""
    theirs = isinstance(model, torchaudio_peer.models.HuBERTPretrainModel)
    with torchaudio_peer.precise(data.waveforms.dtype if theirs else torch.float32):
        torch.manual_seed(seed)
        return model(*data, **arguments)


def valid_frames(lengths: Tensor) -> Tensor:
    """Which of the `num_frames(SAMPLES)` frames of rows of ``lengths`` samples are no padding."""
    frames = torch.tensor([num_frames(samples) for samples in lengths.tolist()])
    return torch.arange(num_frames(SAMPLES)) < frames[:, None]


def recipe_loss(
    outputs: tuple[Optional[Tensor], Optional[Tensor], Tensor],
    *,
    masked_weight: float = 1.0,
    unmasked_weight: float = 0.0,
    feature_weight: float = 10.0,
) -> Tensor:
    """The loss of torchaudio's HuBERT recipe, with the penalty times the masked frames as in its later versions."""
    masked, unmasked, penalty = outputs
    loss = masked_weight * column_zero_loss(masked) + feature_weight * penalty * len(masked)
    return loss + unmasked_weight * column_zero_loss(unmasked) if unmasked_weight else loss


def column_zero_loss(logits: Tensor) -> Tensor:
    """Summed cross-entropy against column 0."""
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long), reduction="sum")


def recipe_correct(logits: Tensor) -> int:
    """Correct frames as torchaudio's recipe counts them: column 0 is the largest, and not the smallest as well."""
    return int(((logits.argmax(1) == 0) & (logits.argmin(1) != 0)).sum())


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|; infinities must stand in the same places, and are left out."""
    assert ours.shape == theirs.shape and torch.equal(ours.isinf(), theirs.isinf())
    ours, theirs = (each.detach().double().masked_fill(each.isinf(), 0.0) for each in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def step(
    objective: nn.Module, data: Batch, run: nn.Module | None = None, **arguments: Any
) -> tuple[Any, dict[str, Tensor]]:
    """The result of a training step of ``objective``, or of ``run``, another way through it, and all gradients."""
    objective.zero_grad()
    result = seeded(objective if run is None else run, data, **arguments)
    result.loss.backward()
    return result, {name: grad.clone() for name, grad in gradients(objective).items() if grad is not None}


def assert_steps_match(ours: tuple, theirs: tuple, tolerance: float) -> None:
    """Every output and every gradient of a `step` within ``tolerance``."""
    assert_outputs_match(ours[0], theirs[0], tolerance)
    assert_gradients_match(ours[1], theirs[1], tolerance)


def assert_outputs_match(ours: Iterable[Tensor | None], theirs: Iterable[Tensor | None], tolerance: float) -> None:
    """Every output within ``tolerance`` of its twin, of its dtype, and None where that is."""
    for given, wanted in zip(ours, theirs, strict=True):
        assert given is wanted is None or given.dtype == wanted.dtype
        assert given is None or relative_error(given, wanted) <= tolerance


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients_match(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Every gradient within ``tolerance`` of torchaudio's, relative to its norm.

    Some gradients are exactly 0 in truth, and what either side computes is rounding: the bias of the keys adds one
    number to all scores of a query, which softmax ignores; under group norm the bias of the first convolution is a
    shift that the norm takes out. Those are held against the scale of the other gradients.
    """
    assert ours.keys() == theirs.keys()
    scale = torch.stack([each.double().norm() for each in theirs.values()]).median()
    errors = {}
    for name, theirs_grad in theirs.items():
        if _is_zero_in_truth(name, ours):
            errors[name] = float(ours[name].double().norm() / scale)
        else:
            errors[name] = relative_error(ours[name], theirs_grad)
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, wrong


def _is_zero_in_truth(name: str, names: dict[str, Tensor]) -> bool:
    group_norm = not any("conv_layers.1.layer_norm" in each for each in names)
    return name.endswith("k_proj.bias") or (group_norm and name.endswith("conv_layers.0.conv.bias"))
