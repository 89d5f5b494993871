"""Where extras are absent, as on a machine with a GPU and little else: what needs one is skipped, by the name of what it needs.

A module of tests that imports an absent extra is skipped as a whole; any other failing import stays an error. Without hypothesis
only the property tests are skipped.
"""

from __future__ import annotations

import inspect
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

# What the extra "pretrain" of pyproject.toml brings, as it is imported, except numpy, which others bring too.
_PRETRAIN = {
    "lhotse", "matplotlib", "safetensors", "scipy", "sklearn", "soundfile", "tensorboard", "tomli_w", "tqdm", "tyro", "urllib3",
    *(["tomli"] if sys.version_info < (3, 11) else []),
}  # fmt: skip

# What the extra "test" brings.
_MODULES = _PRETRAIN | {
    "accelerate", "av", "hypothesis", "lightning", "onnx", "onnxruntime", "onnxscript", "packaging", "peft", "pybind11", "tomli",
    "transformers", "triton",
}  # fmt: skip


def reason(module: str) -> str:
    return f"needs {module} (pip install 'hubert-fast[test]')"


def need_pretrain() -> None:
    """Skip the test that calls this where a package of the extra "pretrain" is absent."""
    for module in sorted(_PRETRAIN):
        if find_spec(module) is None:
            pytest.skip(reason(module))


class Module(pytest.Module):
    """A module of tests, skipped where it imports an extra that is absent."""

    def collect(self) -> Any:
        try:
            return super().collect()
        except self.CollectError as error:
            absent = _absent(error)
            if absent is None:
                raise
        pytest.skip(reason(absent), allow_module_level=True)


def _absent(error: BaseException | None) -> str | None:
    """The extra for whose absence an import failed."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            name = error.name.partition(".")[0]
            return name if name in _MODULES else None
        error = error.__cause__ or error.__context__
    return None


class _Anything:
    """Strategies, and what is made of them, where no example will be drawn."""

    def __getattr__(self, name: str) -> _Anything:
        return self

    def __call__(self, *arguments: Any, **named: Any) -> _Anything:
        return self

    def __or__(self, other: Any) -> _Anything:
        return self


def stand_in_for_hypothesis() -> None:
    """Make ``from hypothesis import ...`` work without it: property tests are collected and skipped."""

    def given(*arguments: Any, **named: Any) -> Any:
        def skipped(test: Any) -> Any:
            def property_test(**fixtures: Any) -> None:
                pass

            # pytest takes arguments for fixtures or parameters: those that would have been drawn are neither.
            left = [each for each in inspect.signature(test).parameters.values() if each.name not in named]
            property_test.__signature__ = inspect.Signature(left[: len(left) - len(arguments)])
            property_test.__name__, property_test.__doc__ = test.__name__, test.__doc__
            return pytest.mark.skip(reason=reason("hypothesis"))(property_test)

        return skipped

    def unchanged(*arguments: Any, **named: Any) -> Any:
        return lambda test: test

    module = ModuleType("hypothesis")
    module.given, module.example, module.settings, module.assume = given, unchanged, unchanged, bool
    module.strategies = _Anything()
    sys.modules["hypothesis"] = module
