"""The blocks of docs/swapping.md run in order, as they stand."""

import re
from pathlib import Path

import torch
import transformers  # noqa: F401

from tests import torchaudio_peer


def test_the_blocks_of_the_page_run_in_order(capsys):
    page = (Path(__file__).parents[2] / "docs" / "swapping.md").read_text(encoding="utf-8")
    names = {}
    torch.manual_seed(0)
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page, re.S)):
        exec(compile(block, f"docs/swapping.md, block {number}", "exec"), names)
    fine_tuned = names["pretrained"].mask_generator.mask_embedding
    assert fine_tuned.grad is not None and fine_tuned.grad.isfinite().all()
    assert "modules run on the fused operators" in capsys.readouterr().out
    assert not hasattr(torchaudio_peer.models.hubert_pretrain_base, "_accelerates")
