"""What is measured, in which order."""

import torch

import hubert_fast
from benchmarks.architecture import ARCHITECTURES
from benchmarks.cases import GPU, cpu_scale, plan
from benchmarks.peers import PEERS

KINDS = ("step", "inference", "operators", "scaling")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODELS, DTYPES = ["base", "large", "xlarge"], [torch.bfloat16, torch.float32]


def gpu_plan(kinds=KINDS):
    return plan(CUDA, GPU, MODELS, DTYPES, kinds)


def cpu_plan(kinds=KINDS):
    return plan(CPU, cpu_scale(5.0, 4e11), ["base"], DTYPES, kinds)


def test_the_first_case_is_a_step_of_base_with_500_classes_by_all_peers():
    for first in (gpu_plan()[0], cpu_plan()[0]):
        assert (first.kind, first.architecture.name, first.num_classes) == ("step", "base", 500)
        assert first.dtype == torch.bfloat16 and first.peers is None and first.layout == "even"
    assert not cpu_plan()[0].without
    first = gpu_plan()[0]
    (compiled,) = (each for each in gpu_plan(["step"]) if each.peers == first.without)
    assert (compiled.name, compiled.dtype, compiled.lengths) == (first.name, first.dtype, first.lengths)
    assert gpu_plan()[0].audio_seconds == 175.0


def test_everything_that_was_asked_for_is_there():
    cases = gpu_plan()
    steps = [each for each in cases if each.kind == "step"]
    steps = {(each.architecture.name, each.num_classes, each.dtype, each.layout) for each in steps}
    assert {("base", 500, torch.bfloat16, layout) for layout in ("even", "librispeech-like")} < steps
    assert {(name, 500, torch.bfloat16, "even") for name in MODELS} < steps
    assert {("base", 100, torch.bfloat16, "even"), ("base", 500, torch.float32, "even")} < steps
    values = {axis: [each.value for each in cases if each.axis == axis] for axis in GPU.axes}
    assert (values["batch seconds"][0], values["batch seconds"][-1]) == (10, 700)
    assert (values["utterance seconds"][0], values["utterance seconds"][-1]) == (2, 120)
    assert (values["classes"][0], values["classes"][-1]) == (100, 10_000)
    assert [each.kind for each in cases].count("operators") == 1


def test_an_axis_changes_its_own_value_and_leaves_the_rest():
    for case in gpu_plan(["scaling"]):
        utterance = case.lengths[0][0] / 16_000
        if case.axis == "batch seconds":
            assert case.audio_seconds == case.value and case.num_classes == 500 and 10 <= utterance <= 12.6
        elif case.axis == "utterance seconds":
            assert utterance == case.value and 120 <= case.audio_seconds <= 181
        else:
            assert case.num_classes == case.value and case.audio_seconds == 175.0


def test_only_what_is_asked_for_is_planned():
    for kind in KINDS:
        assert {each.kind for each in cpu_plan([kind])} == {kind}


def test_cases_that_differ_have_different_names():
    for cases in (gpu_plan(), cpu_plan()):
        named = [(each.kind, each.title, each.axis, each.peers) for each in cases]
        assert len(set(named)) == len(named)


def test_more_time_gives_a_cpu_more_audio_and_none_gives_it_too_much():
    audio = [cpu_scale(minutes, 4e11) for minutes in (1, 5, 10, 30, 100)]
    seconds = [each.utterances * each.utterance_seconds for each in audio]
    assert seconds == sorted(seconds) and seconds[0] == 4 and seconds[-1] == 40


def test_every_peer_that_a_case_names_exists():
    for case in gpu_plan() + cpu_plan():
        assert set(case.peers or ()) | set(case.without) <= set(PEERS)


def test_architectures_are_the_published_models():
    for name in MODELS:
        arguments = ARCHITECTURES[name].factory_arguments(500)
        with torch.device("meta"):
            built = hubert_fast.hubert_pretrain_model(**arguments)
            settings = {} if name != "base" else {"num_classes": 500}
            published = getattr(hubert_fast, f"hubert_pretrain_{name}")(encoder_layer_drop=0.0, **settings)
        assert str(built) == str(published) and built.feature_grad_mult == published.feature_grad_mult
        shapes = [{key: each.shape for key, each in model.state_dict().items()} for model in (built, published)]
        assert shapes[0] == shapes[1]
        masking = [vars(model.mask_generator).items() for model in (built, published)]
        masking = [{key: value for key, value in each if not key.startswith("_")} for each in masking]
        assert masking[0] == masking[1]
