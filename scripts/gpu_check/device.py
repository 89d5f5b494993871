"""The device of a check, and the sizes that fit it: a GPU's, or a CPU's, which stands in where the script itself is tried."""

from __future__ import annotations

import os

# Set by the command line for the processes of the stages.
DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"


def synchronize() -> None:
    """Wait for the device, where it is a GPU; an error of a kernel that ran before is raised here."""
    if ON_GPU:
        import torch

        torch.cuda.synchronize()


def is_lost() -> bool:
    """Whether nothing runs on the device any more in this process, as after an illegal access."""
    try:
        synchronize()
    except Exception:
        return True
    return False
