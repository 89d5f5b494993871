"""Models of torchaudio and transformers, made to run on the fused operators where they stand.

A module's class is replaced by one that derives from ours and from its own: parameters, hooks, state dicts, ``isinstance`` and
whoever holds the module see no difference, and what a class of ours finds hooked or replaced it calls, as ever.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import ExitStack
from functools import wraps
from types import FunctionType
from typing import Any, Callable, NamedTuple, Optional

from torch import nn
from torch.nn.utils import parametrize

from hubert_fast.models.wrappers import all_asleep

# The module of this folder that is asked where one of a library is imported.
_LIBRARIES = {
    "torchaudio.models.wav2vec2.model": "torchaudio_modules",
    "transformers.models.hubert.modeling_hubert": "transformers_modules",
    "transformers.models.wav2vec2.modeling_wav2vec2": "transformers_modules",
}

# Kinds of modules that `Acceleration.left` does not list: the fused operators do what they do, or call them.
_ORDINARY = (nn.Linear, nn.Dropout, nn.LayerNorm, nn.GroupNorm, nn.Conv1d, nn.ModuleList)
_ORDINARY_NAMES = ("SamePadLayer", "NormConvLayer")  # of transformers', how they end
_MODELS = ("torchaudio.models.", "transformers.models.")  # modules of Python that define models


class Acceleration(NamedTuple):
    """The modules of an accelerated model, by their names in ``model.named_modules()``; "" is the model itself."""

    fused: list[str]
    """modules that run on the fused operators"""
    left: dict[str, str]
    """modules that are called as they are, and why"""

    def __str__(self) -> str:
        if not self.fused and not self.left:
            return "a model of hubert_fast: there was nothing to do"
        lines = [f"{len(self.fused)} modules run on the fused operators"]
        return "\n".join(
            [*lines, *(f"{name or 'the model'} is called as it is: {why}" for name, why in self.left.items())]
        )


def accelerate(model: nn.Module) -> Acceleration:
    """Let the modules of a model of torchaudio or transformers run on the fused operators, in place.

    Parameters, buffers and names stay as they are, so an optimizer, a wrapper or a checkpoint goes on with them. Outputs have the
    types that they had. Where ours computes them they are 0 in the padding, so what follows should go by the lengths or the mask.
    The modules' ``__class__`` changes, to one that derives from what it was.
    What is hooked, replaced (as LoRA does) or set to compute something else is called as it is; new hooks and replacements
    are honoured later too. Called again, it takes what is new. A model of this package is left as it is.

    Args:
        model: torchaudio's ``HuBERTPretrainModel`` or ``Wav2Vec2Model``, transformers' ``HubertModel`` or ``Wav2Vec2Model``, or
            any module that holds one, such as ``HubertForCTC``.

    Raises:
        TypeError: for what is no module, a model that holds none of their modules, or WavLM's.
    """
    if not isinstance(model, nn.Module):
        given = model.__name__ if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be a module, such as HubertModel.from_pretrained(...) returns; got {given}")
    kinds, unknown = _kinds()
    found = [(name, each) for name, each in model.named_modules() if _original(type(each)) in kinds]
    if not found and not any(type(each).__module__.startswith("hubert_fast.models.") for each in model.modules()):
        raise TypeError(
            f"model must be or hold a HuBERT or wav2vec 2.0 of torchaudio or transformers; got {type(model).__qualname__}"
            + "".join(f"; {each}" for each in unknown)
        )
    for _, each in found:
        kinds[_original(type(each))].refuse(each)
    left: dict[str, str] = {}
    changes: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []  # all found out before any is made
    for name, each in found:
        kind = kinds[_original(type(each))]
        if why := kind.differs(each):
            left[name] = why
            changes.append((each, _original(type(each)), {}))
        elif type(each) is not kind:
            changes.append((each, kind, kind.attributes(each)))
    for each, kind, attributes in changes:
        _restore(each)
        if _is_accelerated(kind):
            vars(each).update(attributes, _added=tuple(attributes))
            each.__class__ = kind
    return Acceleration([name for name, _ in found if name not in left], _called(model) | left)


def unaccelerate(model: nn.Module) -> None:
    """Give the modules of ``model`` back the classes that they had before `accelerate`."""
    for each in model.modules():
        _restore(each)


def _restore(module: nn.Module) -> None:
    if _is_accelerated(type(module)):
        for name in (*vars(module).get("_added", ()), "_added"):
            vars(module).pop(name, None)
        module.__class__ = _original(type(module))


class Accelerated:
    """The third base of the classes of accelerated modules, beside one of ours and their own."""

    runs_as: type[nn.Module]
    """the class of ours whose code runs"""

    @staticmethod
    def refuse(module: nn.Module) -> None:
        """Raise for a module whose model must not be touched."""

    @staticmethod
    def attributes(module: nn.Module) -> dict[str, Any]:
        """Attributes that modules of ours have and the library's have not, by name."""
        return {}

    @staticmethod
    def differs(module: nn.Module) -> Optional[str]:
        """Why ``module`` computes something else than ours would; None: it does not."""
        return None


def accelerated_classes(names: dict[str, Any]) -> dict[type[nn.Module], type[Any]]:
    """The accelerated classes among the ``names`` of a module of Python, by the library's class of each."""
    classes = [each for each in names.values() if isinstance(each, type) and issubclass(each, nn.Module)]
    return {_original(each): each for each in classes if _is_accelerated(each)}


def _kinds() -> tuple[dict[type[nn.Module], type[Any]], list[str]]:
    """The accelerated class for each class of the libraries that are imported, and which of them are of unknown versions."""
    kinds: dict[type[nn.Module], type[Any]] = {}
    unknown = []
    for library, name in _LIBRARIES.items():
        if library not in sys.modules:
            continue
        try:
            kinds |= importlib.import_module(f"hubert_fast.interop.{name}").kinds()
        except (ImportError, AttributeError) as error:
            version = getattr(sys.modules.get(library.partition(".")[0]), "__version__", "installed")
            unknown.append(f"{library} of version {version} has other modules than those known here ({error})")
    return kinds, unknown


def _original(kind: type[nn.Module]) -> type[nn.Module]:
    """The library's own class of an accelerated one; another class itself."""
    return kind.__bases__[-1] if _is_accelerated(kind) else kind


def _is_accelerated(kind: type[nn.Module]) -> bool:
    return issubclass(kind, Accelerated) and "runs_as" in vars(kind)  # `fully_shard` derives from one


def _called(model: nn.Module) -> dict[str, str]:
    """Modules inside accelerated ones that are called as they are, and why; what is below them is left out."""
    called: dict[str, str] = {}

    def look(name: str, module: nn.Module, inside: bool) -> None:
        # A library's own model is not accelerated where its modules are, but what stands in their place belongs to it.
        own = type(module).__module__.startswith(_MODELS)
        holds = own and any(isinstance(each, Accelerated) for each in module.modules())
        inside = inside or isinstance(module, Accelerated)
        if inside and not holds and (why := _looks_different(module)):
            called[name] = why
            return
        inside = inside or own
        for child, each in module.named_children():
            if each is not None and child != "parametrizations":
                look(f"{name}.{child}" if name else child, each, inside)

    look("", model, False)
    return called


def _looks_different(module: nn.Module) -> Optional[str]:
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    if not all_asleep(module._forward_hooks):
        return "it has hooks"
    if "forward" in vars(module):
        return "its forward was replaced"
    kind = type(module).__base__ if parametrize.is_parametrized(module) else type(module)
    ordinary = kind in _ORDINARY or kind.__name__ == "GELUActivation" or kind.__name__.endswith(_ORDINARY_NAMES)
    if ordinary or issubclass(kind, Accelerated):
        return None
    return f"{kind.__module__}.{kind.__qualname__} is no module that is fused"


def patch_torchaudio() -> ExitStack:
    """Let torchaudio's factories of HuBERT and wav2vec 2.0 return accelerated models, until the result is closed.

    The models are torchaudio's, and ours as well: ``isinstance`` says so of both. A module that imported a factory by name before
    has the one that it was. WavLM's factories stay.

        hubert_fast.patch_torchaudio()  # or: with hubert_fast.patch_torchaudio(): ...
        model = torchaudio.models.hubert_pretrain_base()

    Returns:
        a context manager whose end, or ``close()``, undoes it.
    """
    from torchaudio.models.wav2vec2 import model as module

    originals = (getattr(module, name) for name in dir(module) if name.startswith(("hubert_", "wav2vec2_")))
    patched = {each: _accelerating(each) for each in originals if not hasattr(each, "_accelerates")}
    undo = ExitStack()
    for place in [each for name, each in sys.modules.items() if name.partition(".")[0] == "torchaudio"]:
        for name, value in list(vars(place).items()):
            if isinstance(value, FunctionType) and value in patched:
                setattr(place, name, patched[value])
                undo.callback(_put_back, place, name, patched[value], value)
    return undo


def _put_back(place: Any, name: str, ours: Any, theirs: Any) -> None:
    if vars(place).get(name) is ours:  # somebody may have put another on top
        setattr(place, name, theirs)


def _accelerating(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @wraps(factory)
    def accelerated(*arguments: Any, **named: Any) -> nn.Module:
        model = factory(*arguments, **named)
        accelerate(model)
        return model

    accelerated._accelerates = factory
    return accelerated
