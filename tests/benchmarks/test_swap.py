"""`benchmarks.swap`: what it compares, and what its exit status says. Times are those of a clock that the test owns."""

import json
import os
from concurrent.futures.process import BrokenProcessPool
from unittest import mock

import pytest
import torch

from benchmarks import swap
from benchmarks.swap import Case, Result, Swap, cases, main, table

OURS, TORCHAUDIO, TRANSFORMERS = "hubert_fast swapped in", "torchaudio", "transformers sdpa"


def result(ours, torchaudio, transformers, **fields):
    case = Case(
        **{"kind": "inference", "utterances": 1, "seconds": 1, "padded": False, "dtype": "float32", "threads": 1}
        | fields
    )
    return Result(case, {OURS: ours, TORCHAUDIO: torchaudio, TRANSFORMERS: transformers})


def test_cases_go_from_the_shortest_batch_to_the_longest_in_every_setting():
    found = list(cases(("inference", "training"), ("float32", "bfloat16"), (1, 2), 120.0))
    totals = [each.utterances * each.seconds for each in found]
    assert totals == sorted(totals) and (totals[0], totals[-1]) == (1, 120) and len(set(found)) == len(found)
    assert {(each.kind, each.dtype, each.threads, each.padded) for each in found if each.utterances > 1} == {
        (kind, dtype, threads, padded)
        for kind in ("inference", "training")
        for dtype in ("float32", "bfloat16")
        for threads in (1, 2)
        for padded in (False, True)
    }
    assert {each.utterances * each.seconds for each in cases(("training",), ("float32",), (1,), 5.0)} == {1, 4, 5}
    assert {each.utterances * each.seconds for each in cases(("training",), ("float32",), (1,), 20.0, 15)} == {15, 20}


def test_padding_is_a_quarter_of_the_longest_utterance():
    lengths = Case("training", 4, 5, True, "float32", 1).lengths()
    assert lengths[0] == 80_000 and lengths[-1] == 60_000 and lengths == sorted(lengths, reverse=True)
    assert Case("training", 4, 5, False, "float32", 1).lengths() == [80_000] * 4


def test_a_ratio_is_one_of_medians_and_the_worst_case_comes_last():
    fast, slow = result([1.0, 1.0, 9.0], [2.0, 2.0, 0.1], [3.0] * 3), result([1.0] * 3, [0.5] * 3, [1.5] * 3, seconds=5)
    assert (fast.ratio(TORCHAUDIO), fast.worst, slow.worst) == (2.0, 2.0, 0.5)
    lines = table([slow, fast]).splitlines()
    assert "1 x 1 s" in lines[-2] and "1 x 5 s" in lines[-1]


def test_all_sides_are_timed_in_turn_on_the_same_work(virtual_time, monkeypatch):
    def costs(seconds):
        def call(call, device):
            call()
            virtual_time(seconds)
            return seconds

        return call

    monkeypatch.setattr(swap, "seconds_of", costs(0.5))
    before = torch.get_num_threads()
    measuring = Swap(swap.ARCHITECTURES["tiny"], 7, seconds=0.0, fewest=2)
    for kind in ("inference", "training"):
        found = measuring.measure(Case(kind, 2, 0.5, True, "float32", 1))
        assert all(each == [0.5, 0.5] for each in found.seconds.values()) and OURS in found.seconds
        assert found.peers == measuring.peers()
    assert torch.get_num_threads() == before


def test_the_exit_status_says_whether_ours_is_slower(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(swap, "_SHAPES", (((2, 0.5), False),))
    installed = Swap(swap.ARCHITECTURES["tiny"], 7, seconds=0.0, fewest=1).peers()
    if not installed:
        pytest.skip("neither torchaudio nor transformers is installed")
    options = "--model tiny --classes 7 --kinds training --dtypes float32 --threads 1 --seconds 0 --fewest 1".split()
    out = tmp_path / "swap.json"
    assert main([*options, "--at-least", "0", "--out", str(out)]) == 0
    alone = installed[-1].split()[0]  # in a new process, where transformers is then imported first
    assert main([*options, "--at-least", "1000", "--peers", alone]) == 1
    assert "training, 2 x 0.5 s, float32, 1 thread" in capsys.readouterr().out
    assert json.loads(out.read_text())["cases"][0]["utterances"] == 2
    with pytest.raises(SystemExit):
        main([*options, "--most-seconds", "0.1"])
    with pytest.raises(SystemExit):
        main([*options, "--out", str(tmp_path / "nowhere" / "swap.json")])
    assert "nowhere" in capsys.readouterr().err


def test_a_case_that_fails_is_reported_and_the_others_are_measured(monkeypatch, capsys):
    found = result([1.0], [2.0], [3.0])

    def measure(swap, case):
        if case.kind == "training":
            raise RuntimeError("out of memory")
        return found

    monkeypatch.setattr(swap, "_apart", measure)
    monkeypatch.setattr(Swap, "peers", lambda self: [TORCHAUDIO])
    options = "--model tiny --dtypes float32 --threads 1 --most-seconds 1".split()
    assert main(options) == 1
    said = capsys.readouterr()
    assert found.case.name in said.out
    assert "not measured: RuntimeError: out of memory" in said.err and "1 of 2 cases not measured" in said.err
    assert main([*options, "--kinds", "inference"]) == 0
    assert main([*options, "--kinds", "training"]) == 1


def test_options_choose_peers_and_cases(monkeypatch):
    found = []

    def measure(swap, case):
        found.append((tuple(swap.peers()), case.utterances * case.seconds))
        return result([1.0], [2.0], [3.0])

    monkeypatch.setattr(swap, "_apart", measure)
    monkeypatch.setattr(swap, "PEERS", dict.fromkeys(swap.PEERS, mock.Mock(why_not=lambda setting: None)))
    main(
        "--kinds inference --dtypes float32 --threads 1 --least-seconds 4 --most-seconds 5 --peers transformers".split()
    )
    assert {peers for peers, _ in found} == {(TRANSFORMERS,)} and {seconds for _, seconds in found} == {4, 5}


def test_what_one_process_checked_the_next_one_knows():
    measuring = Swap(swap.ARCHITECTURES["tiny"], 7, seconds=0.0, fewest=1)
    measuring.models.checked = {"a peer": {}}
    case = Case("inference", 1, 0.5, False, "float32", 1)
    with mock.patch.object(Swap, "measure", lambda self, case: found):
        found = result([1.0], [2.0], [3.0], seconds=0.5)
        assert swap._measure(measuring, case) == (found, {"a peer": {}})


class Deadly:
    """A measurement whose process dies."""

    models = None

    def measure(self, case):
        os._exit(9)


def test_what_kills_a_case_does_not_kill_the_benchmark():
    with pytest.raises(BrokenProcessPool):
        swap._apart(Deadly(), None)
