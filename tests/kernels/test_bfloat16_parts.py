"""Sums of bfloat16 parts: exact numbers, and the error that the order of a product promises."""

import pytest
import torch
import triton
import triton.language as tl

from hubert_fast.kernels.bfloat16_parts import PARTS, add_product, order_for, split
from hubert_fast.kernels.launch import Blocks, launch
from tests.kernels.device import DEVICE

SIZE = 64


@triton.jit
def _split(x, parts, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    high, middle, low = split(tl.load(x + at))
    tl.store(parts + at, high)
    tl.store(parts + SIZE * SIZE + at, middle)
    tl.store(parts + 2 * SIZE * SIZE + at, low)


@triton.jit
def _multiply(a, b, out, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr, ORDER: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros([SIZE, SIZE], tl.float32)
    total = add_product(total, tl.load(a + at), tl.load(b + at), A_PARTS, B_PARTS, ORDER)
    tl.store(out + at, total)


def _random(seed, dtype):
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", PARTS, ids=str)
def test_a_number_is_the_sum_of_its_parts(dtype):
    x = _random(0, dtype) * torch.exp2(torch.arange(-10, 10)).to(DEVICE, dtype).repeat(4)[:SIZE]
    parts = torch.empty(3, SIZE, SIZE, dtype=torch.bfloat16, device=DEVICE)
    launch(_split, lambda _: (1,), {"x": x, "parts": parts, "SIZE": SIZE}, [Blocks()])
    assert torch.equal(parts.double().sum(0), x.double())
    assert (parts[PARTS[dtype] :] == 0).all()


@pytest.mark.parametrize(("order", "allowed"), [(3, 1.5), (2, 200.0)])
@pytest.mark.parametrize("right", PARTS, ids=str)
@pytest.mark.parametrize("left", PARTS, ids=str)
def test_a_product_is_as_precise_as_its_order(left, right, order, allowed):
    """Order 3: as PyTorch's float32 product. Order 2: within 2^-16 of a product, which is far below 16-bit rounding."""
    a, b = _random(1, left), _random(2, right)
    out = torch.empty(SIZE, SIZE, device=DEVICE)
    constants = {"A_PARTS": PARTS[left], "B_PARTS": PARTS[right], "ORDER": order, "SIZE": SIZE}
    launch(_multiply, lambda _: (1,), {"a": a, "b": b, "out": out} | constants, [Blocks()])
    truth = a.double() @ b.double()
    ours, pytorchs = (out - truth).norm(), (a.float() @ b.float() - truth).norm()
    assert ours <= max(allowed * pytorchs, 1e-7 * truth.norm())


def test_the_order_follows_the_dtype_of_the_result():
    assert [order_for(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [3, 2, 2]
