"""Whether float32 computes in TF32 on a GPU, under PyTorch's older switches and under its newer ones.

The older are ``torch.backends.cuda.matmul.allow_tf32``, ``torch.backends.cudnn.allow_tf32`` and
``torch.set_float32_matmul_precision``. The newer (PyTorch 2.9) are ``fp32_precision`` of ``torch.backends``, of
``torch.backends.cudnn`` (all of CUDA), and of ``torch.backends.cuda.matmul``, ``torch.backends.cudnn.conv`` and
``torch.backends.cudnn.rnn``; each follows the one before it in this list of three levels where it is "none". An older switch sets
the newer ones too, but not the other way round, and reading an older one that a newer one contradicts raises an error. So the
newer ones are asked.

Source: "TensorFloat-32 (TF32)" in PyTorch's notes on CUDA semantics; ``aten/src/ATen/Context.cpp``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


def in_products() -> bool:
    """Whether products of float32 matrices may use TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def in_convolutions() -> bool:
    """Whether convolutions in float32 may use TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


@contextmanager
def allowed(allow: bool) -> Iterator[None]:
    """Inside, products and convolutions in float32 on a GPU may use TF32, or may not, whatever was set.

    Afterwards every switch is as it was, older or newer, and follows what it followed. Inside, the older switch for products may
    be read, as PyTorch does itself, but not the one for cuDNN: reading `torch.backends.cudnn.allow_tf32` raises an error where it
    was not ``allow`` before, and so does `torch.backends.cudnn.flags(...)`, which reads it. The switches belong to the
    process: other threads see them change.
    """
    wanted = "tf32" if allow else "ieee"
    cuda, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    with ExitStack() as undo:  # in the opposite order, and also where an error or an interrupt comes before all is set
        undo.callback(setattr, cuda, "fp32_precision", _own(cuda, above=torch.backends))
        cuda.fp32_precision = wanted
        undo.callback(setattr, matmul, "fp32_precision", _own(matmul, above=cuda))
        older = _older_precision()
        # Those that do not follow. One that does is left alone: PyTorch's own setting of convolutions cannot be set again.
        others = [(each, each.fp32_precision) for each in (cuda.conv, cuda.rnn) if each.fp32_precision != wanted]
        if allow != (older != "highest"):
            undo.callback(_set_older_precision, older)
            matmul.allow_tf32 = allow
        matmul.fp32_precision = wanted
        for each, precision in others:
            undo.callback(setattr, each, "fp32_precision", precision)
            each.fp32_precision = wanted
        yield


def _own(switch: Any, *, above: Any) -> str:
    """What ``switch`` was set to: "none" where it follows ``above``, which itself follows nothing."""
    before = above.fp32_precision
    answers = set()
    try:
        for precision in ("ieee", "tf32"):
            above.fp32_precision = precision
            answers.add(switch.fp32_precision)
    finally:
        above.fp32_precision = before
    return "none" if len(answers) > 1 else answers.pop()


def _older_precision() -> str:
    """`torch.get_float32_matmul_precision`, where newer switches contradict it too."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    precision = "highest"
    try:
        matmul.fp32_precision = "tf32"
        precision = "high" if matmul.allow_tf32 else "highest"
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # of allow_tf32: it is "highest"; of the last line: a switch of oneDNN's is against it
        pass
    finally:
        matmul.fp32_precision = before
    return precision


def _set_older_precision(precision: str) -> None:
    if precision != "medium":
        torch.backends.cuda.matmul.allow_tf32 = precision == "high"
        return
    onednn = torch.backends.mkldnn.matmul  # "medium" sets it too; whether it followed another switch is not looked at
    before = onednn.fp32_precision
    torch.set_float32_matmul_precision(precision)
    onednn.fp32_precision = before
