"""What a run measures: sums kept on the device between log steps, lines in metrics.jsonl, curves for TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubert_fast.pretrain.atomic import write_text
from hubert_fast.pretrain.distributed import Process


class Meter:
    """Sums over the updates since the last reading, on the device, so that no step waits for the host."""

    def __init__(self, device: torch.device) -> None:
        # [loss, masked_loss, masked_correct, masked_count where these two are known, masked_count,
        #  feature_penalty * masked_count, gradient norm, updates]
        self._sums = torch.zeros(8, dtype=torch.float64, device=device)

    def add_micro_batch(self, output: Any) -> None:
        """Add a result of `hubert_fast.PretrainingObjective`; without ``masked_loss`` (None) accuracy is unknown too."""
        count = _scalar(output.masked_count, self._sums)
        penalty = _scalar(output.feature_penalty, self._sums) * count
        masked = [_scalar(value, self._sums) for value in (output.masked_loss, output.masked_correct)]
        known = _scalar(None, self._sums) if output.masked_correct is None else count
        self._sums[:6] += torch.stack([_scalar(output.loss, self._sums), *masked, known, count, penalty])

    def add_update(self, gradient_norm: Tensor) -> None:
        """Count an update and its gradient norm, which is the same on every rank."""
        self._sums[6:] += torch.stack([_scalar(gradient_norm, self._sums), self._sums.new_ones(())])

    def read(self, process: Process) -> dict[str, float]:
        """Means over all ranks' masked frames since the last reading, and start anew; all ranks call it together.

        ``loss`` is what training minimises; it and ``feature_penalty`` are left out where no frame was masked, ``masked_loss``,
        the cross-entropy of the masked frames, and ``masked_accuracy`` where they were not computed, ``grad_norm`` where there
        was no update.
        """
        loss, masked_loss, correct, known, count, penalty, norm, updates = process.sum_on_host(self._sums.tolist())
        self._sums.zero_()
        means = {"loss": loss / count, "feature_penalty": penalty / count} if count else {}
        if known:
            means |= {"masked_loss": masked_loss / known, "masked_accuracy": correct / known}
        if updates:
            means["grad_norm"] = norm / updates
        return means

    def state_dict(self) -> Tensor:
        return self._sums.cpu().clone()

    def load_state_dict(self, state: Tensor) -> None:
        self._sums.copy_(state)


class Clock:
    """Wall time and audio of a run, over all the processes that have worked on it in turn, and the speed of late."""

    def __init__(self, *, seconds: float = 0.0, audio_seconds: float = 0.0) -> None:
        self.audio_seconds = audio_seconds
        self._earlier = seconds
        self._started = time.monotonic()
        self.restart_window()

    def seconds(self) -> float:
        """Wall seconds spent in the run."""
        return self._earlier + time.monotonic() - self._started

    def add_audio(self, seconds: float) -> None:
        self.audio_seconds += seconds

    def restart_window(self) -> None:
        """Measure the speed from here on, so that validating and saving do not count in it."""
        self._window = (time.monotonic(), self.audio_seconds)

    def audio_seconds_per_second(self) -> float:
        """Seconds of audio per wall second since the window was started (x real time)."""
        started, audio = self._window
        return (self.audio_seconds - audio) / max(1e-9, time.monotonic() - started)


def _scalar(value: Tensor | float | None, like: Tensor) -> Tensor:
    if value is None:
        return like.new_zeros(())
    return torch.as_tensor(value, device=like.device).detach().to(like.dtype)


@contextmanager
def metrics_log(directory: Path, *, step: int = 0) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A function that appends ``{"step": step, **values}`` to metrics.jsonl, and the values to TensorBoard.

    It goes on after ``step``; call it on rank 0 only. A run that was killed has written lines for steps after its last
    checkpoint. They are dropped first, because those steps are about to be taken again.
    """
    from torch.utils.tensorboard import SummaryWriter

    path = metrics_path(directory)
    kept = [line for line in read_metrics(directory) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    curves = SummaryWriter(str(Path(directory) / "tensorboard"), purge_step=step + 1)
    with path.open("a", encoding="utf-8") as file, curves:

        def write(step: int, values: Mapping[str, float]) -> None:
            file.write(json.dumps({"step": step, **values}) + "\n")
            file.flush()
            for name, value in values.items():
                curves.add_scalar(name, value, step)

        yield write


def metrics_path(directory: Path) -> Path:
    return Path(directory) / "metrics.jsonl"


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of ``directory``/metrics.jsonl, none where it is missing, less one that a kill may have cut short."""
    path = metrics_path(directory)
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
