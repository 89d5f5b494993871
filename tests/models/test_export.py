"""What `torch.export` and AOTInductor make of a model: plain ATen, which at any length gives the numbers of eager mode."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch.export import Dim

from hubert_fast import backend
from tests.models.exporting import (
    EXPORTED,
    OTHERS,
    Layers,
    Pretraining,
    assert_agrees,
    dynamic,
    encoder,
    labelled,
    ours,
    padded,
    program,
    waveforms,
)


@pytest.mark.parametrize(
    ("name", "make", "chosen"),
    [("base", waveforms, "auto"), ("base", padded, "auto"), ("large", padded, "auto"), ("base", padded, "reference")],
)
def test_a_program_is_aten_alone_and_agrees_at_other_lengths_and_batches(name, make, chosen):
    exported = program(name, make, chosen)
    assert not ours(exported)
    assert_agrees(exported.module(), encoder(name), make)


def test_the_shortest_audio_of_a_program_is_as_long_as_two_frames():
    dims = ({0: Dim("rows"), 1: Dim("samples", min=50)},)
    torch.export.export(encoder("base"), waveforms(*EXPORTED), dynamic_shapes=dims)


def test_a_strict_export_agrees_at_other_lengths():
    arguments = padded(*EXPORTED)
    exported = torch.export.export(encoder("base"), arguments, dynamic_shapes=dynamic(arguments), strict=True)
    assert not ours(exported)
    assert_agrees(exported.module(), encoder("base"), padded)


@pytest.mark.parametrize(("model", "make"), [(Layers, padded), (Pretraining, labelled)])
def test_outputs_of_layers_and_logits_are_exported_too(model, make):
    model, arguments = model(), make(*EXPORTED)
    exported = torch.export.export(model, arguments, dynamic_shapes=dynamic(arguments))
    assert not ours(exported)
    assert_agrees(exported.module(), model, make)


def test_a_length_beyond_the_audio_counts_as_all_of_it_in_a_program():
    audio, _ = padded(*EXPORTED)
    run = program("base", padded).module()
    for given, wanted in zip(run(audio, torch.tensor([500, 501])), run(audio, torch.tensor([500, 500])), strict=True):
        assert torch.equal(given, wanted)


def test_a_program_runs_where_this_package_is_not(tmp_path):
    audio = waveforms(*OTHERS[1])
    torch.export.save(program("base", waveforms), tmp_path / "program.pt2")
    torch.save((audio, encoder("base")(*audio)[0].detach()), tmp_path / "expected.pt")
    script = (
        "import sys, torch\n"
        "sys.modules['hubert_fast'] = None\n"
        "audio, expected = torch.load('expected.pt')\n"
        "found = torch.export.load('program.pt2').module()(*audio)[0]\n"
        "torch.testing.assert_close(found, expected, atol=1e-4, rtol=0.0)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=tmp_path)


def test_a_model_that_trains_drops_anew_at_every_call_of_its_program():
    rates = ("encoder_projection_dropout", "encoder_attention_dropout", "encoder_ff_interm_dropout", "encoder_dropout")
    model = encoder("base", **dict.fromkeys(rates, 0.5), encoder_layer_drop=0.1).train()
    arguments = padded(*EXPORTED)
    with backend.using("torch"):  # so that nothing is left to PyTorch's own dropout but attention's
        exported = torch.export.export(model, arguments, dynamic_shapes=dynamic(arguments))
    assert not ours(exported)
    module = exported.module()
    first, second = (module(*padded(770, 3))[0] for _ in range(2))
    assert not torch.equal(first, second)
    first.square().sum().backward()
    assert all(each.grad.isfinite().all() for each in module.parameters() if each.grad is not None)


def test_compiled_graphs_keep_the_operators():
    seen = []

    def watch(graph, arguments):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    with backend.using("torch"):
        torch.compile(encoder("base"), backend=watch, fullgraph=True)(*waveforms(*EXPORTED))
    torch._dynamo.reset()
    for name in ("conv_frontend", "positional_conv", "masked_attention", "residual_layer_norm"):
        assert any(f"hubert_fast.{name}" in each for each in seen), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_package_of_aotinductor_agrees_at_other_lengths(tmp_path):
    # What takes a compiler the least time, not what is fastest.
    quick = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0", "cpp.simdlen": 1}
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            program("base", padded), package_path=str(tmp_path / "encoder.pt2"), inductor_configs=quick
        )
    assert_agrees(torch._inductor.aoti_load_package(path), encoder("base"), padded)
