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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Optional

AUTO = "auto"

# Why an implementation cannot take these inputs, or None where it can.
Objection = Optional[str]


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run."""


@dataclass
class _Operator:
    """The implementations of one operator, fastest first."""

    name: str
    implementations: dict[str, str] = field(default_factory=dict)  # backend -> one line about it
    chosen: str = AUTO


_operators: dict[str, _Operator] = {}
_default = os.environ.get("HUBERT_FAST_BACKEND", AUTO)


def register(operator: str, implementations: dict[str, str]) -> None:
    """Declare an operator's implementations, fastest first, each with a line that says what it is. For `hubert_fast.ops`."""
    _operators[operator] = _Operator(operator, dict(implementations), _default)


def use(name: str, operator: Optional[str] = None) -> None:
    """Use backend ``name`` for ``operator``, or for every operator, from now on.

    Raises:
        ValueError: if there is no such operator, or it has no such backend.
    """
    for each in _selected(operator):
        if name != AUTO and name not in each.implementations:
            raise ValueError(
                f"backend {name!r} of operator {each.name!r}: accepted are {[AUTO, *each.implementations]}"
            )
    for each in _selected(operator):
        each.chosen = name


@contextmanager
def using(name: str, operator: Optional[str] = None) -> Iterator[None]:
    """`use` inside a ``with`` block."""
    before = {each.name: each.chosen for each in _selected(operator)}
    use(name, operator)
    try:
        yield
    finally:
        for each, chosen in before.items():
            _operators[each].chosen = chosen


def choose(operator: str, objection: Callable[[str], Objection]) -> str:
    """The backend that runs ``operator`` on inputs to which ``objection(backend)`` says why not, or None."""
    entry = _operators[operator]
    if entry.chosen != AUTO:
        if entry.chosen not in entry.implementations:
            raise BackendError(
                f"backend {entry.chosen!r} of operator {operator!r} does not exist; accepted are "
                f"{[AUTO, *entry.implementations]} (HUBERT_FAST_BACKEND or hubert_fast.backend.use chose it)"
            )
        reason = objection(entry.chosen)
        if reason is not None:
            raise BackendError(
                f"backend {entry.chosen!r} of operator {operator!r} was asked for and cannot run: {reason}"
            )
        return entry.chosen
    for name in entry.implementations:
        if objection(name) is None:
            return name
    raise BackendError(f"no backend of operator {operator!r} supports these inputs")


@dataclass(frozen=True)
class Choice:
    """One operator's line of `report`."""

    operator: str
    chosen: str
    runs: str
    why: str
    available: tuple[str, ...]


def report() -> list[Choice]:
    """For each operator: what was chosen, what runs on ordinary inputs, and why."""
    choices = []
    for name in sorted(_operators):
        entry = _operators[name]
        runs = next(iter(entry.implementations)) if entry.chosen == AUTO else entry.chosen
        why = entry.implementations.get(runs, "does not exist")
        prefix = "fastest available: " if entry.chosen == AUTO else "asked for by name: "
        choices.append(Choice(name, entry.chosen, runs, prefix + why, tuple(entry.implementations)))
    return choices


def _selected(operator: Optional[str]) -> list[_Operator]:
    if operator is None:
        return list(_operators.values())
    if operator not in _operators:
        raise ValueError(f"operator {operator!r} does not exist; there are {sorted(_operators)}")
    return [_operators[operator]]
