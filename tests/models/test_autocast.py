"""Under bf16 autocast the loss and every gradient err no more than torchaudio's own do (design.md, "Numerics")."""

import pytest
import torch

import hubert_fast
from tests.models import configurations
from tests.models.twins import LENGTHS, batch, gradients, recipe_loss, seeded, twins

SEEDS = 6
LOSS_SEEDS = 32


def _squared_errors(grads, truth, scale):
    """Per parameter, against its own norm, or the scale of all of them where it is smaller than rounding shows."""
    return torch.stack(
        [
            ((grads[name].double() - exact).norm() / exact.norm().clamp(min=1e-3 * scale)) ** 2
            for name, exact in truth.items()
        ]
    )


def _losses(name, seed):
    """The true loss with the float64 model that gave it, and the same of both sides in bfloat16."""
    config, data = configurations.ALL[name], batch(lengths=LENGTHS, seed=seed)
    exact, _ = twins(config, torch.float64, seed=seed)
    truth = recipe_loss(seeded(exact, batch(torch.float64, LENGTHS, seed=seed), seed))
    theirs, ours = twins(config, seed=seed)
    with torch.autocast("cpu", torch.bfloat16):
        logits, rest, penalty = seeded(theirs, data, seed)
        their_loss = recipe_loss((logits.float(), rest, penalty))
        our_loss = seeded(hubert_fast.PretrainingObjective(ours), data, seed).loss
    return (truth, exact), {"theirs": (their_loss, theirs), "ours": (our_loss, ours)}


@pytest.mark.parametrize("name", ["base", "xlarge-bias"])
def test_bfloat16_gradient_errors_are_at_most_one_and_a_half_times_torchaudios(name):
    """Root mean squares over seeds; one parameter's error is noisy, so 1.5 holds for all together and 2.5 for each."""
    squares = {"theirs": 0.0, "ours": 0.0}
    for seed in range(SEEDS):
        (true_loss, exact), sides = _losses(name, seed)
        true_loss.backward()
        truth = gradients(exact)
        scale = torch.stack([each.norm() for each in truth.values()]).median()
        for side, (loss, model) in sides.items():
            loss.backward()
            squares[side] = squares[side] + _squared_errors(gradients(model), truth, scale)
    ratios = (squares["ours"] / squares["theirs"]).sqrt()
    worst = {key: round(float(ratio), 2) for key, ratio in zip(truth, ratios) if ratio > 1.5}
    assert (squares["ours"].sum() / squares["theirs"].sum()).sqrt() <= 1.5, worst
    assert ratios.median() <= 1.5 and ratios.max() <= 2.5, worst


@pytest.mark.parametrize("name", ["base", "xlarge-bias"])
def test_bfloat16_loss_errors_are_at_most_one_and_a_half_times_torchaudios(name):
    """Root mean squares over many seeds: a single loss is one number, whose error is as likely tiny as large."""
    squares = {"theirs": 0.0, "ours": 0.0}
    for seed in range(LOSS_SEEDS):
        with torch.no_grad():
            (truth, _), sides = _losses(name, seed)
        for side, (loss, _) in sides.items():
            squares[side] += ((float(loss) - float(truth)) / float(truth)) ** 2
    assert squares["ours"] <= 1.5**2 * squares["theirs"]


@pytest.mark.parametrize("size", [configurations.base, configurations.large])
def test_outputs_have_torchaudios_dtypes_and_gradients_are_float32(size):
    theirs, ours = twins(size())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [seeded(model, batch(lengths=LENGTHS)) for model in (theirs, ours)]
    assert [each.dtype for each in outputs[1]] == [each.dtype for each in outputs[0]]
    recipe_loss(outputs[1]).backward()
    assert all(grad.dtype == torch.float32 for grad in gradients(ours).values())


def test_a_model_in_bfloat16_trains_without_autocast():
    _, ours = twins(configurations.base(), torch.bfloat16)
    result = hubert_fast.PretrainingObjective(ours)(*batch(torch.bfloat16, LENGTHS))
    result.loss.backward()
    assert result.loss.isfinite() and all(grad.dtype == torch.bfloat16 for grad in gradients(ours).values())
