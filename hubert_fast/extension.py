"""The compiled part of the package, ``hubert_fast._C``, and why it is absent where it is.

Its kernels take buffers, sizes, strides and streams and know nothing of torch; ``hubert_fast.cpu_backend`` and
``hubert_fast.cuda_backend`` call them. Importing this module loads nothing; the first question does. One about the CUDA kernels
starts the driver, after which neither ``CUDA_VISIBLE_DEVICES`` nor a forked process can choose GPUs: none is asked before there
are tensors on a GPU, or a user wants to know.
"""

from __future__ import annotations

import functools
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

from hubert_fast import source_tree

# The version of the bindings that this package was written for: `interface_version` in csrc/bindings.h.
INTERFACE = 6

_REBUILD = "rebuild it: `pip install .`, or `pip install -e .` in a source tree"


def cpu() -> Optional[ModuleType]:
    """The CPU kernels, or None (`why_not` tells)."""
    return getattr(_load()[0], "cpu", None)


def cuda() -> Optional[ModuleType]:
    """The CUDA kernels, or None (`why_not` tells). That they were built does not mean that there is a GPU."""
    return None if why_not("cuda") else getattr(_load()[0], "cuda", None)


def why_not(part: str) -> Optional[str]:
    """Why ``part``, "cpu" or "cuda", is absent, in one sentence without a capital or a full stop; None where it is there.

    Raises:
        ValueError: if there is no such part.
    """
    if part not in ("cpu", "cuda"):
        raise ValueError(f"part must be 'cpu' or 'cuda'; got {part!r}")
    module, reason = _load()
    if module is None:
        return reason
    if getattr(module, part, None) is not None:
        return _driver_too_old(module.cuda) if part == "cuda" else None
    return f"the extension was built without CUDA: {module.build_facts()['cuda_why_not']}"


# torch.compile calls it while tracing and keeps the answer, as after `torch.compiler.assume_constant_result`, which would import
# the compiler here.
why_not._dynamo_marked_constant = True


def facts() -> Optional[dict[str, Any]]:
    """How the extension was built, or None where there is none that can be used.

    ``compiler``, ``build_type``: str; ``cpu_variants``: the instruction sets that kernels were compiled for; ``cuda``: the
    version of nvcc or None; ``cuda_archs``: the architectures with machine code; ``cuda_ptx``: the architecture whose PTX
    newer GPUs run, or None; ``cuda_why_not``: str or None; ``cutlass``: version or None.
    """
    module, _ = _load()
    return None if module is None else module.build_facts()


@functools.cache
def _driver_too_old(kernels: ModuleType) -> Optional[str]:
    """A driver runs programs of its own major version of CUDA and of older ones; version 0 means that there is no driver."""
    driver, runtime = kernels.driver_version(), kernels.runtime_version()
    if 0 < driver // 1000 < runtime // 1000:
        return f"the CUDA kernels were built with CUDA {runtime // 1000}, and the driver here takes up to CUDA {driver // 1000}"
    return None


@functools.cache
def _load() -> tuple[Optional[ModuleType], Optional[str]]:
    """(the extension, None), or (None, why not)."""
    try:
        from hubert_fast import _C
    except ImportError as error:
        return None, _import_failure(error)
    built = getattr(_C, "interface", None)
    if built != INTERFACE:
        reason = f"hubert_fast._C was built from other sources (interface {built}, not {INTERFACE}); {_REBUILD}"
        warnings.warn(f"{reason}. Until then PyTorch's operations run in its place, slower.", stacklevel=2)
        return None, reason
    try:
        _C.cpu.instruction_set()
    except ValueError as error:
        return None, f"HUBERT_FAST_INSTRUCTION_SET: {error}"
    return _C, None


def _import_failure(error: ImportError) -> str:
    found = sorted(path.name for path in Path(__file__).parent.glob("_C.*") if path.suffix in (".so", ".pyd"))
    if any(f"_C{suffix}" in found for suffix in EXTENSION_SUFFIXES):
        return f"hubert_fast._C cannot be loaded ({error}); {_REBUILD}"
    if found:
        return f"hubert_fast._C was built for another Python ({', '.join(found)}, not _C{EXTENSION_SUFFIXES[0]}); {_REBUILD}"
    installed = source_tree.installed_extension()
    if installed is not None:
        reason = (
            f"hubert_fast runs from {source_tree.PACKAGE}, where nothing was built; the installed copy has {installed}"
        )
        warnings.warn(f"{reason}. Start Python in another folder, or run `pip install -e .` in this one.", stacklevel=2)
        return reason
    return "hubert_fast._C was not built (HUBERT_FAST_BUILD=0, or a source tree in which nothing was installed)"
