"""Where kernels are tested: on the GPU where there is one, else on the CPU in Triton's interpreter (see tests/conftest.py)."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
