"""Both of PyTorch's exporters to ONNX take the models, and onnxruntime gives the numbers of eager mode at any length."""

import re
from pathlib import Path
from types import SimpleNamespace

import onnx  # noqa: F401  (the exporters need it)
import onnxruntime
import onnxscript  # noqa: F401
import pytest
import torch

from hubert_fast import backend
from tests.models.exporting import (
    EXPORTED,
    Layers,
    Pretraining,
    assert_agrees,
    encoder,
    labelled,
    padded,
    program,
    waveforms,
)

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::UserWarning")


def _runner(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*arguments):
        return [
            torch.from_numpy(each) for each in session.run(None, dict(zip(names, (it.numpy() for it in arguments))))
        ]

    return run


def _traced(model, make, path, **options):
    """What the exporter that traces makes of ``model``, as a function."""
    arguments = make(*EXPORTED)
    axes = {f"input{i}": [*range(each.ndim)] for i, each in enumerate(arguments)}
    options = {"dynamo": False, "input_names": [*axes], "dynamic_axes": axes, **options}
    torch.onnx.export(model, arguments, path, **options)
    return _runner(path)


@pytest.mark.parametrize("chosen", ["auto", "reference", "torch"])
@pytest.mark.parametrize(("name", "make"), [("base", waveforms), ("base-prenorm", padded), ("large-bias", padded)])
def test_the_exporter_that_traces(name, make, chosen, tmp_path):
    with backend.using(chosen):
        run = _traced(encoder(name), make, tmp_path / "model.onnx")
    assert_agrees(run, encoder(name), make)


@pytest.mark.parametrize("opset", [14, 20])
def test_the_exporter_that_traces_with_other_opsets(opset, tmp_path):
    run = _traced(encoder("base"), padded, tmp_path / "model.onnx", opset_version=opset)
    assert_agrees(run, encoder("base"), padded)


@pytest.mark.parametrize(("model", "make"), [(Layers, padded), (Pretraining, labelled)])
def test_the_exporter_that_traces_takes_outputs_of_layers_and_logits(model, make, tmp_path):
    model = model()
    assert_agrees(_traced(model, make, tmp_path / "model.onnx"), model, make)


@pytest.mark.parametrize("chosen", ["auto", "reference"])
def test_one_length_alone(chosen, tmp_path):
    with backend.using(chosen):
        run = _traced(encoder("base"), waveforms, tmp_path / "model.onnx", dynamic_axes={})
    assert_agrees(run, encoder("base"), waveforms, sizes=[EXPORTED])


def test_the_exporter_of_programs(tmp_path):
    path = tmp_path / "model.onnx"
    exported = program("base", padded, "reference")
    torch.onnx.export(exported, (), path, opset_version=23, verbose=False)  # where attention is one operator of ONNX
    assert_agrees(_runner(path), encoder("base"), padded)


def test_the_blocks_of_the_page_on_exporting_run_in_order(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    monkeypatch.setattr("hubert_fast.hubert_pretrain_base", lambda: SimpleNamespace(wav2vec2=encoder("base")))
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        if "aoti" not in block:  # tests/models/test_export.py has it
            exec(block, names)
    assert names["features"].isfinite().all()
    for path in ("encoder.onnx", "traced.onnx"):
        assert_agrees(_runner(path), encoder("base"), padded)
