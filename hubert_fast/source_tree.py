"""The package where it runs from its source tree: `python -m` in the repository's folder imports that copy, installed or not.

`hubert_fast.kernels` and `hubert_fast.benchmarks` lie beside the package there (``package_dir`` in setup.py). Importing this
module makes them importable, and keeps an installation of another copy from lending its own.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any, Optional
from urllib.parse import urlparse
from urllib.request import url2pathname

PACKAGE = Path(__file__).parent
_BESIDE = {f"hubert_fast.{name}": PACKAGE.parent / name for name in ("kernels", "benchmarks")}

IS_SOURCE_TREE = not (PACKAGE / "kernels").exists() and all(path.is_dir() for path in _BESIDE.values())


class _Finder:
    """An import hook, in `sys.meta_path` before that of an editable installation, which may be of another copy."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Optional[ModuleSpec]:
        if name == "hubert_fast._C":
            spec = PathFinder.find_spec(name, [str(PACKAGE)])
            if spec is None:
                raise ModuleNotFoundError(f"there is no extension in {PACKAGE}", name=name)
            return spec
        folder = _BESIDE.get(name)
        if folder is None:
            return None
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


if IS_SOURCE_TREE:
    sys.meta_path.insert(0, _Finder)


def installed_extension() -> Optional[Path]:
    """The extension of an installed copy other than this one, or None."""
    for distribution in importlib.metadata.distributions(name="hubert-fast"):
        folder = Path(str(distribution.locate_file("hubert_fast")))
        source = json.loads(distribution.read_text("direct_url.json") or "{}")
        if source.get("dir_info", {}).get("editable"):
            folder = Path(url2pathname(urlparse(source["url"]).path)) / "hubert_fast"
        if folder != PACKAGE:
            found = sorted([*folder.glob("_C.*.so"), *folder.glob("_C.*.pyd")])
            if found:
                return found[0]
    return None
