"""The installed torchaudio, imported so that its pure-Python models load beside any build of torch.

torchaudio's wheel carries a library compiled against CUDA's torch, which ``import torchaudio`` loads and which a CPU build
of torch refuses. The models need none of it, so a stand-in for the one module that loads the library is in place during
the import. Nothing of the installation is changed, and the classes are torchaudio's own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType


def installed() -> bool:
    return importlib.util.find_spec("torchaudio") is not None


def import_models() -> ModuleType:
    """``torchaudio.models``."""
    if "torchaudio" not in sys.modules:
        sys.modules.setdefault("torchaudio._extension", _extension_stand_in())
    return importlib.import_module("torchaudio.models")


def import_components() -> ModuleType:
    """The parts of its wav2vec 2.0, which have no public names."""
    import_models()
    return importlib.import_module("torchaudio.models.wav2vec2.components")


def _extension_stand_in() -> ModuleType:
    """What torchaudio asks of ``torchaudio._extension``, with the answers of an installation without compiled parts."""
    stand_in = ModuleType("torchaudio._extension")
    stand_in._IS_TORCHAUDIO_EXT_AVAILABLE = False
    stand_in._load_lib = lambda library: False
    stand_in.fail_if_no_align = lambda function: function
    return stand_in
