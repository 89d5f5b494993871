"""`hubert_fast.cli.run`: the main job's own process begins again with threads that sleep while they wait."""

import os
import sys

import pytest
import torch

from hubert_fast import cli


class BegunAgain(Exception):
    pass


@pytest.fixture
def begun(monkeypatch):
    """Run a command line; returns what would be executed, or None where the process goes on."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "main", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def execute(path, arguments):
        raise BegunAgain(path, arguments, os.environ.get("OMP_WAIT_POLICY"))

    monkeypatch.setattr(os, "execv", execute)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hubert-fast", *arguments])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "/bin/hubert-fast", *arguments])
        try:
            assert cli.run() == 0
        except BegunAgain as again:
            return again.args
        return None

    yield run
    os.environ.pop("OMP_WAIT_POLICY", None)


@pytest.mark.skipif(os.name != "posix", reason="a process is replaced as POSIX has it")
def test_training_begins_again_with_the_same_command_line(begun):
    path, arguments, policy = begun("pretrain", "--out", "run")
    assert (path, policy) == (sys.executable, "passive")
    assert arguments == [sys.executable, "-u", "/bin/hubert-fast", "pretrain", "--out", "run"]
    assert begun("pretrain", "--out", "run") is None  # it has begun again


@pytest.mark.parametrize("arguments", [(), ("info",), ("bench", "--help"), ("--version",)])
def test_other_commands_go_on(begun, arguments):
    assert begun(*arguments) is None


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_who_set_a_policy_keeps_it(begun, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert begun("train") is None


def test_beside_a_gpu_threads_are_left_alone(begun, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert begun("train") is None
