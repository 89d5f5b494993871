"""`hubert_fast.backend`: which implementation runs, and why; nothing falls back silently."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from hubert_fast import backend
from hubert_fast.ops.cosine_logits import cosine_logits
from hubert_fast.reference import cosine_logits as reference
from hubert_fast.torch_backend import cosine_logits as torch_backend

OPERATORS = {"conv_frontend", "masked_attention", "cosine_logits", "cosine_cross_entropy"}


def _call():
    return cosine_logits(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]))


@pytest.fixture
def called(monkeypatch):
    """The names of the backends that computed something."""
    names = []
    for name, module, attribute in (("torch", torch_backend, "forward"), ("reference", reference, "cosine_logits")):
        function = getattr(module, attribute)
        monkeypatch.setattr(
            module, attribute, lambda *a, name=name, function=function: names.append(name) or function(*a)
        )
    return names


def test_auto_takes_the_fastest_and_a_name_what_it_names(called):
    _call()
    with backend.using("reference"):
        _call()
        with backend.using("torch", "cosine_logits"):
            _call()
        _call()
    _call()
    assert called == ["torch", "reference", "torch", "reference", "torch"]


def test_using_restores_the_choice_after_an_error():
    with pytest.raises(KeyError), backend.using("reference", "cosine_logits"):
        raise KeyError
    assert {choice.chosen for choice in backend.report()} == {backend.AUTO}


def test_use_holds_until_the_next_use(called):
    try:
        backend.use("reference", operator="cosine_logits")
        _call()
        assert [choice.operator for choice in backend.report() if choice.chosen == "reference"] == ["cosine_logits"]
    finally:
        backend.use("auto")
    _call()
    assert called == ["reference", "torch"]


def test_the_report_names_every_operator_what_runs_and_why():
    choices = {choice.operator: choice for choice in backend.report()}
    assert OPERATORS <= choices.keys()
    for choice in choices.values():
        assert (
            choice.chosen == "auto" and choice.runs in choice.available and choice.why.startswith("fastest available: ")
        )
    with backend.using("reference"):
        assert all(choice.runs == "reference" and "asked for by name" in choice.why for choice in backend.report())


def test_a_name_that_only_some_operators_have_leaves_the_others_at_auto():
    with backend.using("cpu"):
        chosen = {choice.operator: choice.chosen for choice in backend.report()}
        assert chosen.pop("conv_frontend") == chosen.pop("masked_attention") == "cpu"
        assert set(chosen.values()) == {"auto"}
    with pytest.raises(ValueError, match="backend 'cpu' of operator 'cosine_logits': accepted are"):
        backend.use("cpu", operator="cosine_logits")


def test_unknown_names_are_refused_and_change_nothing():
    with pytest.raises(ValueError, match=r"backend 'cuda13' of every operator: accepted are \['auto', "):
        backend.use("cuda13")
    with pytest.raises(ValueError, match=r"operator 'fft' does not exist; there are \['bias_dropout_residual', "):
        backend.use("reference", operator="fft")
    with pytest.raises(ValueError), backend.using("cuda13"):
        pass
    assert {choice.chosen for choice in backend.report()} == {backend.AUTO}


def test_a_named_backend_that_cannot_run_says_why():
    backend.register("test_only", {"quick": "refuses", "slow": "takes anything"})
    try:

        def objection(name):
            return "the inputs are too short" if name == "quick" else None

        assert backend.choose("test_only", objection) == "slow"
        with backend.using("quick", "test_only"):
            with pytest.raises(
                backend.BackendError, match="'quick' .*'test_only' .*cannot run: the inputs are too short"
            ):
                backend.choose("test_only", objection)
        with pytest.raises(backend.BackendError, match="no backend of operator 'test_only' supports these inputs"):
            backend.choose("test_only", lambda name: "no")
    finally:
        del backend._operators["test_only"]


def test_a_backend_that_is_not_installed_is_passed_over_and_says_why_when_asked_for():
    backend.register(
        "test_only",
        {"gpu": "needs a GPU", "compiled": "needs a compiler", "slow": "takes anything"},
        unavailable={"compiled": "nothing was compiled", "slow": None},
        on_gpu=("gpu",),
    )
    try:
        choice = {choice.operator: choice for choice in backend.report()}["test_only"]
        gpu = torch.cuda.is_available()
        assert choice.available == (("gpu",) if gpu else ()) + ("slow",)
        assert choice.runs == choice.available[0]
        assert choice.reasons["compiled"] == "nothing was compiled" and ("gpu" in choice.reasons) != gpu
        assert backend.choose("test_only", lambda name: "no" if name == "gpu" else None) == "slow"
        with (
            backend.using("compiled", "test_only"),
            pytest.raises(backend.BackendError, match="cannot run: nothing was compiled"),
        ):
            backend.choose("test_only", lambda name: None)
    finally:
        del backend._operators["test_only"]


def _availability_of_a_library(asked):
    """A question about a library of C: torch.compile cannot trace it."""

    def why_not():
        asked.append(ctypes.CDLL(None).getpid() > 0)
        return "its driver is too old"

    why_not._dynamo_marked_constant = True  # as `hubert_fast.extension.why_not`
    return why_not


@pytest.fixture
def asked():
    """How often the availability of operator "test_only"'s backend "gpu" was asked for."""
    asked = []
    backend.register(
        "test_only",
        {"gpu": "needs a driver", "slow": "takes anything"},
        unavailable={"gpu": _availability_of_a_library(asked)},
    )
    yield asked
    del backend._operators["test_only"]


def test_whether_a_backend_is_there_is_asked_only_where_it_would_take_the_inputs(asked):
    assert backend.choose("test_only", lambda name: "on a CPU" if name == "gpu" else None) == "slow" and not asked
    assert backend.choose("test_only", lambda name: None) == "slow" and asked
    with backend.using("gpu", "test_only"), pytest.raises(backend.BackendError, match="its driver is too old"):
        backend.choose("test_only", lambda name: None)


def test_whether_a_backend_is_there_may_be_asked_first_inside_a_compiled_graph(asked):
    def double_on_slow(x):
        return 2 * x if backend.choose("test_only", lambda name: None) == "slow" else x

    compiled = torch.compile(double_on_slow, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0)) and asked


@pytest.mark.parametrize(
    ("name", "expected"), [("reference", "reference"), ("cpu", "torch"), ("nonsense", "BackendError")]
)
def test_the_environment_variable_names_the_backend_of_a_process(name, expected):
    script = (
        "import torch\n"
        "from hubert_fast import backend\n"
        "from hubert_fast.ops.cosine_logits import cosine_logits\n"
        "print({choice.operator: choice.runs for choice in backend.report()}['cosine_logits'])\n"
        "cosine_logits(torch.ones(1, 2), torch.eye(2), torch.tensor([0]))\n"
    )
    environment = {**os.environ, "HUBERT_FAST_BACKEND": name}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert expected in done.stdout + done.stderr
    assert (done.returncode == 0) == (name != "nonsense")
