"""`PretrainingObjective` is torchaudio's model followed by its recipe's loss and accuracy."""

import pytest
import torch

import hubert_fast
from tests.models import configurations
from tests.models.twins import (
    LENGTHS,
    Batch,
    assert_gradients_match,
    batch,
    column_zero_loss,
    gradients,
    objective_of,
    recipe_correct,
    recipe_loss,
    relative_error,
    seeded,
    twins,
)

WEIGHTS = {
    "defaults": {},
    "three": dict(masked_weight=0.7, unmasked_weight=0.4, feature_weight=5.0),
    "no-penalty": dict(feature_weight=0.0),
    "large-unmasked": dict(masked_weight=1.0, unmasked_weight=2.0),
}
LOSS_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def _both_sides(name, lengths, dtype, weights):
    theirs, ours = twins(configurations.ALL[name], dtype)
    data = batch(dtype, lengths)
    outputs = seeded(theirs, data)
    loss = recipe_loss(outputs, **weights)
    loss.backward()
    result = seeded(hubert_fast.PretrainingObjective(ours, **weights), data)
    result.loss.backward()
    assert relative_error(result.loss, loss) <= LOSS_TOLERANCE[dtype]
    assert_gradients_match(gradients(ours), gradients(theirs), GRADIENT_TOLERANCE[dtype])
    return result, outputs


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all-valid", "lengths"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["base", "xlarge-bias"])
def test_loss_counts_and_gradients_equal_the_recipes(name, weights, lengths):
    result, (masked, unmasked, penalty) = _both_sides(name, lengths, torch.float64, WEIGHTS[weights])
    _assert_counted(masked, result.masked_count, result.masked_correct, result.masked_loss)
    assert relative_error(result.feature_penalty, penalty) <= 1e-10
    if WEIGHTS[weights].get("unmasked_weight"):
        _assert_counted(unmasked, result.unmasked_count, result.unmasked_correct, result.unmasked_loss)
    else:
        assert result.unmasked_count is result.unmasked_correct is result.unmasked_loss is None


def _assert_counted(logits, count, correct, loss):
    assert (int(count), int(correct)) == (len(logits), recipe_correct(logits))
    assert relative_error(loss, column_zero_loss(logits)) <= 1e-10


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all-valid", "lengths"])
@pytest.mark.parametrize("name", configurations.ALL)
def test_float32_gradients_of_the_masked_frames_alone_equal_the_recipes(name, lengths):
    _both_sides(name, lengths, torch.float32, {})


def test_accuracy_of_a_model_that_has_learnt_is_counted_as_the_recipe_counts():
    """Untrained accuracy is near 0; after a few steps on one batch there is something to count."""
    theirs, ours = twins(configurations.base(num_classes=3, encoder_num_layers=1), torch.float32)
    waveforms, labels, _ = batch()
    data = Batch(waveforms, labels % 3, LENGTHS)
    objective = hubert_fast.PretrainingObjective(ours, unmasked_weight=0.5)
    optimizer = torch.optim.Adam(ours.parameters(), lr=2e-3)
    for _ in range(15):
        optimizer.zero_grad()
        objective(*data).loss.backward()
        optimizer.step()
    theirs.load_state_dict(ours.state_dict())
    masked, unmasked, _ = seeded(theirs, data)
    result = seeded(objective, data)
    assert int(result.masked_correct) == recipe_correct(masked) > 0
    assert int(result.unmasked_correct) == recipe_correct(unmasked) > 0


def test_the_mean_is_over_masked_frames_and_is_known_without_a_wait():
    objective, data = objective_of(configurations.base()), batch(torch.float64, LENGTHS)
    result = seeded(objective, data)
    assert result.mean == result.loss / result.masked_count and result.masked_count > 1
    # A tensor on `meta` has no number that anybody could wait for.
    without = result._replace(loss=torch.zeros((), device="meta"), masked_count=torch.zeros((), device="meta"))
    assert without.mean.is_meta


def test_the_model_is_the_only_submodule_so_a_wrapper_sees_its_parameters_once():
    objective = objective_of(configurations.base())
    assert [name for name, _ in objective.named_children()] == ["model"]
    assert {f"model.{name}" for name in objective.model.state_dict()} == set(objective.state_dict())


@pytest.mark.parametrize("argument", ["masked_weight", "unmasked_weight", "feature_weight"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_negative_weight_is_refused_by_name(argument, value):
    with pytest.raises(ValueError, match=rf"{argument} must be at least 0; got"):
        objective_of(configurations.base(), **{argument: value})
