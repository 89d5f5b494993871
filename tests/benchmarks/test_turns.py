"""Times are the device's own, implementations take turns, and memory is what a call holds at most."""

import itertools
import time

import pytest
import torch

from benchmarks import limits
from benchmarks.clock import device_seconds
from benchmarks.ops import turns


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for a GPU whose queue runs only when the host waits for it: (what was queued, a function that queues work)."""
    queue, done = [], {}

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            queue.append(self)

        def synchronize(self):
            milliseconds = 0.0
            for item in queue:
                if isinstance(item, Event):
                    done[item] = milliseconds
                else:
                    milliseconds += item[1]

        def elapsed_time(self, end):
            return done[end] - done[self]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append(("sleep", 1000.0)))
    return queue, lambda milliseconds: queue.append(("work", milliseconds))


def test_a_gpus_time_is_the_devices_own_behind_a_full_queue(gpu):
    queue, work = gpu
    assert device_seconds(lambda: work(7.0), "cuda") == pytest.approx(7e-3)
    assert [item[0] if isinstance(item, tuple) else "event" for item in queue] == ["sleep", "event", "work", "event"]


def test_a_cpus_time_is_the_counters():
    assert device_seconds(lambda: time.sleep(0.02), "cpu") >= 0.02


def test_implementations_take_turns_at_being_first_and_the_first_turn_is_not_timed():
    order = []
    calls = {name: lambda i, name=name: order.append((name, i)) for name in "ab"}
    taken, errors = turns.in_turn(calls, "cpu", repeats=4, seconds=60.0)
    assert order == [(name, i) for i in range(5) for name in ("ab", "ba")[i % 2]]
    assert [len(each) for each in taken.values()] == [4, 4] and not errors


def test_turns_end_in_time_but_not_before_three(virtual_time):
    calls = {"slow": lambda i: virtual_time(0.25)}
    for seconds, count in ((0.0, 3), (1.0, 5), (1.2, 5), (1.25, 6)):  # a turn that begins in time is done
        taken, _ = turns.in_turn(calls, "cpu", repeats=100, seconds=seconds)
        assert taken["slow"] == count * [0.25]


def test_memory_is_the_most_that_a_call_holds_at_a_time(capfd):
    x = torch.zeros(1 << 20)

    def call(i):
        first = x + 1
        second = first + 1
        del first
        return second + 1

    assert turns.peak_bytes(call, "cpu") == pytest.approx(2 * x.nbytes, rel=0.01)
    assert turns.peak_bytes(lambda i: x.add_(1), "cpu") < 1000
    assert capfd.readouterr().err == ""


def test_limits_are_those_of_a_copy_and_of_a_product(monkeypatch):
    copy = [0.1, 0.1, 4.0, 5.0, 6.0, 2.0, 3.0, 9.0, 7.0, 7.0, 7.0]  # two untimed; medians 5, 3 and 7
    products = [2 * each for each in copy], copy  # on a CPU by either library, the faster of which counts
    seconds = itertools.chain(copy, *products)
    monkeypatch.setattr(limits, "_CPU", (1 << 10, (2, 3, 4), 3))
    monkeypatch.setattr(limits, "device_seconds", lambda call, device: next(seconds))
    measured = limits.measure_limits("cpu", torch.float32)
    assert measured.bytes_per_second == 2 * 1024 / 3.0  # read and written
    assert measured.flops_per_second == 2 * 2 * 3 * 4 / 3.0
