"""The formula against PyTorch's own count of what torchaudio's model and a plain head do."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.architecture import ARCHITECTURES, Architecture
from benchmarks.flops import ATTENTION, FRONT_END, LOSS, POSITIONAL, inference_flops, step_flops, step_flops_by_stage
from tests.torchaudio_peer import models

TINY = ARCHITECTURES["tiny"]


def counted(architecture: Architecture, utterances: int, samples: int, *, backward: bool) -> float:
    """What PyTorch counts of torchaudio's encoder, without dropout so that attention is products it can see."""
    torch.manual_seed(0)
    model = models.hubert_pretrain_model(**architecture.without_dropout().factory_arguments(10)).wav2vec2
    waveforms = torch.randn(utterances, samples)
    # Flash attention computes scores again in its backward, which the formula leaves out.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        out, _ = model(waveforms)
        if backward:
            out.sum().backward()
    return float(counter.get_total_flops())


def extra_positional_frame(architecture: Architecture, utterances: int) -> float:
    """An even kernel makes one frame more than is used; PyTorch counts it, the formula does not."""
    return 2.0 * utterances * architecture.dim * (architecture.dim // architecture.groups) * architecture.taps


@pytest.mark.parametrize("name, utterances, samples", [("tiny", 2, 32_000), ("tiny", 1, 4_321), ("base", 1, 16_000)])
def test_the_forward_pass_is_what_pytorch_counts(name, utterances, samples):
    architecture = ARCHITECTURES[name]
    expected = counted(architecture, utterances, samples, backward=False)
    expected -= extra_positional_frame(architecture, utterances)
    assert inference_flops(architecture, [samples] * utterances) == expected


@pytest.mark.parametrize("name, utterances, samples", [("tiny", 2, 32_000), ("base", 1, 8_000)])
def test_forward_and_backward_are_what_pytorch_counts(name, utterances, samples):
    architecture = ARCHITECTURES[name]
    extra = extra_positional_frame(architecture, utterances)
    positional = step_flops_by_stage(architecture, [samples] * utterances, 10)[POSITIONAL] / 3 + extra
    # It forgets to divide the filters' gradient of a grouped convolution by the groups.
    expected = counted(architecture, utterances, samples, backward=True) - 3 * extra
    expected -= (architecture.groups - 1) * positional
    assert step_flops(architecture, [samples] * utterances, 10, masked_frames=0) == expected


def test_the_head_is_what_pytorch_counts_of_plain_products():
    masked, classes = 37, 20
    hidden = torch.randn(masked, TINY.dim, requires_grad=True)
    projection = torch.randn(TINY.final_dim, TINY.dim, requires_grad=True)
    embeddings = torch.randn(classes, TINY.final_dim, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        F.linear(F.linear(hidden, projection), embeddings).sum().backward()
    assert step_flops_by_stage(TINY, [16_000], classes, masked)[LOSS] == counter.get_total_flops()


def test_padding_is_not_counted_and_attention_stays_within_an_utterance():
    short, long = ([samples] for samples in (16_000, 48_000))
    together = step_flops_by_stage(TINY, short + long, 10, 20)
    apart = [step_flops_by_stage(TINY, each, 10, 10) for each in (short, long)]
    assert together == {stage: sum(each[stage] for each in apart) for stage in together}
    doubled = step_flops_by_stage(TINY, [48_000 * 2], 10, 10)
    assert doubled[POSITIONAL] == pytest.approx(2 * apart[1][POSITIONAL], rel=0.02)
    assert doubled[ATTENTION] > 2.05 * apart[1][ATTENTION]


def test_audio_shorter_than_a_frame_has_no_frames_and_only_first_convolutions():
    flops = step_flops_by_stage(TINY, [100], 10)
    assert flops.pop(FRONT_END) > 0 and not any(flops.values())


def test_all_frames_are_masked_unless_said_otherwise():
    assert step_flops(TINY, [16_000], 10) == step_flops(TINY, [16_000], 10, TINY.frames_of(16_000))
