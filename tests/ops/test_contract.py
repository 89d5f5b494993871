"""What every operator promises on every backend, whatever it computes."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hubert_fast import backend
from hubert_fast.cuda_backend import feed_forward
from tests.kernels.device import DEVICE
from tests.ops import cpu_dropout_twin, products_twin
from tests.ops.comparison import error
from tests.ops.contract import OPERATORS, ROWS, backends, gradients, leaves, present, run, with_gradients

try:
    from hubert_fast.kernels.launch import INTERPRETED
    from tests.kernels import dropout_twin
except ImportError:  # Triton
    INTERPRETED = False

DTYPES = {"torch": [torch.float64, torch.float32], "cpu": [torch.float32, torch.bfloat16]}
ALL = list(backends(DEVICE, interpreted=INTERPRETED))
EVERY = [(case, name, dtype) for case, name in ALL for dtype in DTYPES.get(name, [torch.float32, torch.bfloat16])]


@pytest.fixture(autouse=True)
def _products_are_pytorchs(monkeypatch):
    monkeypatch.setattr(feed_forward, "extension", SimpleNamespace(cuda=lambda: products_twin))


def _id(value):
    return f"{value.operator}, {value.name}" if hasattr(value, "operator") else str(value).removeprefix("torch.")


every = pytest.mark.parametrize(("case", "name", "dtype"), EVERY, ids=_id)
each = pytest.mark.parametrize(("case", "name"), ALL, ids=_id)


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(
        (a is None and b is None) or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(ours, theirs)
    )


class _Watching(TorchDispatchMode):
    """Does nothing, and must not change what is computed; notes what it sees of ours."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@every
def test_gradients_and_results_are_those_of_the_formula(case, name, dtype):
    arguments = case.cast(dtype, DEVICE)
    truth = _truth(case, name, arguments)
    tolerances = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.04}
    for given, exact in zip(run(case.operator, name, arguments), truth, strict=True):
        if given is not None:  # an absent result
            exact = torch.zeros_like(given) if exact is None else exact
            assert error(given, exact) < max(tolerances[dtype], tolerances.get(given.dtype, 0.0))


@pytest.mark.parametrize(
    ("case", "name"), [each for each in ALL if ROWS.intersection(each[0].arguments._fields)], ids=_id
)
def test_16_bit_rows_meet_float32_parameters(case, name):
    """Results have the dtypes that are announced. Kernels round nothing that is float32 but the filters of a convolution."""
    arguments, operator = case.cast(torch.float32, DEVICE, rows=torch.bfloat16), OPERATORS[case.operator]
    results = present(operator.run(name, arguments))
    assert [each.dtype for each in results] == [each.dtype for each in present(operator.fake(arguments, True))]
    truth = [each for each in _truth(case, name, arguments) if each is not None]
    for given, exact in zip(with_gradients(case.operator, results, arguments), truth, strict=True):
        exactly = given.dtype == torch.float32 and name == "triton" and case.operator != "positional_conv"
        assert error(given, exact) < (2e-5 if exactly else 0.02)


def _truth(case, name, arguments):
    """Results and gradients of the reference in float64, with the masks of backend ``name``."""
    twin = dropout_twin if name == "triton" else cpu_dropout_twin if name == "cpu" else None
    with nullcontext() if twin is None else twin.in_references():
        return run(case.operator, "reference", type(arguments)(*_widened(arguments)))


def _widened(arguments):
    for value in arguments:
        if isinstance(value, list):
            yield list(_widened(value))
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            yield value.detach().double().requires_grad_(value.requires_grad)
        else:
            yield torch.float64 if isinstance(value, torch.dtype) else value


@every
def test_two_runs_are_equal_to_the_bit(case, name, dtype):
    assert equal(*(run(case.operator, name, case.cast(dtype, DEVICE)) for _ in range(2)))


@each
def test_the_registered_operator_is_as_torch_wants_it(case, name):
    arguments = case.cast(DTYPES.get(name, [torch.float32])[-1], DEVICE)
    torch.library.opcheck(getattr(torch.ops.hubert_fast, case.operator).default, (*arguments, True, name))


@pytest.mark.parametrize("forward_too", [True, False])
@each
def test_a_dispatch_mode_sees_one_operator_and_changes_nothing(case, name, forward_too):
    arguments, watching = case.cast(torch.float32, DEVICE), _Watching()
    with watching if forward_too else nullcontext():
        results = OPERATORS[case.operator].run(name, arguments)
    with watching:
        seen = with_gradients(case.operator, results, arguments)
    names = [case.operator] * forward_too + [f"{case.operator}_backward"]
    assert {f"hubert_fast.{each}.default" for each in names} <= set(watching.seen)
    assert equal(seen, run(case.operator, name, arguments))


@each
def test_it_compiles_into_one_graph_and_no_number_of_rows_into_it(case, name):
    operator = OPERATORS[case.operator]
    arguments = case.cast(torch.float32, DEVICE)

    def results(*arguments):
        return operator.run(name, type(case.arguments)(*arguments))

    rows = len(arguments[0])
    for value in arguments:
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows:
            torch._dynamo.mark_dynamic(value, 0)  # an error where it is made a number
    torch._dynamo.reset()  # one code object for every operator would be compiled anew too often
    found = torch.compile(results, fullgraph=True, backend="aot_eager")(*arguments)
    assert equal(with_gradients(case.operator, found, arguments), run(case.operator, name, arguments))


@each
def test_what_it_saves_is_what_it_announces(case, name):
    arguments = case.cast(torch.float32, DEVICE)
    operator = OPERATORS[case.operator]
    module = operator.implementation(name)
    with torch.no_grad():
        _, saved = operator.forward(name, arguments, True)
        assert operator.forward(name, arguments, False)[1] == []
    announced = getattr(module, "saved_tensors", lambda arguments: [])(arguments)
    assert [(tuple(value.shape), value.dtype) for value in saved] == [(tuple(shape), its) for shape, its in announced]


@each
def test_autocast_reaches_into_no_implementation(case, name):
    arguments = case.cast(torch.float32, DEVICE)
    expected = run(case.operator, name, arguments)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert equal(run(case.operator, name, arguments), expected)


@each
def test_inputs_and_gradients_are_taken_as_they_lie(case, name):
    def moved(tensor):
        return tensor.movedim(0, -1).repeat_interleave(2, -1)[..., ::2].movedim(-1, 0) if tensor.ndim else tensor

    def part_of_wider_rows(tensor):
        return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]] if tensor.ndim else tensor

    def results(lay, direction):
        def changed(value):
            if isinstance(value, list):
                return [changed(inner) for inner in value]
            is_tensor = isinstance(value, torch.Tensor)
            return lay(value.detach()).requires_grad_(value.requires_grad) if is_tensor else value

        arguments = case.cast(torch.float32, DEVICE)
        arguments = type(arguments)(*map(changed, arguments))
        outputs = [value for value in present(OPERATORS[case.operator].run(name, arguments)) if value.requires_grad]
        directions = [direction(value.detach().nan_to_num(neginf=0.0)) for value in outputs]
        of = leaves(case.operator, arguments)
        return [*outputs, *torch.autograd.grad(outputs, of, directions, allow_unused=True)]

    def assert_equal(ours, theirs):
        for given, expected in zip(ours, theirs, strict=True):
            assert (given is None) == (expected is None)
            assert given is None or error(given.nan_to_num(), expected.nan_to_num()) < 1e-6

    dense = results(torch.clone, torch.ones_like)
    assert_equal(results(moved, lambda output: output.new_ones(()).expand_as(output)), dense)
    assert_equal(results(part_of_wider_rows, moved), results(torch.clone, torch.clone))


@each
def test_only_the_gradients_that_are_wanted_come(case, name):
    full = case.cast(torch.float32, DEVICE)
    expected = run(case.operator, name, full)
    count = len(leaves(case.operator, full))
    for chosen in {0, count - 1}:
        arguments = case.cast(torch.float32, DEVICE)
        every_leaf = leaves(case.operator, arguments)
        for i, leaf in enumerate(every_leaf):
            leaf.requires_grad_(i == chosen)
        results = present(OPERATORS[case.operator].run(name, arguments))
        (gradient,) = gradients(results, [every_leaf[chosen]])
        assert equal([gradient], [expected[len(expected) - count + chosen]])


@each
def test_the_default_device_is_not_that_of_what_an_implementation_allocates(case, name):
    arguments = case.cast(torch.float32, DEVICE)
    expected = run(case.operator, name, arguments)
    of = leaves(case.operator, arguments)
    with torch.device("meta"):
        results = OPERATORS[case.operator].run(name, arguments)
    found = with_gradients(case.operator, results, arguments)
    assert equal(found, expected)
    results = [value for value in present(OPERATORS[case.operator].run(name, arguments)) if value.requires_grad]
    total = sum(value.nan_to_num(neginf=0.0).square().sum() for value in results)
    expected = torch.autograd.grad(total, of, retain_graph=True, allow_unused=True)
    with torch.device("meta"):
        torch.autograd.backward(total)
    assert equal([value.grad for value in of], expected)


@each
def test_tracing_before_dispatch_sees_one_operator(case, name):
    arguments = case.cast(torch.float32, DEVICE)

    def results(first):
        return present(OPERATORS[case.operator].run(name, type(arguments)(first, *arguments[1:])))

    traced = make_fx(results, pre_dispatch=True)(arguments[0])
    assert f"hubert_fast.{case.operator}.default" in traced.code


class _Call(torch.nn.Module):
    def __init__(self, operator, name, arguments):
        super().__init__()
        self.call = lambda first: present(operator.run(name, type(arguments)(first, *arguments[1:])))

    def forward(self, first):
        return self.call(first)


@pytest.mark.filterwarnings("ignore:A model attribute")  # parameters are constants here
@pytest.mark.parametrize(
    ("case", "name"), {case.operator: (case, name) for case, name in reversed(ALL)}.values(), ids=_id
)
def test_exporters_see_aten_alone(case, name):
    if case.operator == "positional_conv":
        pytest.skip("its formula goes from sequence to sequence; exporters see the module that it stands for")
    arguments = case.cast(torch.float32, DEVICE)
    with torch.no_grad():
        call = _Call(OPERATORS[case.operator], name, arguments)
        program = torch.export.export(call, (arguments[0].detach(),))
        found, expected = (
            program.module()(arguments[0].detach()),
            present(OPERATORS[case.operator].reference(arguments)),
        )
    assert "hubert_fast" not in program.graph_module.code
    assert all(error(given, exact) < 2e-5 for given, exact in zip(found, expected, strict=True))


@each
def test_without_a_gradient_nothing_is_kept(case, name):
    kept = []
    arguments = case.cast(torch.float32, DEVICE)
    with torch.no_grad(), saved_tensors_hooks(kept.append, lambda value: value):
        results = OPERATORS[case.operator].run(name, arguments)
    assert not kept and not any(value.requires_grad for value in present(results))


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("name", sorted({name for case, name in ALL if case.operator == "residual_layer_norm"}))
def test_layer_norm_keeps_the_residual_only_where_no_update_was_added_to_it(name, seen):
    kept = {}
    for case, its in ALL:
        if case.operator == "residual_layer_norm" and its == name:
            arguments, sizes = case.cast(torch.float32, DEVICE), []
            with saved_tensors_hooks(lambda value, sizes=sizes: sizes.append(value.nbytes), lambda _: None):
                with _Watching() if seen else nullcontext():
                    OPERATORS[case.operator].run(name, arguments)
            vectors = [arguments.weight, arguments.bias, arguments.update_bias, arguments.index, arguments.seed]
            kept[case.name] = sum(sizes) - sum(each.nbytes for each in vectors if each is not None)
    normed, statistics = 6 * 5 * 4, 2 * 6 * 4  # the residual has nine rows where there is an index
    assert kept and set(kept.values()) == {normed + statistics}, kept


@each
def test_there_is_no_second_derivative(case, name):
    arguments = case.cast(torch.float32, DEVICE)
    results = OPERATORS[case.operator].run(name, arguments)
    results = [value for value in present(results) if value.requires_grad]
    total = sum(value.nan_to_num(neginf=0.0).square().sum() for value in results)
    of = leaves(case.operator, arguments)
    found = torch.autograd.grad(total, of, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError):
        sum(value.square().sum() for value in found if value is not None).backward()


@pytest.mark.parametrize("watched", ["nothing", "forward", "backward"])
@each
def test_activations_may_be_recomputed_also_under_a_mode_that_the_forward_was_not_under(case, name, watched):
    arguments = case.cast(torch.float32, DEVICE)
    operator = OPERATORS[case.operator]
    with _Watching() if watched == "forward" else nullcontext():
        found = checkpoint(partial(operator.run, name), arguments, use_reentrant=False)
    with _Watching() if watched == "backward" else nullcontext():
        found = with_gradients(case.operator, found, arguments)
    assert equal(found, run(case.operator, name, arguments))


@each
def test_the_graph_of_a_backward_is_not_left_out_where_the_gradient_given_needs_none(case, name):
    arguments = case.cast(torch.float32, DEVICE)
    operator = OPERATORS[case.operator]
    results = [value for value in present(operator.run(name, arguments)) if value.requires_grad]
    total = sum(value.nan_to_num(neginf=0.0).sum() for value in results)
    found = torch.autograd.grad(total, leaves(case.operator, arguments), create_graph=True, allow_unused=True)
    constant = case.operator == "bias_dropout_residual" and arguments.bias is None
    assert constant != any(value.requires_grad for value in found if value is not None)


@pytest.mark.parametrize(
    ("case", "name"), {(case.operator, name): (case, name) for case, name in ALL}.values(), ids=_id
)
def test_compiled_autograd_takes_what_ran_eagerly(case, name):
    arguments = case.cast(torch.float32, DEVICE)
    expected = run(case.operator, name, arguments)
    results = OPERATORS[case.operator].run(name, arguments)
    torch._dynamo.reset()
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        assert equal(with_gradients(case.operator, results, arguments), expected)


@each
def test_a_forward_mode_derivative_is_refused(case, name):
    arguments = case.cast(torch.float32, DEVICE)

    def results(tensor):
        return OPERATORS[case.operator].run(name, type(arguments)(tensor, *arguments[1:]))

    with pytest.raises(NotImplementedError, match=f"{case.operator!r} has no forward-mode derivative"):
        torch.func.jvp(results, (arguments[0],), (torch.ones_like(arguments[0]),))


@each
def test_profilers_see_it_by_name(case, name, monkeypatch):
    monkeypatch.setenv(
        "KINETO_LOG_LEVEL", "99"
    )  # read by the first profile of a process: what it logs, other tests see
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run(case.operator, name, case.cast(torch.float32, DEVICE))
    seen = {event.name for event in profiler.events()}
    assert {f"hubert_fast::{case.operator}", f"hubert_fast::{case.operator}_backward"} <= seen


@each
def test_fake_tensors_go_through_without_being_read(case, name):
    real = case.cast(torch.float32, DEVICE)
    expected = run(case.operator, name, real)
    with FakeTensorMode() as mode:
        fake = type(real)(*(_faked(mode, value) for value in real))
        found = run(case.operator, name, fake)
    for given, value in zip(found, expected, strict=True):
        assert (given is None) == (value is None)
        assert given is None or (given.shape, given.dtype) == (value.shape, value.dtype)


def _faked(mode, value):
    if isinstance(value, list):
        return [_faked(mode, inner) for inner in value]
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("operator", sorted({case.operator for case, name in ALL if name == "triton"}))
def test_what_triton_does_not_take_is_refused_by_name_and_goes_elsewhere_by_itself(operator):
    case = next(case for case, _ in ALL if case.operator == operator)
    arguments = case.cast(torch.float64, DEVICE)
    with backend.using("triton", operator), pytest.raises(backend.BackendError, match="got torch.float64"):
        OPERATORS[operator](arguments)
    assert OPERATORS[operator].choose(arguments) in ("torch", "reference")


def test_every_operator_is_here():
    assert {case.operator for case, _ in ALL} == {each.operator for each in backend.report()} - {"span_mask"}
