"""What peers under ``torch.compile`` need."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def why_not_compile(device: torch.device) -> str | None:
    """A sentence that says why torch.compile has no code generator for ``device``, or None."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "torch.compile needs Triton, which is not installed"
    compilers = [os.environ.get("CXX", "c++").split()[0], "g++", "clang++"]
    found = any(shutil.which(each) for each in compilers)
    return None if found else f"torch.compile needs a C++ compiler, and there is none of {', '.join(compilers)}"


@contextmanager
def quiet_dynamo() -> Iterator[None]:
    """Keeps the warnings about graph breaks and recompilations inside off the terminal: they say the same every time."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
