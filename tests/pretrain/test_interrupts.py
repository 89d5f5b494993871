import os
import signal

import pytest

from hubert_fast.pretrain.interrupts import StopRequest


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
    with StopRequest():  # and without a signal
        assert signal.getsignal(signum) != before[signum]
    assert {number: signal.getsignal(number) for number in numbers} == before
