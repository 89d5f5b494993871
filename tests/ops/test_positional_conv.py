"""``positional_conv``: grouped convolution within packed sequences, GELU and residual, with PyTorch or as the formula says."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hubert_fast import backend, cpu
from hubert_fast.models.positional_embedding import ConvolutionalPositionalEmbedding
from hubert_fast.ops.positional_conv import positional_conv
from hubert_fast.torch_backend import positional_conv as convolution
from tests.ops.comparison import assert_as_precise, assert_twins, device_of, on_every_backend
from tests.ops.test_masked_attention import EMPTY

OPERATOR = "positional_conv"


def inputs(rows, groups=2, group_channels=4, taps=6, *, normalised=True, seed=0, dtype=torch.float64):
    """x, weight, bias and, where ``normalised``, gain."""
    generator = torch.Generator().manual_seed(seed)
    channels = groups * group_channels
    shapes = [(rows, channels), (channels, group_channels, taps), (channels,), (1, 1, taps)][: 4 if normalised else 3]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def embed(lengths, groups=2, *, spare_frames=0):
    """The operator as a function of its floating inputs."""
    offsets, longest = offsets_of(lengths), max(lengths, default=0) + spare_frames

    def function(x, weight, bias, gain=None):
        return positional_conv(x, weight, bias, offsets.to(x.device), groups=groups, max_frames=longest, gain=gain)

    return function


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any), empty=EMPTY, dead=st.integers(0, 5),
    groups=st.integers(1, 3), group_channels=st.integers(1, 5), taps=st.integers(1, 24), normalised=st.booleans(),
    spare_frames=st.integers(0, 60), seed=st.integers(0, 1000), many=st.sampled_from([0, 128]),
    windows=st.sampled_from([1, 40, 2048]), channels_last=st.booleans(),
)  # fmt: skip
def test_backends_agree_for_any_shape(
    lengths, empty, dead, groups, group_channels, taps, normalised, spare_frames, seed, many, windows, channels_last
):  # fmt: skip
    lengths = [*lengths, *empty * [0]]
    arguments = inputs(sum(lengths) + dead, groups, group_channels, taps, normalised=normalised, seed=seed)
    with pytest.MonkeyPatch.context() as patch:  # small inputs go the ways of large ones
        patch.setattr(convolution, "_MANY", many)
        patch.setattr(convolution, "_WINDOWS", windows)
        patch.setattr(convolution, "_MANY_ROWS", {torch.float64: 1})
        patch.setattr(cpu, "prefers_channels_last", lambda device: channels_last)
        assert_twins(OPERATOR, embed(lengths, groups, spare_frames=spare_frames), arguments)


def test_one_group_of_many_frames_has_the_gradients_of_the_formula():
    """Its filters' gradient comes as a view that lies otherwise, which weight norm must not read as it is."""
    assert_twins(OPERATOR, embed([150], 1), inputs(150, 1, 8, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_as_precise_as_pytorch(normalised, dtype, channels_last, monkeypatch):
    monkeypatch.setattr(convolution, "_MANY_ROWS", {each: 1 for each in (torch.float32, torch.bfloat16, torch.float16)})
    monkeypatch.setattr(cpu, "prefers_channels_last", lambda device: channels_last)
    lengths = [50, 31, 9]

    def draw(seed):
        return inputs(92, 2, 8, 16, normalised=normalised, seed=seed)

    assert_as_precise(OPERATOR, embed(lengths), draw, dtype, plain=_of_a_padded_batch(lengths))


def _of_a_padded_batch(lengths):
    """The operator with PyTorch's operations, all sequences in one convolution.

    oneDNN takes another kernel for a batch than for a sequence by itself, and on some processors that one alone adds in an
    order that errs 1.6 times as much, whoever calls it.
    """

    def function(x, weight, bias, gain=None):
        if gain is not None:
            weight = gain * weight / torch.linalg.vector_norm(weight, dim=(0, 1), keepdim=True)
        left, frames = weight.shape[2] // 2, max(lengths)
        sequences = x[: sum(lengths)].split(lengths)
        batch = torch.stack(
            [F.pad(each.T, (left, frames - len(each) + weight.shape[2] - 1 - left)) for each in sequences]
        )
        z = F.conv1d(batch, weight.to(x.dtype), bias.to(x.dtype), groups=2)
        outputs = [F.gelu(each[:, : len(frames_)].T) + frames_ for each, frames_ in zip(z, sequences)]
        return torch.cat([*outputs, torch.zeros_like(x[sum(lengths) :])])

    return function


@on_every_backend
def test_sequences_do_not_see_each_other_and_dead_rows_count_for_nothing(name):
    lengths = [9, 14]
    x, *parameters = (each.to(device_of(name)) for each in inputs(30, dtype=torch.float32))
    with backend.using(name, OPERATOR):
        leaf = x.clone().requires_grad_()
        out = embed(lengths)(leaf, *parameters)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        x[9:] = float("nan")
        again = embed(lengths)(x, *parameters)
    assert torch.equal(again[:9], out[:9])
    assert not again[23:].any() and not out[23:].any() and not grad[23:].any()


@on_every_backend
@pytest.mark.parametrize(("lengths", "rows"), [([0], 0), ([0, 0], 0), ([0], 5), ([], 3)])
def test_nothing_in_gives_zeros_out(name, lengths, rows):
    leaves = [each.to(device_of(name)).requires_grad_() for each in inputs(rows, dtype=torch.float32)]
    with backend.using(name, OPERATOR):
        out = embed(lengths)(*leaves)
        grads = torch.autograd.grad(out.sum(), leaves) if name != "reference" else []  # which has no graph of nothing
    assert out.shape == (rows, 8) and not out.any() and not any(each.any() for each in grads)


def test_autocast_decides_the_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert embed([12, 8])(*inputs(20, dtype=torch.float32)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"x must have shape \[rows, channels\]; got \(2, 10, 8\)", dict(x=torch.zeros(2, 10, 8))),
        (r"x must be floating point; got torch.int64", dict(x=torch.zeros(10, 8, dtype=torch.int64))),
        (r"groups must divide the 8 channels of x; got 3", dict(groups=3)),
        (r"groups must divide the 8 channels of x; got 0", dict(groups=0)),
        (r"weight must have shape \[8, 4, taps\].*; got \(8, 8, 6\)", dict(weight=torch.zeros(8, 8, 6))),
        (r"weight must have shape .*; got \(8, 4, 0\)", dict(weight=torch.zeros(8, 4, 0))),
        (r"bias must have shape \[8\]; got \(4,\)", dict(bias=torch.zeros(4))),
        (r"gain must have shape \[1, 1, 6\]; got \(6,\)", dict(gain=torch.zeros(6))),
        (r"gain must be on the device of x, cpu; got meta", dict(gain=torch.zeros(1, 1, 6, device="meta"))),
        (r"offsets must be int64 .*; got torch.int32", dict(offsets=offsets_of([10]).int())),
        (r"offsets must be int64 .*; got torch.int64 \(0,\)", dict(offsets=offsets_of([])[:0])),
        (r"max_frames must be at least 0; got -1", dict(max_frames=-1)),
    ],
)
def test_bad_arguments_are_named(message, change):
    arguments = dict(zip(("x", "weight", "bias"), inputs(10, normalised=False)))
    arguments |= {"offsets": offsets_of([10]), "groups": 2, "max_frames": 10, **change}
    with pytest.raises(ValueError, match=message):
        positional_conv(**arguments)


@pytest.mark.parametrize("amx", [None, True])
def test_the_module_by_itself_is_right_in_bfloat16_for_narrow_groups_too(monkeypatch, amx):
    """Hooks and replaced modules have it called, and oneDNN is wrong for such groups on some processors."""
    if amx:
        monkeypatch.setattr(cpu, "_HAS_AMX", amx)
    torch.manual_seed(0)
    module, x = ConvolutionalPositionalEmbedding(32, 8, 4), torch.randn(2, 49, 32)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.02 * expected.norm()
