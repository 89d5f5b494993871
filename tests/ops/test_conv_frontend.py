"""``conv_frontend``: every backend computes what the layer-by-layer one does."""

from contextlib import contextmanager, nullcontext
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
from tests.ops.comparison import error
from tests.ops.frontend_problem import Problem, assert_as_precise

OPERATOR = "conv_frontend"
STANDARD = [(10, 5), (3, 2), (3, 2), (2, 2)]  # (kernel, stride) of the kinds of layers that HuBERT has
WIDE = (48, 16, 32, 64)  # channels that the C++ passes take

# A result in one dtype beside the same in another order of operations.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}

needs_extension = pytest.mark.skipif(extension.cpu() is None, reason=str(extension.why_not("cpu")))
CPU = pytest.param("cpu", marks=needs_extension)
INSTRUCTION_SETS = extension.cpu().instruction_sets() if extension.cpu() else []

on_fast_backends = pytest.mark.parametrize("name", [CPU, "torch"])
on_every_backend = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("torch", torch.float64),
        ("reference", torch.float64),
        pytest.param("cpu", torch.float32, marks=needs_extension),
    ],
)
with_both_norms = pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])


def _problem(norm="group_norm", *, shapes=STANDARD, channels=WIDE, dtype=torch.float32, **settings):
    return Problem(shapes, norm=norm, channels=channels, dtype=dtype, **settings)


def _assert_agree(problem, tolerance=1e-10):
    errors = [error(*pair) for pair in zip(problem.run("torch"), problem.run("reference"), strict=True)]
    assert max(errors) <= tolerance, errors


SETTINGS = dict(
    batch=st.integers(1, 3), frames=st.integers(1, 40), extra=st.integers(0, 9),
    norm=st.sampled_from(["group_norm", "layer_norm"]), bias=st.booleans(), valid=st.none() | st.floats(0, 1),
    chunk=st.integers(1, 30), seed=st.integers(0, 100),
)  # fmt: skip


def _any_problem(shapes, batch, frames, extra, valid, fewest, norm, **settings):
    """One that gives so many frames; under group norm ``fewest`` of layer 0 at least, as its statistics need some."""
    samples = frames
    for kernel, stride in reversed(shapes):
        samples = (samples - 1) * stride + kernel
    samples += extra
    # No audio as long as a HuBERT frame gives layer 0 so little.
    assume(norm == "layer_norm" or (samples - shapes[0][0]) // shapes[0][1] >= fewest)
    valid = None if valid is None else torch.tensor([samples, int(valid * samples), samples])[:batch]
    return _problem(norm, shapes=shapes, batch=batch, samples=samples, valid=valid, **settings)


@given(shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 5)), min_size=1, max_size=4), **SETTINGS)
def test_backends_agree_for_any_shape(chunk, **settings):
    problem = _any_problem(**settings, fewest=1, channels=(6, 5, 4, 3), dtype=torch.float64)
    with mock.patch.object(gemms, "_CPU_CHUNK_ROWS", chunk):
        _assert_agree(problem, tolerance=1e-8)


@pytest.mark.parametrize("valid", [None, torch.tensor([2003, 700])], ids=["all-valid", "valid-samples"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@with_both_norms
def test_backends_agree_over_many_chunks(norm, bias, valid):
    with mock.patch.object(gemms, "_CPU_CHUNK_ROWS", 16):
        _assert_agree(_problem(norm, bias=bias, samples=2003, valid=valid, dtype=torch.float64))


@needs_extension
@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=4),
    channels=st.lists(st.sampled_from([16, 32, 48]), min_size=4, max_size=4),
    instruction_set=st.sampled_from(INSTRUCTION_SETS or ["none"]),
    **SETTINGS,
)
def test_cpu_passes_agree_for_any_shape(chunk, instruction_set, **settings):
    problem = _any_problem(**settings, fewest=9)  # of fewer the variance may be anything, and float32's error with it
    with (
        mock.patch.object(passes, "_FORWARD_ROWS", chunk),
        mock.patch.object(passes, "_BACKWARD_ROWS", chunk),
        _instruction_set(instruction_set),
    ):
        results = problem.run("cpu")
    for ours, theirs, exact in zip(
        results, problem.run("reference"), problem.run("reference", torch.float64), strict=True
    ):
        if exact.norm() >= 1e-9:  # the bias of layer 0 under group norm has none
            assert error(ours, exact) <= max(4 * error(theirs, exact), 3e-6)


@contextmanager
def _instruction_set(name):
    before = extension.cpu().instruction_set()
    extension.cpu().use_instruction_set(name)
    try:
        yield
    finally:
        extension.cpu().use_instruction_set(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@with_both_norms
@pytest.mark.parametrize(("name", "instruction_set"), [*(("cpu", each) for each in INSTRUCTION_SETS), ("torch", None)])
def test_as_precise_as_pytorch(name, instruction_set, norm, dtype):
    problems = (_problem(norm, channels=32, samples=1500, dtype=dtype, seed=seed) for seed in range(6))
    with nullcontext() if instruction_set is None else _instruction_set(instruction_set):
        assert_as_precise(lambda problem: problem.run(name), problems)


@needs_extension
def test_chunks_of_a_weight_gradient_add_up_in_float32():
    """1,500 chunks of 4 blocks: sums in bfloat16 would lose the later ones."""
    problem = _problem(shapes=STANDARD[:2], channels=16, batch=1, samples=60_000, dtype=torch.bfloat16)
    with mock.patch.object(passes, "_BACKWARD_ROWS", 4):
        ours = problem.run("cpu")
    for many, one, exact in list(zip(ours, problem.run("cpu"), problem.run("reference", torch.float64)))[1:3]:
        assert error(many, exact) <= 2 * error(one, exact)


@needs_extension
def test_sums_of_layer_0_over_many_frames_keep_their_precision():
    problem = _problem(shapes=STANDARD[:1], channels=16, bias=False, batch=1, samples=1_500_000, offset=0.5)
    for ours, truth in list(zip(problem.run("cpu"), problem.run("reference", torch.float64)))[1:]:
        assert error(ours, truth) <= 1e-6


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 1.0), (0.1, 1.0), (1e-4, 0.0), (1e-4, 1e-2), (30.0, 500.0)])
@on_fast_backends
def test_neither_an_offset_nor_a_small_signal_loses_the_variance(name, scale, offset):
    """Layer 0 takes its variance from moments of the waveform: float32 must not cancel in them."""
    problem = _problem(bias=False, scale=scale, offset=offset)
    assert_as_precise(lambda problem: problem.run(name), [problem], floor=2e-6)


@on_fast_backends
def test_a_silent_row_gives_finite_features_and_gradients(name):
    problem = _problem(samples=900)
    problem.waveforms[1] = 0.0
    _assert_agree(problem.changed(dtype=torch.float64))
    assert all(each.isfinite().all() for each in problem.run(name))


@on_every_backend
def test_valid_samples_make_a_row_independent_of_its_padding(name, dtype):
    problem = _problem(samples=2000, valid=torch.tensor([2000, 900]), dtype=dtype)
    problem.waveforms[1, 900:] = 0.0
    padded, unaware = (each.features(name)[1] for each in (problem, problem.changed(valid=None)))
    alone = problem.changed(waveforms=problem.waveforms[1:, :900], valid=torch.tensor([900])).features(name)[0]
    frames = output_length(900, *zip(*STANDARD))
    assert error(padded[:frames], alone[:frames]) <= TOLERANCE[dtype]
    assert error(unaware[:frames], alone[:frames]) > 1e-3


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@on_every_backend
def test_lengths_count_whole_windows_and_no_more_than_there_are(name, dtype, bias):
    """70 samples hold the 13 windows that 74 hold, and 75 one more; past the end of the row there is nothing."""
    problem = _problem(bias=bias, batch=1, samples=700, dtype=dtype)
    lengths = (70, 74, 75, 700, 5000)
    by_length = {length: problem.changed(valid=torch.tensor([length])).features(name) for length in lengths}
    assert torch.equal(by_length[70], by_length[74])
    assert error(by_length[75], by_length[70]) > 1e-3
    assert torch.equal(by_length[5000], by_length[700])
    assert error(by_length[700], problem.features(name)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@on_every_backend
def test_a_row_too_short_for_a_window_takes_all_its_samples(name, dtype, bias):
    problem = _problem(bias=bias, batch=3, samples=2000, dtype=dtype)
    given = problem.changed(valid=torch.tensor([2000, 0, 9])).features(name)
    assert error(given, problem.features(name)) <= TOLERANCE[dtype]


@on_every_backend
def test_a_gradient_with_any_strides_is_taken(name, dtype):
    problem = _problem(samples=1200, dtype=dtype)
    ones = torch.ones_like(problem.direction, dtype=dtype)
    layouts = ones, ones.transpose(1, 2).contiguous().transpose(1, 2), ones[..., :1].expand_as(ones)
    for first, *others in zip(*(problem.changed(direction=each).run(name) for each in layouts)):
        assert all(error(each, first) <= 100 * TOLERANCE[dtype] for each in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@with_both_norms
@on_fast_backends
def test_the_same_numbers_every_time_and_at_every_place_in_the_batch(name, norm, dtype):
    problem = _problem(norm, batch=3, samples=7001, dtype=dtype)
    problem.waveforms[2] = problem.waveforms[0]
    first, second = (problem.run(name) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second))
    alone = problem.changed(waveforms=problem.waveforms[:1]).features(name)[0]
    assert torch.equal(first[0][0], first[0][2]) and torch.equal(first[0][0], alone)


@needs_extension
@with_both_norms
def test_cpu_passes_do_not_depend_on_the_number_of_threads(norm):
    """Only the passes: how BLAS splits a product among threads is its own affair, so layer 0 stands alone here."""
    problem = _problem(norm, shapes=STANDARD[:1], samples=30_001)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(problem.run("cpu"))
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*results):
        assert all(torch.equal(one, other) for other in others)


@needs_extension
@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("needs channels in multiples of 16; the layers have .*12", dict(channels=(16, 12, 16, 16))),
        ("layer 0 has at most 32 taps; this one has 33", dict(shapes=[(33, 5), *STANDARD[1:]])),
    ],
)
def test_what_the_cpu_passes_cannot_take_falls_back_and_says_so(reason, change):
    problem = _problem(batch=1, samples=1200, **change)
    with pytest.warns(UserWarning, match="does not run on backend 'cpu', which would be faster: .*" + reason):
        assert torch.isfinite(problem.features("auto")).all()
    with pytest.raises(backend.BackendError, match=reason):
        problem.features("cpu")
    with pytest.raises(backend.BackendError, match="not torch.float64"):
        problem.changed(dtype=torch.float64).features("cpu")


@on_fast_backends
def test_waveforms_that_require_a_gradient_take_the_reference(name):
    problem = _problem(batch=1, samples=900)
    arguments = problem.arguments()
    arguments.waveforms.requires_grad_()
    problem.call(conv_frontend, arguments).sum().backward()
    assert arguments.waveforms.grad.abs().sum() > 0
    with backend.using(name, OPERATOR):
        with pytest.raises(backend.BackendError, match="gradient with respect to the waveforms"):
            problem.call(conv_frontend, arguments)
        with torch.no_grad():
            problem.call(conv_frontend, arguments)


@with_both_norms
@on_fast_backends
def test_autocast_gives_its_dtype_and_float32_gradients(name, norm):
    problem = _problem(norm, samples=1200)
    with torch.autocast("cpu", torch.bfloat16):
        features, *gradients = problem.run(name)
    assert features.dtype == torch.bfloat16
    assert all(each.dtype == torch.float32 for each in gradients)


@on_fast_backends
def test_the_first_bias_has_no_gradient_under_group_norm(name):
    assert (_problem(samples=1200).run(name)[1 + len(STANDARD)] == 0).all()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"waveforms must be 2-D .*; got shape \(900,\)", dict(waveforms=torch.zeros(900))),
        (r"waveforms is an empty batch", dict(waveforms=torch.zeros(0, 900))),
        (
            r"waveforms must have the dtype of the model, torch.float32; got torch.float64",
            dict(waveforms=torch.zeros(1, 900).double()),
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
    problem = _problem(channels=(16, 12, 8, 20), batch=1, samples=900)
    with pytest.raises(ValueError, match=message):
        problem.call(conv_frontend, problem.arguments()._replace(**change))


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
    problem = _problem(channels=(16, 12, 8, 20), batch=1, samples=900)
    problem.groups[group][index] = tensor
    with pytest.raises(ValueError, match=message):
        problem.features("auto")


def test_the_shortest_audio_gives_one_frame():
    assert _problem(batch=1, samples=60).features("auto").shape == (1, 1, 64)


@on_fast_backends
def test_filters_of_one_tap_are_kept_as_copies(name):
    """`torch.library` refuses an operator that returns what it was given, and such filters need no other layout."""
    problem = _problem(shapes=[(10, 5), (1, 1)], channels=(16, 16))
    waveforms, groups = (
        torch.randn(2, 401),
        [[each.float().requires_grad_() for each in group] for group in problem.groups],
    )
    with backend.using(name, OPERATOR):
        expected = conv_frontend(waveforms, *groups, strides=[5, 1], norm="group_norm")
        with torch.device("cpu"):  # a mode, so the call is seen
            found = conv_frontend(waveforms, *groups, strides=[5, 1], norm="group_norm")
    torch.testing.assert_close(found, expected)


def test_short_audio_in_mixed_dtypes_is_taken_as_long_audio_is():
    problem = _problem()
    groups = [[each.half() for each in group] for group in problem.groups]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for samples in (4000, 30_000):
            features = conv_frontend(torch.randn(1, samples).half(), *groups, strides=[5, 2, 2, 2], norm="group_norm")
            assert features.dtype == torch.bfloat16
