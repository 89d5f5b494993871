"""What a run directory says about itself, as far as the run has come: an unfinished stage is None or empty."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from hubert_fast.pretrain.metrics_log import read_metrics
from hubert_fast.pretrain.tensor_files import naming


@dataclass(frozen=True)
class Metrics:
    """The lines of metrics.jsonl, by rising step; after a resume the newest line of a step counts."""

    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]

    def outcome(self) -> dict[str, Any]:
        """First and last values, as far as there are any: what evaluation.json and the report quote."""
        outcome: dict[str, Any] = {}
        if self.training:
            first, last = self.training[0], self.training[-1]
            for name in ("step", "loss", "masked_loss", "masked_accuracy"):
                outcome |= {f"first_{name}": first.get(name), f"last_{name}": last.get(name)}
            outcome |= {name: last.get(name) for name in ("audio_seconds", "seconds")}
        if self.validation:
            last = self.validation[-1]
            outcome |= {name: last.get(name) for name in ("valid_loss", "valid_masked_loss", "valid_masked_accuracy")}
        return outcome


class ModelSummary(NamedTuple):
    """What the header of model.safetensors says."""

    parameters: int
    config: dict[str, Any]
    """the fields of ModelConfig"""


@dataclass(frozen=True)
class IterationSummary:
    """One iteration directory."""

    number: int
    directory: Path

    @property
    def weights(self) -> Path:
        return self.directory / "train" / "model.safetensors"

    @cached_property
    def units(self) -> dict[str, Any] | None:
        return read_json(self.directory / "units" / "summary.json")

    @cached_property
    def metrics(self) -> Metrics:
        return training_metrics(self.directory / "train")

    @cached_property
    def model(self) -> ModelSummary | None:
        if not self.weights.is_file():
            return None
        from safetensors import safe_open

        with naming(self.weights), safe_open(self.weights, framework="numpy") as file:
            parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
            return ModelSummary(parameters, json.loads(file.metadata()["model_config"]))

    @cached_property
    def evaluation(self) -> dict[str, Any] | None:
        return read_json(self.directory / "evaluation.json")

    @property
    def representations(self) -> list[dict[str, Any]]:
        """The representations that were scored, as evaluation.json describes them."""
        return (self.evaluation or {}).get("representations", [])

    def best_layer(self) -> dict[str, Any] | None:
        """The transformer layer of the highest PNMI."""
        return max((row for row in self.representations if row["layer"]), key=lambda row: row["pnmi"], default=None)

    def mfcc(self) -> dict[str, Any] | None:
        return next((row for row in self.representations if row["layer"] == 0), None)


def iterations(run: Path) -> list[IterationSummary]:
    """The iterations that have a directory below ``run``, in order."""
    found = []
    for directory in Path(run).glob("iteration*"):
        number = re.fullmatch(r"iteration(\d+)", directory.name)
        if number and directory.is_dir():
            found.append(IterationSummary(int(number[1]), directory))
    return sorted(found, key=lambda iteration: iteration.number)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no file; ValueError names a file that is damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); a damaged file is made anew once it is deleted") from error


def parsed_lines(path: Path, parse: Callable[[str], Any], expected: str) -> Iterator[Any]:
    """Parse each line of a file that is not blank with ``parse``; ValueError names a line that is not as ``expected``."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error})") from error
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a text may hold its other separators
        try:
            if line.strip():
                yield parse(line)
        except (ValueError, KeyError, TypeError) as error:
            place = f"{path}, line {number}"
            raise ValueError(f"{place}: expected {expected} ({type(error).__name__}: {error})") from error


def training_metrics(directory: Path) -> Metrics:
    """The metrics of ``RUN/iterationN/train``: ``loss`` marks a line of training, ``valid_loss`` one of validation."""
    training: dict[int, dict[str, Any]] = {}
    validation: dict[int, dict[str, Any]] = {}
    for line in read_metrics(directory):
        if "loss" in line:
            training[line["step"]] = line
        if "valid_loss" in line:
            validation[line["step"]] = line
    return Metrics([training[step] for step in sorted(training)], [validation[step] for step in sorted(validation)])
