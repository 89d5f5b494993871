"""What the GPU backend of ``conv_frontend`` decides from sizes alone; ``tests/csrc/cuda`` runs it."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hubert_fast.cuda_backend import conv_frontend as backend
from hubert_fast.cuda_backend import device
from hubert_fast.ops.conv_frontend import Arguments
from tests.ops.frontend_problem import HUBERT, Problem


def test_saved_memory_is_the_preactivations_and_little_else():
    problem = Problem(HUBERT, norm="group_norm", batch=4, samples=160000, channels=512, dtype=torch.bfloat16)
    saved, frames = backend.saved_tensors(problem.arguments()), problem.arguments().frames
    size = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in saved)
    assert size <= 1.01 * 4 * sum(frames[1:]) * 512 * 2


@given(samples=st.integers(400, 100_000))
def test_rows_double_and_leave_a_dead_row(samples):
    weights = [torch.empty(1, 1, kernel, device="meta") for kernel, _ in HUBERT]
    strides = [stride for _, stride in HUBERT]
    arguments = Arguments(
        torch.empty(1, samples, device="meta"), weights, [], [], [], strides, "group_norm", None, None
    )
    frames = arguments.frames
    rows = backend.rows_of_layers(frames)
    assert all(below == 2 * above for below, above in zip(rows, rows[1:]))
    assert rows[0] >= frames[0] and all(r > f for r, f in zip(rows[1:], frames[1:]))
    smaller = [count // rows[-1] * (rows[-1] - 1) for count in rows]
    assert smaller[0] < frames[0] or any(r <= f for r, f in zip(smaller[1:], frames[1:]))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("kernel and a stride of at most 16; this one has 1, 17 and 5", dict(shapes=[(17, 5), (3, 2)])),
        ("kernel and a stride of at most 16; this one has 1, 10 and 20", dict(shapes=[(10, 20), (3, 2)])),
        ("stride 2 and kernel 2 or 3; layer 1 has 3 and 3", dict(shapes=[(10, 5), (3, 3)])),
        ("stride 2 and kernel 2 or 3; layer 2 has 2 and 4", dict(shapes=[(10, 5), (3, 2), (4, 2)])),
        (r"multiple of 64 and at most 1024; the layers have \[96, 96\]", dict(channels=96)),
        (r"multiple of 64 and at most 1024; the layers have \[1088, 1088\]", dict(channels=1088)),
    ],
)
def test_objections_name_what_is_in_the_way(message, change):
    settings = {"shapes": [(10, 5), (3, 2)], "channels": 512, **change}
    into, weights = 1, []
    for kernel, _ in settings["shapes"]:
        weights.append(torch.empty(settings["channels"], into, kernel, device="meta"))
        into = settings["channels"]
    strides = [stride for _, stride in settings["shapes"]]
    reason = backend.layers_objection(weights, strides)
    assert reason is not None
    assert re.search(message, reason), reason


def test_waveforms_elsewhere_are_refused():
    problem = Problem([(10, 5)], norm="group_norm", samples=400, dtype=torch.float32)
    reason = backend.objection(problem.arguments())
    assert reason == "it runs on an NVIDIA GPU, and waveforms is on cpu"


def test_a_device_runs_what_was_built_for_it_or_for_older_ones_as_ptx():
    runs = device.runs_on
    assert runs((8, 0), "80") and runs((8, 6), "80") and not runs((8, 0), "86") and not runs((9, 0), "80")
    assert runs((9, 0), "90a") and not runs((10, 0), "90a") and not runs((8, 0), "90a")
    assert runs((12, 0), "80+") and runs((8, 0), "80+") and not runs((7, 5), "80+")
