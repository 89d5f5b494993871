"""`hubert-fast info --batch N --seconds S`: what runs is what a run of that size asked for."""

import pytest
import torch

from hubert_fast import backend
from hubert_fast.cli import main
from hubert_fast.what_runs import NOT_CALLED, what_runs

CPU = torch.device("cpu")


def by_operator(**settings):
    return {each.operator: each for each in what_runs(1, 0.3, device=CPU, **settings)}


def test_inference_on_a_cpu_is_composed_and_training_takes_whole_passes():
    found = by_operator()
    assert (found["masked_attention"].inference, found["masked_attention"].training) == (NOT_CALLED, "reference")
    assert found["residual_layer_norm"].training == "reference" and "whole passes" in found["residual_layer_norm"].why
    assert found["cosine_cross_entropy"].training == "torch"
    assert (
        found["conv_frontend"].inference == "reference"
    )  # short audio; in training another backend's gradient is faster
    assert found["conv_frontend"].training in ("cpu", "torch")


def test_what_was_asked_for_by_name_runs():
    with backend.using("torch"):
        found = by_operator()
    for name in ("residual_layer_norm", "masked_attention", "conv_frontend", "mask_fill"):
        assert found[name].training == "torch" and "asked for by name" in found[name].why


def test_the_command_line_refuses_less_than_a_frame(capsys):
    assert main(["info", "--seconds", "0.01"]) == 2
    assert "seconds must be at least one frame" in capsys.readouterr().err
    for seconds in ("inf", "-1", "nan"):
        assert main(["info", "--seconds", seconds]) == 2
        assert "seconds must be positive and finite" in capsys.readouterr().err
    assert main(["info", "--batch", "2"]) == 2 and "go with --seconds" in capsys.readouterr().err
    with pytest.raises(ValueError, match="batch must be at least 1; got 0"):
        what_runs(0, 1.0, device=CPU)
