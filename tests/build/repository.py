"""The source tree that the tests run from."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load(path):
    """The file ROOT/``path`` as a module."""
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module
