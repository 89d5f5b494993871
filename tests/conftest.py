"""Settings shared by all tests: property tests draw the same examples every time, and no example has a time limit."""

import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the kernels
    import tests.kernels.interpreter  # noqa: F401  (mends what it gets wrong in bfloat16)

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")
