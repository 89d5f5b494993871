"""Parts of the encoder, called as code written for torchaudio calls them: on grids, with its masks, hooked."""

import pytest
import torch
from torch import nn

import hubert_fast
from tests import torchaudio_peer
from tests.models import configurations
from tests.models.twins import LENGTHS, batch, num_frames, relative_error, seeded, twins, valid_frames

FRAMES = num_frames(12400)
VALID = valid_frames(LENGTHS)
EVERY_FRAME = torch.ones_like(VALID)
MODELS = ["base", "large"]


def _pair(name="base", **settings):
    return twins({**configurations.ALL[name], **settings}, torch.float64)


def _features(model):
    waveforms, _, lengths = batch(torch.float64, LENGTHS)
    return model.wav2vec2.feature_extractor(waveforms, lengths)


def _causal():
    return torch.full((3, 1, FRAMES, FRAMES), -torch.inf, dtype=torch.float64).triu(1)


def _grid(dim=128):
    return torch.randn(3, FRAMES, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _close(ours, theirs, where=EVERY_FRAME):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert relative_error(ours[where], theirs[where]) <= 1e-10


def _learn(output, where=VALID):
    (output[where] * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)).sum().backward()


def _same_gradients(ours, theirs):
    """Of what has any; those of the keys' biases are 0 in truth."""
    for (name, mine), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (wanted.grad is None), name
        if mine.grad is not None and not name.endswith("k_proj.bias"):
            assert relative_error(mine.grad, wanted.grad) <= 1e-8, name


@pytest.mark.parametrize("lengths", [None, "int64", "int32", "float"])
@pytest.mark.parametrize("name", MODELS)
def test_preprocessed_features_and_their_mask_are_torchaudios(name, lengths):
    theirs, ours = _pair(name)
    features, frames = _features(theirs)
    frames = None if lengths is None else frames.to(getattr(torch, lengths))
    (x, mask), (wanted, wanted_mask) = (each.wav2vec2.encoder._preprocess(features, frames) for each in (ours, theirs))
    _close(x, wanted)
    if lengths is None:
        assert mask is wanted_mask is None
    else:
        assert torch.equal(mask, wanted_mask) and mask.dtype == wanted_mask.dtype and not x[~VALID].any()


@pytest.mark.parametrize("name", MODELS)
def test_what_fine_tuning_calls_gives_torchaudios_numbers_and_gradients(name):
    """torchaudio's recipe and ESPnet preprocess, mask and run the transformer by themselves."""
    outputs, masks = [], []
    pair = _pair(name, mask_channel_prob=0.2)
    for model in pair:
        features, frames = _features(model)
        encoder = model.wav2vec2.encoder
        x, attention_mask = encoder._preprocess(features, frames)
        torch.manual_seed(3)
        x, mask = model.mask_generator(x, torch.arange(FRAMES) >= frames[:, None])
        outputs.append(encoder.transformer(x, attention_mask=attention_mask))
        masks.append(mask)
        _learn(outputs[-1])
    assert torch.equal(*masks)
    _close(outputs[1], outputs[0], VALID)
    _same_gradients(pair[1], pair[0])
    assert not outputs[1][~VALID].any()


def test_a_mask_generator_that_masks_nothing_returns_no_mask():
    theirs, ours = _pair(mask_prob=0.0)
    x = _grid()
    results = [model.mask_generator(x.clone(), None) for model in (ours, theirs)]
    assert results[0][1] is results[1][1] is None and torch.equal(results[0][0], results[1][0])


MASKS = {
    "none": lambda mask: None,
    "of the encoder": lambda mask: mask,
    "of somebody else": lambda mask: mask.clone().expand(3, 1, FRAMES, FRAMES),
    "one row in memory": lambda mask: torch.where(mask[:, :, :1] == 0, 0.0, -1e9).expand(3, 1, FRAMES, FRAMES).double(),
    "with a hole": lambda mask: mask.clone().index_fill_(3, torch.tensor([2]), -1e4),
    "changed since": lambda mask: (mask[:, 0, 0].index_fill_(1, torch.tensor([2]), -1e4), mask)[1],
    "causal": lambda mask: _causal(),
    "bool": lambda mask: mask == 0,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_transformer_layer_and_attention_take_any_mask(name, mask):
    """Also where the padding is not 0, which the positional embedding of a valid frame sees."""
    theirs, ours = _pair(name)
    x = _grid()
    where = EVERY_FRAME if mask in ("none", "causal") else VALID
    masks = [MASKS[mask](model.wav2vec2.encoder._preprocess(*_features(theirs))[1]) for model in (ours, theirs)]
    mine, their = (each.wav2vec2.encoder.transformer for each in (ours, theirs))
    _close(mine(x, masks[0]), their(x, masks[1]), where)
    for out, wanted in zip(
        mine.get_intermediate_outputs(x, masks[0], 2), their.get_intermediate_outputs(x, masks[1], 2), strict=True
    ):
        _close(out, wanted, where)
    _close(mine._preprocess(x), their._preprocess(x))
    for part in ("", "attention"):
        called = (each.layers[0].get_submodule(part) for each in (mine, their))
        given, wanted = (each(x, mask, None, None) for each, mask in zip(called, masks))
        assert given[1] is wanted[1] is None
        _close(given[0], wanted[0])


def test_a_mask_holds_with_dropout_too():
    transformer = _pair(encoder_attention_dropout=0.3)[1].wav2vec2.encoder.transformer
    x, outputs = _grid(), []
    for last in (0.0, 1.0):
        torch.manual_seed(0)
        outputs.append(transformer.layers[0](x + last * (torch.arange(FRAMES) == FRAMES - 1)[:, None], _causal())[0])
    assert torch.equal(outputs[0][:, :-1], outputs[1][:, :-1]) and not torch.equal(*outputs)


def test_a_mask_or_a_grid_of_another_shape_is_refused():
    transformer = _pair()[1].wav2vec2.encoder.transformer
    for call in (transformer, transformer.layers[0], transformer.layers[0].attention):
        with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 1, 38, 38\)"):
            call(_grid(), torch.zeros(3, 1, 1, FRAMES, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x must be \[batch, frames, 128\]; got shape \(3, 38, 64\)"):
        transformer.layers[0].attention(_grid(64))


PLACES = {
    "layer": "layers.1",
    "attention": "layers.1.attention",
    "feed-forward": "layers.1.feed_forward",
    "positional embedding": "pos_conv_embed",
    "transformer": "",
}


def _hooked_run(model, place, call):
    """(what the hook saw, the result): the hook takes a tenth off what it sees."""
    seen = []

    def hook(module, given, output):
        first = output[0] if isinstance(output, tuple) else output
        seen.append((given[0], first))
        return (0.9 * first, None) if isinstance(output, tuple) else 0.9 * first

    with model.wav2vec2.encoder.transformer.get_submodule(PLACES[place]).register_forward_hook(hook):
        result = call(model)
    return seen, result


def test_lengths_that_are_overwritten_later_change_no_mask():
    encoder = _pair()[1].wav2vec2.encoder
    features, frames = _features(_pair()[1])
    x, mask = encoder._preprocess(features, frames)
    wanted = encoder.transformer(x, mask)
    frames.fill_(3)
    assert torch.equal(encoder.transformer(x, mask), wanted)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_a_hook_sees_and_changes_what_torchaudios_hook_sees_and_changes(name, place):
    data = batch(torch.float64, LENGTHS)
    calls = {
        "pre-training": lambda model: [each for each in seeded(model, data)[:2]],
        "features": lambda model: [model.wav2vec2(data.waveforms, data.lengths)[0][VALID]],
        "layers": lambda model: [
            each[VALID] for each in model.wav2vec2.extract_features(data.waveforms, data.lengths)[0]
        ],
    }
    for what, call in calls.items():
        theirs, ours = _pair(name)
        (seen, result), (wanted_seen, wanted) = (_hooked_run(each, place, call) for each in (ours, theirs))
        assert len(seen) == len(wanted_seen) == (0 if (place, what) == ("transformer", "layers") else 1)
        for mine, their in zip(seen, wanted_seen, strict=True):
            for tensor, other in zip(mine, their, strict=True):
                _close(tensor, other, VALID)
        for mine, their in zip(result, wanted, strict=True):
            assert relative_error(mine, their) <= 1e-10


@pytest.mark.parametrize("place", ["layer", "attention", "feed-forward"])
def test_what_is_hooked_in_the_last_layer_of_the_objective_sees_every_frame_and_has_torchaudios_gradients(place):
    theirs, ours = _pair(skip_nomask=True)
    data, seen = batch(torch.float64, LENGTHS), []
    for model in (theirs, ours):
        hooked = model.wav2vec2.encoder.transformer.get_submodule(PLACES[place])
        hooked.register_forward_hook(lambda module, given, output: seen.append(given[0].shape))
        seeded(model, data)[0][:, 0].sum().backward()
    assert seen == [(3, FRAMES, 128)] * 2
    _same_gradients(ours, theirs)


def test_modules_of_torchaudio_may_stand_in_place_of_ours():
    theirs, ours = _pair(mask_channel_prob=0.2)
    data = batch(torch.float64, LENGTHS)
    wanted = seeded(theirs, data)
    ours.mask_generator = theirs.mask_generator
    ours.wav2vec2.encoder.transformer.layers[1] = theirs.wav2vec2.encoder.transformer.layers[1]
    ours.wav2vec2.encoder.transformer.layers[0].attention = theirs.wav2vec2.encoder.transformer.layers[0].attention
    for mine, their in zip(seeded(ours, data), wanted, strict=True):
        assert relative_error(mine, their) <= 1e-10


class _Elsewhere(nn.Module):
    """Somebody's own generator: it masks the third frame, tells so in integers, and writes to the padding."""

    def forward(self, x, padding_mask):
        mask = torch.zeros(x.shape[:2], dtype=torch.int64)
        mask[:, 2] = 1
        return x + 1.0, mask


class _Halved(nn.Module):
    """Somebody's own head around another."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, *arguments):
        return [each / 2 for each in self.head(*arguments)]


class _Subclass(torchaudio_peer.components.Encoder):
    def _preprocess(self, features, lengths=None):
        x, mask = super()._preprocess(features, lengths)
        return 0.9 * x, mask


def _mask_another(model):
    def hook(module, given, output):
        mask = torch.zeros(given[0].shape[:2], dtype=torch.bool)
        mask[:, 4:9] = True
        return output[0], mask

    model.mask_generator.register_forward_hook(hook)


def _own_encoder(model):
    encoder = model.wav2vec2.encoder
    model.wav2vec2.encoder = _Subclass(encoder.feature_projection, encoder.transformer)


def _causal_embedding(model):
    embedding = model.wav2vec2.encoder.transformer.pos_conv_embed
    torch.manual_seed(5)
    embedding.conv, embedding.num_remove = nn.Conv1d(128, 128, 16, padding=15, groups=4).double(), 15


OWN_PARTS = {
    "a hook that masks other frames": _mask_another,
    "mask generator": lambda model: setattr(model, "mask_generator", _Elsewhere()),
    "head": lambda model: setattr(model, "logit_generator", _Halved(model.logit_generator)),
    "encoder": _own_encoder,
    "positional convolution": _causal_embedding,
}


@pytest.mark.parametrize("part", OWN_PARTS)
def test_parts_of_somebody_elses_count_as_in_torchaudio(part):
    data, pair = batch(torch.float64, LENGTHS), _pair()
    for model in pair:
        OWN_PARTS[part](model)
    if part == "mask generator":  # an index of integers is none in torchaudio
        pair[0].mask_generator.register_forward_hook(lambda module, given, output: (output[0], output[1].bool()))
    for mine, their in zip(*(seeded(model, data) for model in reversed(pair)), strict=True):
        assert mine.shape == their.shape and relative_error(mine, their) <= 1e-10


def test_masks_of_inference_tensors_and_masks_that_learn_are_read_as_they_are():
    ours = _pair()[1].eval()
    encoder, (features, frames) = ours.wav2vec2.encoder, _features(ours)
    x, mask = (each.detach() for each in encoder._preprocess(features, frames))
    wanted = encoder.transformer(x, mask)
    with torch.inference_mode():
        assert (
            relative_error(encoder.transformer(*encoder._preprocess(features, frames))[VALID], wanted[VALID]) <= 1e-12
        )
        with encoder.transformer.layers[0].register_forward_hook(lambda *call: None):
            assert relative_error(encoder(features, frames), wanted) <= 1e-12
    bias = torch.zeros(FRAMES, dtype=torch.float64, requires_grad=True)
    encoder.transformer(x, bias.expand(3, 1, FRAMES, FRAMES)).square().sum().backward()
    assert bias.grad.abs().sum() > 0


def test_the_encoder_masks_its_input_without_labels():
    theirs, ours = _pair(mask_channel_prob=0.2)
    waveforms, _, lengths = batch(torch.float64, LENGTHS)
    features, frames = _features(theirs)
    x, attention_mask = theirs.wav2vec2.encoder._preprocess(features, frames)
    torch.manual_seed(0)
    x, mask = theirs.mask_generator(x, ~VALID)
    wanted = theirs.wav2vec2.encoder.transformer(x, attention_mask=attention_mask)
    encoder, generator = ours.wav2vec2.encoder, ours.mask_generator
    for settings in ({}, {"mask": mask}):
        torch.manual_seed(0)
        if settings:
            generator.draw(3, FRAMES, frames)  # the channels are drawn after the frames
        _close(encoder(features, frames, mask_generator=generator, **settings), wanted, VALID)
    torch.manual_seed(0)
    _close(encoder(features, frames, mask_generator=theirs.mask_generator), wanted, VALID)
    torch.manual_seed(0)
    output, valid = ours.wav2vec2(waveforms, lengths, mask_generator=generator)
    _close(output, wanted, VALID)
    assert torch.equal(valid, frames)
    for wrong in ({"mask": mask}, {"mask": mask, "mask_generator": theirs.mask_generator}):
        with pytest.raises(ValueError, match="mask needs mask_generator, a MaskGenerator of this package"):
            encoder(features, frames, **wrong)
    with pytest.raises(ValueError, match=r"mask must be bool of shape \[3, 38\]"):
        encoder(features, frames, mask=mask[:, 1:], mask_generator=generator)


def test_a_model_is_quantised_as_torchaudios_is():
    """Its tests prepare the positional embedding, and quantise the products."""
    waveforms = batch().waveforms
    outputs = []
    for model in twins(configurations.base()):
        encoder = model.wav2vec2.eval()
        embedding = encoder.encoder.transformer.pos_conv_embed
        assert embedding.__prepare_scriptable__() is embedding and not hasattr(embedding.conv, "parametrizations")
        quantised = torch.ao.quantization.quantize_dynamic(encoder, {nn.Linear}, torch.qint8)
        outputs.append(quantised(waveforms)[0])
    assert relative_error(outputs[1], outputs[0]) <= 1e-4


def test_wrappers_that_look_at_nothing_leave_the_padding_out():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, sizes = _pair()[1], []
    objective, data = hubert_fast.PretrainingObjective(model, unmasked_weight=0.5), batch(torch.float64, LENGTHS)
    wanted = seeded(objective, data).loss
    layers = model.wav2vec2.encoder.transformer.layers
    layers[0].feed_forward.output_dense.register_forward_hook(lambda _, given, output: sizes.append(len(output)))
    for i, wrap in enumerate([checkpoint_wrapper, lambda layer: torch.compile(layer, backend="eager")]):
        layers[i] = wrap(layers[i])
    assert relative_error(seeded(objective, data).loss, wanted) <= 1e-12
    model.wav2vec2.encoder.transformer = checkpoint_wrapper(model.wav2vec2.encoder.transformer)
    assert relative_error(seeded(objective, data).loss, wanted) <= 1e-12
    assert sizes == [int(VALID.sum())] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize("lengths_on", ["cpu", "cuda"])
def test_on_a_gpu_parts_called_alone_and_hooked_give_a_cpus_numbers(lengths_on):
    truth, model = twins(configurations.base())[1], twins(configurations.base())[1].cuda()
    truth = truth.double()
    outputs = []
    for each, device, dtype in ((truth, "cpu", torch.float64), (model, "cuda", torch.float32)):
        waveforms, _, lengths = batch(dtype, LENGTHS)
        features, frames = each.wav2vec2.feature_extractor(waveforms.to(device), lengths)
        encoder = each.wav2vec2.encoder
        encoder.transformer.layers[0].register_forward_hook(lambda module, given, output: (0.9 * output[0], None))
        x, mask = encoder._preprocess(features, frames if device == "cpu" else frames.to(lengths_on))
        torch.manual_seed(0)
        x, _ = each.mask_generator(x, (~VALID).to(device))
        copied = mask.clone().expand(3, 1, FRAMES, FRAMES)  # no longer known to be of lengths
        results = [
            encoder.transformer(x, attention_mask=mask)[VALID],
            encoder.transformer.layers[1](x, copied)[0][VALID],
        ]
        outputs.append([result.cpu() for result in results])
    for found, wanted in zip(outputs[1], outputs[0], strict=True):
        assert relative_error(found, wanted) <= 5e-3  # TF32
