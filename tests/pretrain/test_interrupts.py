import os
import signal
from pathlib import Path

import pytest

from hubert_fast.pretrain.interrupts import StopRequest, TrainingInterrupted


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_second_acts(signum):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
    before = {number: signal.getsignal(number) for number in numbers}
    with StopRequest() as stop:
        assert stop.signum == 0
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
        assert signal.getsignal(signum) == before[signum]
    assert {number: signal.getsignal(number) for number in numbers} == before


def test_leaving_without_a_signal_restores_the_handlers():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_interrupted_training_leaves_with_the_code_of_its_signal_and_says_what_it_saved():
    interrupted = TrainingInterrupted(signal.SIGTERM, 12, Path("run/step-00000012.pt"))
    assert interrupted.code == 143
    assert str(interrupted) == "stopped by SIGTERM after step 12; saved run/step-00000012.pt; resume to go on"
