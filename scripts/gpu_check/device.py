"""The device of a check, and the sizes that fit it: a GPU's, or a CPU's, which stands in where the script itself is tried."""

from __future__ import annotations

import os

# Set by the command line for the processes of the stages.
DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
