"""FLOPs as PyTorch's counter sees them: those of torchaudio's model."""

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hubert_fast
from benchmarks.architecture import ARCHITECTURES
from hubert_fast import backend
from hubert_fast.ops.masked_attention import Arguments, _flops, masked_attention
from tests import torchaudio_peer


def _count(package, trains):
    # PyTorch's formula for the weight gradient of a grouped convolution does not divide by the groups.
    architecture = ARCHITECTURES["tiny"].changed(groups=1 if trains else ARCHITECTURES["tiny"].groups)
    model = package.hubert_pretrain_model(**architecture.factory_arguments(num_classes=2)).wav2vec2.eval()
    # It has no formula for PyTorch's flash attention on a CPU either; SDPBackend.MATH is made of products, which it counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trains):
        features, _ = model(torch.randn(1, 64_000))
        if trains:
            features.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trains", [False, True])
def test_a_model_counts_as_torchaudios(trains):
    assert _count(hubert_fast, trains) == pytest.approx(_count(torchaudio_peer.models, trains), rel=0.01)


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_attention_counts_within_sequences_only(name):
    qkv = torch.randn(30, 3, 2, 8)
    with (
        backend.using(name, "masked_attention"),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        masked_attention(qkv, torch.tensor([0, 10, 30]), max_frames=20)
    assert counter.get_total_flops() == 2 * 2 * 16 * (10**2 + 20**2)


def test_attention_counts_no_queries_but_those_asked_for():
    given = torch.randn(30, 3, 2, 8), torch.tensor([0, 10, 30]), None, 20, 0.0, None, None, None, torch.arange(9)
    arguments = Arguments(*given, torch.tensor([0, 2, 7]))
    assert _flops(arguments, False) == 2 * 2 * 16 * (2 * 10 + 5 * 20)
    elsewhere = arguments._replace(query_offsets=torch.empty(3, dtype=torch.int64, device="meta"))
    assert _flops(elsewhere, True) == 5 * 2 * 16 * 9 * 20  # as if every sequence were the longest


def test_asking_where_the_counter_is_does_not_keep_formulas_from_it():
    script = (
        "import importlib.util, hubert_fast, torch\n"
        "importlib.util.find_spec('torch.utils.flop_counter')\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.hubert_fast.conv_frontend in flop_registry\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
