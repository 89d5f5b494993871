"""Products on a CPU: in float32 where 16 bits are slow, by oneDNN where that is faster, and as exact as PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hubert_fast import cpu, hubert_pretrain_base
from hubert_fast.models.plain import gelu_of_product
from hubert_fast.ops.linear import linear
from tests.ops.comparison import error

CPU, BFLOAT16 = torch.device("cpu"), torch.bfloat16


def test_only_a_cpu_without_fast_products_widens_them(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cpu, "_SLOW", {BFLOAT16})
    assert cpu.product_dtype(CPU, BFLOAT16) == torch.float32
    assert cpu.product_dtype(CPU, torch.float16) == torch.float16
    assert cpu.product_dtype(torch.device("cuda"), BFLOAT16) == BFLOAT16
    monkeypatch.setattr(cpu, "_SLOW", set())
    assert cpu.product_dtype(CPU, BFLOAT16) == BFLOAT16


@pytest.mark.parametrize("slow", [set(), {BFLOAT16}], ids=["fast", "slow"])
def test_a_model_gives_one_result_in_16_bits_whichever_way_it_multiplies(monkeypatch, slow):
    """Dtypes are autocast's own, and values are as exact as where the CPU multiplies in 16 bits."""
    torch.manual_seed(0)
    model = hubert_pretrain_base(num_classes=7).eval()
    layers = model.wav2vec2.encoder.transformer
    layers.layers = layers.layers[:1]
    waveforms, labels = torch.randn(2, 4000), torch.zeros(2, 12, dtype=torch.int64)
    truth = model.wav2vec2.extract_features(waveforms)[0][-1]
    monkeypatch.setattr(cpu, "_SLOW", slow)
    with torch.autocast("cpu", BFLOAT16):
        with torch.no_grad():
            found = model.wav2vec2.extract_features(waveforms)[0][-1]
        masked, _, _ = model(waveforms, labels)
    assert found.dtype == masked.dtype == BFLOAT16
    assert error(found.float(), truth) < 0.02
    masked[:, 0].float().sum().backward()
    assert all(each.grad.dtype == torch.float32 for each in model.parameters() if each.grad is not None)


@pytest.mark.parametrize("sizes", [(5, 16, 48), (5, 48, 16)], ids=["wide", "deep"])
@pytest.mark.parametrize("gradient", [False, True])
def test_products_are_as_exact_as_pytorchs(sizes, gradient, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows, depth, out = sizes
    torch.manual_seed(0)
    module, x = nn.Linear(depth, out), torch.randn(rows, depth, requires_grad=gradient)
    parameters = (module.weight, module.bias) if gradient else (module.weight.detach(), module.bias.detach())
    exact = F.linear(x.double(), *(each.double() for each in parameters))
    with torch.set_grad_enabled(gradient):
        found, activated = linear(x, *([each] for each in parameters)), gelu_of_product(module, x)
    for ours, theirs, truth in (
        (found, F.linear(x, *parameters), exact),
        (activated, F.gelu(F.linear(x, *parameters)), F.gelu(exact)),
    ):
        assert error(ours, truth) <= 1.5 * error(theirs, truth) + 1e-7
    if gradient:
        mine, other = (
            torch.autograd.grad(form.square().sum(), [x, *parameters]) for form in (found, F.linear(x, *parameters))
        )
        for ours, theirs in zip(mine, other):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
