"""A step split by stage: what takes longer takes longer in its stage, forward and backward, in every implementation."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import record_function

from benchmarks import batches, stages
from benchmarks.architecture import ARCHITECTURES
from benchmarks.flops import ATTENTION, FEED_FORWARD, FRONT_END, LOSS, POSITIONAL, PROJECTION
from benchmarks.peers import PEERS
from benchmarks.peers.peer import Setting
from benchmarks.stages import ELEMENTWISE, OPTIMIZER, OTHER, STAGES, split
from benchmarks.training import TrainingStep
from hubert_fast import backend, hubert_pretrain_model
from hubert_fast.models.encoder_layer import EncoderLayer
from hubert_fast.torch_backend import (
    bias_gelu_dropout,
    cosine_cross_entropy,
    mask_fill,
    masked_attention,
    positional_conv,
)

TINY, CPU, CLASSES = ARCHITECTURES["tiny"].changed(layers=1), torch.device("cpu"), 10
NAP = "nap"  # what takes time in a stage; on the clock of these tests nothing else does


class Side:
    """A peer's model and its training step on a small padded batch."""

    def __init__(self, name):
        setting = Setting(TINY, CLASSES, CPU, torch.float32, padded=True)
        peer = PEERS[name]
        if peer.why_not(setting):
            pytest.skip(peer.why_not(setting))
        torch.manual_seed(0)
        weights = hubert_pretrain_model(**TINY.factory_arguments(CLASSES)).state_dict()
        self.model = peer.build(setting, weights)
        self.training = TrainingStep(self.model)
        self.batch = batches.make([8_000, 6_000], TINY, CLASSES)

    def step(self):
        self.training(self.batch, torch.float32)

    def split(self):
        return split(self.model, self.step, CPU)


@pytest.fixture
def clock(monkeypatch):
    """Under the profiler a nap takes a second, and all else nothing; a step takes as long as its naps."""
    monkeypatch.setattr(stages, "_cpu_time", lambda event: 1e6 * (event.name == NAP))
    monkeypatch.setattr(stages, "completed", lambda spent, covered, total: {k: v for k, v in spent.items() if v})


@pytest.fixture(scope="module")
def ours():
    return Side("hubert_fast")


@pytest.fixture(scope="module")
def theirs():
    return Side("torchaudio")


@pytest.mark.parametrize("name", ["hubert_fast", "hubert_fast swapped in", "torchaudio", "transformers sdpa"])
def test_every_stage_takes_time_and_together_they_take_that_of_the_step(name, monkeypatch):
    side = Side(name)

    def forty_seconds(step, device):
        step()
        return 40.0

    monkeypatch.setattr(stages, "seconds_of", forty_seconds)
    found = side.split()
    assert tuple(found) == STAGES and min(found.values()) > 0
    assert sum(found.values()) == pytest.approx(40.0)


def nap():
    with record_function(NAP):
        pass


def napping(function):
    def slow(*args, **kwargs):
        nap()
        return function(*args, **kwargs)

    return slow


@pytest.mark.parametrize(
    "module, function, stage",
    [
        (masked_attention, "backward", ATTENTION),
        (bias_gelu_dropout, "forward", ELEMENTWISE),
        (positional_conv, "backward", POSITIONAL),
        (mask_fill, "forward", PROJECTION),
        (cosine_cross_entropy, "backward", LOSS),
    ],
)
def test_an_operator_of_ours_that_is_slower_is_slower_in_its_stage(ours, clock, monkeypatch, module, function, stage):
    monkeypatch.setattr(module, function, napping(getattr(module, function)))
    with backend.using("torch"):
        assert set(ours.split()) == {stage}


@pytest.mark.parametrize(
    "path, stage",
    [
        ("wav2vec2.feature_extractor", FRONT_END),
        ("wav2vec2.encoder.feature_projection", PROJECTION),
        ("wav2vec2.encoder.transformer.pos_conv_embed", POSITIONAL),
        ("wav2vec2.encoder.transformer.layers.0.attention", ATTENTION),
        ("wav2vec2.encoder.transformer.layers.0.feed_forward.output_dense", FEED_FORWARD),
        ("wav2vec2.encoder.transformer.layers.0.final_layer_norm", ELEMENTWISE),
        ("wav2vec2.encoder.transformer.layers.0.feed_forward.intermediate_dropout", ELEMENTWISE),
    ],
)
def test_a_module_of_theirs_whose_backward_is_slower_is_slower_in_its_stage(theirs, clock, path, stage):
    def slow_backward(module, inputs, output):
        tensor = output[0] if isinstance(output, tuple) else output
        tensor.register_hook(lambda gradient: nap())

    with theirs.model.module.get_submodule(path).register_forward_hook(slow_backward):
        assert theirs.split() == {stage: 1.0}
    assert not any("forward" in vars(module) for module in theirs.model.module.modules())


def test_clipping_and_the_optimizer_count_for_the_optimizer(ours, clock):
    class Clipping(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            nap()
            return x.clone()

    with ours.training.optimizer.register_step_pre_hook(lambda *_: nap()):
        assert ours.split() == {OPTIMIZER: 1.0}
    clipped = split(ours.model, lambda: (ours.step(), Clipping.apply(torch.ones(1, requires_grad=True))), CPU)
    assert clipped == {OPTIMIZER: 1.0}


def test_what_lies_between_operators_is_other(ours, monkeypatch):
    monkeypatch.setattr(stages, "_cpu_time", lambda event: 0.0)
    monkeypatch.setattr(stages, "seconds_of", lambda step, device: step() or 40.0)
    assert ours.split() == {OTHER: 40.0}


def test_splitting_leaves_no_trace_and_ours_fused(ours, monkeypatch):
    seen = []
    attend, kernel = vars(EncoderLayer)["_attend"], bias_gelu_dropout.forward
    monkeypatch.setattr(bias_gelu_dropout, "forward", lambda *args: seen.append(args[0].bias) or kernel(*args))
    with backend.using("torch", "bias_gelu_dropout"):
        ours.split()
    assert len(seen) == 2 * TINY.layers
    assert vars(EncoderLayer)["_attend"] is attend
    assert not any("forward" in vars(module) for module in ours.model.module.modules())


def test_nothing_is_left_in_modules_of_theirs_even_after_an_error(theirs):
    own, begun = vars(type(theirs.model))["loss"], []

    def failing_in_scopes():
        begun.append(vars(type(theirs.model))["loss"] is not own)
        if begun[-1]:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        split(theirs.model, failing_in_scopes, CPU)
    assert begun == [False, True]  # the second is profiled, and its scopes were there
    assert not any("forward" in vars(module) for module in theirs.model.module.modules())
    assert vars(type(theirs.model))["loss"] is own


def test_compiled_models_are_not_split():
    def unwanted():
        raise AssertionError("a step of a compiled model may take minutes")

    linear, in_place = nn.Linear(2, 2), nn.Linear(2, 2)
    in_place.compile()
    for model in (
        SimpleNamespace(module=linear, compiled=torch.compile(linear)),
        SimpleNamespace(module=linear, compiled=torch.compile(linear.forward)),
        SimpleNamespace(module=nn.Sequential(in_place)),
    ):
        assert split(model, unwanted, CPU) == {}


def event(name, parent=None, *, sequence=-1, kernels=None):
    """A profiler's, as far as it is read; kernels by name, in microseconds."""
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        sequence_nr=sequence,
        kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in (kernels or {}).items()],
        self_cpu_time_total=1e9,
        device_type=DeviceType.CPU,
        is_async=False,
    )


def test_on_a_gpu_the_kernels_count_and_not_the_host():
    scope = event("stage: attention", kernels={"stage: attention": 7e6})  # what the profiler makes of a scope itself
    linear = event("aten::linear", scope, sequence=3, kernels={"gemm": 2e6})
    unrelated = event("aten::zeros", sequence=3)  # before the next operator with a gradient
    last = event("aten::sum", event("stage: loss"), sequence=4, kernels={"reduce": 1e6})
    node = event("autograd::engine::evaluate_function: AddmmBackward0", sequence=3)
    inner = event("aten::mm", event("AddmmBackward0", node, sequence=3), kernels={"gemm": 4e6})
    kept = event("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", kernels={"add": 0.5e6})
    on_device = SimpleNamespace(name="gemm", device_type=DeviceType.CUDA)
    events = [unrelated, scope, linear, last.cpu_parent, last, node, inner.cpu_parent, inner, kept, on_device]
    found = stages.by_stage(events, on_gpu=True)
    assert {stage: spent for stage, spent in found.items() if spent} == {ATTENTION: 6.5, LOSS: 1.0}


def test_the_rest_of_a_step_is_other_and_more_than_the_step_is_scaled_to_it():
    spent = dict.fromkeys(STAGES, 0.0) | {ATTENTION: 3.0, LOSS: 1.0}
    assert stages.completed(spent, 5.0, 5.0) == {ATTENTION: 3.0, LOSS: 1.0, OTHER: 1.0}
    assert stages.completed(spent, 8.0, 4.0) == {ATTENTION: 1.5, LOSS: 0.5, OTHER: 2.0}  # the profiler slows it down
    assert stages.completed(spent, 2.0, 2.0) == {ATTENTION: 1.5, LOSS: 0.5}  # kernels beside each other
