"""Bad input gets an error that names the argument, what was given and what is accepted; odd but good input works."""

import pytest
import torch

import hubert_fast
from tests.models import configurations
from tests.models.configurations import NUM_CLASSES
from tests.models.twins import SAMPLES, batch, num_frames, twins

FRAMES = num_frames(SAMPLES)
GOOD = batch()


@pytest.fixture(scope="module")
def model():
    return twins(configurations.base())[1]


def _calls(model):
    return {"model": model, "objective": hubert_fast.PretrainingObjective(model)}


def _labels(shape, value=0):
    return torch.full(shape, value)


CASES = {
    "waveforms rank 1": (
        dict(waveforms=GOOD.waveforms[0]),
        r"waveforms must be 2-D \[batch, samples\]; got shape \(12400,\)",
    ),
    "waveforms rank 3": (dict(waveforms=GOOD.waveforms[None]), r"waveforms must be 2-D .*; got shape \(1, 3, 12400\)"),
    "waveforms float64": (dict(waveforms=GOOD.waveforms.double()), r"waveforms .*torch.float32; got torch.float64"),
    "waveforms int16": (dict(waveforms=GOOD.waveforms.short()), r"waveforms .*torch.float32; got torch.int16"),
    "waveforms complex": (dict(waveforms=GOOD.waveforms + 0j), r"waveforms .*torch.float32; got torch.complex64"),
    "waveforms empty batch": (
        dict(waveforms=GOOD.waveforms[:0], labels=_labels((0, FRAMES)), audio_lengths=None),
        r"waveforms is an empty batch",
    ),
    "waveforms too short": (
        dict(waveforms=GOOD.waveforms[:, :399], labels=_labels((3, 0))),
        r"waveforms has 399 samples .*shorter than one frame \(400 samples\)",
    ),
    "waveforms no samples": (
        dict(waveforms=GOOD.waveforms[:, :0], labels=_labels((3, 0))),
        r"waveforms has 0 samples .*shorter than one frame \(400 samples\)",
    ),
    "labels float": (dict(labels=GOOD.labels.float()), r"labels must be integers; got torch.float32"),
    "labels bool": (dict(labels=GOOD.labels > 3), r"labels must be integers; got torch.bool"),
    "labels too few": (dict(labels=GOOD.labels[:, 1:]), r"labels must have shape \[3, 38\].*; got \(3, 37\)"),
    "labels too many": (dict(labels=_labels((3, FRAMES + 1))), r"labels must have shape \[3, 38\].*; got \(3, 39\)"),
    "labels of another batch": (dict(labels=GOOD.labels[:2]), r"labels must have shape \[3, 38\].*; got \(2, 38\)"),
    "labels rank 1": (dict(labels=GOOD.labels[0]), r"labels must have shape \[3, 38\].*; got \(38,\)"),
    "labels too large": (dict(labels=_labels((3, FRAMES), NUM_CLASSES)), r"labels must be in \[0, 20\); got \[20, "),
    "labels negative": (dict(labels=_labels((3, FRAMES), -1)), r"labels must be in \[0, 20\); got \[-1, "),
    "lengths too long": (
        dict(audio_lengths=torch.tensor([12400, 12401, 5])),
        r"audio_lengths must be within \[0, 12400\].*; got \[12401\]",
    ),
    "lengths negative": (
        dict(audio_lengths=torch.tensor([12400, -1, 5])),
        r"audio_lengths must be within .*; got \[-1\]",
    ),
    "lengths of another batch": (
        dict(audio_lengths=torch.tensor([12400])),
        r"audio_lengths must have shape \[3\].*; got \(1,\)",
    ),
    "lengths rank 2": (
        dict(audio_lengths=torch.ones(3, 1).long()),
        r"audio_lengths must have shape \[3\].*; got \(3, 1\)",
    ),
    "lengths float": (dict(audio_lengths=torch.ones(3)), r"audio_lengths must be integers.*; got torch.float32"),
    "lengths elsewhere": (
        dict(audio_lengths=torch.ones(3, dtype=torch.long, device="meta")),
        r"audio_lengths must be on the CPU or on the device of waveforms \(cpu\); got meta",
    ),
    "mask of another shape": (
        dict(mask=torch.zeros(3, FRAMES - 1, dtype=torch.bool)),
        r"mask must be bool of shape \[3, 38\]; got torch.bool \(3, 37\)",
    ),
    "mask of integers": (dict(mask=torch.zeros(3, FRAMES, dtype=torch.long)), r"mask must be bool .*; got torch.int64"),
}


@pytest.mark.parametrize("called", ["model", "objective"])
@pytest.mark.parametrize("case", CASES)
def test_bad_input_names_argument_given_and_accepted(model, case, called):
    change, message = CASES[case]
    arguments = {"waveforms": GOOD.waveforms, "labels": GOOD.labels, "audio_lengths": None, "mask": None, **change}
    with pytest.raises(ValueError, match=message):
        _calls(model)[called](**arguments)


@pytest.mark.parametrize("case", [each for each in CASES if each.startswith(("waveforms", "lengths"))])
def test_the_encoder_alone_refuses_the_same(model, case):
    change, message = CASES[case]
    arguments = {"waveforms": GOOD.waveforms, "lengths": None}
    arguments.update({key.removeprefix("audio_"): value for key, value in change.items() if key != "labels"})
    with pytest.raises(ValueError, match=message):
        model.wav2vec2(**arguments)
    with pytest.raises(ValueError, match=message):
        model.wav2vec2.extract_features(**arguments)


@pytest.mark.parametrize("num_layers", [0, -1, 3])
def test_num_layers_out_of_range_is_refused(model, num_layers):
    with pytest.raises(ValueError, match=rf"num_layers must be in \[1, 2\]; got {num_layers}"):
        model.wav2vec2.extract_features(GOOD.waveforms, num_layers=num_layers)


def test_one_bad_label_among_the_frames_that_count_is_found(model):
    for value in (-1, NUM_CLASSES):
        labels = GOOD.labels.clone()
        labels[1, 7] = value
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 20\); got \[{value}\]"):
            model(GOOD.waveforms, labels)


def test_labels_in_the_padding_are_not_read(model):
    lengths = torch.tensor([SAMPLES, 6000, 400])
    valid = torch.arange(FRAMES) < model.wav2vec2.feature_extractor.output_lengths(lengths)[:, None]
    results = []
    for filler in (-100, 0, 10**6):
        torch.manual_seed(0)
        results.append(model(GOOD.waveforms, GOOD.labels.where(valid, filler), lengths))
    for given in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(given, results[0]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_labels_and_lengths_of_any_integer_dtype_work(model, dtype):
    lengths = torch.tensor([SAMPLES, 6000, 9000])
    torch.manual_seed(0)
    expected = model(GOOD.waveforms, GOOD.labels, lengths)
    torch.manual_seed(0)
    narrow = lengths.to(dtype) if dtype != torch.uint8 else lengths
    outputs = model(GOOD.waveforms, GOOD.labels.to(dtype), narrow)
    assert all(torch.equal(*pair) for pair in zip(outputs, expected))


def test_non_contiguous_tensors_work(model):
    lengths = torch.tensor([SAMPLES, 6000, 9000])
    mask = torch.rand(3, FRAMES) < 0.5
    expected = model(GOOD.waveforms, GOOD.labels, lengths, mask=mask)
    spread = model(
        GOOD.waveforms.T.contiguous().T, GOOD.labels.T.contiguous().T, lengths.repeat_interleave(2)[::2],
        mask=mask.T.contiguous().T,
    )  # fmt: skip
    every_other = model(
        GOOD.waveforms.repeat_interleave(2, 1)[:, ::2], GOOD.labels.repeat_interleave(2, 0)[::2], lengths, mask=mask
    )
    for outputs in (spread, every_other):
        assert all(torch.equal(*pair) for pair in zip(outputs, expected))


def test_the_callers_tensors_are_not_changed(model):
    waveforms, labels, lengths = GOOD.waveforms.clone(), GOOD.labels.clone(), torch.tensor([SAMPLES, 6000, 9000])
    hubert_fast.PretrainingObjective(model)(waveforms, labels, lengths).loss.backward()
    assert torch.equal(waveforms, GOOD.waveforms) and torch.equal(labels, GOOD.labels)
    assert lengths.tolist() == [SAMPLES, 6000, 9000]


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 2.0, float("nan")])
def test_feature_grad_mult_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=r"feature_grad_mult must be None or in \(0, 1\); got "):
        hubert_fast.hubert_pretrain_model(**configurations.base(feature_grad_mult=value))


def test_an_unknown_extractor_mode_and_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="extractor_mode must be one of .*; got 'batch_norm'"):
        hubert_fast.hubert_pretrain_model(**configurations.base(extractor_mode="batch_norm"))
    with pytest.raises(ValueError, match="divisible by num_heads; got 128 and 3"):
        hubert_fast.hubert_pretrain_model(**configurations.base(encoder_num_heads=3))
