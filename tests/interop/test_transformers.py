"""A trained model becomes transformers' HubertModel and comes back: all entries, the same bits, the same outputs."""

import pytest
import torch

import hubert_fast
from benchmarks.architecture import ARCHITECTURES
from benchmarks.peers.transformers import hubert_config
from benchmarks.torchaudio_peer import import_models, installed
from hubert_fast.interop.transformers import encoder_arguments, from_transformers, to_transformers

TINY = ARCHITECTURES["tiny"]
ARCHITECTURE_OF = {
    "post-norm": TINY,
    "pre-norm": TINY.changed(norm="layer_norm", pre_norm=True),
    "one convolution, eleven layers": TINY.changed(convolutions=((32, 10, 5),), layers=11),
}


def _model(architecture=TINY):
    torch.manual_seed(0)
    model = hubert_fast.hubert_pretrain_model(**architecture.factory_arguments(20))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def _hubert(architecture):
    if installed():
        import_models()  # transformers imports torchaudio, whose compiled library does not load beside a CPU build of torch
    transformers = pytest.importorskip("transformers")
    return transformers.HubertModel(hubert_config(architecture)).eval()


def _assert_same(given, expected):
    assert set(given) == set(expected)
    assert all(given[name] is expected[name] or torch.equal(given[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ARCHITECTURE_OF)
def test_hubert_model_takes_the_weights_strictly_and_computes_the_same(name):
    architecture = ARCHITECTURE_OF[name]
    model, hubert = _model(architecture), _hubert(architecture)
    hubert.load_state_dict(to_transformers(model.state_dict()), strict=True)
    waveforms = torch.randn(2, 4000)
    with torch.no_grad():
        expected = model.wav2vec2(waveforms)[0]
        given = hubert(waveforms).last_hidden_state
    assert (given - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURE_OF)
def test_there_and_back_gives_the_same_bits(name):
    model, hubert = _model(ARCHITECTURE_OF[name]), _hubert(ARCHITECTURE_OF[name])
    hubert.load_state_dict(to_transformers(model.state_dict()))
    theirs = hubert.state_dict()
    head = {key: each for key, each in model.state_dict().items() if key.startswith("logit_generator.")}
    _assert_same(from_transformers(theirs, head=head), model.state_dict())
    _assert_same(from_transformers(theirs, head=model.state_dict()), model.state_dict())
    _assert_same(from_transformers(theirs), model.wav2vec2.state_dict())
    _assert_same(to_transformers(from_transformers(theirs, head=head)), theirs)


def test_convolutions_with_bias_and_an_encoder_alone_convert():
    arguments = TINY.factory_arguments(20) | {"extractor_conv_bias": True}
    encoder = hubert_fast.hubert_pretrain_model(**arguments).wav2vec2.state_dict()
    theirs = to_transformers(encoder)
    assert "masked_spec_embed" not in theirs and "feature_extractor.conv_layers.6.conv.bias" in theirs
    _assert_same(from_transformers(theirs), encoder)


def test_the_names_of_published_files_of_weights_are_understood():
    state_dict = _model().state_dict()
    theirs = to_transformers(state_dict)
    conv = "encoder.pos_conv_embed.conv."
    for index, old in enumerate(("weight_g", "weight_v")):
        theirs[conv + old] = theirs.pop(f"{conv}parametrizations.weight.original{index}")
    _assert_same(from_transformers(theirs, head=state_dict), state_dict)


def test_strict_loading_names_what_is_missing_and_what_has_no_counterpart():
    model, hubert = _model(), _hubert(TINY)
    ours, theirs = model.state_dict(), hubert.state_dict()
    for missing, named in (
        ("wav2vec2.encoder.transformer.layers.0.attention.k_proj.bias", "encoder.layers.0.attention.k_proj.bias"),
        ("mask_generator.mask_embedding", "masked_spec_embed"),
    ):
        incomplete = to_transformers({name: each for name, each in ours.items() if name != missing})
        with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{named}"'):
            hubert.load_state_dict(incomplete)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "aux\.weight"'):
        hubert.load_state_dict(to_transformers(ours | {"wav2vec2.aux.weight": torch.zeros(1)}))
    without_mask = {name: each for name, each in theirs.items() if name != "masked_spec_embed"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "mask_generator\.mask_embedding"'):
        model.load_state_dict(from_transformers(without_mask, head=ours))
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "wav2vec2\.hubert\.'):
        model.load_state_dict(from_transformers({f"hubert.{name}": each for name, each in theirs.items()}, head=ours))


@pytest.mark.parametrize("name", ARCHITECTURE_OF)
def test_the_arguments_of_a_config_build_a_model_that_computes_the_same(name):
    """Heads, strides and the order of norms are in no weight."""
    architecture = ARCHITECTURE_OF[name].changed(heads=4)
    hubert = _hubert(architecture)
    arguments = architecture.factory_arguments(20)
    theirs = encoder_arguments(hubert.config)
    assert set(theirs) < set(arguments)
    wrong = {"encoder_num_heads": 1, "encoder_layer_norm_first": not architecture.pre_norm}
    model = hubert_fast.hubert_pretrain_model(**{**arguments, **wrong, **theirs}).eval()
    model.wav2vec2.load_state_dict(from_transformers(hubert.state_dict(), config=hubert.config))
    waveforms = torch.randn(2, 4000)
    with torch.no_grad():
        expected, given = hubert(waveforms).last_hidden_state, model.wav2vec2(waveforms)[0]
    assert (given - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("hidden_act", "relu"),
        ("feat_extract_activation", "gelu_new"),
        ("layer_norm_eps", 1e-6),
        ("conv_pos_batch_norm", True),
        ("feat_proj_layer_norm", False),
    ],
)
def test_a_config_of_another_function_is_refused_by_name(setting, value):
    config = _hubert(TINY).config
    encoder_arguments(config)
    setattr(config, setting, value)
    for call in (encoder_arguments, lambda config: from_transformers({}, config=config)):
        with pytest.raises(ValueError, match=f"config.{setting}={value!r}: models here compute"):
            call(config)
