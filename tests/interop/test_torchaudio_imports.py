"""What torchaudio imports from transformers and fairseq loads into our encoder, and our factory serves its importers."""

import contextlib
import importlib
import types
from unittest import mock

import pytest
import torch
from torch import nn

from hubert_fast import models
from tests import torchaudio_peer  # noqa: F401  (before transformers, which imports torchaudio)

transformers = pytest.importorskip("transformers")
huggingface = importlib.import_module("torchaudio.models.wav2vec2.utils.import_huggingface")
fairseq = importlib.import_module("torchaudio.models.wav2vec2.utils.import_fairseq")

SAMPLES, LENGTHS = 3000, torch.tensor([3000, 2200])
STYLES = {
    "base": dict(feat_extract_norm="group", conv_bias=False, do_stable_layer_norm=False),
    "large": dict(feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True),
}


def _randomized(model):
    """With weights that no two modules share, in eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _huggingface_model(kind, style):
    config = getattr(transformers, f"{'Hubert' if kind.startswith('Hubert') else 'Wav2Vec2'}Config")(
        conv_dim=(16, 16, 16), conv_kernel=(10, 3, 3), conv_stride=(5, 2, 2), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=48, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        vocab_size=11, **STYLES[style],
    )  # fmt: skip
    return _randomized(getattr(transformers, kind)(config))


class Wav2Vec2ForCTC(types.SimpleNamespace):
    """What torchaudio's importer asks of transformers' class of this name."""


@contextlib.contextmanager
def _building_ours(importer):
    """torchaudio's importer with our factory in the place of its own."""
    with mock.patch.object(importer, "wav2vec2_model", models.wav2vec2_model):
        yield


def _assert_loads_and_computes_the_same(imported, arguments):
    """torchaudio's ``imported`` model and ours of the same ``arguments``, of which the weights come from there."""
    aux_num_out = None if imported.aux is None else imported.aux.out_features
    ours = models.wav2vec2_model(**arguments, aux_num_out=aux_num_out).eval()
    ours.load_state_dict(imported.state_dict(), strict=True)
    imported.load_state_dict(ours.state_dict(), strict=True)
    _assert_same_output(ours, imported)
    return ours


def _assert_same_output(ours, theirs):
    theirs.eval()
    ours.eval()
    waveforms = torch.randn(2, SAMPLES, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, frames = theirs(waveforms, LENGTHS)
        given, our_frames = ours(waveforms, LENGTHS)
        assert torch.equal(our_frames, frames)
        for row, valid in enumerate(frames.tolist()):
            torch.testing.assert_close(given[row, :valid], expected[row, :valid], rtol=1e-4, atol=2e-5)
        for each, wanted in zip(
            ours.extract_features(waveforms)[0], theirs.extract_features(waveforms)[0], strict=True
        ):
            torch.testing.assert_close(each, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ["HubertModel", "HubertForCTC", "Wav2Vec2Model", "Wav2Vec2ForCTC"])
def test_an_imported_transformers_model_loads_strictly_and_computes_the_same(kind, style):
    original = _huggingface_model(kind, style)
    # torchaudio imports the head of Wav2Vec2ForCTC alone, which it knows by the name of the class.
    given = original
    if kind == "HubertForCTC":
        given = Wav2Vec2ForCTC(config=original.config, wav2vec2=original.hubert, lm_head=original.lm_head)
    imported = huggingface.import_huggingface_model(given)
    assert (imported.aux is None) == (kind in ("HubertModel", "Wav2Vec2Model"))
    ours = _assert_loads_and_computes_the_same(imported, huggingface._get_config(original.config))
    with _building_ours(huggingface):
        built = huggingface.import_huggingface_model(given)
    assert type(built) is models.Wav2Vec2Model
    for name, each in built.state_dict().items():
        assert torch.equal(each, ours.state_dict()[name])
    waveforms = torch.randn(2, SAMPLES)
    with torch.no_grad():
        result = original(waveforms)
        expected = result.last_hidden_state if imported.aux is None else result.logits
        torch.testing.assert_close(ours(waveforms)[0], expected, rtol=1e-4, atol=2e-5)


class _Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.num_heads, self.dropout_module = 2, nn.Dropout(0.1)
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))


class _Layer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.self_attn, self.self_attn_layer_norm = _Attention(dim), nn.LayerNorm(dim)
        self.fc1, self.fc2, self.final_layer_norm = nn.Linear(dim, 48), nn.Linear(48, dim), nn.LayerNorm(dim)
        self.dropout2, self.dropout3 = nn.Dropout(0.0), nn.Dropout(0.1)


class _Fairseq(nn.Module):
    """Modules and names of fairseq's HubertModel and Wav2Vec2Model, as far as torchaudio's importer looks at them."""

    def __init__(self, style, dim=32):
        super().__init__()
        large, convolutions = style == "large", []
        for i, (taps, stride) in enumerate([(10, 5), (3, 2), (3, 2)]):
            conv = nn.Conv1d(16 if i else 1, 16, taps, stride, bias=large)
            if large:
                norm = nn.Sequential(nn.Identity(), nn.LayerNorm(16), nn.Identity())
            else:
                norm = nn.Identity() if i else nn.GroupNorm(16, 16)
            convolutions.append(nn.Sequential(conv, nn.Dropout(0.0), norm, nn.GELU()))
        self.feature_extractor, self.encoder = nn.Module(), nn.Module()
        self.feature_extractor.conv_layers = nn.ModuleList(convolutions)
        self.layer_norm, self.post_extract_proj, self.dropout_input = (
            nn.LayerNorm(16),
            nn.Linear(16, dim),
            nn.Dropout(0.1),
        )
        positional = nn.utils.weight_norm(nn.Conv1d(dim, dim, 8, padding=4, groups=2), name="weight", dim=2)
        self.encoder.pos_conv = nn.Sequential(positional, nn.Identity(), nn.GELU())
        self.encoder.layers, self.encoder.layer_norm = nn.ModuleList(_Layer(dim) for _ in range(2)), nn.LayerNorm(dim)
        self.encoder.layer_norm_first, self.encoder.layerdrop = large, 0.05
        self.mask_emb, self.final_proj = nn.Parameter(torch.rand(dim)), nn.Linear(dim, 8)


class _FineTuned(nn.Module):
    """fairseq's HubertEncoder and Wav2VecEncoder."""

    def __init__(self, style):
        super().__init__()
        self.w2v_model, self.proj = _Fairseq(style), nn.Linear(32, 11)


KINDS = {"HubertModel": _Fairseq, "Wav2Vec2Model": _Fairseq, "HubertEncoder": _FineTuned, "Wav2VecEncoder": _FineTuned}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")  # fairseq uses it
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_fairseq_model_loads_strictly_and_computes_the_same(kind, style):
    original = _randomized(type(kind, (KINDS[kind],), {})(style))
    imported = fairseq.import_fairseq_model(original)
    arguments = fairseq._parse_config(getattr(original, "w2v_model", original))
    ours = _assert_loads_and_computes_the_same(imported, arguments)
    with _building_ours(fairseq):
        built = fairseq.import_fairseq_model(original)
    assert type(built) is models.Wav2Vec2Model
    for name, each in built.state_dict().items():
        assert torch.equal(each, ours.state_dict()[name]), name
    gain = original.state_dict()[f"{'w2v_model.' * ('Encoder' in kind)}encoder.pos_conv.0.weight_g"]
    assert torch.equal(built.encoder.transformer.pos_conv_embed.conv.parametrizations.weight.original0, gain)
