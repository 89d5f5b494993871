"""How global batches are divided: by hand, by seconds, by the memory that a model predicts and that a trial finds."""

import os
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

from hubert_fast import PretrainingObjective
from hubert_fast.pretrain import micro_batches, trainer
from hubert_fast.pretrain.distributed import Process, joined
from hubert_fast.pretrain.epoch_plan import largest_parts, smallest_batch
from hubert_fast.pretrain.frames import SAMPLE_RATE
from hubert_fast.pretrain.memory_model import MemoryModel
from hubert_fast.pretrain.metrics_log import read_metrics
from hubert_fast.pretrain.presets import PRESETS
from tests.pretrain.test_distributed import free_port
from tests.pretrain.test_training_loop import Batches, Objective, trainer_at, without_time
from tests.pretrain.train_tiny import make_corpus, train_tiny

GIB = 2**30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


class Lengths:
    """The part of `GlobalBatches` that the division asks for."""

    def __init__(self, samples, batch_seconds, world_size):
        self.samples, self.budget, self.world_size = samples, round(batch_seconds * SAMPLE_RATE), world_size

    @property
    def most_micro_batches(self):
        return smallest_batch(self.samples, self.budget) // self.world_size

    def largest_sizes(self, accumulate):
        return largest_parts(self.samples, self.budget, self.world_size * accumulate)


@pytest.mark.parametrize("gpus", [1, 2, 8])
@pytest.mark.parametrize("gib", [24, 80])
@pytest.mark.parametrize("name", ["base", "large", "xlarge"])
def test_presets_start_unchanged_on_gpus_of_any_number_and_size(name, gib, gpus):
    config = PRESETS[name]
    rng = np.random.default_rng(0)
    for iteration in config.iterations():
        longest = round(config.data.max_seconds * SAMPLE_RATE)
        samples = np.append((longest * rng.uniform(0.13, 1.0, size=30_000)).astype(np.int64), longest)
        batches = Lengths(samples, config.data_of(iteration).batch_seconds, gpus)
        with torch.device("meta"):
            parameters = sum(each.numel() for each in iteration.model.build(500).parameters())
        memory = MemoryModel(iteration.model, parameters, config.autocast, world_size=gpus)

        def taken(accumulate, memory=memory, batches=batches):
            return micro_batches.predicted(memory, batches.largest_sizes(accumulate))

        accumulate = micro_batches.fewest(
            batches, lambda sizes, memory=memory: micro_batches.predicted(memory, sizes) <= 0.9 * gib * GIB
        )
        assert taken(accumulate) <= 0.9 * gib * GIB
        assert accumulate == 1 or taken(accumulate - 1) > 0.9 * gib * GIB


def test_seconds_that_are_given_bound_every_micro_batch(corpus, tmp_path, capsys):
    seen = []
    forward = PretrainingObjective.forward

    def noting(objective, waveforms, *arguments, **named):
        if objective.training:
            seen.append(waveforms.numel() / SAMPLE_RATE)
        return forward(objective, waveforms, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainingObjective, "forward", noting)
        train_tiny(corpus, tmp_path, accumulate=None, micro_batch_seconds=2.0, steps=4)
    assert 1.0 < max(seen) <= 2.0 and len(seen) == 4 * 4
    assert "micro-batches of up to 2.0 s, 4 of each of 1 process" in capsys.readouterr().err


def out_of_memory_above(rows):
    forward = PretrainingObjective.forward

    def limited(objective, waveforms, *arguments, **named):
        if objective.training and len(waveforms) > rows:
            raise torch.OutOfMemoryError(f"{len(waveforms)} rows")
        return forward(objective, waveforms, *arguments, **named)

    return limited


def test_micro_batches_that_run_out_of_memory_are_halved_and_nothing_else_changes(corpus, tmp_path, monkeypatch):
    """Dropout and LayerDrop are on: the trials shift no random number."""
    train_tiny(corpus, tmp_path / "by_hand", accumulate=4, steps=4)
    monkeypatch.setattr(trainer, "follow_from_memory", lambda *_: True)
    monkeypatch.setattr(PretrainingObjective, "forward", out_of_memory_above(2))
    with pytest.warns(RuntimeWarning, match="micro-batches of up to .* ran out of memory; going on with") as warned:
        train_tiny(corpus, tmp_path / "halved", accumulate=None, steps=4)
    assert [str(each.message).split(", ")[-1] for each in warned if "ran out" in str(each.message)] == [
        "2 of each of 1 process",
        "4 of each of 1 process",
    ]
    expected, halved = (load_file(tmp_path / name / "model.safetensors") for name in ("by_hand", "halved"))
    assert all(torch.equal(halved[name], expected[name]) for name in expected)
    assert without_time(read_metrics(tmp_path / "halved")) == without_time(read_metrics(tmp_path / "by_hand"))


@pytest.mark.filterwarnings("ignore:micro-batches of up to")
def test_a_single_utterance_that_runs_out_of_memory_is_an_error(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "follow_from_memory", lambda *_: True)
    monkeypatch.setattr(PretrainingObjective, "forward", out_of_memory_above(0))
    with pytest.raises(RuntimeError, match="the smallest that data.batch_seconds allows, runs out of memory: lower"):
        train_tiny(corpus, tmp_path, accumulate=None)


class Divided(Batches):
    """The stand-in's four rows in 1, 2 or 4 parts of each rank; the ranks have the same."""

    accumulate, most_micro_batches = 1, 4

    def divide(self, accumulate):
        self.accumulate = accumulate

    def seconds(self):
        return 40.0 / self.accumulate

    def largest_micro_batch(self):
        return self._parts(self._draw(0))[0]

    def _parts(self, batch):
        tensors = {name: each.chunk(self.accumulate) for name, each in vars(batch).items() if torch.is_tensor(each)}
        rest = {"ids": batch.ids, "failed": {}, "seconds": batch.seconds}
        return [SimpleNamespace(**dict(zip(tensors, part)), **rest) for part in zip(*tensors.values())]

    def __iter__(self):
        return (self._parts(batch) for (batch,) in super().__iter__())


def _train(rank, port, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    class Limited(Objective):
        def forward(self, waveforms, *arguments, **named):
            if rank == 1 and self.training and len(waveforms) > 2:
                raise torch.OutOfMemoryError
            output = vars(super().forward(waveforms, *arguments, **named))
            return namedtuple("Output", output)(**output)  # in which DDP finds the loss

    with joined("cpu") as process:
        trained = trainer_at(folder, objective=Limited(), batches=Divided(), process=process, halve=True)
        trained.fit()
        assert trained.batches.accumulate == 2 and trained.step == trained.steps


@pytest.mark.filterwarnings("ignore:micro-batches of up to")
def test_one_rank_that_runs_out_of_memory_halves_the_micro_batches_of_all(tmp_path):
    torch.multiprocessing.spawn(_train, args=(free_port(), tmp_path), nprocs=2)


def test_on_a_cpu_nothing_is_divided_unless_asked_for(corpus, tmp_path, capsys):
    assert not micro_batches.follow_from_memory(PRESETS["base"], PRESETS["base"].first, Process())
    train_tiny(corpus, tmp_path, accumulate=None, steps=1)
    assert "micro-batches" not in capsys.readouterr().err
