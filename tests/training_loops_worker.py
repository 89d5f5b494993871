"""One process of the tests of training loops: the examples, the recipes of docs/, and updates that one process must match.

Started by `tests.models.processes`. What it finds goes into a file for each rank: by part, then by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import re
import runpy
import sys
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import hubert_fast
from tests.models.processes import REPOSITORY, WORLD_SIZE

EXAMPLES = REPOSITORY / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_ddp  # noqa: E402
from train_graphed import CLASSES, TINY, frames  # noqa: E402

CPU = torch.device("cpu")
UPDATES, UPDATE_MICRO_BATCHES = 3, 4
SAMPLES = 8000
RECIPES = ("DDP", "Lightning", "Accelerate", "transformers' Trainer", "Fine-tuning")  # headings of the page


def absent(part: str) -> str | None:
    """What a part needs beside this project and is not installed."""
    needed = {"Accelerate": ["accelerate"], "transformers' Trainer": ["accelerate", "transformers"]}.get(part, [])
    if "lightning" in part.lower():
        needed = ["lightning"]
    return next((each for each in needed if find_spec(each) is None), None)


def build(layer_drop: float = 0.0) -> hubert_fast.PretrainingObjective:
    """Four layers and no dropout: but for LayerDrop a step draws nothing."""
    dropouts = {f"encoder_{name}": 0.0 for name in ("projection_dropout", "attention_dropout", "dropout")}
    config = dataclasses.replace(TINY, encoder_num_layers=4, encoder_layer_drop=layer_drop, **dropouts)
    torch.manual_seed(0)
    return hubert_fast.PretrainingObjective(config.build(CLASSES).train())


def micro_batch(number: int, masked_frames: int = 9) -> train_ddp.MicroBatch:
    """Three utterances, each with as many masked frames; the same for each rank that asks."""
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(5000, SAMPLES + 1, (3,), generator=generator)
    waveforms = torch.randn(3, SAMPLES, generator=generator)
    labels = torch.randint(0, CLASSES, (3, frames(SAMPLES)), generator=generator)
    mask = torch.zeros(labels.shape, dtype=torch.bool)
    mask[:, 3 : 3 + masked_frames] = True
    return waveforms, labels, lengths, mask


def layers_run(objective: nn.Module) -> list[int]:
    """A list that the layers which are not dropped get into as they run, by number."""
    ran = []
    for i, layer in enumerate(objective.model.wav2vec2.encoder.transformer.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    return ran


def weights(objective: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in objective.named_parameters()}


def ddp_updates(rank: int, processes: int, layer_drop: float = 0.0) -> dict[str, Any]:
    """Weights after updates of examples/train_ddp.py, whose micro-batches mask different numbers of frames."""
    objective = build(layer_drop)
    ran = layers_run(objective)
    wrapped = DistributedDataParallel(objective) if processes > 1 else objective
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    torch.manual_seed(rank)
    losses = []
    for first in range(0, UPDATES * UPDATE_MICRO_BATCHES, UPDATE_MICRO_BATCHES):
        mine = range(first + rank, first + UPDATE_MICRO_BATCHES, processes)
        micro_batches = [micro_batch(number, masked_frames=3 + number % 5) for number in mine]
        losses.append(train_ddp.update(wrapped, objective, optimizer, micro_batches, CPU))
    return {"weights": weights(objective), "losses": torch.stack(losses), "ran": ran}


def lightning_updates(rank: int, processes: int, layer_drop: float = 0.0) -> dict[str, Any]:
    """Weights after the same updates by the module of examples/train_lightning.py, and what it puts on another device."""
    import lightning.pytorch as pl
    import train_lightning

    class Module(train_lightning.HuBERT):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_train_batch_end(self, *_: Any) -> None:
            losses.append(self.trainer.callback_metrics["loss"])

    losses: list[Tensor] = []
    module = Module(build(layer_drop).model, UPDATES)
    ran = layers_run(module.objective)
    trainer = pl.Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", max_epochs=1,
        accumulate_grad_batches=UPDATE_MICRO_BATCHES // processes, gradient_clip_val=10.0, enable_checkpointing=False,
        logger=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    mine = [micro_batch(number) for number in range(rank, UPDATES * UPDATE_MICRO_BATCHES, processes)]
    trainer.fit(module, DataLoader(mine, batch_size=None))
    batch = micro_batch(0)
    waveforms, plan = module.transfer_batch_to_device(batch, torch.device("meta"), 0)
    return {
        "weights": weights(module.objective),
        "losses": torch.stack(losses),
        "ran": ran,
        "find_unused": [getattr(trainer.model, "find_unused_parameters", False)],
        "moved": [waveforms.device.type, plan.labels.device.type, *(each.device.type for each in batch)],
        "rows, kept": [len(plan.mask), len(plan.keep)],
    }


def example(name: str, *arguments: str) -> dict[str, Any]:
    """What a script of examples/ writes to its standard output."""
    output = io.StringIO()
    with mock.patch.object(sys, "argv", [name, "--tiny", *arguments]), contextlib.redirect_stdout(output):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return {"output": output.getvalue()}


def blocks() -> dict[str, str]:
    """The block of code of each section of docs/training-loops.md by its heading; that of all recipes is called common."""
    common, *sections = (REPOSITORY / "docs" / "training-loops.md").read_text(encoding="utf-8").split("\n## ")
    found = {"common": re.findall(r"```python\n(.*?)```", common, re.DOTALL)}
    found.update({each.partition("\n")[0]: re.findall(r"```python\n(.*?)```", each, re.DOTALL) for each in sections})
    return {heading: block for heading, (block,) in ((heading, each) for heading, each in found.items() if each)}


def recipe(heading: str) -> dict[str, Any]:
    """What a recipe of the page leaves, with a small model that drops every other layer, and what DDP it makes."""
    if heading not in ("DDP", "Lightning"):
        from benchmarks.torchaudio_peer import import_models, installed

        if installed():
            import_models()  # transformers imports torchaudio, whose compiled library does not load beside a CPU build of torch
    models, wrappers, plans = [], [], []

    def small(num_classes: int) -> hubert_fast.HuBERTPretrainModel:
        assert num_classes > CLASSES  # the recipe's labels are fewer, in this test
        models.append(build(layer_drop=0.5).model)
        return models[-1]

    def wrap(self: DistributedDataParallel, *arguments: Any, **settings: Any) -> None:
        wrappers.append(self)
        return construct(self, *arguments, **settings)

    def plan(*arguments: Any) -> Any:
        plans.append(make_plan(*arguments))
        return plans[-1]

    construct, make_plan = DistributedDataParallel.__init__, hubert_fast.models.hubert.make_plan
    script = (blocks()["common"] + blocks()[heading]).replace("randint(0, 500", f"randint(0, {CLASSES}")
    with (
        mock.patch.object(hubert_fast, "hubert_pretrain_base", small),
        mock.patch.object(DistributedDataParallel, "__init__", wrap),
        mock.patch.object(hubert_fast.models.hubert, "make_plan", plan),
    ):
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(script, heading, "exec"), names)
    (model,) = models
    return {
        "weights": weights(model),
        "find_unused": [each.find_unused_parameters for each in wrappers],
        "grids": [plan.layout.batch * plan.layout.frames for plan in plans],
        "rows": [len(plan.mask) for plan in plans],
        "kept": [len(plan.keep) for plan in plans],
    }


def main(rank: int, folder: Path) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found: dict[str, Any] = {}
    stores, torchrun = itertools.count(), {}

    def init(*_: Any, **__: Any) -> None:
        """In place of ``init_process_group``, for one group after another: in one store they would get in each other's way."""
        store = f"file://{folder}/store {next(stores)}"
        init_process_group("gloo", store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60))

    init_process_group, dist.init_process_group = dist.init_process_group, init

    def note(part: str, work: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        if absent(part) is None:
            with mock.patch.dict(os.environ, torchrun):  # each time: Lightning takes some away
                found[part] = work(*arguments)
        if dist.is_initialized():  # what frameworks leave
            dist.destroy_process_group()

    # Of one process: each part in one of the ranks, which know nothing of one another yet.
    if rank == 0:
        note("ddp, alone", ddp_updates, 0, 1)
        note("train_ddp.py, alone", example, "train_ddp.py", "--steps", "3")
        if absent("lightning") is None:
            import lightning.pytorch  # noqa: F401  (it takes seconds, for which the other rank would wait)
    else:
        note("lightning, alone", lightning_updates, 0, 1)
        for part, steps in (("train_lightning.py, alone", "2"), ("train_lightning.py, resumed", "4")):
            note(part, example, "train_lightning.py", "--steps", steps, "--out", str(folder / "checkpoint"))
    torchrun = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
    }
    for part, layer_drop in (("ddp", 0.0), ("ddp, LayerDrop", 0.5)):
        dist.init_process_group("gloo")
        note(part, ddp_updates, rank, WORLD_SIZE, layer_drop)
    note("lightning", lightning_updates, rank, WORLD_SIZE)
    note("lightning, LayerDrop", lightning_updates, rank, WORLD_SIZE, 0.5)
    note("train_ddp.py", example, "train_ddp.py", "--steps", "3")
    note("train_lightning.py", example, "train_lightning.py", "--steps", "3", "--devices", str(WORLD_SIZE))
    os.chdir(folder)  # where recipes leave what they save
    for heading in RECIPES:
        note(heading, recipe, heading)
        if "accelerate" in sys.modules:
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
