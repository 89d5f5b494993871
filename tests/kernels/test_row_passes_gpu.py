"""On a GPU, in a model's shapes: the passes over rows agree with PyTorch's, wait for nothing and repeat in a CUDA graph."""

import pytest
import torch
import torch.nn.functional as F

from hubert_fast import backend
from hubert_fast.ops.bias_dropout_residual import bias_dropout_residual
from hubert_fast.ops.bias_gelu_dropout import bias_gelu_dropout
from hubert_fast.ops.mask_fill import mask_fill
from hubert_fast.ops.residual_layer_norm import residual_layer_norm
from tests.kernels import dropout_twin
from tests.ops.comparison import error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

ROWS = 8743
WIDTHS = pytest.mark.parametrize("channels", [768, 1024, 1280])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def _draw(channels, dtype):
    """x, residual, weight, bias, all with gradients; parameters in float32."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((ROWS, channels), dtype), ((ROWS, channels), dtype), (channels, torch.float32), (channels, torch.float32)
    return [torch.randn(shape, device="cuda", generator=generator).to(kind).requires_grad_() for shape, kind in shapes]


def _passes(x, residual, weight, bias, p=0.0, seed=None):
    """All four, one after another."""
    mask = torch.arange(len(x), device=x.device) % 2 == 0
    settings = {"dropout_p": p, "seed": seed}
    x = mask_fill(x, bias, weight, mask, **settings)
    x = bias_gelu_dropout(x, bias, **settings)
    normed, summed = residual_layer_norm(
        residual, weight, bias, update=x, update_bias=bias, update_dropout_p=p, seed=seed, with_sum=True
    )
    return bias_dropout_residual(normed, bias, summed, **settings)


def _plain(x, residual, weight, bias):
    mask = torch.arange(len(x), device=x.device) % 2 == 0
    x = torch.where(mask[:, None], weight, x + bias)
    summed = residual + F.gelu(x + bias) + bias
    return F.layer_norm(summed, summed.shape[1:], weight, bias) + bias + summed


@WIDTHS
@DTYPES
def test_they_agree_with_pytorch(channels, dtype):
    inputs = _draw(channels, dtype)
    results = []
    for function, leaves in ((_passes, inputs), (_plain, [each.detach().double().requires_grad_() for each in inputs])):
        with backend.using("triton") if function is _passes else backend.using("reference"):
            out = function(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    tolerance = 8 * torch.finfo(dtype).eps
    assert all(error(*pair) < tolerance for pair in zip(*results))


@WIDTHS
def test_masks_are_those_of_the_seed(channels):
    x, _, _, bias = _draw(channels, torch.bfloat16)
    ones = torch.ones_like(x, requires_grad=True)
    with backend.using("triton", "bias_gelu_dropout"):
        out = bias_gelu_dropout(ones, bias.abs(), dropout_p=0.1, seed=torch.tensor(-7, device="cuda"))
    out.sum().backward()
    mask = dropout_twin.kept_values(torch.tensor(-7), ROWS, channels, 0.1).mask
    assert torch.equal(out != 0, mask) and torch.equal(ones.grad != 0, mask)


def test_the_host_never_waits_and_two_runs_are_equal_to_the_bit():
    inputs, seed = _draw(768, torch.bfloat16), torch.tensor(3, device="cuda")
    _passes(*inputs, 0.1, seed).square().sum().backward()  # compiles
    runs = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            out = _passes(*inputs, 0.1, seed)
            runs.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        _passes(*inputs, 0.1)  # a seed is drawn
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(*pair) for pair in zip(*runs))


def test_a_cuda_graph_repeats_them_with_new_seeds():
    inputs, seed = _draw(768, torch.bfloat16), torch.tensor(3, device="cuda")
    expected = []
    for value in (3, 4):
        seed.fill_(value)
        out = _passes(*inputs, 0.1, seed)
        expected.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _passes(*inputs, 0.1, seed)
        captured = (out, *torch.autograd.grad(out.square().sum(), inputs))
    for value, results in zip((3, 4), expected):
        seed.fill_(value)
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(captured, results))
