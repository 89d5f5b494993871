import functools
import gc
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hubert_fast.pretrain import pipeline
from hubert_fast.pretrain.config_file import read_config, write_config
from hubert_fast.pretrain.distributed import Process
from hubert_fast.pretrain.forget import forget
from hubert_fast.pretrain.left_out import read_left_out
from hubert_fast.pretrain.manifest import load_manifest
from hubert_fast.pretrain.pipeline import Run, RunExistsError, open_run
from hubert_fast.pretrain.resume_checks import ConfigMismatchError
from hubert_fast.pretrain.run_record import recorded
from tests.pretrain.small_run import small_config, small_folder
from tests.pretrain.test_config_checks import changed


def opened(directory, config=None, *, audio=None, resume=False, command=None):
    config = config or small_config()
    return open_run(directory, config, Process(), audio=audio, resume=resume, command=command, progress=False)


@pytest.fixture
def folder(tmp_path):
    return small_folder(tmp_path / "speech")


@pytest.fixture
def scanned(folder, tmp_path):
    run = opened(tmp_path / "run", audio=folder)
    run.scan()
    return run.directory


def states(directory: Path, pattern: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in directory.glob(pattern)}


def test_the_whole_job_leaves_everything_and_is_not_repeated(folder, tmp_path):
    run = opened(tmp_path / "run", audio=folder, command=["hubert-fast", "pretrain"])
    assert run.everything(resume=False).read_text().count("iteration2/train/model.safetensors") >= 1
    assert read_config(run.directory / "config.toml", small_config()) == small_config()
    assert len(recorded(run.directory)["starts"]) == 1
    results = "iteration*/**/*.safetensors"
    before = states(run.directory, results) | states(run.directory, "manifest/*")
    assert len(before) == 13
    opened(run.directory, resume=True).everything(resume=True)
    assert before == states(run.directory, results) | states(run.directory, "manifest/*")

    again = opened(run.directory, resume=True)
    (run.directory / "iteration1" / "train" / "model.safetensors").write_bytes(b"damaged")
    for stage in (lambda: again.train(1, resume=True), lambda: again.units(2)):
        with pytest.raises(OSError, match="iteration1/train/model.safetensors cannot be read"):
            stage()


@pytest.mark.parametrize("also", ["nothing", "manifest", "forget"])
def test_a_run_goes_on_without_a_recording_that_is_gone(folder, tmp_path, also):
    """Its file is removed after a checkpoint, or its manifest too, or the run is told to forget it: to the same weights."""
    run = opened(tmp_path / "run", audio=folder)
    run.scan()
    run.units(1)
    run.train(1, resume=False)
    train = run.directory / "iteration1" / "train"
    (train / "model.safetensors").unlink()
    (train / "checkpoints" / "step-00000002.pt").unlink()
    units = (run.directory / "iteration1" / "units" / "train.safetensors").read_bytes()
    gone = load_manifest(run.manifest, "train").id(2)
    for other in ("reference", "changed"):
        shutil.copytree(run.directory, tmp_path / other)
    (folder / gone).unlink()
    if also == "manifest":
        shutil.rmtree(tmp_path / "changed" / "manifest")
    if also == "forget":
        assert forget(tmp_path / "changed", [gone]) == [gone]
    reports = [opened(tmp_path / name, resume=True).everything(resume=True) for name in ("reference", "changed")]
    first, second = (
        load_file(tmp_path / name / "iteration1/train/model.safetensors") for name in ("reference", "changed")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "changed/iteration1/units/train.safetensors").read_bytes() == units
    told = [gone in each.read_text() for each in reports]
    assert told == [True, True] and read_left_out(tmp_path / "reference/iteration1/train")[0]["id"] == gone
    assert bool(read_left_out(tmp_path / "changed/iteration1/train")) == (also != "forget")


def test_a_stage_names_the_one_that_is_missing(folder, tmp_path):
    run = opened(tmp_path / "run", audio=folder)
    train = functools.partial(run.train, resume=False)
    for stage, missing in ((run.units, "scan"), (train, "units"), (run.evaluate, "train")):
        with pytest.raises(FileNotFoundError, match=f"run the stage `hubert-fast {missing}` first"):
            stage(1)
    with pytest.raises(ValueError, match=r"iteration must be in \[1, 2\].*got 3"):
        run.units(3)


def test_an_existing_run_or_another_folder_is_refused_and_untouched(scanned, folder):
    before = states(scanned, "*")
    with pytest.raises(RunExistsError, match="holds a run already; go on with it by --resume"):
        opened(scanned, audio=folder)
    assert states(scanned, "*") == before
    for resume in (False, True):
        with pytest.raises(RunExistsError, match="holds no run"):
            opened(folder, audio=folder, resume=resume)


@pytest.mark.parametrize(
    ("make_audio", "config", "message"),
    [
        pytest.param(lambda audio: None, small_config(), "audio=.*speech.*is not a folder", id="missing"),
        pytest.param(Path.touch, small_config(), "audio=.*speech.*is not a folder", id="file"),
        pytest.param(Path.mkdir, small_config(), "audio=.*speech.*holds no audio", id="empty"),
        pytest.param(small_folder, small_config(layer=7), "second.units.layer=7 ", id="setting out of range"),
    ],
)
def test_what_is_refused_leaves_no_run_directory(tmp_path, make_audio, config, message):
    make_audio(tmp_path / "speech")
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "run", config, audio=tmp_path / "speech")
    assert not (tmp_path / "run").exists()


def test_a_run_that_does_not_know_its_audio_asks_for_it(folder, tmp_path):
    write_config(tmp_path / "run" / "config.toml", small_config())
    with pytest.raises(ValueError, match="does not say which audio.*--audio FOLDER"):
        opened(tmp_path / "run", resume=True)
    assert opened(tmp_path / "run", resume=True, audio=folder).audio == folder.resolve()
    assert opened(tmp_path / "run", resume=True).audio == folder.resolve()


def run_with(folder, run, outputs):
    """A run that has got as far as these outputs."""
    opened(run, audio=folder)
    for name in outputs:
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text("{}")
    return run


FREE_AT_FIRST = {
    "seed": 5,
    "data.min_seconds": 0.2,
    "data.channel": 1,
    "data.batch_seconds": 3.0,
    "first.units.clusters": 5,
    "first.optimizer.steps": 3,
    "second.model.mask_prob": 0.5,
    "third.optimizer.steps": 3,
}


@pytest.mark.parametrize(
    ("there", "refused"),
    [
        ([], set()),
        (["manifest/summary.json"], {"seed", "data.min_seconds", "data.channel"}),
        (["iteration1/units/summary.json"], {"first.units.clusters"}),
        (["iteration1/train/checkpoints/step-00000001.pt"], {"first.optimizer.steps", "data.batch_seconds"}),
        (["iteration2/train/model.safetensors"], {"second.model.mask_prob"}),
        (["iteration3/units/summary.json"], {"third.optimizer.steps"}),
    ],
)
def test_what_has_no_output_yet_may_change_when_a_run_is_resumed(folder, tmp_path, there, refused):
    run = run_with(folder, tmp_path / "run", there)
    found = set()
    for name, value in FREE_AT_FIRST.items():
        write_config(run / "config.toml", small_config())
        try:
            opened(run, changed(small_config(), name, value), resume=True)
        except ConfigMismatchError as error:
            assert f"{name} is " in str(error) and f"and {value!r} here" in str(error)
            found.add(name)
    assert found == refused


def test_what_decides_no_number_may_always_change(folder, tmp_path):
    there = ["manifest/summary.json", "iteration1/units/summary.json", "iteration1/train/model.safetensors"]
    run = run_with(folder, tmp_path / "run", there)
    changes = {"device": "auto", "graphs": "off", "data.workers": 1, "logging.save_every": 7, "evaluation.clusters": 9}
    opened(run, changed(small_config(), "data.micro_batch_seconds", 2.0), resume=True)
    config = small_config()
    for name, value in (changes | {"first.optimizer.accumulate": 2}).items():
        config = changed(config, name, value)
    opened(run, config, resume=True)
    assert read_config(run / "config.toml", small_config()) == config


def test_audio_is_normalized_as_the_model_was_trained(folder, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(pipeline, "HubertFeatures", lambda weights, layer, **options: seen.update(options))
    for name, expected in (("first", True), ("second", False)):
        run = opened(tmp_path / name, changed(small_config(), f"{name}.normalize_audio", True), audio=folder)
        weights = run.iteration_directory(1) / "train" / "model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.touch()
        run._features(2)
        assert seen["normalize_audio"] is expected


def test_other_ranks_leave_the_work_to_rank_0_and_fail_with_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Process, "from_main", lambda self, value: (None, "rank 0 cannot go on"))
    run = Run(tmp_path / "run", small_config(), Process(rank=1, world_size=2), folder)
    stages = {
        "open_run": lambda: open_run(run.directory, run.config, run.process, audio=folder, resume=False),
        "scan": run.scan,
        "units": lambda: run.units(1),
        "train": lambda: run.train(1, resume=False),
        "evaluate": lambda: run.evaluate(1),
        "report": run.report,
    }
    for name, stage in stages.items():
        with pytest.raises(RuntimeError, match="^rank 0 cannot go on$"):
            stage()
        assert not run.directory.exists(), name


def test_what_training_leaves_in_cycles_is_freed_before_the_next_stage(scanned, monkeypatch):
    class Weights:
        def __init__(self):
            self.itself = self

    left = []
    monkeypatch.setattr(pipeline, "train", lambda *_, resume, **__: left.append(weakref.ref(Weights())))
    monkeypatch.setattr(Run, "_require", lambda *_: None)
    gc.disable()
    try:
        opened(scanned, resume=True).train(1, resume=False)
        assert left[0]() is None
    finally:
        gc.enable()
