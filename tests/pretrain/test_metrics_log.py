import json
from types import SimpleNamespace

import pytest
import torch

from hubert_fast.pretrain.distributed import Process
from hubert_fast.pretrain.metrics_log import Clock, Meter, metrics_log, metrics_path, read_metrics


def output(loss, count, correct, penalty):
    values = {"loss": loss, "masked_loss": loss / 2, "masked_count": count, "masked_correct": correct}
    values["feature_penalty"] = penalty
    return SimpleNamespace(**{name: torch.tensor(value) for name, value in values.items()})


def test_the_meter_averages_over_masked_frames_and_starts_anew():
    meter = Meter(torch.device("cpu"))
    meter.add_micro_batch(output(20.0, 10, 5, 0.5))
    meter.add_micro_batch(output(70.0, 30, 5, 0.1))
    meter.add_update(torch.tensor(3.0))
    meter.add_update(torch.tensor(5.0))
    expected = {"loss": 90 / 40, "masked_loss": 45 / 40, "masked_accuracy": 10 / 40, "feature_penalty": (5 + 3) / 40}
    assert meter.read(Process()) == pytest.approx(expected | {"grad_norm": 4.0})
    assert meter.read(Process()) == {}


def test_a_resumed_log_drops_the_lines_after_its_step_and_a_line_cut_short(tmp_path):
    with metrics_log(tmp_path) as log:
        for step in (1, 2, 3):
            log(step, {"loss": float(step)})
    with metrics_path(tmp_path).open("a") as file:
        file.write('{"step": 4, "lo')
    with metrics_log(tmp_path, step=2) as log:
        log(3, {"loss": 30.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert all(json.loads(line) for line in metrics_path(tmp_path).read_text().splitlines())
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_clock_counts_earlier_processes_but_measures_speed_in_its_window(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("hubert_fast.pretrain.metrics_log.time.monotonic", lambda: now[0])
    clock = Clock(seconds=50.0, audio_seconds=1000.0)
    now[0] = 110.0
    clock.add_audio(300.0)
    assert clock.seconds() == 60.0 and clock.audio_seconds == 1300.0 and clock.audio_seconds_per_second() == 30.0
    clock.restart_window()
    now[0] = 112.0
    clock.add_audio(10.0)
    assert clock.audio_seconds_per_second() == 5.0 and clock.seconds() == 62.0
