"""GELU of the C++ passes, for every instruction set that this machine can run."""

import pytest
import torch
import torch.nn.functional as F

from hubert_fast import extension

pytestmark = pytest.mark.skipif(extension.cpu() is None, reason=str(extension.why_not("cpu")))
INSTRUCTION_SETS = extension.cpu().instruction_sets() if extension.cpu() else []


@pytest.fixture(params=INSTRUCTION_SETS)
def gelu(request):
    """GELU through a layer 0 of one tap with weight 1."""
    kernels = extension.cpu()
    before = kernels.instruction_set()
    kernels.use_instruction_set(request.param)

    def apply(x):
        one, zero, out = torch.ones(1, 16), torch.zeros(16), torch.empty(len(x), 16)
        constants = {"filters": one, "centre": zero, "shift": zero}
        layer = kernels.FirstLayer(signal=x, **constants, taps=1, stride=1)
        windows = kernels.Windows(data=out, kernel=1, stride=1, rows=len(x))
        settings = dict(dtype="float32", channels=16, start=0, stop=len(x), threads=1)
        kernels.forward(first_layer=layer, windows=windows, **settings)
        return out[:, 3].clone()

    yield apply
    kernels.use_instruction_set(before)


def test_as_precise_as_pytorchs(gelu):
    for x in (torch.linspace(-14, 14, 100_001), torch.randn(100_000, generator=torch.Generator().manual_seed(0))):
        truth = F.gelu(x.double())
        ours, pytorchs = (each - truth for each in (gelu(x), F.gelu(x)))
        assert ours.norm() <= 1.5 * pytorchs.norm()
        assert ours.abs().max() <= 1.5 * pytorchs.abs().max()


def test_the_ends_of_the_range(gelu):
    x = torch.tensor([0.0, 1e-30, -1e-30, 30.0, -30.0, 1e30, -1e30])
    torch.testing.assert_close(gelu(x), F.gelu(x), rtol=1e-6, atol=1e-37)
    unusual = gelu(torch.tensor([float("inf"), -float("inf"), float("nan")]))
    assert unusual[0] == float("inf")  # the limit
    assert unusual[1:].isnan().all()
