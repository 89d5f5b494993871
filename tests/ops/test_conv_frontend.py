"""``conv_frontend``: every backend computes what the layer-by-layer one does."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hubert_fast import backend, extension
from hubert_fast.cpu_backend import conv_frontend as passes
from hubert_fast.ops.conv_frontend import conv_frontend
from hubert_fast.reference.conv_frontend import output_length
from hubert_fast.torch_backend import conv_frontend as gemms
from tests.ops.comparison import assert_as_precise, assert_twins, error, run

OPERATOR = "conv_frontend"
STANDARD = [(10, 5), (3, 2), (3, 2), (2, 2)]  # (kernel, stride) of the kinds of layers that HuBERT has
WIDE = (48, 16, 32, 64)  # channels that the C++ passes take

# A result in one dtype beside the same in another order of operations.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}
FLOAT64 = [("torch", torch.float64), ("reference", torch.float64)]

needs_extension = pytest.mark.skipif(extension.cpu() is None, reason=str(extension.why_not("cpu")))
CPU = pytest.param("cpu", marks=needs_extension)
INSTRUCTION_SETS = extension.cpu().instruction_sets() if extension.cpu() else []


class Layers:
    """Random parameters of a front end, and the operator as a function of one flat list of tensors."""

    def __init__(self, norm, *, bias=True, shapes=STANDARD, channels=(16, 12, 8, 20), seed=0):
        self.norm, self.shapes, self.bias = norm, shapes, bias
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        self.count = len(shapes)
        self.norms = 1 if norm == "group_norm" else self.count
        widths = [1, *channels[: self.count]]
        self.parameters = [
            randn(out, into, kernel) * (2 / (into * kernel)) ** 0.5
            for into, out, (kernel, _) in zip(widths, widths[1:], shapes)
        ]
        self.parameters += [0.1 * randn(out) for out in widths[1:]] if bias else []
        self.parameters += [1 + 0.2 * randn(out) for out in widths[1 : 1 + self.norms]]
        self.parameters += [0.3 * randn(out) for out in widths[1 : 1 + self.norms]]

    def groups(self, parameters):
        """Filters, biases, norm weights and norm biases."""
        cuts = [self.count, self.count if self.bias else 0, self.norms, self.norms]
        groups, start = [], 0
        for cut in cuts:
            groups.append(list(parameters[start : start + cut]))
            start += cut
        return groups

    def function(self, valid_samples=None):
        def features(waveforms, *parameters):
            # Detached: with a gradient of the waveforms asked for, only the reference runs.
            return conv_frontend(
                waveforms.detach(),
                *self.groups(parameters),
                strides=[stride for _, stride in self.shapes],
                norm=self.norm,
                valid_samples=valid_samples,
            )

        return features


def _noise(batch, samples, seed=0, scale=1.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(batch, samples, dtype=torch.float64, generator=generator) + offset


def _assert_agree(layers, waveforms, valid_samples=None, tolerance=1e-10):
    def parameters_only(*parameters):
        return layers.function(valid_samples)(waveforms, *parameters)

    assert_twins(OPERATOR, parameters_only, layers.parameters, tolerance)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 5)), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    frames=st.integers(1, 40),
    extra=st.integers(0, 9),
    norm=st.sampled_from(["group_norm", "layer_norm"]),
    bias=st.booleans(),
    valid=st.none() | st.floats(0, 1),
    chunk=st.integers(1, 30),
    seed=st.integers(0, 100),
)
def test_backends_agree_for_any_shape(shapes, batch, frames, extra, norm, bias, valid, chunk, seed):
    samples = frames
    for kernel, stride in reversed(shapes):
        samples = (samples - 1) * stride + kernel
    samples += extra
    # PyTorch's group_norm refuses a single value in all; no audio as long as a HuBERT frame gives layer 0 so little.
    assume(norm == "layer_norm" or (samples - shapes[0][0]) // shapes[0][1] > 0)
    valid_samples = None if valid is None else torch.tensor([samples, int(valid * samples), samples])[:batch]
    layers = Layers(norm, bias=bias, shapes=shapes, channels=(6, 5, 4, 3), seed=seed)
    with mock.patch.object(gemms, "_CPU_CHUNK_ROWS", chunk):
        _assert_agree(layers, _noise(batch, samples, seed), valid_samples, tolerance=1e-8)


@pytest.mark.parametrize("valid_samples", [None, torch.tensor([2003, 700])], ids=["all-valid", "valid-samples"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
def test_backends_agree_over_many_chunks(norm, bias, valid_samples):
    with mock.patch.object(gemms, "_CPU_CHUNK_ROWS", 16):
        _assert_agree(Layers(norm, bias=bias), _noise(2, 2003), valid_samples)


@needs_extension
@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=4),
    channels=st.lists(st.sampled_from([16, 32, 48]), min_size=4, max_size=4),
    batch=st.integers(1, 3),
    frames=st.integers(1, 40),
    extra=st.integers(0, 9),
    norm=st.sampled_from(["group_norm", "layer_norm"]),
    bias=st.booleans(),
    valid=st.none() | st.floats(0, 1),
    chunk=st.integers(1, 30),
    instruction_set=st.sampled_from(INSTRUCTION_SETS or ["none"]),
    seed=st.integers(0, 100),
)
def test_cpu_passes_agree_for_any_shape(
    shapes, channels, batch, frames, extra, norm, bias, valid, chunk, instruction_set, seed
):
    samples = frames
    for kernel, stride in reversed(shapes):
        samples = (samples - 1) * stride + kernel
    samples += extra
    # With few frames the variance may be anything, and float32's error of the norm with it.
    assume(norm == "layer_norm" or (samples - shapes[0][0]) // shapes[0][1] > 8)
    valid_samples = None if valid is None else torch.tensor([samples, int(valid * samples), samples])[:batch]
    layers = Layers(norm, bias=bias, shapes=shapes, channels=channels, seed=seed)
    inputs = [each.float() for each in layers.parameters]
    waveforms = _noise(batch, samples, seed).float()

    def features(*parameters):
        return layers.function(valid_samples)(waveforms.to(parameters[0].dtype), *parameters)

    truth = run(OPERATOR, "reference", features, [each.double() for each in inputs])
    with (
        mock.patch.object(passes, "_FORWARD_ROWS", chunk),
        mock.patch.object(passes, "_BACKWARD_ROWS", chunk),
        _instruction_set(instruction_set),
    ):
        results = run(OPERATOR, "cpu", features, inputs)
    pytorchs = run(OPERATOR, "reference", features, inputs)
    for ours, theirs, exact in zip(results, pytorchs, truth):
        if exact is None or exact.norm() < 1e-9:  # the bias of layer 0 under group norm
            continue
        assert error(ours, exact) <= max(4 * error(theirs, exact), 3e-6)


@contextmanager
def _instruction_set(name):
    """None leaves what there is."""
    if name is None:
        yield
        return
    before = extension.cpu().instruction_set()
    extension.cpu().use_instruction_set(name)
    try:
        yield
    finally:
        extension.cpu().use_instruction_set(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
@pytest.mark.parametrize(("name", "instruction_set"), [*(("cpu", each) for each in INSTRUCTION_SETS), ("torch", None)])
def test_as_precise_as_pytorch(name, instruction_set, norm, dtype):
    layers = Layers(norm, channels=(32, 32, 32, 32))

    def draw(seed):
        return [_noise(2, 1500, seed), *Layers(norm, channels=(32, 32, 32, 32), seed=seed).parameters]

    def features(waveforms, *parameters):
        return layers.function()(waveforms, *parameters) + 0.0 * waveforms.sum()  # so that every input has a gradient

    with _instruction_set(instruction_set):
        assert_as_precise(OPERATOR, features, draw, dtype, name=name, seeds=6)


@needs_extension
def test_chunks_of_a_weight_gradient_add_up_in_float32():
    """1,500 chunks of 4 blocks: sums in bfloat16 would lose the later ones."""
    layers = Layers("group_norm", shapes=[(10, 5), (3, 2)], channels=(16, 16))
    inputs = [each.bfloat16() for each in layers.parameters]
    waveforms = _noise(1, 60_000).bfloat16()

    def features(*parameters):
        return layers.function()(waveforms.to(parameters[0].dtype), *parameters)

    truth = run(OPERATOR, "reference", features, [each.double() for each in inputs])
    with mock.patch.object(passes, "_BACKWARD_ROWS", 4):
        ours = run(OPERATOR, "cpu", features, inputs)
    whole = run(OPERATOR, "cpu", features, inputs)
    for many, one, exact in zip(ours[1:3], whole[1:3], truth[1:3]):
        assert error(many, exact) <= 2 * error(one, exact)


@needs_extension
def test_sums_of_layer_0_over_many_frames_keep_their_precision():
    layers = Layers("group_norm", shapes=STANDARD[:1], channels=(16,), bias=False)
    inputs = [_noise(1, 1_500_000).float() + 0.5, *(each.float() for each in layers.parameters)]
    exact = run(OPERATOR, "reference", layers.function(), [each.double() for each in inputs])
    for ours, truth in list(zip(run(OPERATOR, "cpu", layers.function(), inputs), exact))[2:]:
        assert error(ours, truth) <= 1e-6


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 1.0), (0.1, 1.0), (1e-4, 0.0), (1e-4, 1e-2), (30.0, 500.0)])
@pytest.mark.parametrize("name", [CPU, "torch"])
def test_neither_an_offset_nor_a_small_signal_loses_the_variance(name, scale, offset):
    """Layer 0 takes its variance from moments of the waveform: float32 must not cancel in them."""
    layers = Layers("group_norm", bias=False, channels=WIDE)
    waveforms = _noise(2, 3000, scale=scale, offset=offset).float()
    parameters = [each.float() for each in layers.parameters]
    truth = run(OPERATOR, "reference", layers.function(), [waveforms.double(), *(each.double() for each in parameters)])
    single = run(OPERATOR, name, layers.function(), [waveforms, *parameters])
    pytorchs = run(OPERATOR, "reference", layers.function(), [waveforms, *parameters])
    for ours, theirs, exact in zip(single, pytorchs, truth):
        if exact is not None:
            assert error(ours, exact) <= max(1.5 * error(theirs, exact), 2e-6)


@pytest.mark.parametrize("name", [CPU, "torch"])
def test_a_silent_row_gives_finite_features_and_gradients(name):
    layers = Layers("group_norm", channels=WIDE)
    waveforms = _noise(2, 900)
    waveforms[1] = 0.0
    _assert_agree(layers, waveforms)
    results = run(OPERATOR, name, layers.function(), [waveforms.float(), *(each.float() for each in layers.parameters)])
    assert all(each.isfinite().all() for each in results if each is not None)


@pytest.mark.parametrize(("name", "dtype"), [*FLOAT64, pytest.param("cpu", torch.float32, marks=needs_extension)])
def test_valid_samples_make_a_row_independent_of_its_padding(name, dtype):
    layers = Layers("group_norm", channels=WIDE)
    parameters = [each.to(dtype) for each in layers.parameters]
    waveforms = _noise(2, 2000).to(dtype)
    waveforms[1, 900:] = 0.0
    with backend.using(name, OPERATOR):
        padded = layers.function(torch.tensor([2000, 900]))(waveforms, *parameters)
        alone = layers.function(torch.tensor([900]))(waveforms[1:, :900], *parameters)
        unaware = layers.function()(waveforms, *parameters)
    frames = output_length(900, *zip(*STANDARD))
    assert error(padded[1, :frames], alone[0, :frames]) <= TOLERANCE[dtype]
    assert error(unaware[1, :frames], alone[0, :frames]) > 1e-3


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("name", "dtype"), [*FLOAT64, pytest.param("cpu", torch.float32, marks=needs_extension)])
def test_lengths_count_whole_windows_and_no_more_than_there_are(name, dtype, bias):
    """70 samples hold the 13 windows that 74 hold, and 75 one more; past the end of the row there is nothing."""
    layers = Layers("group_norm", channels=WIDE, bias=bias)
    parameters = [each.to(dtype) for each in layers.parameters]
    waveforms = _noise(1, 700).to(dtype)
    with backend.using(name, OPERATOR):
        by_length = {n: layers.function(torch.tensor([n]))(waveforms, *parameters) for n in (70, 74, 75, 700, 5000)}
        assert torch.equal(by_length[70], by_length[74])
        assert error(by_length[75], by_length[70]) > 1e-3
        assert torch.equal(by_length[5000], by_length[700])
        assert error(by_length[700], layers.function()(waveforms, *parameters)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("name", "dtype"), [*FLOAT64, pytest.param("cpu", torch.float32, marks=needs_extension)])
def test_a_row_too_short_for_a_window_takes_all_its_samples(name, dtype, bias):
    layers = Layers("group_norm", channels=WIDE, bias=bias)
    parameters = [each.to(dtype) for each in layers.parameters]
    waveforms = _noise(3, 2000).to(dtype)
    with backend.using(name, OPERATOR):
        given = layers.function(torch.tensor([2000, 0, 9]))(waveforms, *parameters)
        assert error(given, layers.function()(waveforms, *parameters)) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("name", "dtype"), [*FLOAT64, pytest.param("cpu", torch.float32, marks=needs_extension)])
def test_a_gradient_with_any_strides_is_taken(name, dtype):
    layers = Layers("group_norm", channels=WIDE)
    waveforms = _noise(2, 1200).to(dtype)
    grads = []
    for layout in (
        lambda x: x,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x[..., :1].expand_as(x),
    ):
        parameters = [each.to(dtype, copy=True).requires_grad_() for each in layers.parameters]
        with backend.using(name, OPERATOR):
            features = layers.function()(waveforms, *parameters)
            direction = torch.ones_like(features)
            grads.append(torch.autograd.grad(features, parameters, layout(direction), allow_unused=True))
    for first, *others in zip(*grads):
        assert all(error(each, first) <= 100 * TOLERANCE[dtype] for each in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
@pytest.mark.parametrize("name", [CPU, "torch"])
def test_the_same_numbers_every_time_and_at_every_place_in_the_batch(name, norm, dtype):
    layers = Layers(norm, channels=WIDE)
    parameters = [each.to(dtype) for each in layers.parameters]
    row = _noise(1, 7001).to(dtype)
    waveforms = torch.cat([row, _noise(1, 7001, seed=1).to(dtype), row])
    first, second = (run(OPERATOR, name, layers.function(), [waveforms, *parameters]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second) if a is not None)
    features = first[0]
    assert torch.equal(features[0], features[2])
    with backend.using(name, OPERATOR):
        assert torch.equal(layers.function()(row, *parameters)[0], features[0])


@needs_extension
@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
def test_cpu_passes_do_not_depend_on_the_number_of_threads(norm):
    """Only the passes: how BLAS splits a product among threads is its own affair, so layer 0 stands alone here."""
    layers = Layers(norm, shapes=STANDARD[:1], channels=WIDE)
    inputs = [_noise(2, 30_001).float(), *(each.float() for each in layers.parameters)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(OPERATOR, "cpu", layers.function(), inputs))
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*results):
        assert one is None or all(torch.equal(one, other) for other in others)


@needs_extension
@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("needs channels in multiples of 16; the layers have .*12", dict(channels=(16, 12, 16, 16))),
        ("layer 0 has at most 32 taps; this one has 33", dict(shapes=[(33, 5), *STANDARD[1:]], channels=WIDE)),
    ],
)
def test_what_the_cpu_passes_cannot_take_falls_back_and_says_so(reason, change):
    layers = Layers("group_norm", **change)
    parameters = [each.float() for each in layers.parameters]
    waveforms = _noise(1, 1200).float()
    with pytest.warns(UserWarning, match="does not run on backend 'cpu', which would be faster: .*" + reason):
        assert torch.isfinite(layers.function()(waveforms, *parameters)).all()
    with backend.using("cpu", OPERATOR), pytest.raises(backend.BackendError, match=reason):
        layers.function()(waveforms, *parameters)
    with backend.using("cpu", OPERATOR), pytest.raises(backend.BackendError, match="not torch.float64"):
        layers.function()(waveforms.double(), *layers.parameters)


@pytest.mark.parametrize("name", [CPU, "torch"])
def test_waveforms_that_require_a_gradient_take_the_reference(name):
    layers = Layers("group_norm", channels=WIDE)
    arguments = layers.groups([each.float() for each in layers.parameters])
    settings = dict(strides=[stride for _, stride in STANDARD], norm="group_norm")
    waveforms = _noise(1, 900).float().requires_grad_()
    conv_frontend(waveforms, *arguments, **settings).sum().backward()
    assert waveforms.grad.abs().sum() > 0
    with (
        backend.using(name, OPERATOR),
        pytest.raises(backend.BackendError, match="gradient with respect to the waveforms"),
    ):
        conv_frontend(waveforms, *arguments, **settings)
    with backend.using(name, OPERATOR), torch.no_grad():
        conv_frontend(waveforms, *arguments, **settings)


@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
@pytest.mark.parametrize("name", [CPU, "torch"])
def test_autocast_gives_its_dtype_and_float32_gradients(name, norm):
    layers = Layers(norm, channels=WIDE)
    parameters = [each.float().requires_grad_() for each in layers.parameters]
    with torch.autocast("cpu", torch.bfloat16), backend.using(name, OPERATOR):
        features = layers.function()(_noise(2, 1200).float(), *parameters)
    assert features.dtype == torch.bfloat16
    features.float().sum().backward()
    assert all(each.grad.dtype == torch.float32 for each in parameters)


@pytest.mark.parametrize("name", [CPU, "torch"])
def test_the_first_bias_has_no_gradient_under_group_norm(name):
    layers = Layers("group_norm", channels=WIDE)
    parameters = [each.float() for each in layers.parameters]
    results = run(OPERATOR, name, lambda *p: layers.function()(_noise(2, 1200).float(), *p), parameters)
    assert (results[1 + len(STANDARD)] == 0).all()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"waveforms must be 2-D .*; got shape \(900,\)", dict(waveforms=torch.zeros(900))),
        (r"waveforms is an empty batch", dict(waveforms=torch.zeros(0, 900))),
        (
            r"waveforms must have the dtype of the model, torch.float32; got torch.float64",
            dict(waveforms=_noise(1, 900)),
        ),
        (r"waveforms must have the dtype .*; got torch.int16", dict(waveforms=torch.zeros(1, 900, dtype=torch.int16))),
        (r"waveforms has 59 samples .* shorter than one frame \(60 samples\)", dict(waveforms=torch.zeros(2, 59))),
        (r"norm must be one of .*; got 'batch_norm'", dict(norm="batch_norm")),
        (r"need 4 strides.*; got 3", dict(strides=[5, 2, 2])),
        (r"strides must be positive; got \[5, 2, 0, 2\]", dict(strides=[5, 2, 0, 2])),
        (r"valid_samples must be int64 of shape \[1\]; got .*\(2,\)", dict(valid_samples=torch.tensor([9, 9]))),
        (r"valid_samples must be int64 .*; got torch.float32", dict(valid_samples=torch.tensor([9.0]))),
    ],
)
def test_bad_arguments_are_named(message, change):
    layers = Layers("group_norm")
    groups = layers.groups([each.float() for each in layers.parameters])
    settings = {"strides": [stride for _, stride in STANDARD], "norm": "group_norm", **change}
    waveforms = settings.pop("waveforms", torch.zeros(1, 900))
    with pytest.raises(ValueError, match=message):
        conv_frontend(waveforms, *groups, **settings)


@pytest.mark.parametrize(
    ("message", "group", "index", "tensor"),
    [
        (r"weights\[1\] must be \[out_channels, 16, kernel\]; got shape \(12, 8, 3\)", 0, 1, torch.zeros(12, 8, 3)),
        (r"weights\[0\] must be \[out_channels, 1, kernel\]; got shape \(16, 2, 10\)", 0, 0, torch.zeros(16, 2, 10)),
        (r"weights\[2\] must be .*; got shape \(8, 12\)", 0, 2, torch.zeros(8, 12)),
        (r"biases\[3\] must have shape \[20\]; got \(1,\)", 1, 3, torch.zeros(1)),
        (r"norm_weights\[0\] must have shape \[16\]; got \(12,\)", 2, 0, torch.zeros(12)),
        (r"norm_biases\[0\] must have shape \[16\]; got \(1,\)", 3, 0, torch.zeros(1)),
        (
            r"norm_biases\[0\] must be on the device of the waveforms, cpu; got meta",
            3,
            0,
            torch.zeros(16, device="meta"),
        ),
    ],
)
def test_parameters_that_do_not_fit_are_named(message, group, index, tensor):
    layers = Layers("group_norm")
    groups = layers.groups([each.float() for each in layers.parameters])
    groups[group][index] = tensor
    with pytest.raises(ValueError, match=message):
        conv_frontend(torch.zeros(1, 900), *groups, strides=[stride for _, stride in STANDARD], norm="group_norm")


def test_the_shortest_audio_gives_one_frame():
    layers = Layers("group_norm")
    assert layers.function()(_noise(1, 60), *layers.parameters).shape == (1, 1, 20)
