"""The loop on a stand-in objective and stand-in batches; `test_trainer.py` runs it on the real ones."""

import itertools
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hubert_fast.pretrain.checkpoint import DiskFullError, list_checkpoints, load_checkpoint
from hubert_fast.pretrain.config import IterationConfig, LoggingConfig, OptimizerConfig, PretrainConfig
from hubert_fast.pretrain.distributed import Process
from hubert_fast.pretrain.finite import NonFiniteTrainingError
from hubert_fast.pretrain.interrupts import TrainingInterrupted
from hubert_fast.pretrain.left_out import LeftOut, TooManyBadUtterancesError, read_left_out
from hubert_fast.pretrain.metrics_log import read_metrics
from hubert_fast.pretrain.random_state import seed_everything
from hubert_fast.pretrain.run_summary import training_metrics
from hubert_fast.pretrain.training_loop import Trainer

FRAMES = 6
OPTIMIZER = OptimizerConfig(steps=10, learning_rate=0.05, warmup_fraction=0.2, clip_norm=1.0)
LOGGING = LoggingConfig(log_every=4, valid_every=5, save_every=3, keep_checkpoints=2)


class Objective(nn.Module):
    """Classifies each frame by one weight vector a class; ``loss`` is the sum over masked frames, as the real one's."""

    def __init__(self, *, dropout=0.0):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 5))

    def forward(self, waveforms, labels, audio_lengths=None, *, mask=None):
        logits = self.model(waveforms.unflatten(1, (FRAMES, 4)))[mask]
        loss = nn.functional.cross_entropy(logits.float(), labels[mask], reduction="sum")
        counts = {"masked_count": mask.sum(), "masked_correct": (logits.argmax(-1) == labels[mask]).sum()}
        return SimpleNamespace(loss=loss, masked_loss=loss, feature_penalty=waveforms.mean(), **counts)


class Batches:
    """Three global batches an epoch, each a function of (epoch, batch) alone and one micro-batch."""

    def __init__(self, *, change=lambda number, batch: None):
        self.change, self.epoch, self.batch = change, 0, 0
        self.left_out = LeftOut(12, 0.15)

    def __iter__(self):
        while True:
            batch = self._draw(3 * self.epoch + self.batch)
            self.epoch, self.batch = (self.epoch, self.batch + 1) if self.batch < 2 else (self.epoch + 1, 0)
            yield [batch]

    def _draw(self, number):
        generator = torch.Generator().manual_seed(number)
        waveforms = torch.randn(4, FRAMES * 4, generator=generator)
        batch = SimpleNamespace(
            waveforms=waveforms,
            labels=(waveforms.unflatten(1, (FRAMES, 4))[..., 0] > 0).long(),
            audio_lengths=torch.full((4,), FRAMES * 4),
            mask=torch.rand(4, FRAMES, generator=generator) < 0.6,
            ids=[f"utterance-{number}-{row}" for row in range(4)],
            failed={},
            seconds=40.0,
        )
        self.change(number, batch)
        return batch

    def state_dict(self):
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state):
        self.epoch, self.batch = state["epoch"], state["batch"]


class HeldOut:
    """Two batches, the same every time."""

    left_out = LeftOut(4, 0.0)

    def __iter__(self):
        return itertools.islice(Batches(), 2)


def trainer_at(out, *, objective=None, dropout=0.0, optimizer=OPTIMIZER, batches=None, autocast=False, **options):
    seed_everything(0)
    return Trainer(
        objective or Objective(dropout=dropout),
        batches or Batches(),
        HeldOut(),
        PretrainConfig(autocast=autocast, logging=LOGGING),
        IterationConfig(optimizer=optimizer),
        out=out,
        description={},
        progress=False,
        **{"process": Process(), **options},
    )


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.objective.parameters()])


def without_time(lines):
    return [{name: value for name, value in line.items() if name not in ("seconds", "x_realtime")} for line in lines]


def test_learns_logs_validates_and_saves_when_due(tmp_path):
    trainer = trainer_at(tmp_path)
    trainer.fit()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)
    lines = read_metrics(tmp_path)
    trained, valid = ([line for line in lines if name in line] for name in ("loss", "valid_loss"))
    assert [line["step"] for line in trained] == [1, 4, 8, 10]
    assert [line["step"] for line in valid] == [5, 10]
    measured = "loss masked_loss masked_accuracy feature_penalty grad_norm lr x_realtime audio_seconds seconds"
    assert set(trained[0]) == {"step", *measured.split()}
    assert set(valid[0]) == {"step", "valid_loss", "valid_masked_loss", "valid_masked_accuracy"}
    assert [line["lr"] for line in trained] == pytest.approx([0.025, 0.05 * 7 / 8, 0.05 * 3 / 8, 0.05 / 8])
    assert [line["audio_seconds"] for line in trained] == [40.0, 160.0, 320.0, 400.0]
    assert trained[-1]["loss"] < 0.9 * trained[0]["loss"] and valid[1]["valid_loss"] < valid[0]["valid_loss"]
    assert [path.name for path in list_checkpoints(trainer.checkpoints)] == ["step-00000009.pt", "step-00000010.pt"]


def test_an_accuracy_that_the_objective_does_not_compute_is_not_logged(tmp_path):
    trainer = trainer_at(tmp_path)
    forward = trainer.objective.forward
    trainer.objective.forward = lambda *args, **kwargs: SimpleNamespace(
        **{**vars(forward(*args, **kwargs)), "masked_loss": None, "masked_correct": None, "feature_penalty": None}
    )
    trainer.fit()
    lines = read_metrics(tmp_path)
    assert not any("masked_accuracy" in name for line in lines for name in line)
    assert any("valid_loss" in line for line in lines)
    outcome = training_metrics(tmp_path).outcome()
    assert outcome["last_loss"] > 0 and outcome["last_masked_accuracy"] is outcome["valid_masked_accuracy"] is None


@pytest.mark.parametrize("stop_after", range(1, 10))
def test_a_resumed_run_ends_with_the_same_weights_and_metrics_bit_for_bit(tmp_path, stop_after):
    whole = trainer_at(tmp_path / "whole", dropout=0.5, autocast=True)
    whole.fit()

    class Killed(Exception):
        pass

    def kill(number, batch):
        if number == stop_after:
            raise Killed

    killed = trainer_at(tmp_path / "killed", dropout=0.5, autocast=True, batches=Batches(change=kill))
    with pytest.raises(Killed):
        killed.fit()
    resumed = trainer_at(tmp_path / "killed", dropout=0.5, autocast=True)
    checkpoints = list_checkpoints(resumed.checkpoints)
    saved = [step for step in (3, 6, 9) if step <= stop_after]
    assert [load_checkpoint(path)["step"] for path in checkpoints] == saved[-2:]
    if checkpoints:
        resumed.restore(load_checkpoint(checkpoints[-1]))
    resumed.fit()
    assert torch.equal(weights(resumed), weights(whole))
    assert without_time(read_metrics(tmp_path / "killed")) == without_time(read_metrics(tmp_path / "whole"))


def test_a_batch_without_masked_frames_changes_no_gradient_and_divides_by_no_zero(tmp_path):
    def unmask(number, batch):
        batch.mask.zero_()

    optimizer = OptimizerConfig(steps=3, weight_decay=0.0)
    trainer = trainer_at(tmp_path, optimizer=optimizer, batches=Batches(change=unmask))
    before = weights(trainer)
    trainer.fit()
    assert torch.equal(weights(trainer), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_step_and_utterances_and_spares_the_weights(tmp_path, value):
    def spoil(number, batch):
        if number == 4:
            batch.waveforms[2, 3] = value

    trainer = trainer_at(tmp_path, batches=Batches(change=spoil))
    with pytest.raises(
        NonFiniteTrainingError, match="at step 5; .*utterance-4-0, utterance-4-1, utterance-4-2, utterance-4-3"
    ):
        trainer.fit()
    assert weights(trainer).isfinite().all()
    assert [path.name for path in list_checkpoints(trainer.checkpoints)] == ["step-00000003.pt"]


def test_a_full_disk_stops_the_training(tmp_path, monkeypatch):
    trainer = trainer_at(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(DiskFullError, match="there is no earlier checkpoint"):
        trainer.fit()
    assert trainer.step == LOGGING.save_every


@pytest.mark.parametrize("workers_die", [False, True])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_step_boundary_and_resuming_ends_with_the_same_weights(
    tmp_path, signum, workers_die, capsys
):
    whole = trainer_at(tmp_path / "whole", dropout=0.5)
    whole.fit()

    def send(number, batch):
        if number == 4:  # while the fifth batch is fetched: four steps are done
            os.kill(os.getpid(), signum)
            if workers_die:
                raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")

    stopped = trainer_at(tmp_path / "stopped", dropout=0.5, batches=Batches(change=send))
    with pytest.raises(TrainingInterrupted) as interrupted:
        stopped.fit()
    assert interrupted.value.code == 128 + signum
    assert interrupted.value.checkpoint.name == "step-00000004.pt"
    said = f"stopped by {signum.name} after step 4; saved {interrupted.value.checkpoint}; resume to go on\n"
    assert capsys.readouterr().err == said
    resumed = trainer_at(tmp_path / "stopped", dropout=0.5)
    resumed.restore(load_checkpoint(interrupted.value.checkpoint))
    resumed.fit()
    assert torch.equal(weights(resumed), weights(whole))


def test_restoring_for_another_number_of_processes_warns(tmp_path):
    trainer_at(tmp_path).fit()
    state = load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    state["ranks"] = state["ranks"] * 2
    with pytest.warns(RuntimeWarning, match="saved by 2 processes, this run has 1"):
        trainer_at(tmp_path).restore(state)


def fail(number, batch):
    """Three rows are gone, in the updates 2, 5 and 8."""
    if number in (1, 4, 7):
        batch.failed = {f"u{number}": "gone"}


def test_what_fails_is_left_out_from_there_on_counted_and_listed_and_resuming_knows_it(tmp_path, capsys):
    whole = trainer_at(tmp_path / "whole", batches=Batches(change=fail))
    with pytest.raises(TooManyBadUtterancesError, match="3 of 12 .*'u1': gone; 'u4': gone; 'u7': gone. .*--resume"):
        trainer_at(tmp_path / "strict", batches=Batches(change=fail)).fit()
    assert capsys.readouterr().err.count("utterance 'u1' is left out: gone") == 1
    # What came with the last one is not saved: the audio may be there again tomorrow.
    saved = load_checkpoint(list_checkpoints(tmp_path / "strict" / "checkpoints")[-1])
    assert saved["step"] == 6 and saved["left_out"] == {"train": [["u1", "gone", 2], ["u4", "gone", 5]], "valid": []}
    assert [line["step"] for line in read_left_out(tmp_path / "strict")] == [2, 5]

    whole.batches.left_out = LeftOut(12, 0.5)
    whole.fit()
    assert [line.get("left_out") for line in read_metrics(tmp_path / "whole") if "loss" in line] == [None, 1, 3, 3]
    resumed = trainer_at(tmp_path / "strict", batches=Batches(change=fail))
    resumed.batches.left_out = LeftOut(12, 0.5)
    resumed.restore(saved)
    assert "u1" in resumed.batches.left_out
    resumed.fit()
    assert torch.equal(weights(resumed), weights(whole))
    assert read_left_out(tmp_path / "strict") == read_left_out(tmp_path / "whole")


def test_a_validation_of_which_nothing_is_left_logs_no_loss(tmp_path):
    trainer = trainer_at(tmp_path)
    trainer.valid_batches = Batches(change=lambda number, batch: batch.mask.zero_())
    trainer.valid_batches.__class__ = type(
        "Two", (Batches,), {"__iter__": lambda self: itertools.islice(Batches.__iter__(self), 2)}
    )
    trainer.fit()
    assert not any("valid_loss" in line for line in read_metrics(tmp_path))
