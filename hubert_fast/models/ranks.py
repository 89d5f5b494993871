"""Agreement between processes that train together, whatever each of them draws.

A process that gathers weights or sums gradients waits for all others to do the same, without a message where one does not. So
which modules are called, and which parameters get a gradient, must not depend on a process's own random numbers or batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def await_every_gradient() -> bool:
    """Whether other processes may wait for the gradient of each parameter, used here or not.

    Those of DDP that looks for unused parameters do not. FSDP and loops that sum gradients themselves cannot be told from here.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    wrapper = DistributedDataParallel._get_active_ddp_module()
    return wrapper is None or not wrapper.find_unused_parameters


def beside(x: Tensor, unused: Iterable[Tensor]) -> Tensor:
    """``x``; in the backward ``unused``, on which it does not depend, get zeros."""
    return _Beside.apply(x, *unused)


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *unused: Tensor) -> Tensor:
        ctx.save_for_backward(*unused)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[1:])
        return grad, *(torch.zeros_like(each) if needed else None for each, needed in wanted)
