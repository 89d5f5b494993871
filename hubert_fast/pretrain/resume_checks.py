"""What may change when a run is resumed: settings that decide no number, and those whose stage has no output yet."""

from __future__ import annotations

from pathlib import Path

from hubert_fast.pretrain.checkpoint import list_checkpoints
from hubert_fast.pretrain.config import PretrainConfig
from hubert_fast.pretrain.config_file import differences

# An evaluation with other settings is made anew; the others decide no number of the result, or its rounding alone.
_ALWAYS_FREE = ("device", "graphs", "logging.", "evaluation.")
_ALWAYS_FREE += tuple(f"data.{name}" for name in ("workers", "micro_batch_seconds", "max_bad_utterances"))
_OF_THE_SCAN = ("seed", "data.min_seconds", "data.channel", "data.valid_fraction")
_ITERATIONS = ("first", "second", "third")


class ConfigMismatchError(ValueError):
    """A run is to be resumed with other settings than its own."""


def require_resumable(stored: PretrainConfig, given: PretrainConfig, directory: Path) -> None:
    """Raise `ConfigMismatchError` naming every setting that differs though the run has results made with it."""
    changed = [
        f"{name} is {before!r} there and {now!r} here"
        for name, before, now in differences(stored, given)
        if not _is_free(name, before, now, stored, directory)
    ]
    if changed:
        raise ConfigMismatchError(
            f"out={str(directory)!r} holds results made with other settings ({'; '.join(changed)}); resume it with its "
            "own, or choose another folder"
        )


def _is_free(name: str, before: object, now: object, stored: PretrainConfig, run: Path) -> bool:
    if name.startswith(_ALWAYS_FREE) or name.endswith(".optimizer.accumulate"):
        return True
    if name in _OF_THE_SCAN:
        return not (run / "manifest" / "summary.json").exists()
    part, _, rest = name.partition(".")
    if part not in _ITERATIONS:  # data.* and autocast: every iteration reads them
        return not is_trained(run / "iteration1")
    earlier = _ITERATIONS[: _ITERATIONS.index(part)]
    number = 1 + sum(getattr(stored, each).optimizer.steps > 0 for each in earlier)
    directory = run / f"iteration{number}"
    # Leaving an iteration out, or in, moves those after it to other numbers.
    moves = rest == "optimizer.steps" and 0 in (before, now)
    if rest.startswith("units.") or moves:
        return not (directory / "units" / "summary.json").exists()
    return not is_trained(directory)


def is_trained(iteration: Path) -> bool:
    """Whether an iteration's directory holds something that training would go on from."""
    train = iteration / "train"
    return (train / "model.safetensors").exists() or bool(list_checkpoints(train / "checkpoints"))
