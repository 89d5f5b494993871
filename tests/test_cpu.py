"""Products on a CPU: in float32 where 16 bits are slow, by oneDNN where that is faster, and as exact as PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hubert_fast import cpu, hubert_pretrain_base
from hubert_fast.models.plain import gelu_of_product
from hubert_fast.ops.linear import linear
from tests.ops.comparison import error

CPU, BFLOAT16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture(autouse=True, params=[False, True], ids=["mkl or onednn", "onednn"])
def whichever_wins(monkeypatch, request):
    """Small products are as large ones here, on a processor where oneDNN wins some of them or all."""
    monkeypatch.setattr(cpu, "_FEWEST_WEIGHTS", 1)
    monkeypatch.setattr(cpu, "_FEWEST_TO_LEARN", 1)
    monkeypatch.setattr(cpu, "_ONEDNN_WINS", request.param)
    monkeypatch.setattr(cpu, "_FULL_WIDTH", request.param)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # on one AVX2 leaves all to MKL


def test_onednn_takes_what_it_was_measured_to_win(monkeypatch, whichever_wins):
    everything = cpu._ONEDNN_WINS
    rows, wide, deep = torch.ones(500, 48), torch.ones(96, 48), torch.ones(32, 48)
    assert cpu.onednn_wins(rows, wide, learning=True) and cpu.onednn_wins(rows, deep, learning=False) is everything
    assert cpu.onednn_wins(rows[:100], deep, learning=False)
    assert cpu.onednn_wins(rows[:100], deep, learning=True) is everything
    assert cpu.onednn_wins(rows.repeat(2, 1), wide, learning=True) is everything
    assert not cpu.onednn_wins(rows.double(), wide.double(), learning=True)
    assert not cpu.onednn_wins(torch.ones(5, 0), torch.ones(4, 0), learning=False)
    assert not cpu.onednn_wins(rows.to("meta"), wide.to("meta"), learning=True)
    monkeypatch.setattr(cpu, "_FEWEST_TO_LEARN", wide.numel() + 1)
    assert cpu.onednn_wins(rows, wide, learning=False) and not cpu.onednn_wins(rows, wide, learning=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert cpu.onednn_wins(rows[:49], wide, learning=False) is everything
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu, "_FEWEST_WEIGHTS", wide.numel() + 1)
    assert not cpu.onednn_wins(rows, wide, learning=False)


def test_only_a_cpu_without_fast_products_widens_them(monkeypatch):
    monkeypatch.setattr(cpu, "_SLOW", {BFLOAT16})
    assert cpu.product_dtype(CPU, BFLOAT16) == torch.float32
    assert cpu.product_dtype(CPU, torch.float16) == torch.float16
    assert cpu.product_dtype(torch.device("cuda"), BFLOAT16) == BFLOAT16
    monkeypatch.setattr(cpu, "_SLOW", set())
    assert cpu.product_dtype(CPU, BFLOAT16) == BFLOAT16


def test_narrow_groups_are_convolved_in_float32_where_onednn_gets_them_wrong(monkeypatch):
    monkeypatch.setattr(cpu, "_SLOW", set())
    for amx, depth, expected in ((True, 12, torch.float32), (True, 16, BFLOAT16), (False, 12, BFLOAT16)):
        monkeypatch.setattr(cpu, "_HAS_AMX", amx)
        assert cpu.convolution_dtype(CPU, BFLOAT16, depth) == expected
    assert cpu.convolution_dtype(torch.device("cuda"), BFLOAT16, 12) == BFLOAT16


@pytest.mark.parametrize("slow", [set(), {BFLOAT16}], ids=["fast", "slow"])
def test_a_model_gives_one_result_in_16_bits_whichever_way_it_multiplies(monkeypatch, slow):
    """Dtypes are autocast's own, and values are as exact as where the CPU multiplies in 16 bits."""
    torch.manual_seed(0)
    model = hubert_pretrain_base(num_classes=7).eval()
    layers = model.wav2vec2.encoder.transformer
    layers.layers = layers.layers[:1]
    waveforms, labels = torch.randn(2, 4000), torch.zeros(2, 12, dtype=torch.int64)
    truth = model.wav2vec2.extract_features(waveforms)[0][-1]
    monkeypatch.setattr(cpu, "_SLOW", slow)
    with torch.autocast("cpu", BFLOAT16):
        with torch.no_grad():
            found = model.wav2vec2.extract_features(waveforms)[0][-1]
        masked, _, _ = model(waveforms, labels)
    assert found.dtype == masked.dtype == BFLOAT16
    assert error(found.float(), truth) < 0.02
    masked[:, 0].float().sum().backward()
    assert all(each.grad.dtype == torch.float32 for each in model.parameters() if each.grad is not None)


@pytest.mark.parametrize("sizes", [(5, 16, 48), (5, 48, 16)], ids=["wide", "deep"])
@pytest.mark.parametrize("gradient", [False, True])
def test_products_are_as_exact_as_pytorchs(sizes, gradient):
    rows, depth, out = sizes
    torch.manual_seed(0)
    module, x = nn.Linear(depth, out), torch.randn(rows, depth, requires_grad=gradient)
    parameters = (module.weight, module.bias) if gradient else (module.weight.detach(), module.bias.detach())
    exact = F.linear(x.double(), *(each.double() for each in parameters))
    with torch.set_grad_enabled(gradient):
        found, activated = linear(x, *([each] for each in parameters)), gelu_of_product(module, x)
    for ours, theirs, truth in (
        (found, F.linear(x, *parameters), exact),
        (activated, F.gelu(F.linear(x, *parameters)), F.gelu(exact)),
    ):
        assert error(ours, truth) <= 1.5 * error(theirs, truth) + 1e-7
    if gradient:
        mine, other = (
            torch.autograd.grad(form.square().sum(), [x, *parameters]) for form in (found, F.linear(x, *parameters))
        )
        for ours, theirs in zip(mine, other):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 7, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BFLOAT16], ids=str)
def test_products_over_rows_are_as_exact_as_pytorchs(monkeypatch, rows, dtype):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    generator = torch.Generator().manual_seed(rows)
    y, x = (torch.randn(rows, 2 * width, generator=generator).to(dtype)[:, ::2] for width in (24, 40))
    exact = y.double().T @ x.double()
    for left, right in ((y, x), (y.contiguous(), x.contiguous()), (y.T.contiguous().T, x)):
        out = torch.full((24, 40), float("nan"), dtype=dtype)
        for found in (cpu.product_over_rows(left, right), cpu.product_over_rows(left, right, out)):
            assert found.shape == (24, 40) and found.is_contiguous() and found.dtype == dtype
            assert error(found, exact) <= 1.5 * error(y.T @ x, exact) + 1e-7
        assert found is out
    assert torch.equal(cpu.product_over_rows(y[:0], x[:0]), torch.zeros(24, 40, dtype=dtype))
    overlapping = torch.randn(7 * rows + 40, generator=generator).to(dtype).unfold(0, 40, 7)[:rows]
    exact = y.double().T @ overlapping.double()
    assert error(cpu.product_over_rows(y, overlapping), exact) <= 1.5 * error(y.T @ overlapping, exact) + 1e-7


@torch.no_grad()
def test_products_over_rows_are_onednns_on_processors_where_it_wins(monkeypatch, whichever_wins):
    called = []
    monkeypatch.setattr(cpu, "_onednn", lambda x, weight, *_: called.append("linear") or x @ weight.T)
    monkeypatch.setattr(cpu, "_filters_gradient", lambda y, x: called.append("convolution") or y.T @ x)
    for rows, threads in ((10, 2), (1500, 2), (1500, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(
            cpu.product_over_rows(torch.ones(rows, 4), torch.ones(rows, 5)), torch.full((4, 5), float(rows))
        )
    assert called == (["linear", "convolution", "linear"] if cpu._FULL_WIDTH else [])


@pytest.mark.parametrize("rows", [0, 1, 256, 700])
@pytest.mark.parametrize("into", [False, True])
def test_sums_over_rows_are_those_of_the_wider_dtype(rows, into):
    x = torch.randn(rows, 3, 8, generator=torch.Generator().manual_seed(0)).to(BFLOAT16)
    out = torch.full((3, 8), float("nan")) if into else None
    found = cpu.sum_over_rows(x, torch.float32, out)
    assert found.dtype == torch.float32 and (out is None or found is out)
    torch.testing.assert_close(found.double(), x.double().sum(0), rtol=1e-6, atol=1e-5)
    assert torch.equal(cpu.sum_over_rows(x, BFLOAT16), x.sum(0))
    assert torch.equal(cpu.sum_over_rows(x, torch.float16), x.sum(0, dtype=torch.float16))


def test_a_batch_without_a_row_to_predict_has_gradients():
    for rows, width in ((0, 16), (0, 300)):
        x, weight = torch.randn(rows, width, requires_grad=True), torch.randn(1024, width, requires_grad=True)
        linear(x, [weight]).sum().backward()
        assert torch.equal(weight.grad, torch.zeros_like(weight)) and x.grad.shape == x.shape


@pytest.mark.parametrize(
    "bias", [torch.arange(96.0)[::2], torch.arange(144.0).view(48, 3)[:, 1], torch.ones(1).expand(48)]
)
def test_a_bias_may_lie_apart(bias):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 16), torch.randn(48, 16)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, [weight], [bias]), F.linear(x, weight, bias))


def test_a_weight_that_lies_apart_stays_pytorchs(monkeypatch):
    """oneDNN multiplies such a weight by its reference loops, a thousand times slower."""
    onednn, seen = cpu._onednn, []
    monkeypatch.setattr(
        cpu, "_onednn", lambda x, weight, *rest: (seen.append(weight.stride()), onednn(x, weight, *rest))[1]
    )
    x, y, wide = torch.randn(9, 16), torch.randn(9, 24), torch.randn(24, 48)
    for weight in (wide[:, 16:32], wide[:, :32:2]):
        assert error(cpu.product(x, weight, None), x.double() @ weight.T.double()) < 1e-6
        assert error(cpu.product(x, weight, None, gelu=True), F.gelu(x.double() @ weight.T.double())) < 1e-6
        with torch.no_grad():
            assert error(cpu.product_with(y, weight), y.double() @ weight.double()) < 1e-6
    assert not seen
    monkeypatch.setattr(cpu, "_NARROW_GELU", {BFLOAT16})
    cpu.product(x.bfloat16(), wide.bfloat16()[:, 16:32], None, gelu=True)
    cpu.product(x, wide[:, :16].contiguous(), None)
    assert seen == [(16, 1)]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_what_pytorch_broadcasts_or_refuses_stays_its_own():
    x, weight = torch.randn(5, 16), torch.randn(48, 16)
    with torch.no_grad():
        for bias in (torch.tensor(1.0), torch.ones(1), torch.ones(5, 48)):
            torch.testing.assert_close(linear(x, [weight], [bias]), F.linear(x, weight, bias))
        torch.testing.assert_close(linear(x, [weight.to_sparse_csr()]), F.linear(x, weight))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(x, [torch.randn(48, 15)])


def test_a_product_that_casts_nothing_has_every_derivative():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 16, requires_grad=True), torch.randn(48, 16, requires_grad=True)

    def second(form):
        (first,) = torch.autograd.grad(form(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), [x, weight])

    for mine, theirs in zip(second(lambda x: linear(x, [weight])), second(lambda x: F.linear(x, weight))):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-2)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(linear(dual, [weight])).tangent
    torch.testing.assert_close(tangent, torch.ones(5, 16) @ weight.detach().t())


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_gelu_of_a_product_in_autocasts_dtype(dtype):
    torch.manual_seed(0)
    module, x = nn.Linear(48, 64), torch.randn(9, 48).to(dtype)
    exact = F.gelu(module.double()(x.double())).detach()
    module.float()
    with torch.no_grad(), torch.autocast("cpu", BFLOAT16):
        found, theirs = gelu_of_product(module, x), F.gelu(module(x))
    assert found.dtype == BFLOAT16 and error(found, exact) <= 1.5 * error(theirs, exact)


def test_gelu_of_a_product_casts_nothing_that_pytorch_would_not():
    module = nn.Linear(48, 64)
    with torch.no_grad():
        module.bias = nn.Parameter(torch.zeros(64, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="dtype"):
            gelu_of_product(module, torch.randn(9, 48))
        with pytest.raises(RuntimeError, match="dtype"):
            gelu_of_product(module.bfloat16(), torch.randn(9, 48))
        x = torch.randn(9, 48, dtype=torch.float64)
        with torch.autocast("cpu", BFLOAT16):
            assert gelu_of_product(module.double(), x).dtype == torch.float64


@pytest.mark.parametrize("weights", [1, 2])
def test_a_backward_inside_autocast_keeps_float32(weights):
    torch.manual_seed(0)
    x, parts = torch.randn(5, 16, requires_grad=True), [torch.randn(24, 16, requires_grad=True) for _ in range(weights)]
    out = linear(x, parts)
    with torch.autocast("cpu", BFLOAT16):
        found = torch.autograd.grad(out, [x, *parts], torch.ones_like(out))
    expected = torch.autograd.grad(F.linear(x, torch.cat(parts)), [x, *parts], torch.ones_like(out))
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs)
