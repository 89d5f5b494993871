"""Where the time of a training step goes: seconds by stage, from one step under PyTorch's profiler.

While it runs, what makes up a stage of a model is enclosed in named scopes. The time of each operator counts for the scope that
it lies in; that of a backward operator for the scope of the forward operator that it is the gradient of, which autograd's
sequence numbers tell. So every eager implementation is split in the same way. On a GPU the times are those of the kernels that
an operator launches, and what the GPU waits for the host is in "other".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from hubert_fast.models.encoder import Encoder
from hubert_fast.models.encoder_layer import EncoderLayer
from hubert_fast.models.feature_extractor import FeatureExtractor
from hubert_fast.models.hubert import HuBERTPretrainModel
from hubert_fast.models.logits import LogitGenerator
from hubert_fast.models.positional_embedding import ConvolutionalPositionalEmbedding
from hubert_fast.models.transformer import Transformer

from .flops import ATTENTION, FEED_FORWARD, FRONT_END, LOSS, POSITIONAL, PROJECTION
from .peers.peer import PeerModel
from .training import seconds_of

ELEMENTWISE = "norms, GELU, dropout"  # of the transformer, and its residuals; elsewhere they count for their stage
OPTIMIZER = "optimizer"
OTHER = "other"

STAGES = (FRONT_END, PROJECTION, POSITIONAL, ATTENTION, FEED_FORWARD, ELEMENTWISE, LOSS, OPTIMIZER, OTHER)

# Ours runs unfused where a module is hooked or replaced, so its scopes are around functions of classes.
_OUR_SCOPES = (
    (FeatureExtractor, "forward", FRONT_END),
    (HuBERTPretrainModel, "_plan", PROJECTION),
    (Encoder, "masked_rows", PROJECTION),
    (ConvolutionalPositionalEmbedding, "add_to", POSITIONAL),
    (Transformer, "stream", ELEMENTWISE),
    (EncoderLayer, "_attend", ATTENTION),
    (EncoderLayer, "_feed_forward", FEED_FORWARD),
    (LogitGenerator, "forward", LOSS),
    (LogitGenerator, "cross_entropy", LOSS),
)

# What torchaudio and transformers call their modules. One that is not named here belongs to the one that it is part of.
_MODULE_SCOPES = {
    "hubert": PROJECTION,  # transformers' own: what is not in one of the modules below is the masking
    "feature_extractor": FRONT_END,
    "feature_projection": PROJECTION,
    "mask_generator": PROJECTION,
    "encoder": ELEMENTWISE,
    "transformer": ELEMENTWISE,
    "pos_conv_embed": POSITIONAL,
    "attention": ATTENTION,
    "feed_forward": FEED_FORWARD,
    "logit_generator": LOSS,
    "final_proj": LOSS,
}

# Operators inside attention and feed-forward that are no part of the products.
_ELEMENTWISE_OPERATORS = {"aten::gelu", "aten::dropout", "aten::layer_norm", "hubert_fast::bias_gelu_dropout"}

_PREFIX = "stage: "
_BACKWARD = "autograd::engine::evaluate_function: "
_ACCUMULATION = _BACKWARD + "torch::autograd::AccumulateGrad"
_OPTIMIZER_PREFIX = "Optimizer."
_GRAPH_LAUNCH = "cudaGraphLaunch"


def split(peer_model: PeerModel, step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Seconds of a training step by stage; they add up to the time of a step that is not profiled.

    Args:
        peer_model: what ``step`` trains.
        step: runs forward, backward and optimizer. It is called twice, and is to have been called before.
        device: of the model.

    Returns:
        seconds by stage, in the order of `STAGES`, without those that take no time. Empty where the model is compiled or runs
        as a CUDA graph: nothing in it would be one stage.
    """
    if _is_compiled(peer_model):
        return {}
    total = seconds_of(step, device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it has nothing to say to who did not ask for a profile
    with _scopes(peer_model), profile(activities=activities) as profiler:
        profiled = seconds_of(step, device)
    events = profiler.events()
    if any(event.name == _GRAPH_LAUNCH for event in events):
        return {}
    on_gpu = device.type == "cuda"
    spent = by_stage(events, on_gpu=on_gpu)
    # Kernels take as long under the profiler as without it; the host does not.
    return completed(spent, total if on_gpu else profiled, total)


def by_stage(events: Iterable[FunctionEvent], *, on_gpu: bool) -> dict[str, float]:
    """Seconds of ``events`` by stage, on the CPU or of the kernels that they launched. They are in the order of their start."""
    stages: dict[int, str] = {}  # by event
    forward: dict[int, str] = {}  # by autograd's sequence number: of operators before the backward
    spent = dict.fromkeys(STAGES, 0.0)
    backward = None  # stage of the last node of the backward
    events = [event for event in events if event.device_type == DeviceType.CPU and not event.is_async]
    # A node's number, from the node itself: where a hook runs an operator first, the event around both has none.
    numbers = {
        id(parent): event.sequence_nr
        for event in events
        if (parent := event.cpu_parent) is not None and parent.name == _BACKWARD + event.name
    }
    for event in events:
        if event.name.startswith(_BACKWARD):
            if event.name != _ACCUMULATION:  # a gradient is kept right after it is made
                backward = forward.get(numbers.get(id(event), event.sequence_nr), OTHER)
            stage = backward or OTHER
        else:
            stage = _stage(event, stages, alone=OTHER if backward is None else OPTIMIZER)
            if backward is None and event.sequence_nr >= 0:
                # Operators without a gradient have the number of the next one that has, so the last is the right one.
                forward[event.sequence_nr] = stage
        stages[id(event)] = stage
        spent[stage] += (_kernel_time(event) if on_gpu else _cpu_time(event)) / 1e6
    return spent


def _stage(event: FunctionEvent, stages: dict[int, str], *, alone: str) -> str:
    """Of an event that is no node of the backward; one in no scope is ``alone``: after the backward it clips gradients, say."""
    if event.name.startswith(_PREFIX):
        return event.name.removeprefix(_PREFIX)
    if event.name.startswith(_OPTIMIZER_PREFIX):
        return OPTIMIZER
    parent = event.cpu_parent
    if parent is None:
        return alone
    stage = stages[id(parent)]
    of_operator = parent.name.startswith(_PREFIX) and stage in (ATTENTION, FEED_FORWARD)
    return ELEMENTWISE if of_operator and event.name in _ELEMENTWISE_OPERATORS else stage


def _cpu_time(event: FunctionEvent) -> float:
    """Microseconds of an operator, less those of the operators that it calls."""
    return event.self_cpu_time_total


def _kernel_time(event: FunctionEvent) -> float:
    """Microseconds. A scope has a kernel of its own name, which stands for all that run in it."""
    return sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)


def completed(spent: dict[str, float], covered: float, total: float) -> dict[str, float]:
    """``spent`` of ``covered`` seconds, with the rest of them in "other", as shares of ``total`` seconds."""
    spent = {**spent, OTHER: spent[OTHER] + max(0.0, covered - sum(spent.values()))}
    scale = total / sum(spent.values())
    return {stage: scale * seconds for stage, seconds in spent.items() if seconds > 0.0}


def _is_compiled(peer_model: PeerModel) -> bool:
    parts = [*vars(peer_model).values(), *peer_model.module.modules()]
    marks = ("_orig_mod", "_torchdynamo_orig_callable", "_compiled_call_impl")  # a module's, a function's, one in place
    return any(getattr(part, mark, None) is not None for part in parts for mark in marks)


@contextmanager
def _scopes(peer_model: PeerModel) -> Iterator[None]:
    """Encloses every stage of the model in a scope that the profiler sees."""
    ours = any(isinstance(module, HuBERTPretrainModel) for module in peer_model.module.modules())
    functions = [(type(peer_model), "loss", LOSS), *(_OUR_SCOPES if ours else _module_scopes(peer_model.module))]
    with ExitStack() as stack:
        for owner, name, stage in functions:
            stack.enter_context(_enclosed(owner, name, stage))
        yield


def _module_scopes(root: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    for path, module in root.named_modules():
        stage = _MODULE_SCOPES.get(path.rpartition(".")[2])
        if stage is not None:
            yield module, "forward", stage


def _enclosed(owner: Any, name: str, stage: str) -> AbstractContextManager:
    """``owner.name`` in a scope, for a while."""
    function = getattr(owner, name)

    @wraps(function)
    def enclosed(*args: Any, **kwargs: Any) -> Any:
        with record_function(_PREFIX + stage):
            return function(*args, **kwargs)

    return mock.patch.object(owner, name, enclosed)
