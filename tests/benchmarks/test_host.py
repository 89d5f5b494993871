"""`benchmarks.host`: what a training step asks of the host does not grow unseen."""

import os
import re
import subprocess
import sys

import pytest

from tests.build.repository import ROOT

pytest.importorskip("triton", minversion="3.6")


def _run(*arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.host", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**kept, **environment}, timeout=300)


def test_a_step_of_two_layers_launches_no_more_than_it_did():
    """More is a regression, and less a reason to lower the number here. PyTorch's releases differ in a few operations."""
    done = _run("--layers", "2", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"(\d+) launches of Triton's kernels, (\d+) calls of the extension, (\d+) operations", done.stdout
    )
    launches, calls, operations = map(int, found.groups())
    assert (launches, calls) == (46, 45)
    assert operations <= 1200
    assert len(re.findall(r"median [\d.]+ ms, least [\d.]+ ms of 1$", done.stdout, re.MULTILINE)) == 2


@pytest.mark.parametrize(("layer_drop", "graphs"), [(0.0, 2), (0.05, 8)])
def test_an_update_in_graphs_starts_the_front_end_and_a_few_graphs(layer_drop, graphs):
    """With LayerDrop each of two layers has one for its forward and one for its backward."""
    done = _run("--layers", "2", "--rounds", "1", "--work", "update", "--layer-drop", str(layer_drop))
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"(\d+) launches of Triton's kernels, (\d+) calls of the extension.*\((\d+) kernels\), (\d+)", done.stdout
    )
    launches, calls, kernels, graph_launches = map(int, found.groups())
    assert (launches, calls, graph_launches) == (0, 41, graphs)
    assert kernels <= 40


def test_a_whole_update_of_base_launches_no_more_than_it_did():
    """Front end and optimizer included, at the full width; 750 before LayerNorm, products and attention moved nothing twice."""
    done = _run("--work", "launches")
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"^(\d+) launches in all", done.stdout, re.MULTILINE)[1]) <= 450


def test_without_a_compiler_it_says_what_it_needs():
    done = _run(CC="no-such-compiler")
    assert done.returncode == 1 and "needs a C compiler; 'no-such-compiler' is none" in done.stderr


def test_in_the_interpreter_there_is_nothing_to_measure():
    done = _run(TRITON_INTERPRET="1")
    assert done.returncode == 1 and "TRITON_INTERPRET is set" in done.stderr
