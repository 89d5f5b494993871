"""transformers' models, accelerated where they stand, give their own numbers; in the padding 0."""

import copy
import io
import pickle

import numpy
import pytest
import torch
from torch import nn

import hubert_fast
from benchmarks.torchaudio_peer import import_models, installed
from hubert_fast.models.encoder_layer import EncoderLayer
from tests.models.twins import assert_gradients_match, relative_error

if installed():
    import_models()  # transformers imports torchaudio, whose compiled library does not load beside a CPU build of torch
transformers = pytest.importorskip("transformers")

SAMPLES = 4000  # 12 frames
FRAMES = torch.tensor([12, 9, 6])
AUDIO = torch.randn(3, SAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
RAGGED = (torch.arange(SAMPLES) < torch.tensor([[4000], [3000], [2100]])).long()
VALID = torch.arange(12) < FRAMES[:, None]
LABELS = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, -100]])

POST_NORM = {}
PRE_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


def _config(family="Hubert", **settings):
    size = dict(
        vocab_size=20, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, conv_dim=[16] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, classifier_proj_size=32, ctc_loss_reduction="mean",
        attn_implementation="sdpa",
    )  # fmt: skip
    dropouts = ("hidden", "activation", "attention", "feat_proj", "final")
    none = {f"{name}_dropout": 0.0 for name in dropouts} | {"layerdrop": 0.0, "mask_time_prob": 0.0}
    return getattr(transformers, f"{family}Config")(**size | none | settings)


def _model(kind="HubertForCTC", dtype=torch.float64, **settings):
    """With norms and biases away from 1 and 0, where many gradients vanish."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(_config("Hubert" if kind.startswith("Hubert") else "Wav2Vec2", **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).train()


def _step(model, mask=RAGGED, **arguments):
    """The outputs of a step of CTC and all gradients."""
    model.zero_grad()
    torch.manual_seed(3)
    numpy.random.seed(3)
    outputs = model(AUDIO.to(model.dtype), attention_mask=mask, labels=LABELS, **arguments)
    outputs.loss.backward()
    named = model.named_parameters()
    return outputs, {name: each.grad.clone() for name, each in named if each.grad is not None}


def _assert_same(given, wanted, mask=RAGGED, tolerance=1e-9):
    assert type(given[0]) is type(wanted[0])
    assert relative_error(given[0].loss, wanted[0].loss) <= max(tolerance, 1e-6)  # CTC is computed in float32
    valid = torch.ones_like(VALID) if mask is None else VALID
    assert given[0].logits.dtype == wanted[0].logits.dtype
    assert relative_error(given[0].logits[valid], wanted[0].logits[valid]) <= tolerance
    assert_gradients_match(given[1], wanted[1], tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mask", [RAGGED, None], ids=["ragged", "whole"])
@pytest.mark.parametrize("settings", [POST_NORM, PRE_NORM, {"attn_implementation": "eager"}])
@pytest.mark.parametrize("kind", ["HubertForCTC", "Wav2Vec2ForCTC"])
def test_outputs_and_gradients_are_those_of_before(kind, settings, mask, dtype, rows):
    model = _model(kind, dtype, **settings)
    wanted = _step(model, mask)
    assert not rows
    result = hubert_fast.accelerate(model)
    given = _step(model, mask)
    assert rows == [36 if mask is None else 27] * 2
    _assert_same(given, wanted, mask, 1e-9 if dtype == torch.float64 else 3e-5)
    base = kind.partition("For")[0].lower()
    assert len(result.fused) == 10 and not result.left and f"{base}.encoder.layers.1.attention" in result.fused


def test_the_output_is_0_in_the_padding_and_of_their_type():
    model = _model("HubertModel").eval()
    hubert_fast.accelerate(model)
    with torch.no_grad():
        output = model(AUDIO, attention_mask=RAGGED)
    assert type(output) is transformers.modeling_outputs.BaseModelOutput
    assert torch.equal(output.last_hidden_state.abs().sum(2) > 0, VALID)
    assert type(model(AUDIO, return_dict=False)) is tuple


def test_it_is_what_it_was_to_whoever_holds_it():
    from transformers.models.hubert.modeling_hubert import HubertEncoderLayer

    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    parameters, names = list(model.parameters()), list(model.state_dict())
    layer, kind = model.hubert.encoder.layers[0], type(model.hubert)
    hubert_fast.accelerate(model)
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    assert names == list(model.state_dict()) and type(model.hubert) is kind
    assert isinstance(layer, HubertEncoderLayer) and isinstance(layer, EncoderLayer)
    assert type(layer).__name__ == "HubertEncoderLayer" in model._no_split_modules
    _step(model)
    before = parameters[-1].detach().clone()
    optimizer.step()
    assert not torch.equal(before, parameters[-1])


@pytest.mark.parametrize("settings", [POST_NORM, PRE_NORM])
def test_unaccelerate_leaves_no_trace(settings):
    model = _model(**settings)
    before = {name: (type(each), set(vars(each))) for name, each in model.named_modules()}
    wanted = _step(model)
    hubert_fast.accelerate(model)
    hubert_fast.accelerate(model)
    hubert_fast.unaccelerate(model)
    assert {name: (type(each), set(vars(each))) for name, each in model.named_modules()} == before
    given = _step(model)
    assert all(torch.equal(given[1][name], each) for name, each in wanted[1].items())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", [POST_NORM, PRE_NORM])
def test_hidden_states_are_theirs_and_a_plain_call_is_fused_again(settings, attention, rows):
    model = _model(**settings, attn_implementation=attention)
    wanted, plain = _step(model, output_hidden_states=True), _step(model)
    hubert_fast.accelerate(model)
    for _ in range(2):
        given = _step(model, output_hidden_states=True)
        _assert_same(given, wanted)
        assert type(given[0].hidden_states) is tuple and len(given[0].hidden_states) == 3
        for ours, theirs in zip(given[0].hidden_states, wanted[0].hidden_states, strict=True):
            assert relative_error(ours[VALID], theirs[VALID]) <= 1e-9
        rows.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Module, "__call__", _noting(called := [], nn.Module.__call__))
            given = _step(model)
        _assert_same(given, plain)
        assert rows == [27, 27] and not {"HubertEncoderLayer", "HubertAttention", "HubertFeedForward"} & {*called}
    assert not hubert_fast.accelerate(model).left


def _noting(called, call):
    def noting(module, *arguments, **named):
        called.append(type(module).__name__.removesuffix("StableLayerNorm"))
        return call(module, *arguments, **named)

    return noting


def test_attention_weights_are_theirs():
    model = _model(attn_implementation="eager")
    wanted = _step(model, output_attentions=True)
    hubert_fast.accelerate(model)
    given = _step(model, output_attentions=True)
    _assert_same(given, wanted)
    assert len(given[0].attentions) == 2
    assert all(torch.allclose(*each) for each in zip(given[0].attentions, wanted[0].attentions, strict=True))
    model.config.output_attentions = True
    assert len(_step(model)[0].attentions) == 2


@pytest.mark.parametrize("kind", ["HubertForCTC", "Wav2Vec2ForCTC"])
def test_spec_augment_draws_and_computes_the_same(kind):
    model = _model(kind, mask_time_prob=0.5, mask_time_length=2, mask_feature_prob=0.3, mask_feature_length=4)
    for mask in (RAGGED, None):
        hubert_fast.unaccelerate(model)
        wanted = _step(model, mask)
        hubert_fast.accelerate(model)
        _assert_same(_step(model, mask), wanted, mask)


def test_spec_augment_may_write_into_a_projection_with_dropout():
    model = _model(
        mask_time_prob=0.5, mask_time_length=2, feat_proj_dropout=0.1, hidden_dropout=0.1, attention_dropout=0.1
    )
    hubert_fast.accelerate(model)
    assert all(each.isfinite().all() for each in _step(model)[1].values())


@pytest.mark.parametrize("training", [True, False])
def test_layer_drop_drops_the_same_layers_and_leaves_the_same_random_numbers(training):
    model = _model(num_hidden_layers=6, layerdrop=0.5).train(training)
    wanted = _step(model), torch.rand(1)
    hubert_fast.accelerate(model)
    given = _step(model), torch.rand(1)
    _assert_same(given[0], wanted[0])
    assert torch.equal(given[1], wanted[1])
    names = {name.partition("encoder.layers.")[2][:1] for name in given[0][1]} - {""}
    assert (len(names) < 6) == training
    model.config.layerdrop = 1.0  # which is asked for again at every call
    assert any("encoder.layers" in name for name in _step(model)[1]) != training


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("settings", [POST_NORM, PRE_NORM])
def test_checkpoints_give_the_same_gradients_on_rows(settings, reentrant, rows):
    model = _model(**settings)
    wanted = _step(model)
    hubert_fast.accelerate(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _assert_same(_step(model), wanted)
    assert rows == [27] * 4  # each layer twice
    rows.clear()
    _step(model.eval())
    assert rows == [27] * 2


def test_checkpoints_give_the_gradients_of_the_same_dropout_masks():
    model = _model(hidden_dropout=0.3, attention_dropout=0.3, activation_dropout=0.3, feat_proj_dropout=0.3)
    hubert_fast.accelerate(model)
    wanted = _step(model)
    model.gradient_checkpointing_enable()
    _assert_same(_step(model), wanted)


def test_a_frozen_feature_encoder_gets_no_gradient_and_the_rest_the_same():
    model = _model()
    model.freeze_feature_encoder()
    wanted = _step(model)
    hubert_fast.accelerate(model)
    given = _step(model)
    _assert_same(given, wanted)
    assert not any("feature_extractor" in name for name in given[1])


@pytest.mark.parametrize("first", ["accelerate", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_the_same_whichever_comes_first(first, checkpointing, rows):
    peft = pytest.importorskip("peft")

    def lora(model):
        torch.manual_seed(1)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, settings)

    plain = lora(_model())
    if checkpointing:
        plain.gradient_checkpointing_enable()
    wanted = _step(plain)
    model = _model()
    if first == "lora":
        model = lora(model)
        assert {name.rpartition(".")[2] for name in hubert_fast.accelerate(model).left} == {"q_proj", "v_proj"}
    else:
        hubert_fast.accelerate(model)
        model = lora(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    _assert_same(_step(model), wanted)
    assert rows == [27] * (4 if checkpointing else 2) and len(wanted[1]) == 8


def _places(model):
    base = model.hubert
    layer, encoder = base.encoder.layers[0], base.encoder
    return {
        "feature_extractor": base.feature_extractor,
        "conv layer": base.feature_extractor.conv_layers[2],
        "conv": base.feature_extractor.conv_layers[2].conv,
        "conv activation": base.feature_extractor.conv_layers[2].activation,
        "feature_projection": base.feature_projection,
        "encoder": base.encoder,
        "pos_conv_embed": encoder.pos_conv_embed,
        "pos conv": encoder.pos_conv_embed.conv,
        "pos padding": encoder.pos_conv_embed.padding,
        "layer": layer,
        "attention": layer.attention,
        "q_proj": layer.attention.q_proj,
        "layer_norm": layer.layer_norm,
        "feed_forward": layer.feed_forward,
        "intermediate_act_fn": layer.feed_forward.intermediate_act_fn,
        "output_dropout": layer.feed_forward.output_dropout,
        "encoder dropout": encoder.dropout,
    }


def _double(module, inputs, output):
    if isinstance(output, tuple):
        return 2.0 * output[0], *output[1:]
    if isinstance(output, torch.Tensor):
        return 2.0 * output
    return type(output)(last_hidden_state=2.0 * output.last_hidden_state)


@pytest.mark.parametrize(
    "settings", [POST_NORM, PRE_NORM, {"attn_implementation": "eager"}], ids=["post", "pre", "eager"]
)
@pytest.mark.parametrize("place", list(_places(_model())))
def test_a_hook_sees_and_changes_what_it_did(place, settings):
    seen = []

    def hook(module, inputs, output):
        seen.append([each for each in (*inputs, *(output if isinstance(output, tuple) else [output]))])
        return _double(module, inputs, output)

    model = _model(**settings)
    _places(model)[place].register_forward_hook(hook)
    wanted = _step(model)
    result = hubert_fast.accelerate(model)
    given = _step(model)
    _assert_same(given, wanted)
    assert list(result.left.values()) == ["it has hooks"]
    theirs, ours = seen
    for given, wanted in zip(ours, theirs, strict=True):
        assert type(given) is type(wanted)
        if isinstance(given, torch.Tensor) and "dropout" not in place and place not in ("q_proj", "layer_norm"):
            if place != "intermediate_act_fn":
                assert given.shape == wanted.shape and given.dtype == wanted.dtype


@pytest.mark.parametrize("name", ["attention", "feed_forward"])
def test_backward_hooks_are_called(name):
    model, seen = _model(), []
    hubert_fast.accelerate(model)
    getattr(model.hubert.encoder.layers[1], name).register_full_backward_hook(lambda *call: seen.append(name))
    _step(model)
    assert seen == [name]


class _Halved(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        output = self.inner(hidden_states, attention_mask=attention_mask, **kwargs)
        return (0.5 * output[0], *output[1:]) if isinstance(output, tuple) else 0.5 * output


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", ["layer", "attention"])
def test_a_module_in_anothers_place_is_called_as_transformers_calls_it(place, when):
    def replace(model):
        parent, name = (
            (model.hubert.encoder.layers, "1") if place == "layer" else (model.hubert.encoder.layers[1], place)
        )
        setattr(parent, name, _Halved(getattr(parent, name)))
        return model

    wanted = _step(replace(_model()))
    if when == "before":
        model = replace(_model())
        assert any("_Halved is no module that is fused" in each for each in hubert_fast.accelerate(model).left.values())
    else:
        hubert_fast.accelerate(model := _model())
        assert "hubert.encoder.layers.0" in hubert_fast.accelerate(replace(model)).fused
    _assert_same(_step(model), wanted)
    hubert_fast.unaccelerate(model)
    _assert_same(_step(model), wanted)


@pytest.mark.parametrize("settings", [POST_NORM, PRE_NORM], ids=["post", "pre"])
@pytest.mark.parametrize(
    "place", ["conv", "norm", "projection", "projection norm", "query", "dense", "layer norm", "block"]
)
def test_a_part_in_a_wrapper_is_called(place, settings):
    def replace(model):
        base = model.hubert
        blocks, layer = base.feature_extractor.conv_layers, base.encoder.layers[0]
        parent, name = {
            "conv": (blocks[3], "conv"),
            "norm": (blocks[0], "layer_norm"),
            "block": (blocks, "2"),
            "projection": (base.feature_projection, "projection"),
            "projection norm": (base.feature_projection, "layer_norm"),
            "query": (layer.attention, "q_proj"),
            "dense": (layer.feed_forward, "output_dense"),
            "layer norm": (layer, "final_layer_norm"),
        }[place]
        setattr(parent, name, nn.Sequential(nn.Tanh(), getattr(parent, name)))
        return model

    wanted = _step(replace(_model(**settings)))
    hubert_fast.accelerate(model := _model(**settings))
    replace(model)
    _assert_same(_step(model), wanted)
    assert ["torch.nn.modules.container.Sequential is no module that is fused"] == [
        *hubert_fast.accelerate(model).left.values()
    ]


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"hidden_act": "relu"}, "feed_forward.intermediate_act_fn"),
        ({"hidden_act": "gelu_new"}, "feed_forward.intermediate_act_fn"),
        ({"feat_extract_activation": "relu"}, "feature_extractor"),
        ({"conv_pos_batch_norm": True}, "pos_conv_embed"),
        ({"feat_proj_layer_norm": False}, "feature_projection"),
        ({**PRE_NORM, "adapter_attn_dim": 8}, "layers.1"),
        ({"layer_norm_eps": 1e-3}, None),
    ],
)
@pytest.mark.parametrize("mask", [RAGGED, None], ids=["ragged", "whole"])
def test_what_is_another_formula_stays_and_is_listed(settings, left, mask):
    model = _model(**settings)
    if "conv_pos_batch_norm" in settings:
        model.hubert.encoder.pos_conv_embed.batch_norm.momentum = 0.0
    wanted = _step(model, mask)
    result = hubert_fast.accelerate(model)
    _assert_same(_step(model, mask), wanted, mask)
    assert any(name.endswith(left) for name in result.left) if left else not result.left


def test_a_norm_of_the_feature_encoder_with_another_eps_stays():
    model = _model(**PRE_NORM)
    for block in model.hubert.feature_extractor.conv_layers:
        block.layer_norm.eps = 1e-2
    wanted = _step(model)
    assert "eps of 0.01" in hubert_fast.accelerate(model).left["hubert.feature_extractor"]
    _assert_same(_step(model), wanted)


def test_an_activation_put_in_later_is_called():
    model = _model()
    hubert_fast.accelerate(model)
    for module in (*model.hubert.encoder.layers, model.hubert.encoder, model.hubert.feature_extractor):
        for each in module.modules():
            for name in ("activation", "intermediate_act_fn"):
                if name in each._modules:
                    setattr(each, name, nn.SiLU())
    given = _step(model)
    hubert_fast.unaccelerate(model)
    _assert_same(given, _step(model))


def test_an_adapter_put_in_later_is_called():
    from transformers.models.hubert.modeling_hubert import HubertAttnAdapterLayer

    pair = _model(**PRE_NORM), _model(**PRE_NORM)
    hubert_fast.accelerate(pair[0])
    for model in pair:
        torch.manual_seed(1)
        config = _config(**PRE_NORM, adapter_attn_dim=8)
        model.hubert.encoder.layers[1].adapter_layer = HubertAttnAdapterLayer(config).double()
    _assert_same(*map(_step, pair))


def test_a_convolutional_adapter_sees_the_padding_that_it_saw():
    mask = torch.ones(AUDIO.shape, dtype=torch.long)
    mask[1, -900:] = 0
    model = _model("Wav2Vec2Model", add_adapter=True).eval()
    wanted = model(AUDIO, attention_mask=mask).last_hidden_state
    hubert_fast.accelerate(model)
    assert relative_error(model(AUDIO, attention_mask=mask).last_hidden_state, wanted) <= 1e-9


def test_hidden_states_in_inference_mode_are_theirs():
    model = _model().eval()
    wanted = model(AUDIO, attention_mask=RAGGED, output_hidden_states=True).hidden_states
    hubert_fast.accelerate(model)
    with torch.inference_mode():
        given = model(AUDIO, attention_mask=RAGGED, output_hidden_states=True).hidden_states
    for mine, theirs in zip(given, wanted, strict=True):
        assert relative_error(mine[VALID], theirs[VALID]) <= 1e-9


def test_another_attention_function_is_called():
    from transformers.modeling_utils import AttentionInterface

    def negated(module, query, key, value, attention_mask, **settings):
        return -value.transpose(1, 2), None

    AttentionInterface.register("negated", negated)
    transformers.AttentionMaskInterface.register("negated", lambda **settings: None)
    try:
        model = _model()
        plain = _step(model)
        hubert_fast.accelerate(model)
        for config in {id(each.config): each.config for each in model.modules() if hasattr(each, "config")}.values():
            config._attn_implementation = "negated"
        given = _step(model)
        hubert_fast.unaccelerate(model)
        _assert_same(given, _step(model))
        assert relative_error(given[0].logits, plain[0].logits) > 1e-3
    finally:
        del AttentionInterface._global_mapping["negated"]


@pytest.mark.parametrize("hidden", ["head", "hole"])
def test_a_mask_that_hides_more_than_the_end_is_theirs(hidden):
    model = _model("HubertModel").eval()
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, :3] = False
    if hidden == "hole":
        mask[1, 0] = True
    x = torch.randn(3, 12, 64, dtype=torch.float64)
    with torch.no_grad():
        wanted = model.encoder(x.clone(), attention_mask=mask).last_hidden_state
        hubert_fast.accelerate(model)
        given = model.encoder(x.clone(), attention_mask=mask).last_hidden_state
    assert relative_error(given[mask], wanted[mask]) <= 1e-9


def test_layers_and_attention_called_alone_take_their_arguments():
    model = _model("HubertModel").eval()
    layer, x = model.encoder.layers[0], torch.randn(2, 7, 64, dtype=torch.float64)
    mask = torch.rand(2, 1, 7, 7) > 0.3
    calls = [
        lambda: layer(x),
        lambda: layer(x, attention_mask=mask),
        lambda: layer(hidden_states=x, attention_mask=mask),
        lambda: layer.attention(x)[0],
        lambda: layer.attention(hidden_states=x, attention_mask=mask)[0],
        lambda: layer.attention(x, key_value_states=x.flip(1))[0],
        lambda: layer.feed_forward(x),
        lambda: model.encoder(x)[0],
        lambda: model.encoder.pos_conv_embed(x),
    ]
    with torch.no_grad():
        wanted = [call() for call in calls]
        hubert_fast.accelerate(model)
        for given, theirs in zip([call() for call in calls], wanted, strict=True):
            assert relative_error(given, theirs) <= 1e-9


@pytest.mark.parametrize("change", ["half", "bfloat16", "autocast"])
def test_16_bits_give_their_types_and_their_numbers_within_rounding(change):
    model = _model(dtype=torch.float32, hidden_size=128, num_conv_pos_embedding_groups=2, conv_dim=[32] * 7).eval()
    exact = model(AUDIO.float(), attention_mask=RAGGED).logits
    if change != "autocast":
        model = getattr(model, change)()
    x = AUDIO.to(model.dtype)

    def logits():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
            return model(x, attention_mask=RAGGED).logits

    theirs = logits()
    hubert_fast.accelerate(model)
    ours = logits()
    assert ours.dtype == theirs.dtype
    error = relative_error(theirs[VALID], exact[VALID])
    assert relative_error(ours[VALID], exact[VALID]) <= 1.5 * error + 1e-3


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_too(way, rows):
    model = _model()
    if way != "deepcopy":  # PyTorch pickles no convolution with weight norm
        model.hubert.encoder.pos_conv_embed.conv = nn.Conv1d(64, 64, 16, padding=8, groups=4).double()
    hubert_fast.accelerate(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    wanted = _step(model)
    rows.clear()
    given = _step(other)
    assert rows == [27, 27]
    _assert_same(given, wanted)
    hubert_fast.unaccelerate(other)
    assert type(other.hubert.encoder).__module__.startswith("transformers.") and rows


def test_saved_and_loaded_weights_are_the_same(tmp_path):
    model = _model(dtype=torch.float32)
    hubert_fast.accelerate(model)
    model.save_pretrained(tmp_path)
    other = transformers.HubertForCTC.from_pretrained(tmp_path)
    assert type(other.hubert.encoder).__module__.startswith("transformers.")
    assert all(
        torch.equal(*each) for each in zip(other.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert other.config.to_diff_dict().keys() - {"_name_or_path"} == model.config.to_diff_dict().keys() - {
        "_name_or_path"
    }


@pytest.mark.parametrize("settings", [{}, {"use_weighted_layer_sum": True}])
@pytest.mark.parametrize("kind", ["HubertForSequenceClassification", "Wav2Vec2ForSequenceClassification"])
def test_heads_of_other_tasks_get_the_same(kind, settings):
    model, labels = _model(kind, **settings), torch.tensor([0, 1, 1])

    def step():
        model.zero_grad()
        outputs = model(AUDIO, labels=labels, attention_mask=None if settings else RAGGED)
        outputs.loss.backward()
        return outputs, {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}

    wanted = step()
    assert len(hubert_fast.accelerate(model).fused) == 10
    given = step()
    assert relative_error(given[0].logits, wanted[0].logits) <= 1e-9
    assert_gradients_match(given[1], wanted[1], 1e-8)


def test_a_step_of_trainer_is_the_same(tmp_path):
    pytest.importorskip("accelerate")
    data = [{"input_values": AUDIO[i].float(), "attention_mask": RAGGED[i], "labels": LABELS[i]} for i in range(3)]
    settings = dict(max_steps=2, per_device_train_batch_size=3, report_to=[], save_strategy="no", use_cpu=True)

    def trained(accelerated):
        model = _model(dtype=torch.float32)
        if accelerated:
            hubert_fast.accelerate(model)
        arguments = transformers.TrainingArguments(str(tmp_path), learning_rate=1e-3, optim="sgd", **settings)
        transformers.Trainer(model, arguments, train_dataset=data).train()
        return model.state_dict()

    wanted, start = trained(False), _model(dtype=torch.float32).state_dict()
    for name, given in trained(True).items():
        assert relative_error(given - start[name], wanted[name] - start[name]) <= 1e-2 or given.equal(wanted[name])


def test_ddp_sums_the_same_gradients(tmp_path):
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = _model()
        wanted = _step(model)
        hubert_fast.accelerate(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        model.zero_grad()
        wrapped(AUDIO, attention_mask=RAGGED, labels=LABELS).loss.backward()
        assert_gradients_match({name: each.grad for name, each in model.named_parameters()}, wanted[1], 1e-9)
    finally:
        dist.destroy_process_group()


def test_models_of_other_architectures_are_refused():
    config = transformers.WavLMConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(TypeError, match="model must be or hold"):
        hubert_fast.accelerate(transformers.WavLMModel(config))
