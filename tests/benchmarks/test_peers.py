"""A peer is timed only if it does the same work: every adapter here does, and whatever does other work is rejected."""

import functools
from dataclasses import replace

import pytest
import torch

import hubert_fast
from benchmarks.architecture import ARCHITECTURES
from benchmarks.batches import make
from benchmarks.peers import PEERS
from benchmarks.peers.agreement import DifferentWork, check
from benchmarks.peers.ours import HubertFast, build_model
from benchmarks.peers.ours_graph import GraphModel, HubertFastGraph
from benchmarks.peers.peer import Setting
from hubert_fast import tf32
from tests.models.graph_stand_in import replace_capture

CPU = torch.device("cpu")
TINY = ARCHITECTURES["tiny"]
FLOAT32 = Setting(TINY, 30, CPU, torch.float32)
FLOAT32_ON_CUDA = replace(FLOAT32, device=torch.device("cuda"))
BFLOAT16 = Setting(TINY, 30, CPU, torch.bfloat16)
PRE_NORM = TINY.changed(norm="layer_norm", pre_norm=True, feature_grad_mult=None)

EAGER = [peer for peer in PEERS.values() if not peer.compiled]


def _available(peer, setting):
    reason = peer.why_not(setting)
    if reason is not None:
        pytest.skip(reason)
    return peer


@pytest.mark.parametrize("architecture", [TINY, PRE_NORM], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("peer", EAGER, ids=lambda peer: peer.name)
def test_every_peer_agrees_with_the_reference(peer, architecture):
    setting = replace(BFLOAT16, architecture=architecture)
    found = check(_available(peer, setting), setting)
    assert set(found) == {"loss", "gradient", "features", "loss in bfloat16", "gradient in bfloat16"}
    assert found["loss"] < 1e-5 and found["gradient"] < 2e-5 and found["features"] < 1e-4


@pytest.mark.parametrize("name", ["torchaudio compiled", "minimal-hubert"])
def test_a_compiled_peer_agrees_with_the_reference(name, monkeypatch):
    """Traced, and run without generated code, which would take minutes to make."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    peer = PEERS[name]
    architecture = TINY if name.startswith("torchaudio") else ARCHITECTURES["base"]
    setting = replace(FLOAT32, architecture=architecture)
    assert set(check(_available(peer, setting), setting)) == {"loss", "gradient", "features"}


class Wrong(HubertFast):
    """hubert_fast with one method of its model replaced by ``change(model, method)``."""

    name = "wrong"

    def __init__(self, method, change):
        self._method, self._change = method, change

    def build(self, setting, weights):
        model = super().build(setting, weights)
        setattr(model, self._method, functools.partial(self._change, model, getattr(model, self._method)))
        return model


def _scaled(*, value=1.0, gradient=1.0):
    """The loss times ``value``, and its gradient times ``gradient``."""

    def change(model, loss, batch):
        exact = loss(batch)
        return gradient * exact + (value - gradient) * exact.detach()

    return change


def _unaware_of_padding(model, method, batch):
    return method(replace(batch, lengths=None))


def _with_other_labels(model, loss, batch):
    return loss(replace(batch, labels=batch.labels.roll(1, 1)))


def _without_backward_of_the_penalty(model, loss, batch):
    result = model.module(batch.waveforms, batch.labels, batch.lengths)
    penalty = 10 * result.feature_penalty * result.masked_count
    return result.loss - penalty + penalty.detach()


def _with_frozen_classes(model, loss, batch):
    model.module.model.logit_generator.label_embeddings.requires_grad_(False)
    return loss(batch)


def _of_the_first_layer(model, features, batch):
    return model.module.model.wav2vec2.extract_features(batch.waveforms, batch.lengths)[0][0]


def _one_frame_short(model, features, batch):
    return features(batch)[:, :-1]


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("loss", _scaled(value=1.01), r"loss differs by 1\.00% in float32, and 0\.01% is allowed"),
        ("loss", _unaware_of_padding, "loss differs by"),
        ("loss", _with_other_labels, "loss differs by"),
        ("loss", _scaled(value=torch.nan), "loss differs by nan%"),
        ("loss", _scaled(gradient=0.5), r"gradient differs by \d+\.\d\d% in float32, and 0\.10% is allowed"),
        ("loss", _scaled(gradient=-1.0), "gradient differs by"),
        ("loss", _without_backward_of_the_penalty, "gradient differs by"),
        ("loss", _with_frozen_classes, r"no gradient reaches model\.logit_generator\.label_embeddings$"),
        ("features", _of_the_first_layer, "features differs by"),
        ("features", _unaware_of_padding, "features differs by"),
        ("features", _one_frame_short, "features differs by inf%"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_peer_that_does_other_work_is_rejected(method, change, message):
    with pytest.raises(DifferentWork, match="wrong does other work than the reference: " + message):
        check(Wrong(method, change), FLOAT32)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (_scaled(value=1.03), r"loss differs by [23]\.\d\d% in bfloat16, and 2\.00% is allowed"),
        (_scaled(gradient=0.1), r"gradient differs by \d+\.\d\d% in bfloat16"),
    ],
    ids=["loss", "gradient"],
)
def test_a_peer_that_is_wrong_under_autocast_alone_is_rejected(wrong, message):
    def change(model, loss, batch):
        return wrong(model, loss, batch) if torch.is_autocast_enabled("cpu") else loss(batch)

    assert check(Wrong("loss", change), FLOAT32)["loss"] < 1e-5
    with pytest.raises(DifferentWork, match=message):
        check(Wrong("loss", change), BFLOAT16)


def test_a_peer_without_float32_is_compared_in_its_own_dtype():
    class SixteenBits(HubertFast):
        def why_not(self, setting):
            return "float32" if setting.dtype == torch.float32 else None

        def build(self, setting, weights):
            assert setting.dtype == torch.bfloat16
            return super().build(setting, weights)

    found = check(SixteenBits(), BFLOAT16)
    assert set(found) == {"loss", "gradient", "features"} and 1e-5 < found["features"] < 5e-2


def test_a_check_leaves_random_numbers_backends_and_tf32_as_they_were():
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    before = tf32.in_products(), tf32.in_convolutions(), hubert_fast.backend.report()
    with pytest.raises(DifferentWork):
        check(Wrong("loss", _scaled(value=1.01)), FLOAT32)
    assert (tf32.in_products(), tf32.in_convolutions(), hubert_fast.backend.report()) == before
    assert torch.equal(torch.rand(3), wanted)


class _OnCpu(HubertFastGraph):
    """The graph peer on a stand-in for CUDA graphs."""

    def why_not(self, setting):
        return None

    def build(self, setting, weights):
        return _CpuGraphModel(build_model(setting, weights))


class _CpuGraphModel(GraphModel):
    def _step(self, batch, dtype):
        step = super()._step(batch, dtype)
        if step._capture is None:
            self.capture = replace_capture(step)
        return step


def test_the_graph_peer_gives_each_batch_its_own_gradients():
    setting = replace(FLOAT32, architecture=TINY.without_dropout())
    weights = hubert_fast.hubert_pretrain_model(**TINY.factory_arguments(30)).state_dict()
    graph, plain = (peer.build(setting, weights) for peer in (_OnCpu(), HubertFast()))
    batches = [make([16000, length], TINY, 30, seed=seed) for seed, length in enumerate(range(11900, 12500, 100))]
    for batch in batches:
        for model in (graph, plain):
            torch.manual_seed(batch.seed)
            model.module.zero_grad()
            model.forward_backward(batch, torch.float32)
        for mine, expected in zip(graph.module.parameters(), plain.module.parameters()):
            assert torch.allclose(mine.grad, expected.grad, rtol=1e-3, atol=1e-3 * float(expected.grad.abs().max()))
    assert 1 <= graph.capture.graphs < graph.capture.replays


def test_a_graph_that_remembers_its_first_batch_is_rejected(monkeypatch):
    assert check(_OnCpu(), FLOAT32)["gradient"] < 2e-5
    monkeypatch.setattr(_CpuGraphModel, "forward_backward", _of_the_first_batch)
    with pytest.raises(DifferentWork, match="gradient differs by"):
        check(_OnCpu(), FLOAT32)


def _of_the_first_batch(self, batch, dtype):
    self.first = getattr(self, "first", batch)
    GraphModel.forward_backward(self, self.first, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize(
    "name", ["hubert_fast", "hubert_fast graph", "torchaudio", "transformers sdpa", "transformers flash"]
)
def test_peers_agree_with_the_reference_on_a_gpu(name):
    setting = replace(BFLOAT16, device=torch.device("cuda"))
    assert check(_available(PEERS[name], setting), setting)["loss"] < 2e-2


@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_peers_have_versions(peer):
    assert _available(peer, FLOAT32).version()[0].isdigit()


@pytest.mark.parametrize(
    ("name", "setting", "reason"),
    [
        ("hubert_fast graph", FLOAT32, "CUDA graphs need a GPU"),
        ("transformers flash", FLOAT32, "flash attention needs a GPU"),
        ("transformers flash", FLOAT32_ON_CUDA, "flash attention does not compute in float32"),
    ],
)
def test_what_cannot_run_says_why(name, setting, reason):
    pytest.importorskip("transformers")
    assert PEERS[name].why_not(setting) == reason


def test_what_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert PEERS["torchaudio"].why_not(FLOAT32) == "torchaudio is not installed"
    assert PEERS["transformers sdpa"].why_not(FLOAT32) == "transformers is not installed"


def test_compiling_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert PEERS["torchaudio compiled"].why_not(FLOAT32).startswith("torch.compile needs a C++ compiler")
