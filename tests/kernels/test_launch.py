"""How kernels are started: what `hubert_fast.kernels.launch` remembers of Triton's launcher is what Triton would find."""

import os
import re
import subprocess
import sys

import pytest

from tests.build.repository import ROOT

pytest.importorskip("triton", minversion="3.6")


def test_a_second_launch_starts_the_kernel_that_triton_would_start():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.launched_again"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert re.fullmatch(r"(\d+) of \1 right, \d+ kernels\n", done.stdout), done.stdout + done.stderr
