"""TF32 under PyTorch's older and newer switches, which belong to the process: each case has a process of its own, on the CPU."""

import json
import os
import subprocess
import sys

import pytest

from tests.build.repository import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# Statements after ``B = torch.backends``; whether products, and whether convolutions may use TF32 then. Convolutions start with a
# "tf32" of their own, which a switch above them overrides in some versions of PyTorch; after "none" it does in all.
CASES = {
    "": (False, True),
    "B.cuda.matmul.allow_tf32 = True": (True, True),
    "B.cudnn.allow_tf32 = False": (False, False),
    "torch.set_float32_matmul_precision('medium')": (True, True),
    "B.cuda.matmul.fp32_precision = 'tf32'": (True, True),
    "B.cudnn.conv.fp32_precision = 'ieee'": (False, False),
    "B.fp32_precision = 'tf32'": (True, True),
    "B.cudnn.conv.fp32_precision = 'none'; B.fp32_precision = 'ieee'": (False, False),
    "B.fp32_precision = 'ieee'; B.cudnn.conv.fp32_precision = 'none'; B.cudnn.fp32_precision = 'tf32'": (True, True),
    "B.cudnn.allow_tf32 = False; B.fp32_precision = 'tf32'": (True, True),
    "B.cuda.matmul.allow_tf32 = True; B.cuda.matmul.fp32_precision = 'ieee'": (False, True),
    "B.cudnn.rnn.fp32_precision = 'ieee'": (False, True),
}

_FORKS = """
import json, os, sys, torch, traceback
B = torch.backends
torch.set_num_threads(1)  # a fork has no threads but its own

def in_a_fork_each(function):
    for switches in json.loads(sys.argv[1]):
        if os.fork() == 0:
            try:
                exec(switches)
                print(json.dumps([switches, function()]), flush=True)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        assert os.wait()[1] == 0, switches
"""

_STEP = """
import tests.conftest
from hubert_fast import backend
from hubert_fast.kernels import masked_attention, positional_conv, weight_norm
from tests.models.test_kernels import _objective

# The interpreter takes seconds for a step: what is asked of the kernels is noted, and not done.
used = {masked_attention: set(), positional_conv: set(), weight_norm: set()}
for module in used:
    def launch(kernel, grid, arguments, blocks, of=used[module]):
        of.update({arguments["PRECISION"]} if "PRECISION" in arguments else ())
    module.launch = launch

def step(run):
    for of in used.values():
        of.clear()
    with backend.using("triton", "masked_attention"), backend.using("triton", "positional_conv"):
        run(torch.randn(1, 2000), torch.zeros(1, 6, dtype=torch.int64), mask=mask).loss.backward()
    return [sorted(used[masked_attention]), sorted(used[positional_conv])]

objective = _objective("base", encoder_num_layers=1)
mask = torch.tensor([3 * [True] + 3 * [False]])
step(objective)  # imports what is imported late, before the forks
"""


def _run(script):
    """What each case printed, by its switches."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", _FORKS + script, json.dumps([*CASES])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def _names(products, convolutions):
    return [["tf32" if each else "ieee"] for each in (products, convolutions)]


def test_a_step_in_float32_computes_as_the_switches_say():
    pytest.importorskip("triton")
    used = _run(_STEP + "in_a_fork_each(lambda: step(objective))")
    assert used == {switches: _names(*may) for switches, may in CASES.items()}


def test_a_compiled_step_does_too_and_so_does_the_next_one_after_a_switch():
    pytest.importorskip("triton")
    script = """
compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
B.cuda.matmul.fp32_precision, B.cudnn.conv.fp32_precision = "tf32", "ieee"
print(json.dumps(["first", step(compiled)]))
B.cuda.matmul.fp32_precision, B.cudnn.conv.fp32_precision = "ieee", "tf32"
print(json.dumps(["second", step(compiled)]))
"""
    assert _run(_STEP + script) == {"first": _names(True, False), "second": _names(False, True)}


def test_allowed_holds_inside_and_leaves_every_switch_as_it_was():
    script = """
from unittest import mock
from hubert_fast import tf32

def read(switch):
    try:
        return switch()
    except RuntimeError:
        return "contradicted"

def state():
    newer = (B, B.cudnn, B.cuda.matmul, B.cudnn.conv, B.cudnn.rnn, B.mkldnn.matmul)
    older = (lambda: B.cuda.matmul.allow_tf32, lambda: B.cudnn.allow_tf32, torch.get_float32_matmul_precision)
    return [each.fp32_precision for each in newer] + [read(each) for each in older]

def states():
    "Also what follows what."
    found, before = [state()], B.fp32_precision
    for precision in ("ieee", "tf32", "none"):
        B.fp32_precision = precision
        found.append(state())
    B.fp32_precision = before
    return found

def inside():
    return [tf32.in_products(), tf32.in_convolutions(), B.cuda.matmul.allow_tf32]

def check():
    before, found = states(), []
    for allow in (True, False):
        with tf32.allowed(allow):
            found.append(inside() == 3 * [allow])
            with tf32.allowed(not allow):
                found.append(inside() == 3 * [not allow])
            found.append(inside() == 3 * [allow])
        found.append(states() == before)
        try:
            with tf32.allowed(allow):
                raise KeyError
        except KeyError:
            found.append(states() == before)
        try:
            with mock.patch.object(tf32, "_older_precision", side_effect=KeyError), tf32.allowed(allow):
                pass
        except KeyError:  # before all switches are set
            found.append(states() == before)
    return found

in_a_fork_each(check)
"""
    assert _run(script) == {switches: 12 * [True] for switches in CASES}
