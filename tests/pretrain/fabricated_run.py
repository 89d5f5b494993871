"""A run directory as the pipeline leaves it, with invented numbers and the weights of a tiny random model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from hubert_fast.pretrain.config import ModelConfig
from tests.pretrain.train_tiny import MODEL


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_json_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def fabricate_run(
    run: Path, *, iterations: int = 2, steps: int = 400, skipped: list[dict] | None = None, layers: int = 6
) -> Path:
    """Everything but weights (see `save_tiny_weights`)."""
    write_json(
        run / "manifest" / "summary.json",
        {
            "settings": {"audio": "/data/speech"},
            "utterances": {"train": 180, "valid": 20},
            "seconds": {"train": 540.0, "valid": 61.5},
            "hours": {"train": 0.15, "valid": 0.0171},
            "sampling_rates": {"8000": 3, "16000": 197},
            "skipped": len(skipped or []),
            "has_alignments": True,
        },
    )
    write_json_lines(run / "manifest" / "skipped.jsonl", skipped or [])
    (run / "config.toml").write_text('seed = 0\ndevice = "auto"\n\n[data]\nnormalize_audio = false\n', encoding="utf-8")
    for number in range(1, iterations + 1):
        directory = run / f"iteration{number}"
        source = "mfcc" if number == 1 else f"layer{layers // 2}"
        write_json(
            directory / "units" / "summary.json",
            {"source": source, "clusters": 100 * number, "perplexity": 81.25 * number, "commonest_share": 0.1},
        )
        write_json_lines(directory / "train" / "metrics.jsonl", metrics_lines(steps, ceiling=0.2 + 0.2 * number))
        write_json(directory / "evaluation.json", evaluation(number, layers))
    return run


def metrics_lines(steps: int, *, ceiling: float) -> list[dict]:
    rng = np.random.default_rng(steps)
    lines: list[dict] = []
    for step in range(1, steps + 1):
        progress = 1 - math.exp(-3 * step / steps)
        noise = float(rng.normal(0, 0.03))
        loss = 4.6 - 2.5 * progress + noise
        values = {"loss": loss, "masked_loss": loss - 0.1, "masked_accuracy": max(0.0, ceiling * progress + noise / 3)}
        speed = {"x_realtime": 90 + 20 * noise, "audio_seconds": 40.0 * step, "seconds": 0.5 * step}
        lines.append({"step": step, **values, "feature_penalty": 0.01, "lr": 5e-4, "grad_norm": 2.0, **speed})
        if step % (steps // 4) == 0:
            valid = {"valid_loss": loss + 0.2, "valid_masked_loss": loss + 0.1}
            lines.append({"step": step, **valid, "valid_masked_accuracy": ceiling * progress * 0.9})
    return lines


def evaluation(number: int, layers: int) -> dict:
    def scores(name: str, layer: int | None, pnmi: float) -> dict:
        purities = {"phone_purity": pnmi * 0.9, "cluster_purity": 0.08, "pnmi": pnmi, "chance_pnmi": 0.15}
        rest = {"phone_entropy": 3.2, "unit_perplexity": 71.3, "frames": 3050}
        return {"name": name, "layer": layer, "clusters": 100, **purities, **rest}

    rows = [scores("mfcc", 0, 0.31)]
    rows += [scores(f"layer{n}", n, 0.30 + 0.1 * number * math.sin(n / layers * 2.5)) for n in range(1, layers + 1)]
    rows.append(scores("training_units", None, 0.29))
    return {
        "training": {},
        "clusters": 100,
        "fit_frames": 26950,
        "utterances": 20,
        "frames": 3050,
        "phone_frames": {"sil": 400, "a": 200},
        "representations": rows,
    }


def save_tiny_weights(path: Path, *, config: ModelConfig = MODEL, state_dict: dict | None = None) -> None:
    """`HuBERTPretrainModel` weights as the trainer saves them; those of ``config``, as torch's seed draws them, or others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"model_config": config.to_json(), "num_classes": "7"}
    save_file(config.build(7).state_dict() if state_dict is None else state_dict, path, metadata=metadata)
