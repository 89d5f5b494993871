"""How products are best computed on a CPU: in which dtype, and by which library.

oneDNN has products in 16 bits for processors that have vector instructions for them. On others PyTorch's own loops take over: on
an AMD EPYC of 2021 (AVX2), 2 threads, a product of 2048 x 768 x 768 ran at 1.3 GFLOP/s in bfloat16 and at 123 in float32. There
operands are widened, multiplied in float32 and rounded once.

In float32 PyTorch calls MKL. Its time over oneDNN's for x weight^T, weights out of cache, 1 and 2 threads:

    AMD, AVX2 (2021)          49, 98 rows         196, 249, 499 rows  1,000, 1,996 rows
    768 -> 2,304 or 3,072     1.0-1.1, 1.1-1.4    0.9-1.1, 1.0-1.2    0.9, 0.9-1.1
    768 or 3,072 -> 768       0.8-1.0, 1.1-1.4    0.8-0.9, 0.9-1.1    0.9-1.0, 0.9-1.0
    AMD, AVX-512 (2022)       49, 98 rows         249, 499 rows       1,000, 1,996 rows
    768 -> 2,304 or 3,072     1.2, 1.3-1.5        1.1-1.2, 1.1-1.3    1.1, 1.1-1.2
    768 or 3,072 -> 768       1.1-1.2, 1.4-1.5    1.1, 1.1-1.2        1.1, 1.1
    1,024 or 1,536 -> 512     1.1-1.2, 1.2-1.4    1.1, 1.1            1.1, 1.1
    all of these, y weight    0.9-1.4, 0.8-2.0    1.1, 1.2-1.4        1.0-1.2, 1.1-1.2
    64 -> 64, 128 -> 128      0.4-0.8, 0.4-0.7    0.7-1.0, 0.6-0.9    0.9-1.1, 0.8-1.0

    AMD, AVX-512 (2024)       49, 98 rows         249, 499 rows       1,996 rows
    all of these, x weight^T  1.8-2.1             2.1-2.2             2.1-2.2
    all of these, y weight    1.7-2.5             1.9-2.3             1.9-2.3
    all of these, y^T x       1.8-2.2             1.9-2.4             1.6-1.8

For the gradient of a weight, y^T x, both take about the same time on those of 2021 and 2022. On AMD's processors MKL does not use
AVX-512. Those of 2024 have vector units of its full width, so there MKL runs at half of their rate. On Intel's own processors
nothing was measured.

So oneDNN takes all products of those of 2024, all but y^T x of those of 2022, and on AVX2, with two threads or more, products of
up to 512 rows that widen them and, in inference, of up to 128 rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def _has_products(name: str) -> bool:
    asked = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return asked is not None and torch.backends.mkldnn.is_available() and bool(asked())


# Asked once, here: torch.compile cannot trace the question.
_SLOW = {dtype for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")) if not _has_products(name)}


def is_cpu(device: torch.device) -> bool:
    """Whether work on ``device`` is arranged for a CPU. What counts a GPU's launches on a CPU replaces this."""
    return device.type == "cpu"


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype to multiply ``dtype`` on ``device`` in: float32 where a CPU has no fast product in 16 bits."""
    return torch.float32 if dtype in _SLOW and is_cpu(device) else dtype


def convolution_dtype(device: torch.device, dtype: torch.dtype, depth: int) -> torch.dtype:
    """The dtype to convolve ``dtype`` in, with ``depth`` input channels a group: `product_dtype`'s, or float32 if it goes wrong.

    In bfloat16 on processors with AMX, oneDNN gives wrong sums for fewer than 16 input channels a group (PyTorch 2.13; 2 to 12
    channels of 8 or 64 taps were up to 117% off, with stride 1; strides of 2 and 5 were right. pytorch/pytorch#163347).
    """
    wrong = _HAS_AMX and dtype == torch.bfloat16 and depth < 16
    return torch.float32 if wrong and is_cpu(device) else product_dtype(device, dtype)


def _cpuinfo(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not on Linux
        return ""
    return next((line.rpartition(":")[2].strip() for line in lines if line.startswith(name)), "")


_HAS_AMX = "amx_bf16" in _cpuinfo("flags").split()
_NARROW_GELU = {torch.bfloat16} - _SLOW  # oneDNN refuses it elsewhere
_FEW_ROWS, _SOME_ROWS, _MANY_ROWS = 128, 512, 1024
_ROWS_OF_A_SUM = 256
_ONEDNN_WINS = torch.backends.cpu.get_cpu_capability() == "AVX512" and _cpuinfo("vendor_id") == "AuthenticAMD"
_FULL_WIDTH = _ONEDNN_WINS and int(_cpuinfo("cpu family") or 0) >= 26  # 2024

# Values of the smallest weight whose products are oneDNN's: what it needs to begin is a large part of a smaller product. Where
# there will be a gradient, autograd in Python is another.
_FEWEST_WEIGHTS, _FEWEST_TO_LEARN = 1 << (14 if _FULL_WIDTH else 17), 1 << 17
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def prefers_channels_last(device: torch.device) -> bool:
    """Whether oneDNN's convolutions of many frames are fastest where the channels of each lie side by side.

    On AMD's AVX-512 (2024) they then run at twice the rate in float32. On AVX2 the gradient of the rows took 1.2 times as long;
    on AVX-512 of 2022 nothing was measured.
    """
    return _FULL_WIDTH and is_cpu(device)


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are being computed, which only PyTorch's own functions have."""
    return torch.autograd.forward_ad._current_level >= 0


def onednn_wins(x: Tensor, weight: Tensor, *, learning: bool) -> bool:
    """Whether oneDNN takes less time than MKL for ``x weight^T`` in float32, as the table above says.

    ``learning``: there will be a gradient, and autograd in Python takes what few rows gain.
    """
    out, depth = weight.shape
    if not _onednn_can(x, weight, weight.numel()) or x.shape[1] != depth or not _lies_together(weight):
        return False
    if learning and weight.numel() < _FEWEST_TO_LEARN:
        return False
    if _ONEDNN_WINS:
        return True
    if torch.get_num_threads() == 1:
        return False
    return len(x) <= _SOME_ROWS if out > depth else not learning and len(x) <= _FEW_ROWS


def _onednn_is_there() -> bool:
    return _onednn is not None and torch._C._get_mkldnn_enabled()


def _onednn_can(left: Tensor, right: Tensor, weights: int) -> bool:
    """Whether a product in float32 of as many weights, or gradients of them, may be oneDNN's."""
    if (
        left.dtype != torch.float32
        or right.dtype != torch.float32
        or weights < _FEWEST_WEIGHTS
        or not is_cpu(left.device)
    ):
        return False
    return left.layout == right.layout == torch.strided and _onednn_is_there()


def _lies_together(weight: Tensor) -> bool:
    """Whether the values of a weight, or of its transpose, lie side by side.

    oneDNN multiplies others by its slow reference loops: [768, 768] of [768, 3072], 500 rows, took 13.8 s, by MKL 13 ms.
    """
    return weight.is_contiguous() or weight.t().is_contiguous()


def has_gelu(dtype: Optional[torch.dtype]) -> bool:
    """Whether `product` may have a GELU in ``dtype``.

    In 16 bits GELU is taken before the sum is rounded, if the weight or its transpose lies together.
    """
    if dtype == torch.float32:
        return True
    return dtype in _NARROW_GELU and _onednn_is_there()


def product(x: Tensor, weight: Tensor, bias: Optional[Tensor], *, gelu: bool = False, learning: bool = False) -> Tensor:
    """``x weight^T + bias``, and its GELU where that is wanted, for who takes care of gradients.

    Args:
        x: ``[rows, in]``.
        weight: ``[out, in]`` in the same dtype.
        bias: ``[out]`` in the same dtype, or None.
        gelu: whether the exact GELU of the sum is wanted.
        learning: as of `onednn_wins`.

    Returns:
        ``[rows, out]``.
    """
    in_16_bits = gelu and x.dtype == torch.bfloat16 and has_gelu(x.dtype) and x.shape[1] == weight.shape[1]
    of_each_column = bias is None or bias.shape == weight.shape[:1]  # `F.linear` takes others too
    if of_each_column and (in_16_bits and _lies_together(weight) or onednn_wins(x, weight, learning=learning)):
        # It takes for granted that a bias lies together.
        bias = None if bias is None else bias.contiguous()
        # In float32 on AVX2 its GELU takes 0.1 to 0.5 of the product's time.
        if gelu and (in_16_bits or _ONEDNN_WINS):
            return _onednn(x, weight, bias, "gelu", [], "none")
        out = _onednn(x, weight, bias, "none", [], "")
    else:
        out = F.linear(x, weight, bias)
    return F.gelu(out) if gelu else out


def product_into(
    out: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, *, learning: bool = False
) -> None:
    """`product` into ``out``, ``[rows, out]`` in the same dtype."""
    if onednn_wins(x, weight, learning=learning):
        out.copy_(product(x, weight, bias, learning=learning))
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def product_with(y: Tensor, weight: Tensor, total: Optional[Tensor] = None) -> Tensor:
    """``y weight``, or ``total`` to which it was added: the gradient of `product`'s rows.

    Args:
        y: ``[rows, out]``.
        weight: ``[out, in]`` in the same dtype.
        total: ``[rows, in]`` in the same dtype, or None.

    Returns:
        ``[rows, in]``; PyTorch's own product on a GPU, and where its gradient is wanted.
    """
    if _is_onednns(y, weight, weight.numel()) and _lies_together(weight):
        out = _onednn(y, weight.t(), None, "none", [], "")
        return out if total is None else total.add_(out)
    return y @ weight if total is None else total.addmm_(y, weight)


def product_over_rows(y: Tensor, x: Tensor, out: Optional[Tensor] = None) -> Tensor:
    """``y^T x``: the gradient of `product`'s weight.

    Args:
        y: ``[rows, out]``.
        x: ``[rows, in]`` in the same dtype.
        out: ``[out, in]`` in the same dtype, where the result goes, or None.

    Returns:
        ``[out, in]``; PyTorch's own product on a GPU, and where its gradient is wanted.
    """
    # oneDNN has no sum over nothing.
    if not (_FULL_WIDTH and len(x) and _is_onednns(y, x, y.shape[1] * x.shape[1])):
        return torch.mm(y.t(), x, out=out)
    many = len(x) >= _MANY_ROWS and torch.get_num_threads() > 1
    # As a weight oneDNN takes no rows that overlap.
    found = _filters_gradient(y, x) if many else _onednn(y.t(), x.contiguous().t(), None, "none", [], "")
    return found if out is None else out.copy_(found)


def sum_over_rows(x: Tensor, dtype: torch.dtype, out: Optional[Tensor] = None) -> Tensor:
    """``x.sum(0, dtype=dtype)``, ``[...]`` of ``[rows, ...]``; into ``out`` where that is given.

    PyTorch casts all of ``x`` first. On a CPU that is memory touched for the first time: of 1,996 x 2,304 values in bfloat16
    23 ms in a training step.
    """
    if x.dtype.itemsize >= dtype.itemsize or not is_cpu(x.device) or len(x) <= _ROWS_OF_A_SUM:
        return torch.sum(x, 0, dtype=dtype, out=out)
    first, *rest = x.split(_ROWS_OF_A_SUM)
    total = torch.sum(first, 0, dtype=dtype, out=out)
    for each in rest:
        total += each.sum(0, dtype=dtype)
    return total


def _filters_gradient(y: Tensor, x: Tensor) -> Tensor:
    """``y^T x`` as the gradient of a convolution with one tap, which reads both as they lie: a Linear has ``y`` transposed first.

    Rows of 1,996 frames, 768 by 3,072, 2 threads: 24 ms, as a Linear 27, and in a step, where that copy is new memory, 71.
    """
    out, depth = y.shape[1], x.shape[1]
    images = (each[None, None].permute(0, 3, 1, 2) for each in (y, x))  # of one row of pixels, channels last
    filters = y.new_empty(1).expand(out, depth, 1, 1)  # never read
    settings = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    found = torch.ops.aten.convolution_backward(*images, filters, None, *settings, [False, True, False])[1]
    return found.view(out, depth)


def _is_onednns(left: Tensor, right: Tensor, weights: int) -> bool:
    """Whether a product in a backward is oneDNN's."""
    return _ONEDNN_WINS and _onednn_can(left, right, weights) and not torch.is_grad_enabled()
