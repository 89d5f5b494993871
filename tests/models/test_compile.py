"""``torch.compile(fullgraph=True)`` of the objective and of the model gives the numbers of eager mode."""

import shutil

import pytest
import torch

from tests.models import configurations
from tests.models.twins import (
    LENGTHS,
    Batch,
    assert_steps_match,
    batch,
    num_frames,
    objective_of,
    relative_error,
    step,
    twins,
    valid_frames,
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _in_one_graph(module, **options):
    return torch.compile(module, fullgraph=True, backend="aot_eager", **options)


def _compare(objective, compiled, data, *, mask=None, tolerance=1e-10):
    expected, given = step(objective, data, mask=mask), step(objective, data, compiled, mask=mask)
    assert_steps_match(given, expected, tolerance)


def _mask(data):
    return torch.rand(data.labels.shape, generator=torch.Generator().manual_seed(0)) < 0.5


@pytest.mark.parametrize("unmasked_weight", [0.0, 0.5])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all-valid", "lengths"])
@pytest.mark.parametrize("name", ["base", "xlarge-bias"])
def test_the_objective_in_one_graph(name, lengths, unmasked_weight):
    objective = objective_of(configurations.ALL[name], unmasked_weight=unmasked_weight)
    data = batch(torch.float64, lengths)
    valid = torch.ones_like(data.labels, dtype=torch.bool) if lengths is None else valid_frames(lengths)
    data = data._replace(labels=data.labels.where(valid, -100))  # labels in the padding are not read
    _compare(objective, _in_one_graph(objective), data, mask=_mask(data) & valid)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all-valid", "lengths"])
def test_masks_drawn_inside_the_graph_are_those_of_eager_mode(lengths):
    objective = objective_of(configurations.base()).eval()
    compiled = _in_one_graph(objective)
    _compare(objective, compiled, batch(torch.float64, lengths))
    torch.manual_seed(1)
    first, second = (compiled(*batch(torch.float64, lengths)).loss for _ in range(2))
    assert not torch.equal(first, second), "the second call got the first one's mask"


def test_lengths_and_batch_sizes_may_change_without_a_new_graph_failing():
    objective = objective_of(configurations.base())
    compiled = _in_one_graph(objective, dynamic=True)
    waveforms, labels, _ = batch(torch.float64)
    for rows, samples in ((3, 12400), (2, 9100)):
        frames = num_frames(samples)
        data = Batch(waveforms[:rows, :samples], labels[:rows, :frames], torch.tensor([samples, 5000, 7000])[:rows])
        mask = torch.zeros(rows, frames, dtype=torch.bool)
        mask[:, 1:9] = True
        _compare(objective, compiled, data, mask=mask)


def test_dropout_and_layer_drop_compile():
    settings = dict(encoder_dropout=0.1, encoder_attention_dropout=0.1, encoder_layer_drop=0.5)
    objective = objective_of(configurations.base(**settings))
    compiled = _in_one_graph(objective)
    data = batch(torch.float64, LENGTHS)
    losses = {float(compiled(*data, mask=_mask(data)).loss.detach()) for _ in range(6)}
    assert len(losses) == 6
    assert all(grad.isfinite().all() for grad in step(objective, data, compiled, mask=_mask(data))[1].values())


def test_the_encoder_compiles():
    encoder = twins(configurations.large(), torch.float64)[1].wav2vec2
    compiled = _in_one_graph(encoder)
    waveforms = batch(torch.float64).waveforms
    assert relative_error(compiled(waveforms)[0], encoder(waveforms)[0]) <= 1e-10
    assert relative_error(compiled(waveforms, LENGTHS)[0], encoder(waveforms, LENGTHS)[0]) <= 1e-10  # 0 in the padding


def test_bad_values_are_found_in_a_compiled_graph_too():
    compiled = _in_one_graph(objective_of(configurations.base()))
    data = batch(torch.float64, LENGTHS)
    mask = torch.ones_like(data.labels, dtype=torch.bool)
    with pytest.raises((RuntimeError, ValueError), match=r"labels must be in \[0, 20\)"):
        compiled(data.waveforms, torch.full_like(data.labels, 20), data.lengths, mask=mask)
    with pytest.raises((RuntimeError, ValueError), match="audio_lengths must be within"):
        compiled(data.waveforms, data.labels, data.lengths + 10, mask=mask)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    objective = objective_of(configurations.base(encoder_num_layers=1)).float()
    data = batch(lengths=LENGTHS)
    mask = torch.zeros_like(data.labels, dtype=torch.bool)
    mask[:, 2:9] = True
    _compare(objective, torch.compile(objective, fullgraph=True), data, mask=mask, tolerance=2e-5)
