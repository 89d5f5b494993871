"""GPUs that the kernels of the extension run on, and the form in which they take tensors, dtypes and streams."""

from __future__ import annotations

from types import ModuleType
from typing import Optional

import torch
from torch import Tensor

from hubert_fast import extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How the kernels know a dtype. float64 is for tests, whose stand-ins for the kernels take it; the kernels refuse its number.
NUMBERS = {**{dtype: number for number, dtype in enumerate(DTYPES)}, torch.float64: -1}


def _built_for() -> tuple[str, ...]:
    """Architectures, such as "80" and "90a"; "80+" is PTX of 80, which newer GPUs compile for themselves."""
    facts = extension.facts() or {"cuda_archs": (), "cuda_ptx": None}
    return (*facts["cuda_archs"], *([f"{facts['cuda_ptx']}+"] if facts["cuda_ptx"] else []))


def runs_on(capability: tuple[int, int], built: str) -> bool:
    """Machine code runs on its major version from its minor on, with a suffix on one GPU alone, and PTX from its version on."""
    number = int(built.rstrip("af+"))
    wanted = number // 10, number % 10
    if built.endswith("+"):
        return capability >= wanted
    return capability == wanted if built[-1] in "af" else capability[0] == wanted[0] and capability >= wanted


# Asked once, here: torch.compile cannot trace the question.
_BUILT_FOR = _built_for()


def objection(name: str, tensor: Tensor) -> Optional[str]:
    """Why the kernels, which are there, cannot run where ``tensor``, an argument of that name, lies; None where they can."""
    device = tensor.device
    if device.type != "cuda":
        return f"it runs on an NVIDIA GPU, and {name} is on {device}"
    capability = torch.cuda.get_device_capability(device)
    if not any(runs_on(capability, built) for built in _BUILT_FOR):
        has = f"{capability[0]}.{capability[1]}"
        return f"it was built for {', '.join(_BUILT_FOR)}, and {device} has compute capability {has}"
    return None


def stream_of(kernels: ModuleType, device: torch.device) -> int:
    """The current stream of ``device``, which the kernels then take for the current device."""
    if device.type != "cuda":
        return 0
    kernels.set_device(device.index)
    return torch.cuda.current_stream(device).cuda_stream


def aligned(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy where it does not begin on 16 bytes, as the kernels load them; a view may begin anywhere."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
