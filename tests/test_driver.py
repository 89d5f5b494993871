"""Nothing starts the CUDA driver before there is something on a GPU: until then CUDA_VISIBLE_DEVICES and forks still count.

A stand-in for libcuda.so.1, one of CUDA 10, writes down every call that reaches it.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from hubert_fast import extension
from tests import extras
from tests.build.repository import ROOT

STAND_IN = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int note(const char *name, int result) {
    FILE *calls = fopen(getenv("STAND_IN_CALLS"), "a");
    fprintf(calls, "%s\n", name);
    fclose(calls);
    return result;
}
int cuInit(unsigned flags) { return note("cuInit", 100); }  /* no device */
int cuDriverGetVersion(int *version) { *version = 10020; return note("cuDriverGetVersion", 0); }
static int refuse(void) { return note("another", 100); }
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status) {
    *function = (void *)refuse;
    if (strcmp(name, "cuInit") == 0) *function = (void *)cuInit;
    if (strcmp(name, "cuDriverGetVersion") == 0) *function = (void *)cuDriverGetVersion;
    if (strcmp(name, "cuGetProcAddress") == 0) *function = (void *)cuGetProcAddress_v2;
    if (status) *status = 0;
    return note("cuGetProcAddress", 0);
}
"""

PRELUDE = """
import json, os, sys
import torch

def calls():
    if not os.path.exists(os.environ["STAND_IN_CALLS"]):
        return []
    with open(os.environ["STAND_IN_CALLS"]) as file:
        return file.read().split()

assert calls() == [], "torch itself starts the driver"
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A folder with the library."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler for the stand-in")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "libcuda.c").write_text(STAND_IN)
    command = [compiler, "-shared", "-fPIC", "-w", "libcuda.c", "-o", "libcuda.so.1"]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    return folder


def _run(stand_in, folder, script):
    environment = os.environ | {"LD_LIBRARY_PATH": str(stand_in), "STAND_IN_CALLS": str(folder / "calls")}
    command = [sys.executable, "-c", PRELUDE + script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_building_masking_and_a_forward_pass_on_the_cpu_leave_it_alone(stand_in, tmp_path):
    script = """
found = {}
import hubert_fast, hubert_fast.cli
found["import"] = calls()
from tests.models import configurations
model = hubert_fast.hubert_pretrain_model(**configurations.base())
found["build"] = calls()
waveforms, lengths = torch.randn(2, 8000), torch.tensor([8000, 6000])
labels = torch.zeros(2, 24, dtype=torch.int64)
hubert_fast.PretrainingObjective(model)(waveforms, labels, lengths)  # PyTorch's own backward counts GPUs
found["mask and forward"] = calls()
print(json.dumps(found))
"""
    assert _run(stand_in, tmp_path, script) == {"import": [], "build": [], "mask and forward": []}


def test_the_trainers_modules_and_loaders_leave_it_alone(stand_in, tmp_path):
    extras.need_pretrain()
    script = """
import importlib, pathlib, pkgutil
import hubert_fast.pretrain
found = {}
for each in pkgutil.iter_modules(hubert_fast.pretrain.__path__):
    importlib.import_module(f"hubert_fast.pretrain.{each.name}")
found["import"] = calls()
from tests.pretrain.speech_folder import numbered_folder
from tests.pretrain.test_batches import LENGTHS, stream, take
folder = pathlib.Path(sys.argv[1])
numbered_folder(folder, LENGTHS)
assert len(take(stream(folder, workers=1), 2)) == 2
found["load"] = calls()
print(json.dumps(found))
"""
    script = script.replace("sys.argv[1]", repr(str(tmp_path)))
    assert _run(stand_in, tmp_path, script) == {"import": [], "load": []}


def test_a_question_about_gpus_reaches_it(stand_in, tmp_path):
    if extension.facts() is None or not extension.facts()["cuda"]:
        pytest.skip(f"needs the CUDA kernels: {extension.why_not('cuda')}")
    script = """
import hubert_fast
before = calls()
choice = {each.operator: each for each in hubert_fast.backend.report()}["conv_frontend"]
print(json.dumps([before, calls(), choice.reasons["cuda"], choice.runs]))
"""
    before, after, reason, runs = _run(stand_in, tmp_path, script)
    assert before == [] and "cuDriverGetVersion" in after
    assert reason.endswith("the driver here takes up to CUDA 10") and runs == "cpu"
