"""The operators' formulas for `torch.utils.flop_counter`, and for what is built on it.

That module imports Triton, which would double the time that importing this package takes: formulas wait until it is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Optional

_MODULE = "torch.utils.flop_counter"

_formulas: list[tuple[Any, Callable[..., int]]] = []


def add(operator: Any, formula: Callable[..., int]) -> None:
    """Have each call of ``operator``, one of ``torch.ops``, count as many FLOPs as ``formula`` gives for its arguments."""
    _formulas.append((operator, formula))
    module = sys.modules.get(_MODULE)
    if module is not None:
        _register(module, operator, formula)


def _register(module: ModuleType, operator: Any, formula: Callable[..., int]) -> None:
    module.register_flop_formula(operator, get_raw=True)(formula)


class _Finder:
    """An import hook in `sys.meta_path` that waits for the module and, once it is imported, registers what was added."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Optional[ModuleSpec]:
        spec = PathFinder.find_spec(name, path) if name == _MODULE else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for each in _formulas:
                _register(module, *each)
            if cls in sys.meta_path:  # only now: whoever asks for a spec may want to know no more than that it is there
                sys.meta_path.remove(cls)

        spec.loader.exec_module = exec_module
        return spec


if _MODULE not in sys.modules:
    sys.meta_path.insert(0, _Finder)
