"""``torch.compile(fullgraph=True)`` of the objective and of the model gives the numbers of eager mode."""

import shutil

import pytest
import torch

import hubert_fast
from tests.models import configurations
from tests.models.twins import LENGTHS, assert_gradients_match, batch, gradients, relative_error, twins


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compare(objective, compiled, data, *, mask=None, tolerance=1e-10):
    results = []
    for function in (objective, compiled):
        objective.zero_grad()
        torch.manual_seed(0)
        result = function(*data, mask=mask)
        result.loss.backward()
        results.append((result, {name: grad.clone() for name, grad in gradients(objective).items()}))
    (expected, expected_grads), (given, grads) = results
    for value, wanted in zip(given, expected, strict=True):
        assert value is wanted is None or relative_error(value, wanted) <= tolerance
    assert_gradients_match(grads, expected_grads, tolerance)


def _mask(data):
    return torch.rand(data.labels.shape, generator=torch.Generator().manual_seed(0)) < 0.5


@pytest.mark.parametrize("unmasked_weight", [0.0, 0.5])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all-valid", "lengths"])
@pytest.mark.parametrize("name", ["base", "xlarge-bias"])
def test_the_objective_in_one_graph(name, lengths, unmasked_weight):
    _, model = twins(configurations.ALL[name], torch.float64)
    objective = hubert_fast.PretrainingObjective(model, unmasked_weight=unmasked_weight)
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    data = batch(torch.float64, lengths)
    mask = _mask(data)
    if lengths is not None:
        valid = torch.arange(mask.shape[1]) < model.wav2vec2.feature_extractor.output_lengths(lengths)[:, None]
        mask &= valid
        data = data._replace(labels=data.labels.where(valid, -100))  # labels in the padding are not read
    _compare(objective, compiled, data, mask=mask)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all-valid", "lengths"])
def test_masks_drawn_inside_the_graph_are_those_of_eager_mode(lengths):
    _, model = twins(configurations.base(), torch.float64)
    objective = hubert_fast.PretrainingObjective(model.eval())
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    _compare(objective, compiled, batch(torch.float64, lengths))
    torch.manual_seed(1)
    first, second = (compiled(*batch(torch.float64, lengths)).loss for _ in range(2))
    assert not torch.equal(first, second), "the second call got the first one's mask"


def test_lengths_and_batch_sizes_may_change_without_a_new_graph_failing():
    _, model = twins(configurations.base(), torch.float64)
    objective = hubert_fast.PretrainingObjective(model)
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, samples in ((3, 12400), (2, 9100)):
        waveforms, labels, _ = batch(torch.float64)
        frames = (samples - 400) // 320 + 1
        lengths = torch.tensor([samples, 5000, 7000])[:rows]
        mask = torch.zeros(rows, frames, dtype=torch.bool)
        mask[:, 1:9] = True
        _compare(
            objective, compiled, type(batch())(waveforms[:rows, :samples], labels[:rows, :frames], lengths), mask=mask
        )


def test_dropout_and_layer_drop_compile():
    settings = dict(encoder_dropout=0.1, encoder_attention_dropout=0.1, encoder_layer_drop=0.5)
    _, model = twins(configurations.base(**settings), torch.float64)
    objective = hubert_fast.PretrainingObjective(model)
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    data = batch(torch.float64, LENGTHS)
    losses = {float(compiled(*data, mask=_mask(data)).loss.detach()) for _ in range(6)}
    assert len(losses) == 6
    compiled(*data, mask=_mask(data)).loss.backward()
    assert all(grad is None or grad.isfinite().all() for grad in gradients(objective).values())


def test_the_encoder_compiles():
    _, model = twins(configurations.large(), torch.float64)
    encoder = model.wav2vec2
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    waveforms = batch(torch.float64).waveforms
    for lengths in (None, LENGTHS):
        assert relative_error(compiled(waveforms, lengths)[0], encoder(waveforms, lengths)[0]) <= 1e-10


def test_bad_values_are_found_in_a_compiled_graph_too():
    _, model = twins(configurations.base())
    compiled = torch.compile(hubert_fast.PretrainingObjective(model), fullgraph=True, backend="aot_eager")
    data = batch(lengths=LENGTHS)
    mask = torch.ones_like(data.labels, dtype=torch.bool)
    with pytest.raises((RuntimeError, ValueError), match=r"labels must be in \[0, 20\)"):
        compiled(data.waveforms, torch.full_like(data.labels, 20), data.lengths, mask=mask)
    with pytest.raises((RuntimeError, ValueError), match="audio_lengths must be within"):
        compiled(data.waveforms, data.labels, data.lengths + 10, mask=mask)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    _, model = twins(configurations.base(encoder_num_layers=1))
    objective = hubert_fast.PretrainingObjective(model)
    data = batch(lengths=LENGTHS)
    mask = torch.zeros_like(data.labels, dtype=torch.bool)
    mask[:, 2:9] = True
    _compare(objective, torch.compile(objective, fullgraph=True), data, mask=mask, tolerance=2e-5)
