"""The number of micro-batches into which each rank divides its share of a global batch: as asked, or as a GPU's memory allows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hubert_fast.ops.feed_forward import keeps_hidden_once
from hubert_fast.pretrain.batches import GlobalBatches, largest_seconds
from hubert_fast.pretrain.config import IterationConfig, PretrainConfig
from hubert_fast.pretrain.distributed import Process
from hubert_fast.pretrain.memory_model import MemoryModel
from hubert_fast.pretrain.progress import say
from hubert_fast.pretrain.random_state import preserved_random_state

if TYPE_CHECKING:
    from hubert_fast.pretrain.utterances import Batch

# The share of the free memory that predicted bytes may take.
_SHARE = 0.9
# More audio than this in a micro-batch is no faster, and the front end's first activations pass 2**31 values at 1,300 s.
_MOST_SECONDS = 700.0
_GIB = 2**30

Sizes = Sequence[tuple[int, int]]  # (rows, samples of each)
Gradients = Callable[["list[Batch]"], Any]


def follow_from_memory(config: PretrainConfig, iteration: IterationConfig, process: Process) -> bool:
    """Whether nobody said how batches are split, and there is a GPU whose memory decides."""
    automatic = iteration.optimizer.accumulate is None and config.data.micro_batch_seconds == "auto"
    return automatic and process.device.type == "cuda"


def divide(
    batches: GlobalBatches, config: PretrainConfig, iteration: IterationConfig, model: nn.Module, process: Process
) -> None:
    """Divide ``batches`` as the settings ask, and say how."""
    seconds = config.data.micro_batch_seconds
    if iteration.optimizer.accumulate is not None:
        batches.divide(iteration.optimizer.accumulate)
    elif seconds != "auto":
        batches.divide(fewest(batches, lambda sizes: largest_seconds(sizes) <= seconds))
        _say(f"{_described(batches, process)}, where {seconds:g} s were asked for", process)
    elif process.device.type == "cuda":
        memory = MemoryModel(
            iteration.model,
            sum(each.numel() for each in model.parameters()),
            config.autocast,
            masked_only=iteration.objective.unmasked_weight == 0,
            world_size=process.world_size,
            hidden_once=keeps_hidden_once(process.device, torch.bfloat16),
        )
        free = _free_bytes(process)

        def fits(sizes: Sizes) -> bool:
            return largest_seconds(sizes) <= _MOST_SECONDS and predicted(memory, sizes) <= _SHARE * free

        batches.divide(fewest(batches, fits))
        bytes_ = predicted(memory, batches.largest_sizes(batches.accumulate))
        _say(f"{_described(batches, process)}: {bytes_ / _GIB:.1f} of {free / _GIB:.1f} GiB by prediction", process)


def fewest(batches: GlobalBatches, fits: Callable[[Sizes], bool]) -> int:
    """The smallest number of micro-batches of each rank of which the largest ``fits``, or the largest number there can be."""
    most = batches.most_micro_batches
    return next((each for each in range(1, most) if fits(batches.largest_sizes(each))), most)


def predicted(memory: MemoryModel, sizes: Sizes) -> int:
    """Peak bytes of a step on micro-batches of ``sizes``."""
    return max(memory.peak(memory.largest(*size)) for size in sizes)


def halve_until_they_fit(
    batches: GlobalBatches, gradients: Gradients, optimizer: torch.optim.Optimizer, process: Process
) -> None:
    """Double the number of micro-batches for as long as the largest of them run out of memory on any rank.

    ``gradients(micro_batches)`` computes and adds up gradients without a word to other ranks. They are thrown away, and what
    it draws shifts no random number that is drawn later. Place and order of ``batches`` stay.

    Raises:
        RuntimeError: where even the smallest micro-batches run out of memory.
    """
    while process.sum_on_host([_runs_out(batches, gradients, optimizer, process.device)])[0] > 0:
        seconds, accumulate = batches.seconds(), batches.accumulate
        if accumulate >= batches.most_micro_batches:
            raise RuntimeError(
                f"a training step on micro-batches of {seconds:.1f} s, the smallest that data.batch_seconds allows, runs out "
                "of memory: lower data.max_seconds, or take a smaller model or a larger GPU"
            )
        batches.divide(min(2 * accumulate, batches.most_micro_batches))
        if process.is_main:
            warnings.warn(
                f"micro-batches of up to {seconds:.1f} s ran out of memory; going on with {_described(batches, process)}",
                RuntimeWarning,
                stacklevel=2,
            )
    if process.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(process.device)
        _say(f"micro-batches of {batches.seconds():.1f} s took {peak / _GIB:.1f} GiB in a trial", process)


def run_largest(
    batches: GlobalBatches, gradients: Gradients, optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    """Compute the gradients of the largest micro-batch that may come, and throw them away. No random number is used up.

    Raises:
        torch.OutOfMemoryError: where it does not fit.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    # From the second on, the gradients of those before lie beside what is kept of a micro-batch.
    micro_batches = [batches.largest_micro_batch()] * min(2, batches.accumulate)
    try:
        _try(lambda: gradients(micro_batches), [] if optimizer.state else parameters, device)
    finally:
        for each in parameters:
            each.grad = None


def _runs_out(
    batches: GlobalBatches, gradients: Gradients, optimizer: torch.optim.Optimizer, device: torch.device
) -> bool:
    try:
        run_largest(batches, gradients, optimizer, device)
        runs_out = False
    except RuntimeError as error:  # libraries have errors of their own for it
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        runs_out = True
    # Here the error, and with it the tensors of all that it came through, is gone.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return runs_out


def _try(work: Callable[[], Any], without_moments: list[nn.Parameter], device: torch.device) -> None:
    """``work``, beside as much memory as the moments take that AdamW makes at the end of its first step."""
    moments = [torch.empty_like(each) for each in 2 * without_moments]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with preserved_random_state():
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    del moments


def _free_bytes(process: Process) -> int:
    """Free bytes of the fullest GPU of all ranks, with what PyTorch holds there: weights are predicted too."""
    free = torch.cuda.mem_get_info(process.device)[0] + torch.cuda.memory_reserved(process.device)
    return process.from_main(min(process.gather(free), default=0))


def _described(batches: GlobalBatches, process: Process) -> str:
    processes = "1 process" if process.world_size == 1 else f"{process.world_size} processes"
    return f"micro-batches of up to {batches.seconds():.1f} s, {batches.accumulate} of each of {processes}"


def _say(line: str, process: Process) -> None:
    if process.is_main:
        say(line)
