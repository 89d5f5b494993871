"""Wrappers that call a module as they are called themselves: FSDP, activation checkpoints, ``torch.compile``.

They look at nothing, so what is inside may be handed rows. Whoever hooks or replaces a module sees torchaudio's grids.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any, Optional

from torch import nn

_CAPTURING = "transformers.utils.output_capturing"
_CHECKPOINT = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP1 or FSDP2 gathers weights as ``module`` is called."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # it takes long to import, and who shards has imported it
    return fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))


def gathers(module: nn.Module) -> bool:
    """Whether anything in ``module``, or all of it, is sharded."""
    return "torch.distributed.fsdp" in sys.modules and any(map(is_sharded, module.modules()))


def as_built(module: nn.Module) -> tuple[nn.Module, type[nn.Module]]:
    """The module and its class as they were before anybody wrapped the one, or put another in the other's place."""
    while (inside := _inside(module)) is not None:
        module = inside
    kind = type(module)
    if is_sharded(module):
        kind = kind.__mro__[2]  # `fully_shard` derives a class from `FSDPModule` and the module's own
    return module, runs_as(kind)


def runs_as(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of this package whose code a class runs: itself, or what one of `hubert_fast.accelerate` names."""
    return vars(kind).get("runs_as", kind)


def takes_rows(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is a ``kind``, compiled or in wrappers, at whose inputs and outputs nobody else looks."""
    layers = [module]
    while (inside := _inside(layers[-1])) is not None:
        layers.append(inside)
    return as_built(module)[1] is kind and not any(map(_is_watched, layers))


def _inside(module: nn.Module) -> Optional[nn.Module]:
    """The module inside ``module``, if that is a wrapper that is known."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
        return module.module
    checkpoint = sys.modules.get(_CHECKPOINT)
    if checkpoint is not None and isinstance(module, checkpoint.ActivationWrapper):
        return module._checkpoint_wrapped_module
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None and isinstance(module, compiler.OptimizedModule):
        return module._orig_mod
    return None


def _is_watched(module: nn.Module) -> bool:
    """Whether the forward of ``module`` was replaced, or has hooks that are not FSDP's."""
    if "forward" in vars(module) and not hasattr(module, "_orig_mod"):  # a compiled module's is its compiler's
        return True
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return any(not (_is_fsdp_hook(each) or _is_asleep(each)) for each in hooks)


def all_asleep(hooks: Mapping[int, Any]) -> bool:
    """Whether these forward hooks do nothing now."""
    return all(map(_is_asleep, hooks.values()))


def _is_asleep(hook: Any) -> bool:
    """Whether transformers' ``hook`` that collects outputs collects none now: once asked for they stay on a model for ever."""
    if getattr(hook, "__module__", None) != _CAPTURING or getattr(hook, "__name__", "") != "output_capturing_hook":
        return False
    collected = sys.modules[_CAPTURING]._active_collector.get()
    return not collected or inspect.getclosurevars(hook).nonlocals.get("key") not in (None, *collected)


def _is_fsdp_hook(hook: Any) -> bool:
    """Whether FSDP2 registered ``hook``, on a module by itself or on one of several that it shards together."""
    return getattr(getattr(hook, "__wrapped__", hook), "__module__", "").startswith("torch.distributed.fsdp.")
