"""The memory model beside a count of what autograd keeps on the GPU's kernels, on tensors without memory."""

from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hubert_fast import PretrainingObjective, backend, cpu
from hubert_fast.cuda_backend import conv_frontend, feed_forward
from hubert_fast.models import plain
from hubert_fast.models.plan import StepPlan
from hubert_fast.ops import triton_backend
from hubert_fast.pretrain.memory_model import MemoryModel, Size
from hubert_fast.pretrain.presets import PRESETS

pytest.importorskip("triton", minversion="3.6")

SECOND = 16_000
# Samples of each row: full rows of the longest and of short utterances, and rows of which a third is padding.
BATCHES = {"long": [15.6] * 11, "short": [2.0] * 30, "padded": [15.6, 14.0, 9.0, 9.0, 7.0, 5.0]}


def fake(tensor):
    return None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype)


def fake_plan(plan: StepPlan) -> StepPlan:
    layout = plan.layout
    placed = layout._replace(**{name: fake(getattr(layout, name)) for name in ("index", "offsets", "key_lengths")})
    return StepPlan(placed, *map(fake, plan[1:]))


@pytest.fixture
def kernels_of_a_gpu():
    """Inside it tensors that pretend to lie on the CPU take the backends "triton" and "cuda", in CUDA's dtypes."""

    def stream_dtype(x):
        return torch.float32 if torch.is_autocast_enabled("cpu") else None

    with ExitStack() as stack:

        def patch(target, name, value):
            stack.enter_context(mock.patch.object(target, name, value))

        patch(triton_backend, "objection", lambda *_: None)
        patch(conv_frontend, "objection", lambda *_: None)
        patch(feed_forward, "objection", lambda *_: None)
        patch(plain, "stream_dtype", stream_dtype)
        patch(cpu, "is_cpu", lambda device: False)
        for entry in backend._operators.values():
            patch(entry, "unavailable", {})
        yield


def kept_bytes(objective: PretrainingObjective, shape: tuple[int, int], plan: StepPlan, autocast: bool) -> int:
    """Bytes of all storages that the forward of a step saves for its backward, but the parameters'."""
    saved = {}  # held on to, so that no number of a storage is given twice
    with FakeTensorMode():
        for module in objective.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = None if parameter is None else nn.Parameter(fake(parameter))
        own = {each.untyped_storage()._cdata for each in objective.parameters()}

        def save(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            objective(torch.empty(shape), plan=fake_plan(plan))
    return sum(each.nbytes() for each in saved.values())


def counted_and_predicted(model, lengths, *, unmasked_weight=0.0, autocast=True, extension=True):
    """(Bytes that a step keeps, the model of it, the size of the step) for rows of ``lengths`` samples."""
    # LayerDrop asks for a number, which these tensors have not.
    config = replace(model, encoder_layer_drop=0.0)
    with torch.device("meta"):
        objective = PretrainingObjective(config.build(500), unmasked_weight=unmasked_weight)
    parameters = sum(each.numel() for each in objective.parameters())
    memory = MemoryModel(config, parameters, autocast, masked_only=unmasked_weight == 0, hidden_once=extension)
    samples = torch.tensor(lengths)
    frames = objective.model.wav2vec2.feature_extractor.output_lengths(samples)
    labels = torch.zeros(len(samples), int(frames.max()), dtype=torch.int64)
    plan = objective.plan(labels, samples, samples=int(samples.max()), device="cpu")
    shape = len(samples), int(samples.max())
    # In such a mode an automatic choice is the composition.
    fused = extension and autocast and not config.encoder_ff_interm_dropout
    with backend.using("cuda" if fused else "torch", "feed_forward"):
        counted = kept_bytes(objective, shape, plan, autocast)
    if fused:  # its weights in 16 bits, which the backward of a plain step makes again and a graphed one has
        counted += config.encoder_num_layers * 2 * config.encoder_embed_dim * config.encoder_ff_interm_features * 2
    return counted, memory, Size(*shape, int(frames.sum()), None if plan.keep is None else len(plan.keep))


@pytest.mark.parametrize("unmasked_weight", [0.0, 1.0])
@pytest.mark.parametrize("autocast", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["base", "large", "xlarge"])
def test_it_predicts_what_is_kept_for_the_backward(kernels_of_a_gpu, name, autocast, unmasked_weight):
    model = PRESETS[name].iterations()[-1].model
    for lengths in BATCHES.values() if unmasked_weight == 0 else [BATCHES["long"]]:
        lengths = [round(each * SECOND) for each in lengths]
        settings = {"unmasked_weight": unmasked_weight, "autocast": autocast}
        counted, memory, size = counted_and_predicted(model, lengths, **settings)
        assert memory.kept(size) == pytest.approx(counted, rel=0.05), lengths
        # What batches are divided by: no padding, and as many masked frames as there can be.
        assert counted <= 1.01 * memory.kept(memory.largest(*size[:2]))


@pytest.mark.parametrize(("extension", "most"), [(True, 2.4e9), (False, 3.0e9)])
def test_the_rows_of_base_keep_no_more_than_they_have_to(kernels_of_a_gpu, extension, most):
    """175 s of audio in bfloat16, without the front end and the copies of weights, which are not the rows'."""
    counted, memory, size = counted_and_predicted(
        PRESETS["base"].iterations()[-1].model, [200_000] * 14, extension=extension
    )
    assert memory.kept(size) == pytest.approx(counted, rel=0.01)
    assert counted - memory._front_end(size) - memory._weights() <= most
