"""Bad input gets an error that names the argument, what was given and what is accepted; odd but good input works."""

import pytest
import torch
from torch import tensor

import hubert_fast
from tests.models import configurations
from tests.models.configurations import NUM_CLASSES
from tests.models.twins import SAMPLES, Batch, batch, num_frames, seeded, twins, valid_frames

FRAMES = num_frames(SAMPLES)
GOOD = batch()
TOO_SHORT = r"shorter than one frame \(400 samples\)"
ON_THE_CPU = r"must be on the CPU or on the device of waveforms \(cpu\); got meta"


@pytest.fixture(scope="module")
def model():
    return twins(configurations.base())[1]


def _one_label(value):
    labels = GOOD.labels.clone()
    labels[1, 7] = value
    return labels


# What is wrong: the argument, what is given, and what the message says after the argument's name.
CASES = {
    "waveforms rank 1": ("waveforms", GOOD.waveforms[0], r"must be 2-D \[batch, samples\]; got shape \(12400,\)"),
    "waveforms rank 3": ("waveforms", GOOD.waveforms[None], r"must be 2-D .*; got shape \(1, 3, 12400\)"),
    "waveforms float64": ("waveforms", GOOD.waveforms.double(), ".*torch.float32; got torch.float64"),
    "waveforms int16": ("waveforms", GOOD.waveforms.short(), ".*torch.float32; got torch.int16"),
    "waveforms complex": ("waveforms", GOOD.waveforms + 0j, ".*torch.float32; got torch.complex64"),
    "waveforms empty batch": ("waveforms", GOOD.waveforms[:0], "is an empty batch"),
    "waveforms too short": ("waveforms", GOOD.waveforms[:, :399], f"has 399 samples .*{TOO_SHORT}"),
    "waveforms no samples": ("waveforms", GOOD.waveforms[:, :0], f"has 0 samples .*{TOO_SHORT}"),
    "labels float": ("labels", GOOD.labels.float(), "must be integers; got torch.float32"),
    "labels bool": ("labels", GOOD.labels > 3, "must be integers; got torch.bool"),
    "labels too few": ("labels", GOOD.labels[:, 1:], r"must have shape \[3, 38\].*; got \(3, 37\)"),
    "labels too many": ("labels", torch.zeros(3, FRAMES + 1).long(), r"must have shape \[3, 38\].*; got \(3, 39\)"),
    "labels of another batch": ("labels", GOOD.labels[:2], r"must have shape \[3, 38\].*; got \(2, 38\)"),
    "labels rank 1": ("labels", GOOD.labels[0], r"must have shape \[3, 38\].*; got \(38,\)"),
    "one label too large": ("labels", _one_label(NUM_CLASSES), r"must be in \[0, 20\); got \[20\]"),
    "one label negative": ("labels", _one_label(-1), r"must be in \[0, 20\); got \[-1\]"),
    "lengths too long": ("audio_lengths", tensor([12400, 12401, 5]), r"must be within \[0, 12400\].*; got \[12401\]"),
    "lengths negative": ("audio_lengths", tensor([12400, -1, 5]), r"must be within .*; got \[-1\]"),
    "lengths of another batch": ("audio_lengths", tensor([12400]), r"must have shape \[3\].*; got \(1,\)"),
    "lengths rank 2": ("audio_lengths", tensor([[1], [1], [1]]), r"must have shape \[3\].*; got \(3, 1\)"),
    "lengths float": ("audio_lengths", tensor([1.0, 1.0, 1.0]), "must be integers.*; got torch.float32"),
    "lengths fractional": ("audio_lengths", tensor([12400, 1.5, 5]), "must be integers.*; got torch.float32"),
    "lengths elsewhere": ("audio_lengths", tensor([1, 1, 1], device="meta"), ON_THE_CPU),
    "mask of another shape": (
        "mask",
        GOOD.labels[:, 1:] > 3,
        r"must be bool of shape \[3, 38\]; got torch.bool \(3, 37\)",
    ),
    "mask of integers": ("mask", GOOD.labels, "must be bool .*; got torch.int64"),
}


@pytest.mark.parametrize("wrap", [lambda model: model, hubert_fast.PretrainingObjective], ids=["model", "objective"])
@pytest.mark.parametrize("case", CASES)
def test_bad_input_names_argument_given_and_accepted(model, case, wrap):
    argument, value, message = CASES[case]
    arguments = {"waveforms": GOOD.waveforms, "labels": GOOD.labels, argument: value}
    with pytest.raises(ValueError, match=f"{argument} {message}"):
        wrap(model)(**arguments)


ENCODER_CASES = {
    **{case: each for case, each in CASES.items() if case.startswith("waveforms")},
    **{
        case: ("lengths", *CASES[case][1:])
        for case in ("lengths of another batch", "lengths rank 2", "lengths elsewhere")
    },
    "lengths negative": ("lengths", tensor([12400, -1, 5]), r"must be whole .*, none of them negative; got \[-1\]"),
    "lengths fractional": ("lengths", tensor([12400, 0.5, 5]), r"must be whole numbers .*; got \[0.5\]"),
    "lengths not a number": ("lengths", tensor([1, float("nan"), float("inf")]), r".*; got \[nan, inf\]"),
    "lengths bool": ("lengths", tensor([True, True, False]), "must be whole numbers .*; got torch.bool"),
    "lengths complex": ("lengths", tensor([1, 1, 1 + 0j]), "must be whole numbers .*; got torch.complex64"),
}


@pytest.mark.parametrize("case", ENCODER_CASES)
def test_the_encoder_alone_and_its_extractor_refuse_the_like(model, case):
    argument, value, message = ENCODER_CASES[case]
    arguments = [value if argument == name else GOOD._asdict()[name] for name in ("waveforms", "lengths")]
    for call in (model.wav2vec2, model.wav2vec2.extract_features, model.wav2vec2.feature_extractor):
        with pytest.raises(ValueError, match=f"{argument} {message}"):
            call(*arguments)


@pytest.mark.parametrize("num_layers", [0, -1, 3])
def test_num_layers_out_of_range_is_refused(model, num_layers):
    with pytest.raises(ValueError, match=rf"num_layers must be in \[1, 2\]; got {num_layers}"):
        model.wav2vec2.extract_features(GOOD.waveforms, num_layers=num_layers)


def test_labels_in_the_padding_are_not_read(model):
    lengths = torch.tensor([SAMPLES, 6000, 400])
    labels = [GOOD.labels.where(valid_frames(lengths), filler) for filler in (-100, 0, 10**6)]
    expected, *results = (seeded(model, Batch(GOOD.waveforms, each, lengths)) for each in labels)
    for given in results:
        assert all(torch.equal(*pair) for pair in zip(given, expected))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_labels_and_lengths_of_any_integer_dtype_work(model, dtype):
    lengths = torch.tensor([SAMPLES, 6000, 9000])
    expected = seeded(model, Batch(GOOD.waveforms, GOOD.labels, lengths))
    narrow = lengths.to(dtype) if dtype != torch.uint8 else lengths
    outputs = seeded(model, Batch(GOOD.waveforms, GOOD.labels.to(dtype), narrow))
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


GRAD_MULT = r"feature_grad_mult must be None or in \(0, 1\); got "


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        *(("feature_grad_mult", value, GRAD_MULT) for value in (0.0, 1.0, -0.5, 2.0, float("nan"))),
        ("extractor_mode", "batch_norm", "extractor_mode must be one of .*; got 'batch_norm'"),
        ("encoder_num_heads", 3, "divisible by num_heads; got 128 and 3"),
    ],
)
def test_settings_that_no_model_can_have_are_refused(setting, value, message):
    with pytest.raises(ValueError, match=message):
        hubert_fast.hubert_pretrain_model(**configurations.base(**{setting: value}))
