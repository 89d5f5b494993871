"""Clipping and the optimizer's step, captured where the optimizer allows it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Optional

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hubert_fast.models.capture import Work

# Graphs, each for a set of parameters and settings of the optimizer, and such sets that are remembered.
_MOST_GRAPHS, _MOST_SEEN = 16, 4096


class OptimizerStep:
    """Clips the gradients of ``parameters`` to ``clip_norm`` (None: leaves them) and steps ``optimizer``.

    A set of parameters that takes part runs eagerly the first time, which makes the optimizer's state, and is captured the
    second. The learning rate reaches the graph as data, in float32; all other settings of the optimizer are constants of it.

    Args:
        capture: makes a graph of work; None: everything runs eagerly.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Sequence[nn.Parameter],
        clip_norm: Optional[float],
        capture: Optional[Callable[[Work], Work]],
    ) -> None:
        self._optimizer, self._parameters, self._clip_norm = optimizer, parameters, clip_norm
        self._capture = capture if _can_be_captured(optimizer) else None
        device = parameters[0].device
        self.norm = torch.zeros((), device=device)
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, Work] = {}
        self.forget()
        # Weakly: the optimizer may outlive this, and graphs keep memory.
        forget = weakref.WeakMethod(self.forget)
        optimizer.register_load_state_dict_post_hook(lambda _: (forget() or _nothing)())

    def __call__(self, taking_part: Hashable) -> Tensor:
        """One step with the gradients at hand; ``taking_part`` tells which parameters have one.

        Returns:
            The norm of all gradients before clipping, ``[]`` float32.
        """
        if self._capture is None:
            self._run()
            return self.norm.clone()
        key = (taking_part, self._settings())
        if len(self._rates) != len(self._optimizer.param_groups) or len(self._seen) >= _MOST_SEEN:
            self.forget()
        for rate, group in zip(self._rates, self._optimizer.param_groups):
            rate.fill_(group["lr"])
        if key not in self._seen or self._is_full(key):
            self._seen.add(key)
            with self._rates_as_data(captured=False):  # as a graph reads them: float32
                self._run()
            return self.norm.clone()
        if key not in self._graphs:
            with self._rates_as_data(captured=True):
                self._graphs[key] = self._capture(self._run)
        self._graphs[key]()
        return self.norm.clone()

    def forget(self) -> None:
        """Drop the graphs: what they read lies elsewhere now."""
        self._seen.clear()
        self._graphs.clear()
        self._rates = [torch.zeros_like(self.norm) for _ in self._optimizer.param_groups]

    def _run(self) -> None:
        if self._clip_norm is None:
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
        else:
            norm = nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self.norm.copy_(norm)
        self._optimizer.step()

    def _is_full(self, key: Hashable) -> bool:
        return key not in self._graphs and len(self._graphs) >= _MOST_GRAPHS

    def _settings(self) -> str:
        groups = self._optimizer.param_groups
        return repr([{name: value for name, value in each.items() if name not in ("params", "lr")} for each in groups])

    @contextmanager
    def _rates_as_data(self, *, captured: bool) -> Iterator[None]:
        """Inside it the optimizer reads its learning rates from the device, and knows whether it is captured."""
        groups = self._optimizer.param_groups
        before = [{name: group[name] for name in ("lr", "capturable") if name in group} for group in groups]
        for group, rate in zip(groups, self._rates):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = captured or group["capturable"]
        try:
            yield
        finally:
            for group, values in zip(groups, before):
                group.update(values)


def _can_be_captured(optimizer: Optimizer) -> bool:
    """Whether the optimizer keeps its state on the device and has nobody who wants to see each step."""
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    on_device = all(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return not hooks and on_device


def _nothing() -> None:
    return None
