import pytest
import torch

from hubert_fast.pretrain.presets import PRESETS


@pytest.mark.parametrize("name", ["large", "xlarge"])
def test_only_the_big_model_takes_normalized_audio(name):
    config = PRESETS[name]
    assert [config.data_of(each).normalize_audio for each in config.iterations()] == [False, False, True]
    assert config.first == PRESETS["base"].first and config.second == PRESETS["base"].second


@pytest.mark.parametrize(
    ("name", "layers", "millions"), [("tiny", 4, 2.3), ("base", 12, 94.7), ("large", 24, 316.6), ("xlarge", 48, 963.7)]
)
def test_models_have_the_size_they_are_named_for(name, layers, millions):
    model = PRESETS[name].iterations()[-1].model
    assert model.encoder_num_layers == layers
    with torch.device("meta"):
        parameters = sum(each.numel() for each in model.build(500).parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.03)
