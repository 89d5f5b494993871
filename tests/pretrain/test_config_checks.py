import dataclasses
from typing import Any

import pytest

from hubert_fast.pretrain.config import PretrainConfig
from hubert_fast.pretrain.config_checks import check_config
from hubert_fast.pretrain.presets import PRESETS
from tests.pretrain.small_run import small_config


def changed(config: Any, name: str, value: Any) -> Any:
    """``config`` with the setting of the dotted ``name`` replaced."""
    first, _, rest = name.partition(".")
    return dataclasses.replace(config, **{first: changed(getattr(config, first), rest, value) if rest else value})


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_pass(name):
    check_config(PRESETS[name])
    check_config(changed(PRESETS[name], "second.units.layer", 0))


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("seed", -1, "0 or more"),
        ("data.max_seconds", 0.0, "0.025"),
        ("data.batch_seconds", 0.5, "data.max_seconds=1.0 or more"),
        ("data.batch_seconds", float("nan"), "data.max_seconds=1.0 or more"),
        ("data.min_seconds", -1.0, r"in \[0, 60\)"),
        ("data.channel", 0, "mix or the number of a channel, 1 or more"),
        ("data.valid_fraction", 1.0, r"in \[0, 1\)"),
        ("data.workers", -1, "0 or more"),
        ("logging.save_every", 0, "1 or more"),
        ("first.optimizer.steps", -1, "0 or more"),
        ("first.optimizer.accumulate", 0, "1 or more"),
        ("data.micro_batch_seconds", 0.5, "data.max_seconds=1.0 or more"),
        ("first.optimizer.warmup_fraction", 1.0, r"in \[0, 1\)"),
        ("first.optimizer.learning_rate", 0.0, "more than 0"),
        ("first.optimizer.betas", (0.9, 1.0), r"each in \[0, 1\)"),
        ("first.objective.feature_weight", -1.0, "0 or more"),
        ("first.units.clusters", 1, "2 or more"),
        ("first.units.fit_frames", 3, "clusters=4 or more"),
        ("first.units.layer", 1, "no model before it"),
        ("second.units.layer", 3, r"0 \(MFCC\) or a layer of the model before it, in \[1, 2\]"),
        ("second.units.layer", -1, r"in \[1, 2\]"),
        ("second.batch_seconds", 0.5, "data.max_seconds=1.0 or more"),
        ("second.model.encoder_embed_dim", 33, "a positive multiple of encoder_num_heads=2"),
        ("second.model.encoder_layer_drop", 1.5, r"in \[0, 1\]"),
        ("evaluation.clusters", 0, "2 or more"),
    ],
)
def test_what_is_out_of_range_is_named_with_its_value_and_what_is_accepted(name, value, accepted):
    shown = repr(value).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"^{name}={shown} must be .*{accepted}"):
        check_config(changed(small_config(), name, value))


def test_micro_batches_are_counted_or_given_in_seconds_but_not_both():
    config = changed(small_config(), "data.micro_batch_seconds", 2.0)
    check_config(config)
    check_config(changed(small_config(), "second.optimizer.accumulate", 2))
    with pytest.raises(ValueError, match="second.optimizer.accumulate=2 must be none .*micro_batch_seconds=2.0 says"):
        check_config(changed(config, "second.optimizer.accumulate", 2))


def test_the_layer_is_of_the_last_iteration_that_has_steps():
    without_first = changed(small_config(), "first.optimizer.steps", 0)
    with pytest.raises(ValueError, match="second.units.layer=1 .*no model before it"):
        check_config(without_first)
    check_config(changed(without_first, "second.units.layer", 0))


def test_a_run_without_iterations_is_refused():
    config = PretrainConfig()
    for name in ("first", "second", "third"):
        config = changed(config, f"{name}.optimizer.steps", 0)
    with pytest.raises(ValueError, match="optimizer.steps.* must be 1 or more in one iteration"):
        check_config(config)
