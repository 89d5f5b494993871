"""``pytest benchmarks/``: every implementation of every operator, timed by pytest-benchmark and grouped by what it does.

    pytest benchmarks/                                     # base, on the GPU where there is one; results are checked first
    pytest benchmarks/ops/bench_masked_attention.py --dtype bfloat16 --benchmark-json result.json

Unlike in `benchmarks.operators`, which the suite uses, implementations do not take turns: each has its calls at a stretch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hubert_fast.backend import BackendError

from .clock import clock, fill_queue
from .limits import measure_limits
from .operators import cases_of, fastest_convolutions, row_of
from .ops.calls import Calls
from .ops.case import CannotRun, OperatorCase
from .report import Limits, Seconds
from .sizes import SIZES, size_on

# Timed calls. Those by which an implementation is checked come before them.
_ROUNDS = {"cpu": 3, "cuda": 20}
_WARMUP_ROUNDS = 1

# What pytest-benchmark's file says of an implementation beside its times.
_EXTRA = ("implementation", "version", "device", "dtype", "shape", "floor_seconds", "share_of_limit", "check")


def pytest_addoption(parser: pytest.Parser) -> None:
    on_gpu = torch.cuda.is_available()
    group = parser.getgroup("operators", "what the operators are measured on")
    group.addoption("--size", choices=sorted([*SIZES, "tiny"]), default="base", help="model whose shapes are taken")
    group.addoption("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of activations")
    group.addoption("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    group.addoption("--rounds", type=int, help="timed calls of each implementation")
    group.addoption("--compiled", action="store_true", default=on_gpu, help="torch.compile takes part (slow on a CPU)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each implementation of each case of the module's operator."""
    if "timed" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    device, dtype = option("--device"), getattr(torch, option("--dtype"))
    parameters = [
        pytest.param((case, name), id=f"{case.name} | {name}", marks=_marks(metafunc.module.OPERATOR, case))
        for case in cases_of(metafunc.module.OPERATOR, size_on(device, option("--size")), dtype, device)
        for name, side in case.sides.items()
        if option("--compiled") or not side.compiled
    ]
    metafunc.parametrize("timed", parameters, indirect=True)


def _marks(operator: str, case: OperatorCase) -> pytest.MarkDecorator:
    group = f"{operator}: {case.name}" + ("" if case.on_host else f", {case.dtype_name}")
    return pytest.mark.benchmark(group=group, timer=clock(case.device), disable_gc=True)


@pytest.fixture(scope="session")
def limits(request: pytest.FixtureRequest) -> Limits:
    """Of the device, measured once."""
    return measure_limits(request.config.getoption("--device"), getattr(torch, request.config.getoption("--dtype")))


@pytest.fixture(scope="session")
def calls() -> Callable[[OperatorCase], Calls]:
    """A case's calls; those of the latest case are kept, so that its implementations share inputs and truth."""
    latest: list[Calls] = []

    def of(case: OperatorCase) -> Calls:
        if not latest or latest[0].case is not case:
            latest[:] = [Calls(case)]
        return latest[0]

    return of


@pytest.fixture
def timed(request: pytest.FixtureRequest, benchmark: Any, calls: Any, limits: Limits) -> Iterator[Callable[[], None]]:
    """Checks and times one implementation of one case."""
    case, name = request.param
    turns = itertools.count()

    def before_a_call() -> tuple[tuple[int], dict[str, Any]]:
        """The inputs of the next call. Work for the GPU is queued first, so that the host gets ahead of it."""
        fill_queue(case.device)
        return (next(turns),), {}

    def run() -> None:
        try:
            call, error = calls(case).make(name)
        except (BackendError, CannotRun) as reason:
            pytest.skip(str(reason))
        rounds = request.config.getoption("--rounds") or _ROUNDS[case.device]
        benchmark.pedantic(call, setup=before_a_call, rounds=rounds, warmup_rounds=_WARMUP_ROUNDS)
        if benchmark.enabled:
            seconds = Seconds.of(benchmark.stats.stats.data)
            row = row_of(request.module.OPERATOR, case, name, seconds, limits, error)
            benchmark.extra_info.update({each: getattr(row, each) for each in _EXTRA})

    with fastest_convolutions():
        yield run
