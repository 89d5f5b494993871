"""The examples run, and so do the blocks of code in docs/."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from tests.models.test_graphed_step import build

_ROOT = Path(__file__).parents[1]


def test_the_graphed_example_trains_on_a_cpu_and_goes_on_from_its_checkpoint(tmp_path):
    def losses(steps):
        command = [sys.executable, "examples/train_graphed.py", "--tiny", "--steps", str(steps), "--out", str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(_ROOT), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {int(update): float(loss) for update, loss in re.findall(r"update (\d+): loss ([\d.]+)", done.stdout)}

    first, then = losses(3), losses(6)
    assert (list(first), list(then)) == ([1, 2, 3], [4, 5, 6])
    assert then[6] < first[1]


def test_the_blocks_of_the_page_on_graphs_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hubert_fast.hubert_pretrain_base", lambda num_classes: build().model)
    samples = [8000] * 8
    speech = [(torch.randn(each), torch.zeros((each - 400) // 320 + 1, dtype=torch.long)) for each in samples]
    names = {"speech": speech, "batches": [[0, 1], [2, 3], [4, 5], [6, 7]], "path": tmp_path / "checkpoint.pt"}
    held_out = torch.stack([speech[0][0]]), torch.stack([speech[0][1]]), torch.tensor(samples[:1])
    names["held_out"] = held_out
    page = (_ROOT / "docs" / "cuda-graphs.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for block in blocks:
        if any(each in block for each in ("set_device", "plan_of", "basicConfig")):  # a GPU; the log of all tests
            continue
        exec(block.replace('device("cuda")', 'device("cpu")').replace("num_workers=2", "num_workers=0"), names)
    assert "2.2%, at most 6.2%" in capsys.readouterr().out
