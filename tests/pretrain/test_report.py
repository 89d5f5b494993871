import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from benchmarks.torchaudio_peer import import_models
from hubert_fast.pretrain import plots, report
from hubert_fast.pretrain.html_page import element, facts, page, table
from hubert_fast.pretrain.report import write_report
from hubert_fast.pretrain.report_text import loading_code
from hubert_fast.pretrain.run_record import describe_machine, record, recorded
from hubert_fast.pretrain.run_summary import iterations, training_metrics
from tests.pretrain.fabricated_run import fabricate_run, save_tiny_weights, write_json, write_json_lines


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
    """Drawing takes most of the time, and nobody looks at these."""
    monkeypatch.setattr(plots, "_DOTS_PER_INCH", 30)


_VOID = {"meta", "img", "br", "link"}


class _Reader(HTMLParser):
    """Collects the text, and fails where tags do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.text.append(data)


def read(report: Path) -> tuple[str, list[str]]:
    """Text as a reader sees it, blanks collapsed, and the things it links to."""
    reader = _Reader()
    reader.feed(report.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return re.sub(r"\s+", " ", " ".join(reader.text)), reader.sources


def finished_run(run: Path, **options) -> Path:
    """With weights files of 12 parameters: enough for what the report reads."""
    for number in (1, 2):
        path = run / f"iteration{number}" / "train" / "model.safetensors"
        save_tiny_weights(path, state_dict={"a": torch.zeros(3, 4)})
    return fabricate_run(run, **options)


def test_the_report_of_a_whole_run_tells_all_of_it(tmp_path):
    run = finished_run(tmp_path / "my-run", skipped=[{"path": "a.wav", "reason": "zero-length"}])
    record(run, command=["hubert-fast", "pretrain", "--audio", "my speech"])
    text, sources = read(write_report(run))
    assert "not finished" not in text
    for expected in (
        "my-run",
        "hubert-fast pretrain --audio 'my speech'",
        "16,000 Hz: 197",
        "180",
        "9.0 min",
        "a.wav zero-length",
        "MFCC layer 3 of the iteration before",
        "81.2 162.5",
        "2 transformer layers, 32 dimensions",
        "highest learning rate 0.0005",
        "audio in a step 40.0 s",
        "audio taken in 4.4 h",
        "80 x real time",
        "PNMI",
        "cluster purity",
        "iteration2/train/model.safetensors",
        "load_model",
        "torchaudio.models.hubert_pretrain_model",
    ):
        assert expected in text, expected
    assert "torch" in describe_machine() and describe_machine()["torch"] in text
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)


def test_file_names_cannot_become_markup(tmp_path):
    nasty = "<script>alert('x')</script> & \"co\".wav"
    run = fabricate_run(tmp_path / "a <b> & c", skipped=[{"path": nasty, "reason": "bad <i>header</i>"}])
    (run / "config.toml").write_text('name = "</pre><script>"\n', encoding="utf-8")
    record(run, command=["hubert-fast", "--audio", "<img src=x>"])
    report = write_report(run)
    assert "<script>" not in report.read_text(encoding="utf-8")
    text, sources = read(report)
    assert nasty in text and "bad <i>header</i>" in text and "a <b> & c" in text and "<img src=x>" in text
    assert all(source.startswith("data:") for source in sources)


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        ("manifest/summary.json", "the scan of the audio"),
        ("iteration1/units/summary.json", "units of iteration 1"),
        ("iteration2/evaluation.json", "evaluation of iteration 2"),
        ("iteration2/train/model.safetensors", "trained weights of iteration 2"),
    ],
)
def test_a_missing_stage_is_named_and_the_rest_is_there(tmp_path, removed, named):
    run = finished_run(tmp_path, steps=8)
    (run / removed).unlink()
    text, _ = read(write_report(run))
    assert f"This run is not finished. Missing: {named}." in text
    assert "Iterations" in text and "model.safetensors" in text


def test_an_empty_run_directory_gives_a_report_that_says_so(tmp_path):
    text, sources = read(write_report(tmp_path))
    for expected in ("the scan of the audio; every iteration", "has not been scanned", "There are no weights yet"):
        assert expected in text, expected
    assert sources == []


def test_without_alignments_the_report_gives_the_reason_instead_of_a_table(tmp_path):
    run = fabricate_run(tmp_path, iterations=1, steps=8)
    note = "The held-out part has no phone alignments."
    write_json(run / "iteration1" / "evaluation.json", {"training": {}, "representations": [], "note": note})
    text, sources = read(write_report(run))
    assert note in text and "by chance" not in text.split("Words")[0] and len(sources) == 3


def test_different_numbers_of_clusters_are_warned_about(tmp_path):
    run = fabricate_run(tmp_path, steps=8)
    assert "must not be compared" not in read(write_report(run))[0]
    path = run / "iteration2" / "evaluation.json"
    write_json(path, json.loads(path.read_text()) | {"clusters": 500})
    assert "must not be compared" in read(write_report(run))[0]


def test_only_so_many_skipped_files_are_listed(tmp_path):
    run = fabricate_run(tmp_path, steps=8, skipped=[{"path": f"{n}.wav", "reason": "too short"} for n in range(1234)])
    text, _ = read(write_report(run))
    assert "Skipped files: 1,234, of which the first 200 are listed" in text
    assert "199.wav" in text and " 200.wav" not in text


def test_what_was_noticed_of_files_that_were_taken_is_counted_and_listed(tmp_path):
    run = fabricate_run(tmp_path, steps=8)
    assert "Files to look at" not in read(write_report(run))[0]
    path = run / "manifest" / "summary.json"
    counts = {"closed_folders": 2, "notices": {"repaired": 1, "silent": 0}}
    write_json(path, json.loads(path.read_text()) | counts)
    noticed = [{"path": "a.wav", "kind": "repaired", "note": "2 streams that were joined"}]
    write_json_lines(run / "manifest" / "notices.jsonl", noticed)
    text = read(write_report(run))[0]
    for expected in (
        "Files to look at: 1 file kind what was noticed a.wav repaired 2 streams that were joined",
        "folders that could not be entered 2",
        "repaired recordings 1",
        "silent recordings 0",
        "No file was skipped",
    ):
        assert expected in text, expected


def test_a_run_that_is_no_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="run=.*nowhere.*RUN directory"):
        write_report(tmp_path / "nowhere")


def test_starts_are_recorded_one_after_the_other(tmp_path):
    record(tmp_path, command=["hubert-fast", "pretrain"])
    record(tmp_path, command=["hubert-fast", "pretrain", "--resume"])
    commands = [start["command"] for start in recorded(tmp_path)["starts"]]
    assert commands == ["hubert-fast pretrain", "hubert-fast pretrain --resume"]
    text = read(write_report(tmp_path))[0]
    assert "resumed" in text and all(command in text for command in commands) and "Machine of" not in text


def test_starts_of_one_second_and_of_several_machines_are_all_shown(tmp_path):
    starts = [{"command": f"try {n}", "date": "noon", "machine": {"processor": f"kind {n // 2}"}} for n in range(3)]
    write_json(tmp_path / "run.json", {"starts": starts})
    text = read(write_report(tmp_path))[0]
    for expected in ("try 0", "try 1", "try 2", "Machine of noon, noon", "kind 0", "kind 1"):
        assert expected in text, expected


def test_the_code_in_the_report_normalizes_audio_where_the_last_model_was_trained_so(tmp_path):
    run = finished_run(tmp_path, steps=8)
    for normalized, expected in (("first", False), ("second", True)):
        (run / "config.toml").write_text(f"[{normalized}]\nnormalize_audio = true\n")
        assert ("zero mean and unit variance" in read(write_report(run))[0]) is expected


@pytest.mark.parametrize("damaged", ['{"path"', '{"path": "b.wav"}', "3"])
def test_a_damaged_line_on_skipped_files_is_named_and_a_blank_one_is_passed_over(tmp_path, damaged):
    run = fabricate_run(tmp_path, steps=8)
    skipped = run / "manifest" / "skipped.jsonl"
    whole = '{"path": "a.wav", "reason": "empty"}\n\n'
    skipped.write_text(whole)
    assert "Skipped files: 1 " in read(write_report(run))[0]
    skipped.write_text(whole + damaged)
    with pytest.raises(ValueError, match='skipped.jsonl, line 3: expected {"path": ..., "reason": ...}'):
        write_report(run)


def test_damaged_files_are_named(tmp_path):
    run = fabricate_run(tmp_path, steps=8)
    (run / "iteration1" / "train" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(OSError, match="iteration1/train/model.safetensors cannot be read"):
        write_report(run)
    (run / "manifest" / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="manifest/summary.json is not JSON"):
        write_report(run)


def test_the_newest_line_of_a_step_counts_and_steps_are_sorted(tmp_path):
    lines = [{"step": 2, "loss": 3.0}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": 2.0, "valid_loss": 5.0}]
    write_json_lines(tmp_path / "metrics.jsonl", lines)
    metrics = training_metrics(tmp_path)
    assert [line["loss"] for line in metrics.training] == [4.0, 2.0]
    outcome = metrics.outcome()
    assert (outcome["first_loss"], outcome["last_loss"], outcome["valid_loss"]) == (4.0, 2.0, 5.0)


def test_iterations_are_found_in_order_and_other_folders_are_not(tmp_path):
    for name in ("iteration10", "iteration2", "iterationX", "plots"):
        (tmp_path / name).mkdir()
    assert [iteration.number for iteration in iterations(tmp_path)] == [2, 10]


@pytest.mark.parametrize("library", ["torchaudio", "hubert_fast"])
def test_the_code_in_the_report_loads_the_weights(tmp_path, monkeypatch, library):
    if library == "torchaudio":
        import_models()  # its compiled library does not load beside a CPU build of torch
    monkeypatch.chdir(tmp_path)
    save_tiny_weights(tmp_path / "it's" / "model.safetensors")
    scope: dict = {}
    exec(loading_code("it's/model.safetensors")[library], scope)
    assert type(scope["model"]).__name__ == "HuBERTPretrainModel"


def test_pages_escape_text_and_durations_read_well():
    assert element("td", "<&>") == "<td>&lt;&amp;&gt;</td>"
    assert element("p", element("b", "x")) == "<p><b>x</b></p>"
    assert "&lt;" in facts({"<": "1"}) and "&lt;" in table(["<"], [["a"]]) and "&lt;" in page("<", "")
    durations = [report.duration(seconds) for seconds in (None, 1, 119, 120, 7199, 7200, 3.6e6)]
    assert durations == ["–", "1.0 s", "119.0 s", "2.0 min", "120.0 min", "2.0 h", "1,000.0 h"]


def test_what_was_left_out_on_the_way_is_listed_and_what_was_forgotten_named(tmp_path):
    run = fabricate_run(tmp_path, steps=8)
    assert "left out on the way" not in read(write_report(run))[0]
    bad = {"id": "a <b>.wav#0001", "reason": "the file changed since the scan", "step": 1234}
    write_json_lines(run / "iteration2" / "train" / "left_out.jsonl", [bad])
    write_json_lines(run / "iteration1" / "units" / "left_out.jsonl", [bad | {"step": 0}])
    evaluation = json.loads((run / "iteration1" / "evaluation.json").read_text())
    write_json(run / "iteration1" / "evaluation.json", evaluation | {"left_out": {"c.wav": "there is no such file"}})
    write_json_lines(run / "forgotten.jsonl", [{"path": "speaker/1.wav", "date": "2026-12-01"}])
    text, _ = read(write_report(run))
    assert "could not be read later, and were left out: 3." in text
    assert "iteration 1, units a <b>.wav#0001 the file changed since the scan – " in text
    assert "iteration 2, training a <b>.wav#0001 the file changed since the scan 1,234 " in text
    assert "iteration 1, evaluation c.wav there is no such file" in text
    assert "Recordings that were taken out of the run: 1 (speaker/1.wav)." in text


def test_weak_units_are_warned_of_and_the_headline_stands_beside_the_commonest_unit(tmp_path):
    run = fabricate_run(tmp_path, steps=8)
    text, _ = read(write_report(run))
    assert "training (always naming the commonest unit: 10.0 %)" in text and "say little" not in text
    units = {"source": "mfcc", "clusters": 100, "perplexity": 1.2, "commonest_share": 0.97, "units_used": 3}
    write_json(run / "iteration2" / "units" / "summary.json", units)
    text, _ = read(write_report(run))
    assert "Iteration 2 has units that say little: 3 of 100 units are used, their perplexity is 1.20" in text
    assert "(always naming the commonest unit: 97.0 %)" in text
