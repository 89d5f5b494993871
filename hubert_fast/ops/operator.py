"""An operator is declared once, its arguments as a NamedTuple; autograd, `torch.library` and the backends follow from that.

An implementation is a module of the operator's name in the package of a backend (`hubert_fast.torch_backend`,
`hubert_fast.kernels`...), with

    forward(arguments, save) -> results, saved                 saved: what the backward reads besides arguments; [] unless save
    backward(arguments, saved, gradients, wanted) -> list      a gradient for each argument that has one; None unless wanted
    saved_tensors(arguments) -> [(shape, dtype), ...]          of what ``forward`` saves; absent where that is nothing

The backward's ``saved`` begins with the results that the operator's ``kept_results`` names. ``gradients`` are those of the
results, None where there is none; ``wanted`` has a flag for each name in the operator's ``gradients``.

Of a shape in ``saved_tensors`` and in `Operator.fake` a compiler may know no number: ``len`` of a tensor would make it one, and
each number of rows a graph of its own.

Calls on plain tensors reach it through an autograd function. `torch.library`, whose dispatch costs more host time than most
kernels take on a GPU, stands between only where somebody must see one operator instead of what it does: compilers, dispatch
modes, transforms, subclasses of tensors. Exporters see the reference, so that their programs run without this package.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ContextManager, Generic, List, Optional, Tuple

import torch
from torch import Tensor

from hubert_fast import backend, cpu
from hubert_fast.exporters import is_exporting
from hubert_fast.ops import triton_backend
from hubert_fast.ops.record import Layout, Record, tensors_of
from hubert_fast.ops.registration import register

Results = Tuple[Optional[Tensor], ...]

_ROOMS = {"triton": "kernels", "cuda": "cuda_backend", "cpu": "cpu_backend", "torch": "torch_backend"}

# Types of arguments that make no call other than plain: tensors of no subclass, and settings.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype})
_NOTHING = nullcontext()
# Names what runs inside for profilers, and costs nothing where there is none.
_titled = torch._C._profiler._RecordFunctionFast


def _nothing(*_: Any) -> None:
    return None


def _no_names(_: Any) -> Sequence[str]:
    return ()


def _no(_: Any) -> bool:
    return False


@dataclass(eq=False)
class Operator(Generic[Record]):
    """A fused operator, as its module in `hubert_fast.ops` declares it.

    Args:
        name: of the operator, and of the modules that implement it.
        arguments: the type of the arguments, a NamedTuple that `record.Layout` accepts.
        backends: those that have the operator, fastest first, each with a line that says what it is.
        reference: arguments -> results: the formula, which autograd differentiates.
        results: names of the results.
        fake: (arguments, save) -> empty tensors with the results' shapes and dtypes, None for a result that is absent;
            ``save`` says whether there will be a backward.
        gradients: names of the arguments that have a gradient.
        kept: names of the tensors among the arguments that the backward reads; of others it sees shape, dtype and device.
        unread: arguments -> names among ``kept`` that the backward of these does not read.
        kept_results: names of the results that the backward reads.
        one_gradient: arguments -> the names of two whose gradients are one and the same tensor, or None.
        objection: (backend, arguments) -> why it cannot take them, or None. Not asked about "reference"; what no Triton
            kernel takes is known without it.
        unavailable: as in `backend.register`; the absence of Triton is known without it.
        flops: (arguments, backward) -> FLOPs of the matrix products, 2 a multiply-add. None: the operator has no product.
        whole_passes_win: arguments on a CPU -> whether the reference takes less time than backends "cpu" and "torch", which
            then are not what "auto" takes for a plain call. Each operator says how that was measured.
    """

    name: str
    arguments: type[Record]
    backends: Mapping[str, str]
    reference: Callable[[Record], Results]
    results: Sequence[str]
    fake: Callable[[Record, bool], Results]
    gradients: Sequence[str]
    kept: Sequence[str] = ()
    unread: Callable[[Record], Sequence[str]] = _no_names
    kept_results: Sequence[str] = ()
    one_gradient: Callable[[Record], Optional[Tuple[str, str]]] = _nothing
    objection: Callable[[str, Record], backend.Objection] = _nothing
    unavailable: Mapping[str, backend.Availability] = field(default_factory=dict)
    flops: Optional[Callable[[Record, bool], int]] = None
    whole_passes_win: Callable[[Record], bool] = _no

    def __post_init__(self) -> None:
        self.title, self.backward_title = f"hubert_fast::{self.name}", f"hubert_fast::{self.name}_backward"
        self.layout = Layout(self.arguments, self.gradients, self.kept, self.unread)
        self._kept_results = [list(self.results).index(each) for each in self.kept_results]
        # Not `Function.apply`, which would ask once more whether a `torch.func` transform is active (`must_be_seen`).
        self._call = super(torch.autograd.Function, type(self.name, (_Call,), {})).apply
        self._registered, self.registered_backward = register(self)
        unavailable = dict(self.unavailable)
        if "triton" in self.backends:
            unavailable["triton"] = triton_backend.why_not()
        on_gpu = [each for each in self.backends if each in ("triton", "cuda")]
        backend.register(self.name, dict(self.backends), unavailable=unavailable, on_gpu=on_gpu)

    def __call__(self, arguments: Record) -> Results:
        """The results on the backend that `choose` names."""
        return self.run(self.choose(arguments), arguments)

    def choose(self, arguments: Record) -> str:
        """The backend that runs on ``arguments``.

        Raises:
            backend.BackendError: if one was asked for by name that cannot.
        """
        if (
            cpu.is_cpu(arguments[0].device)
            and backend.is_automatic(self.name)
            and is_plain_call(arguments)
            and self.whole_passes_win(arguments)
        ):
            return "reference"
        return backend.choose(self.name, lambda name: self._objection(name, arguments))

    def run(self, chosen: str, arguments: Record) -> Results:
        """The results on backend ``chosen``; one that these arguments do not produce is None or, of `torch.library`, empty."""
        if chosen == "reference":
            return self.reference(arguments)
        given = (arguments[place] for place in self.layout.places)
        save = torch.is_grad_enabled() and any(each.requires_grad for each in tensors_of(given))
        if self.must_be_seen(arguments):
            return self.reference(arguments) if is_exporting() else self._registered(*arguments, save, chosen)[:-1]
        with _titled(self.title):
            if save:
                return self._call(self, chosen, *self.layout.flat(arguments))
            return self.forward(chosen, arguments, False)[0]

    def implementation(self, chosen: str) -> ModuleType:
        """The module that implements the operator on backend ``chosen``, imported at its first use."""
        return _imported(_ROOMS[chosen], self.name)

    def forward(self, chosen: str, arguments: Record, save: bool) -> tuple[Results, List[Tensor]]:
        """The implementation's forward. Autocast is off: the implementation decides on dtypes."""
        with _without_autocast(arguments[0].device.type):
            return self.implementation(chosen).forward(arguments, save)

    def backward(
        self, chosen: str, arguments: Record, saved: List[Tensor], gradients: Results, wanted: List[bool]
    ) -> Sequence[Any]:
        """The implementation's backward, with autocast off too."""
        with _titled(self.backward_title), _without_autocast(arguments[0].device.type):
            return self.implementation(chosen).backward(arguments, saved, gradients, wanted)

    def keep(self, ctx: Any, chosen: str, arguments: Record, results: Results, saved: List[Tensor]) -> None:
        """Keep all that the backward needs in autograd's ``ctx``."""
        ctx.set_materialize_grads(False)  # no zeros for what is only saved
        ctx.chosen = chosen
        self.layout.keep(ctx, arguments, [*(results[place] for place in self._kept_results), *saved])

    def must_be_seen(self, arguments: Sequence[Any]) -> bool:
        """Whether the call must go through `torch.library`: without it the results would be wrong, or there would be none.

        Raises:
            NotImplementedError: for a forward-mode derivative, which `torch.library` gives as 0.
        """
        if is_plain_call(arguments):
            return arguments[0].is_meta
        transform = None if torch.compiler.is_compiling() else torch._C._functorch.peek_interpreter_stack()
        if transform is not None and transform.key() == torch._C._functorch.TransformType.Jvp:
            raise NotImplementedError(
                f"operator {self.name!r} has no forward-mode derivative; hubert_fast.backend.use('reference') has"
            )
        return True

    def _objection(self, name: str, arguments: Record) -> backend.Objection:
        reason = None
        if name == "triton":
            reason = triton_backend.objection(self.name, *(arguments[place] for place in self.layout.places))
        return self.objection(name, arguments) if reason is None and name != "reference" else reason


@functools.cache
def _imported(room: str, name: str) -> ModuleType:
    return importlib.import_module(f"hubert_fast.{room}.{name}")


def _is_traced_before_dispatch() -> bool:
    """Whether a mode sees calls before autograd does, as `make_fx` and export have it with ``pre_dispatch``."""
    return torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)


def is_plain_call(arguments: Sequence[Any]) -> bool:
    """Whether nobody looks at a call on ``arguments`` but autograd: no compiler, mode, transform or subclass of tensors."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None:
        return False
    # The default device is such a mode, and would be that of whatever an implementation allocates.
    if torch._C._len_torch_function_stack() > 0 or _is_traced_before_dispatch():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for each in arguments:  # a loop, not a generator: this is called some 70 times a step
        if type(each) in _PLAIN:
            continue
        if (
            isinstance(each, Tensor)
            or isinstance(each, list)
            and not all(type(it) in _PLAIN for it in tensors_of(each))
        ):
            return False
    return True


def _without_autocast(device_type: str) -> ContextManager[None]:
    return _switched_off(device_type) if torch.is_autocast_enabled(device_type) else _NOTHING


@contextmanager
def _switched_off(device_type: str) -> Iterator[None]:
    """Autocast off inside, by its flag alone: `torch.autocast` would set its dtype and cache too, which takes longer."""
    torch.set_autocast_enabled(device_type, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, True)


class _Call(torch.autograd.Function):
    """An operator on plain tensors; each has a subclass of its own name."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, chosen: str, *flat: Any) -> Results:
        arguments = operator.layout.unflat(flat)
        results, saved = operator.forward(chosen, arguments, True)
        ctx.operator = operator
        operator.keep(ctx, chosen, arguments, results, saved)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Optional[Tensor]) -> Tuple[Any, ...]:
        operator, layout = ctx.operator, ctx.operator.layout
        if all(each is None for each in gradients):
            return None, None, *layout.flat_gradients(ctx, ())
        arguments, saved = layout.kept(ctx)
        # With gradients on, a graph of the backward is wanted: a registered operator without a derivative says so.
        if torch.is_grad_enabled() or operator.must_be_seen((*arguments, *gradients)):
            run = operator.registered_backward
        else:
            run = operator.backward
        found = run(ctx.chosen, arguments, saved, gradients, layout.wanted(ctx.needs_input_grad[2:]))
        return None, None, *layout.flat_gradients(ctx, found)
