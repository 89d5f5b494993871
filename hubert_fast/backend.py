"""Which implementation of each operator runs, and why.

``auto`` takes the fastest one that supports the inputs. A backend that was asked for by name and cannot run raises
`BackendError` with the reason; nothing falls back silently.

    hubert_fast.backend.use("reference")                            # every operator, from now on
    hubert_fast.backend.use("torch", operator="conv_frontend")      # one operator
    with hubert_fast.backend.using("reference"): ...                # for a while
    hubert_fast.backend.report()                                    # what would run, and why

The environment variable ``HUBERT_FAST_BACKEND`` names the backend that a process starts with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Optional, Union

AUTO = "auto"

# Why an implementation cannot take these inputs, or None where it can.
Objection = Optional[str]

# The same whatever the inputs; or a function that finds out, which is called when somebody wants to know.
Availability = Union[Objection, Callable[[], Objection]]


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run."""


@dataclass
class _Operator:
    """The implementations of one operator, fastest first."""

    name: str
    implementations: dict[str, str] = field(default_factory=dict)  # backend -> one line about it
    unavailable: dict[str, Availability] = field(default_factory=dict)  # backend -> why it cannot run here at all
    on_gpu: frozenset[str] = frozenset()

    @property
    def chosen(self) -> str:
        return _by_name.get(self.name, AUTO)

    def why_unavailable(self, name: str) -> Objection:
        reason = self.unavailable.get(name)
        return reason() if callable(reason) else reason


# Every name that some operator has. One that an operator lacks leaves that operator at "auto".
_NAMES = ("triton", "cuda", "cpu", "torch", "reference")

_operators: dict[str, _Operator] = {}
_by_name: dict[str, str] = {}  # operator -> backend, of those that are not at "auto"
_default = os.environ.get("HUBERT_FAST_BACKEND", AUTO)


def register(
    operator: str,
    implementations: dict[str, str],
    *,
    unavailable: Mapping[str, Availability] = MappingProxyType({}),
    on_gpu: Collection[str] = (),
) -> None:
    """Declare an operator's implementations. For `hubert_fast.ops`.

    Args:
        implementations: fastest first, each with a line that says what it is.
        unavailable: why one cannot run in this installation at all, or a function that says so; None is no objection.
        on_gpu: those that run on a GPU only, which `report` needs to know.
    """
    chosen = AUTO if _default in _NAMES and _default not in implementations else _default
    _operators[operator] = _Operator(operator, dict(implementations), dict(unavailable), frozenset(on_gpu))
    _choose(operator, chosen)


def use(name: str, operator: Optional[str] = None) -> None:
    """Use backend ``name`` for ``operator``, or for every operator that has it, from now on. Without ``operator``, those that
    do not have it go back to "auto".

    Raises:
        ValueError: if there is no such operator, it has no such backend, or no operator has it.
    """
    selected = _selected(operator)
    if name != AUTO and not any(name in each.implementations for each in selected):
        accepted = dict.fromkeys(other for each in selected for other in each.implementations)
        whose = "every operator" if operator is None else f"operator {operator!r}"
        raise ValueError(f"backend {name!r} of {whose}: accepted are {[AUTO, *accepted]}")
    for each in selected:
        _choose(each.name, name if name in each.implementations else AUTO)


@contextmanager
def using(name: str, operator: Optional[str] = None) -> Iterator[None]:
    """`use` inside a ``with`` block."""
    before = {each.name: each.chosen for each in _selected(operator)}
    use(name, operator)
    try:
        yield
    finally:
        for each, chosen in before.items():
            _choose(each, chosen)


def choose(operator: str, objection: Callable[[str], Objection]) -> str:
    """The backend that runs ``operator`` on inputs to which ``objection(backend)`` says why not, or None."""
    entry = _operators[operator]
    if entry.chosen != AUTO:
        if entry.chosen not in entry.implementations:
            raise BackendError(
                f"backend {entry.chosen!r} of operator {operator!r} does not exist; accepted are "
                f"{[AUTO, *entry.implementations]} (HUBERT_FAST_BACKEND or hubert_fast.backend.use chose it)"
            )
        reason = entry.why_unavailable(entry.chosen) or objection(entry.chosen)
        if reason is not None:
            raise BackendError(
                f"backend {entry.chosen!r} of operator {operator!r} was asked for and cannot run: {reason} "
                "(HUBERT_FAST_BACKEND or hubert_fast.backend.use chose it)"
            )
        return entry.chosen
    for name in entry.implementations:
        if isinstance(entry.unavailable.get(name), str) or objection(name) is not None:
            continue
        if entry.why_unavailable(name) is None:  # last: on a CPU nobody asks whether there is a driver for GPUs
            return name
    raise BackendError(f"no backend of operator {operator!r} supports these inputs")


def is_automatic(operator: str) -> bool:
    """Whether nobody asked for a backend of ``operator`` by name."""
    return operator not in _by_name


def all_automatic() -> bool:
    """Whether nobody asked for a backend of any operator by name."""
    return not _by_name


def is_reference(operator: str) -> bool:
    """Whether somebody asked for the formula of ``operator`` by name."""
    return _operators[operator].chosen == "reference"


@dataclass(frozen=True)
class Choice:
    """One operator's line of `report`."""

    operator: str
    chosen: str
    runs: str
    why: str
    available: tuple[str, ...]
    reasons: dict[str, str]  # of the backends that cannot run here: why not


def report() -> list[Choice]:
    """For each operator: what was chosen, what runs on ordinary inputs (on a GPU where there is one), and why."""
    choices = []
    for name in sorted(_operators):
        entry = _operators[name]
        reasons = _reasons(entry)
        available = tuple(each for each in entry.implementations if each not in reasons)
        runs = available[0] if entry.chosen == AUTO else entry.chosen
        why = reasons.get(runs) or entry.implementations.get(runs, "does not exist")
        prefix = "fastest available: " if entry.chosen == AUTO else "asked for by name: "
        if runs in reasons:
            prefix = "asked for by name, and cannot run: "
        choices.append(Choice(name, entry.chosen, runs, prefix + why, available, reasons))
    return choices


def _choose(operator: str, name: str) -> None:
    _by_name.pop(operator, None)
    if name != AUTO:
        _by_name[operator] = name


def _reasons(entry: _Operator) -> dict[str, str]:
    """Why implementations cannot run in this installation on this machine."""
    import torch

    reasons = {name: entry.why_unavailable(name) for name in entry.implementations}
    reasons = {name: reason for name, reason in reasons.items() if reason is not None}
    if not torch.cuda.is_available():
        for each in entry.on_gpu:
            reasons.setdefault(each, "it runs on a GPU, and torch finds none here")
    return reasons


def _selected(operator: Optional[str]) -> list[_Operator]:
    if operator is None:
        return list(_operators.values())
    if operator not in _operators:
        raise ValueError(f"operator {operator!r} does not exist; there are {sorted(_operators)}")
    return [_operators[operator]]
