"""Every operator's cases run, their implementations agree, and their least work is what PyTorch counts."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.operators import OPERATORS, cases_of
from benchmarks.ops import bench_residual_layer_norm
from benchmarks.ops.calls import Calls, WrongResult
from benchmarks.ops.case import OURS, Inputs, OperatorCase, Side, Work, both_ways
from benchmarks.ops.turns import in_turn
from benchmarks.report import Seconds
from benchmarks.sizes import size_on

TINY = size_on("cpu", "tiny")


def _cases(operator, dtype=torch.float32, size=TINY):
    return cases_of(operator, size, dtype, "cpu")


@pytest.mark.parametrize("operator", OPERATORS)
def test_implementations_of_every_case_agree_in_float32(operator):
    cases = _cases(operator)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        calls = Calls(case)
        names = [name for name, side in case.sides.items() if not side.compiled]
        assert OURS in names
        for name in names:
            call, error = calls.make(name)
            assert error < 1e-4, (case.name, name)
            assert len(call(0)) == len(call(1)) >= 1


def test_gradients_are_computed_in_the_cases_that_say_so():
    both, forward = _cases("positional_conv")[:2]
    for case, results in ((both, 5), (forward, 1)):  # the output; the gradients of rows, weight, bias and gain
        call, _ = Calls(case).make(OURS)
        assert len(call(0)) == results


def test_layer_norm_models_have_their_own_front_end():
    size = replace(TINY, norm="layer_norm")
    case = _cases("conv_frontend", size=size)[0]
    calls = Calls(case)
    for name in (OURS, "torchaudio"):
        if name in case.sides:
            assert calls.make(name)[1] < 1e-4
    assert "layer_norm" in case.name


def _counted_flops(case):
    inputs = case.truth.prepare(case.draw(0))
    with FlopCounterMode(display=False) as counter:
        outputs = case.truth.function(inputs.tensors, 0.0)
        if case.backward:
            torch.autograd.backward(outputs, inputs.directions)
    return counter.get_total_flops()


# Work counts the valid frames only, so attention and convolution are held against a batch without padding.
@pytest.mark.parametrize(
    ("operator", "name"),
    [
        ("conv_frontend", "all layers"),
        ("conv_frontend", "layer 0"),
        ("cosine_logits", ""),
        ("feed_forward", ""),
        ("masked_attention", "100% valid"),
    ],
)
@pytest.mark.parametrize("backward", [True, False])
def test_flops_are_those_of_pytorchs_operations(operator, name, backward):
    case = next(case for case in _cases(operator) if case.backward is backward and name in case.name)
    assert _counted_flops(case) == case.least.flops


def test_flops_of_the_positional_convolution_are_those_of_pytorchs_operations():
    both, forward = (case for case in _cases("positional_conv") if "100% valid" in case.name)
    # PyTorch computes a frame more, and then drops it. Its counter does not know groups in a backward.
    assert _counted_flops(forward) * TINY.frames == forward.least.flops * (TINY.frames + 1)
    assert both.least.flops == 3 * forward.least.flops


def test_bytes_of_a_pass_are_its_tensors_once_each():
    both, forward = _cases("bias_dropout_residual", torch.bfloat16)[:2]
    tensor = 2 * TINY.rows * TINY.dim
    assert forward.least.bytes == 3 * tensor  # x, residual, result
    assert both.least.bytes == 5 * tensor  # and the gradients of the result and of x


@pytest.mark.parametrize(("dropout_p", "of_update"), [(0.1, True), (0.0, False)])
def test_the_stream_of_a_post_norm_model_is_float32_on_a_gpu_and_its_bytes_count_so(dropout_p, of_update):
    values = TINY.rows * TINY.dim
    for device, stream in (("cuda", 4), ("cpu", 2)):
        cases = cases_of("residual_layer_norm", TINY, torch.bfloat16, device)
        both, forward, *copied = (case for case in cases if case.dropout_p == dropout_p and "post-norm" in case.name)
        pre_norm = next(case for case in cases if not case.backward and "pre-norm" in case.name)
        assert forward.least.bytes == (2 * stream + 2) * values  # residual and normed; update
        backward = both.least.bytes - forward.least.bytes
        another = of_update or stream == 4  # else the update has the residual's gradient
        assert backward == (4 * stream + 2 * another) * values
        more = [ours.least.bytes - plain.least.bytes for ours, plain in zip(copied, (both, forward))]
        assert more == ([4 * values, 2 * values] if stream == 4 else [])  # the copy, and its gradient
        assert pre_norm.least.bytes == 4 * 2 * values and pre_norm.shape["stream"] == "bfloat16"


def test_a_float32_stream_and_its_16_bit_update_are_what_is_measured(monkeypatch):
    monkeypatch.setattr(bench_residual_layer_norm, "stream_dtype", lambda dtype, device, pre_norm: torch.float32)
    plain, _, copied, *_ = _cases("residual_layer_norm", torch.bfloat16)
    for case, copy in ((plain, []), (copied, [torch.bfloat16])):
        residual, update, *_ = case.draw(0).tensors
        assert (residual.dtype, update.dtype) == (torch.float32, torch.bfloat16) and "float32 stream" in case.name
        calls = Calls(case)
        for name in (OURS, "PyTorch"):
            call, error = calls.make(name)
            dtypes = [each.dtype for each in call(0)]  # of normed, copy, gradients of residual and update
            assert dtypes[: 3 + len(copy)] == [torch.float32, *copy, torch.float32, torch.bfloat16]
            assert error < 0.02


def _double(scale=1.0, gradient_scale=1.0, offset=0.0):
    """2 x, or something near it."""

    def function(tensors, dropout_p):
        (x,) = tensors
        y = 2.0 * scale * x + offset
        return (y + (gradient_scale - 1.0) * 2.0 * (x - x.detach()),)

    return Side(function, "1")


def _doubling(**sides):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        x, direction = (torch.randn(4, 3, generator=generator) for _ in range(2))
        return Inputs((x.requires_grad_(),), (direction,))

    case = OperatorCase("2 x", {}, "cpu", torch.float32, draw, {OURS: _double(), **sides}, _double(), Work(24.0, 12.0))
    return next(both_ways(case, Work(8.0)))


@pytest.mark.parametrize(
    "wrong",
    [
        _double(scale=1.01),
        _double(gradient_scale=1.01),
        _double(offset=float("inf")),
        Side(lambda tensors, dropout_p: (2.0 * tensors[0].flatten(),), "1"),
    ],
    ids=["a result", "a gradient", "infinite", "shape"],
)
def test_an_implementation_that_does_other_work_is_rejected(wrong):
    calls = Calls(_doubling(other=wrong))
    calls.make(OURS)
    with pytest.raises((WrongResult, RuntimeError), match="other is wrong|Mismatch in shape"):
        calls.make("other")


def test_a_case_with_its_backward_has_the_work_of_both():
    case = _doubling()
    assert case.backward and case.least == Work(32.0, 12.0)


def test_calls_work_on_other_inputs_in_turn():
    call, _ = Calls(_doubling()).make(OURS)
    assert not torch.equal(call(0)[0], call(1)[0])
    assert torch.equal(call(0)[0], call(64)[0])  # as many sets as there may be


def test_implementations_do_not_follow_each_other_on_the_same_inputs():
    case = _doubling()
    case = replace(case, sides={"a": case.sides[OURS], "b": case.sides[OURS]})
    calls = Calls(case)
    (first, _), (second, _) = calls.make("a"), calls.make("b")
    assert not torch.equal(first(0)[0], second(0)[0])
    assert torch.equal(first(32)[0], second(0)[0])  # they work on the same sets all the same


class _Compiling:
    """2 x by a kernel that takes half a second when it first sees a shape and dtype, forward and backward each."""

    def __init__(self, advance):
        self.seen, self.advance, self.compiled = set(), advance, 0

    def compile(self, direction, x):
        if (direction, x.shape, x.dtype) not in self.seen:
            self.seen.add((direction, x.shape, x.dtype))
            self.compiled += 1
            self.advance(0.5)
        self.advance(0.001)

    def __call__(self, tensors, dropout_p):
        (x,) = tensors
        self.compile("forward", x)
        y = 2.0 * x
        if y.requires_grad:
            y.register_hook(lambda grad: self.compile("backward", grad))
        return (y,)


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_compiled_for_a_shape_falls_into_no_timed_call_and_not_into_their_time(virtual_time, backward, dtype):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        x, direction = (torch.randn(1 + seed % 5, 3, generator=generator).to(dtype) for _ in range(2))
        return Inputs((x.requires_grad_(),), (direction,))

    kernel = _Compiling(virtual_time)
    sides = {OURS: Side(kernel, "1")}
    case = replace(_doubling(), draw=draw, sides=sides, truth=_double(), dtype=dtype, backward=backward)
    call, _ = Calls(case).make(OURS)
    assert kernel.compiled == 5 * (1 + backward)
    taken, _ = in_turn({OURS: call}, "cpu", repeats=20, seconds=1.0)
    seconds = Seconds.of(taken[OURS])
    assert seconds.count == 20 and seconds.median == pytest.approx(seconds.p80) == pytest.approx(0.001 * (1 + backward))


def test_dropout_is_on_in_calls_and_off_in_checks():
    side = Side(lambda tensors, dropout_p: (F.dropout(tensors[0], dropout_p),), "1")
    case = replace(_doubling(), sides={OURS: side}, truth=side, dropout_p=0.5)
    call, error = Calls(case).make(OURS)
    assert error == 0.0 and (call(0)[0] == 0.0).any()
