import os
import socket

import pytest
import torch
import torch.multiprocessing

from hubert_fast.pretrain.distributed import joined


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _talk(rank, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with joined("cpu") as process:
        assert (process.rank, process.world_size, process.is_main) == (rank, 2, rank == 0)
        assert process.sum_on_host([rank + 1, 2**40]) == [3.0, 2.0**41]
        assert process.gather({"rank": rank}) == ([{"rank": 0}, {"rank": 1}] if rank == 0 else [])
        assert process.from_main(f"from {rank}") == "from 0"
        process.barrier()
        assert process.on_main(lambda: rank) == 0
        with pytest.raises(ZeroDivisionError if rank == 0 else RuntimeError, match="division by zero"):
            process.on_main(lambda: 1 / 0)
    assert not torch.distributed.is_initialized()


def test_two_processes_sum_gather_hear_the_main_one_and_fail_with_it():
    torch.multiprocessing.spawn(_talk, args=(free_port(),), nprocs=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_says_when_there_is_no_gpu():
    with pytest.raises(ValueError, match="needs a GPU for local rank 0, but 0 are visible"), joined("cuda"):
        pass


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_the_world_size_does_not_allow_is_refused_by_name(monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"got RANK={rank}, WORLD_SIZE=2"), joined("cpu"):
        pass


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_one_variable_alone_does_not_make_a_group(monkeypatch, name):
    monkeypatch.setenv(name, "3")
    with joined("cpu") as process:
        assert (process.rank, process.world_size) == (0, 1)
