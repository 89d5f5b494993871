"""Settings shared by all tests: property tests draw the same examples every time, and no example has a time limit."""

import os
from importlib.util import find_spec

# Before torch is imported: workers side by side, each with a thread for every core, would wait for one another most of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests import extras

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the kernels
    if find_spec("triton") is not None:
        import tests.kernels.interpreter  # noqa: F401  (mends what it gets wrong)

if find_spec("hypothesis") is None:
    extras.stand_in_for_hypothesis()
else:
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "repeatable", derandomize=True, deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("repeatable")


def pytest_pycollect_makemodule(module_path, parent):
    return extras.Module.from_parent(parent, path=module_path)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Tests of modules that take DEVICE of tests.kernels.device run on a GPU where there is one: there they are GPU tests too."""
    if torch.cuda.is_available():
        from tests.kernels.device import DEVICE

        for item in items:
            if getattr(getattr(item, "module", None), "DEVICE", None) is DEVICE:
                item.add_marker(pytest.mark.gpu)
