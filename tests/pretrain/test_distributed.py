import os
import socket

import pytest
import torch
import torch.multiprocessing

from hubert_fast.pretrain.distributed import Process, joined


@pytest.fixture(autouse=True)
def without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_one_process_needs_no_group():
    with joined("cpu") as process:
        assert process == Process(torch.device("cpu"), 0, 1, None)
        assert process.is_main
        assert process.sum_on_host([1, 2.5]) == [1.0, 2.5]
        assert process.gather("a") == ["a"] and process.from_main("b") == "b"
        process.barrier()
        assert not torch.distributed.is_initialized()


def _talk(rank, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with joined("cpu") as process:
        assert (process.rank, process.world_size, process.is_main) == (rank, 2, rank == 0)
        assert process.sum_on_host([rank + 1, 2**40]) == [3.0, 2.0**41]
        assert process.gather({"rank": rank}) == ([{"rank": 0}, {"rank": 1}] if rank == 0 else [])
        assert process.from_main(f"from {rank}") == "from 0"
        with joined("cpu") as inner:  # joins the group that exists and leaves it standing
            assert inner.sum_on_host([1.0]) == [2.0]
        process.barrier()
    assert not torch.distributed.is_initialized()


def test_two_processes_sum_gather_and_hear_the_main_one():
    torch.multiprocessing.spawn(_talk, args=(free_port(),), nprocs=2)


@pytest.mark.parametrize("device", ["tpu", "cuda:0"])
def test_names_a_device_that_is_not_accepted(device):
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda'"), joined(device):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_says_when_there_is_no_gpu():
    with pytest.raises(ValueError, match="needs a GPU for local rank 0, but 0 are visible"), joined("cuda"):
        pass


def test_refuses_contradicting_torchrun_variables(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK=2, WORLD_SIZE=2"), joined("cpu"):
        pass
