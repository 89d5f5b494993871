"""The objective with Triton's kernels on, in the interpreter where there is no GPU: the reference's numbers, in one graph too."""

import importlib
import pkgutil

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from hubert_fast import backend
from tests.kernels.device import DEVICE
from tests.models import configurations
from tests.models.test_activation_checkpointing import leave, recompute
from tests.models.test_dropout import DROPOUTS
from tests.models.twins import Batch, objective_of, relative_error, step

SAMPLES = 5200  # 16 frames
LENGTHS = torch.tensor([5200, 3700, 5000])


def _batch(dtype):
    generator = torch.Generator().manual_seed(1)
    waveforms = torch.randn(3, SAMPLES, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    return Batch(waveforms, torch.randint(0, configurations.NUM_CLASSES, (3, 16), generator=generator), LENGTHS)


def _mask():
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, 2:9] = True
    return mask


def _objective(name, dtype=torch.float32, **settings):
    """One head as wide as the published sizes', and few of all else: the interpreter takes milliseconds for each block."""
    dim = 80 if name.startswith("xlarge") else 64
    small = dict(encoder_embed_dim=dim, encoder_num_heads=1, encoder_ff_interm_features=96, encoder_pos_conv_kernel=4)
    return objective_of(configurations.ALL[name] | small | settings).to(DEVICE, dtype)


def _step(objective, dtype, name, autocast=False, run=None):
    with backend.using(name), torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        result, grads = step(objective, _batch(dtype), run, mask=_mask())
    return result.loss.detach(), grads


def _errors(step, truth):
    """Of the loss, and of all gradients together: one parameter's is luck."""
    given, wanted = (torch.cat([each.flatten().double().cpu() for each in side[1].values()]) for side in (step, truth))
    return relative_error(step[0], truth[0]), relative_error(given, wanted)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", ["base", "xlarge-bias"])
def test_loss_and_gradients_err_no_more_than_pytorchs(name, autocast):
    truth = _step(_objective(name, torch.float64), torch.float64, "reference")
    objective = _objective(name)
    ours = _errors(_step(objective, torch.float32, "triton", autocast), truth)
    pytorchs = _errors(_step(objective, torch.float32, "reference", autocast), truth)
    floor = 2e-3 if autocast else 2e-7
    assert all(mine <= max(1.5 * theirs, floor) for mine, theirs in zip(ours, pytorchs)), (ours, pytorchs)


def test_every_operator_that_has_a_kernel_runs_it(monkeypatch):
    """A kernel that the model never reaches is no kernel of the model."""
    import hubert_fast.kernels
    from hubert_fast.kernels import launch

    started = []
    original = launch.launch

    def counted(kernel, *rest):
        started.append(kernel.__name__)
        original(kernel, *rest)

    for each in pkgutil.iter_modules(hubert_fast.kernels.__path__):
        module = importlib.import_module(f"hubert_fast.kernels.{each.name}")
        if getattr(module, "launch", None) is original:
            monkeypatch.setattr(module, "launch", counted)
    objective = _objective("xlarge-bias", **DROPOUTS | {"encoder_layer_drop": 0.0})
    _step(objective, torch.float32, "triton")
    operators = {"masked_attention", "cosine_cross_entropy", "positional_conv", "bias_gelu_dropout"}
    operators |= {"residual_layer_norm", "bias_dropout_residual", "mask_fill"}
    with_kernels = {each.operator for each in backend.report() if "triton" in {*each.reasons, *each.available}}
    assert with_kernels >= operators
    assert len(set(started)) >= 2 * len(operators), sorted(set(started))  # forward and backward of each


def test_a_batch_without_a_masked_frame_has_gradients_of_zeros():
    objective = _objective("base")
    with backend.using("triton"):
        result = objective(*_batch(torch.float32), mask=torch.zeros(3, 16, dtype=torch.bool))
        result.mean.backward()
    assert result.mean == 0 and all((each.grad == 0).all() for each in objective.parameters())


def test_the_objective_compiles_to_one_graph():
    torch._dynamo.reset()
    objective = _objective("base")
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    graph, eager = (_step(objective, torch.float32, "triton", run=run) for run in (compiled, None))
    assert max(_errors(graph, eager)) <= 1e-5  # the graph computes padding and every row of the last layer
    torch._dynamo.reset()


def test_dropout_is_drawn_again_when_activations_are_recomputed():
    objective = _objective("base", **DROPOUTS | {"encoder_layer_drop": 0.0})
    for layer in objective.model.wav2vec2.encoder.transformer.layers:
        leave(layer)
    plain, repeated = (_step(objective, torch.float32, "triton") for _ in range(2))
    for layer in objective.model.wav2vec2.encoder.transformer.layers:
        recompute(layer)
    recomputed = _step(objective, torch.float32, "triton")
    for again in (repeated, recomputed):
        assert torch.equal(plain[0], again[0])
        assert all(torch.equal(plain[1][key], grad) for key, grad in again[1].items())
