"""RUN/report.html: what was run, on what speech, with which result, for a reader who was not there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hubert_fast.pretrain import atomic
from hubert_fast.pretrain.config import PretrainConfig, config_path
from hubert_fast.pretrain.config_file import read_config
from hubert_fast.pretrain.forget import forgotten
from hubert_fast.pretrain.html_page import Markup, element, facts, join, page, png, section, table
from hubert_fast.pretrain.left_out import read_left_out
from hubert_fast.pretrain.plots import write_plots
from hubert_fast.pretrain.report_text import GLOSSARY, PLOT_CAPTIONS, PNMI_NOTE, loading_code
from hubert_fast.pretrain.run_record import describe_machine, now, recorded
from hubert_fast.pretrain.run_summary import IterationSummary, iterations, parsed_lines, read_json
from hubert_fast.pretrain.unit_usage import weakness_of

_LISTED_FILES = 200
_ABSENT = "–"
_PARTS = {"train": "training", "valid": "held-out"}


def write_report(run: Path) -> Path:
    """Write ``run/plots/*.png`` and ``run/report.html`` with the pictures in it, anew each time.

    It tells of whatever stages the run has finished; those that are missing are named at the top.

    Returns:
        the path of the report.
    """
    run = Path(run)
    if not run.is_dir():
        raise ValueError(f"run={str(run)!r} is no directory; the RUN directory of `hubert-fast pretrain` is accepted")
    name = run.resolve().name
    found, manifest, plots = iterations(run), read_json(run / "manifest" / "summary.json"), write_plots(run)
    html = page(
        f"HuBERT pre-training: {name}",
        element("h1", "HuBERT pre-training report"),
        element("p", f"Run “{name}”, report written {now()}", class_="subtitle"),
        _missing_stages(found, manifest),
        summary_cards(found, manifest),
        what_was_run(run),
        speech(run, manifest),
        lost(run, found),
        training(found, plots),
        phones(found, plots),
        words(),
        next_steps(run, found),
    )
    target = run / "report.html"
    atomic.write_text(target, html)
    return target


def _missing_stages(found: Sequence[IterationSummary], manifest: Mapping[str, Any] | None) -> Markup:
    missing = [] if manifest else ["the scan of the audio"]
    missing += [] if found else ["every iteration"]
    for iteration in found:
        stages = {"units": iteration.units, "trained weights": iteration.model, "evaluation": iteration.evaluation}
        missing += [f"{stage} of iteration {iteration.number}" for stage, value in stages.items() if value is None]
    if not missing:
        return Markup()
    return element(
        "p", element("strong", "This run is not finished. "), f"Missing: {'; '.join(missing)}.", class_="warning"
    )


def summary_cards(found: Sequence[IterationSummary], manifest: Mapping[str, Any] | None) -> Markup:
    """The handful of numbers that a reader in a hurry wants."""
    cards: list[tuple[str, str]] = []
    if manifest:
        cards.append((duration(sum(manifest["seconds"].values())), "of speech"))
    trained = [iteration for iteration in found if iteration.metrics.training]
    if trained:
        outcome, name = trained[-1].metrics.outcome(), f"iteration {trained[-1].number}"
        share = (trained[-1].units or {}).get("commonest_share")
        beside = "" if share is None else f" (always naming the commonest unit: {percent(share)})"
        cards.append(
            (percent(outcome["last_masked_accuracy"]), f"masked accuracy at the end of {name}, training{beside}")
        )
        cards.append((percent(outcome.get("valid_masked_accuracy")), "the same on held-out speech"))
        cards.append((realtime(outcome), f"speed of training {name}"))
    scored = [iteration for iteration in found if iteration.best_layer()]
    if scored:
        layer, mfcc = scored[-1].best_layer(), scored[-1].mfcc()
        name = f"PNMI of the best layer, layer {layer['layer']} of iteration {scored[-1].number}"
        beside = f", MFCC {number(mfcc['pnmi'])}" if mfcc else ""
        cards.append((number(layer["pnmi"]), f"{name} (by chance {number(layer['chance_pnmi'])}{beside})"))
    drawn = [element("div", element("b", value), element("span", name), class_="card") for value, name in cards]
    return element("div", *drawn, class_="cards")


def what_was_run(run: Path) -> Markup:
    starts, config = recorded(run).get("starts", []), config_path(run)
    rows = [
        ("started" if index == 0 else "resumed", start["date"], element("code", start["command"]))
        for index, start in enumerate(starts)
    ]
    content = [table(["", "date", "command"], rows)] if starts else []
    machines = list({tuple(start["machine"].items()): start["machine"] for start in starts}.values())
    for machine in machines:
        if len(machines) > 1:
            dates = ", ".join(start["date"] for start in starts if start["machine"] == machine)
            content.append(element("h3", f"Machine of {dates}"))
        content.append(facts(machine))
    if not starts:
        content.append(facts(describe_machine()))
        note = "The start of this run was not recorded: the machine named here is the one that wrote this report."
        content.append(element("p", note, class_="note"))
    if config.is_file():
        text = element("pre", config.read_text(encoding="utf-8"))
        content.append(element("details", element("summary", "Full configuration (config.toml)"), text))
    return section("What was run", *content)


def speech(run: Path, manifest: Mapping[str, Any] | None) -> Markup:
    if manifest is None:
        return section("The speech", element("p", "The audio has not been scanned."))
    skipped = _listed(run, "skipped", ("path", "reason"))
    noticed = _listed(run, "notices", ("path", "kind", "note"))
    content = [_manifest_facts(manifest)]
    content += _file_table("Skipped files", "skipped", ["file", "reason"], skipped)
    content += _file_table("Files to look at", "notices", ["file", "kind", "what was noticed"], noticed)
    return section("The speech", *content, *([] if skipped else [element("p", "No file was skipped.")]))


def _listed(run: Path, name: str, keys: Sequence[str]) -> list[tuple[str, ...]]:
    def values(line: str) -> tuple[str, ...]:
        entry = json.loads(line)
        return tuple(entry[key] for key in keys)

    path = run / "manifest" / f"{name}.jsonl"
    expected = "{" + ", ".join(f'"{key}": ...' for key in keys) + "}"
    return list(parsed_lines(path, values, expected)) if path.is_file() else []


def _file_table(title: str, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Markup]:
    if not rows:
        return []
    title += f": {count(len(rows))}"
    if len(rows) > _LISTED_FILES:
        title += f", of which the first {_LISTED_FILES} are listed (all are in manifest/{name}.jsonl)"
    return [element("h3", title), table(header, rows[:_LISTED_FILES])]


def _manifest_facts(manifest: Mapping[str, Any]) -> Markup:
    rows = [
        (_PARTS[split], count(manifest["utterances"][split]), duration(seconds))
        for split, seconds in manifest["seconds"].items()
    ]
    rates = [f"{int(rate):,} Hz: {count(files)}" for rate, files in manifest["sampling_rates"].items()]
    others = {
        "folder": manifest["settings"]["audio"],
        "files by sampling rate": ", ".join(rates),
        "phone alignments": "yes" if manifest["has_alignments"] else "no",
    }
    if manifest.get("closed_folders"):
        others["folders that could not be entered"] = count(manifest["closed_folders"])
    for kind, files in manifest.get("notices", {}).items():
        if files or kind != "alignment":
            others["alignments of no audio file" if kind == "alignment" else f"{kind} recordings"] = count(files)
    return join([table(["part", "utterances", "duration"], rows), facts(others)])


def lost(run: Path, found: Sequence[IterationSummary]) -> Markup:
    """What the run went past: audio that could not be read any more after the scan, and what was forgotten."""
    stages = {}
    for each in found:
        stages[f"iteration {each.number}, units"] = read_left_out(each.directory / "units")
        stages[f"iteration {each.number}, training"] = read_left_out(each.directory / "train")
        evaluated = (each.evaluation or {}).get("left_out", {})
        stages[f"iteration {each.number}, evaluation"] = [{"id": key, "reason": evaluated[key]} for key in evaluated]
    rows = [
        (stage, bad["id"], bad["reason"], count(bad.get("step") or None))
        for stage, listed in stages.items()
        for bad in listed
    ]
    paths = sorted(forgotten(run))
    if not rows and not paths:
        return Markup()
    content = []
    if rows:
        shown = f", of which the first {_LISTED_FILES} are listed" if len(rows) > _LISTED_FILES else ""
        text = (
            f"Utterances that were scanned and could not be read later, and were left out: {count(len(rows))}{shown}."
        )
        header = ["stage", "utterance", "reason", "noticed at update"]
        content += [element("p", text, class_="warning"), table(header, rows[:_LISTED_FILES])]
    if paths:
        listed = ", ".join(paths[:_LISTED_FILES])
        content.append(element("p", f"Recordings that were taken out of the run: {count(len(paths))} ({listed})."))
    return section("What was left out on the way", *content)


def training(found: Sequence[IterationSummary], plots: Mapping[str, Path]) -> Markup:
    if not found:
        return section("Iterations", element("p", "No iteration has been started."))
    columns = [_iteration_facts(iteration) for iteration in found]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    header = ["", *(f"iteration {iteration.number}" for iteration in found)]
    said = [(each.number, weakness_of(each.units)) for each in found if "units_used" in (each.units or {})]
    warnings = [element("p", f"Iteration {number} has {text}.", class_="warning") for number, text in said if text]
    pictures = [png(plots[name], PLOT_CAPTIONS[name]) for name in ("loss", "masked_accuracy", "speed") if name in plots]
    return section("Iterations", table(header, rows), *warnings, *pictures)


def _iteration_facts(iteration: IterationSummary) -> dict[str, str]:
    units, outcome, model = iteration.units or {}, iteration.metrics.outcome(), iteration.model
    rates = [line["lr"] for line in iteration.metrics.training]
    architecture = _ABSENT
    if model:
        architecture = "{encoder_num_layers} transformer layers, {encoder_embed_dim} dimensions".format(**model.config)
    return {
        "units made from": units_source(units),
        "clusters": count(units.get("clusters")),
        "unit perplexity": number(units.get("perplexity"), 1),
        "model": architecture,
        "parameters": f"{model.parameters / 1e6:,.2f} million" if model else _ABSENT,
        "optimizer steps": count(outcome.get("last_step")),
        "audio in a step": duration(outcome["audio_seconds"] / outcome["last_step"]) if rates else _ABSENT,
        "highest learning rate": f"{max(rates):.2g}" if rates else _ABSENT,
        "audio taken in": duration(outcome.get("audio_seconds")),
        "wall time of training": duration(outcome.get("seconds")),
        "speed": realtime(outcome),
        "masked loss, first": number(outcome.get("first_masked_loss")),
        "masked loss, last": number(outcome.get("last_masked_loss")),
        "entropy of the units: masked loss of one who knows only their frequencies": number(_nats(units)),
        "masked accuracy, first": percent(outcome.get("first_masked_accuracy")),
        "masked accuracy, last": percent(outcome.get("last_masked_accuracy")),
        "share of the commonest unit: accuracy of one who always names it": percent(units.get("commonest_share")),
        "held-out masked loss, last": number(outcome.get("valid_masked_loss")),
        "held-out masked accuracy, last": percent(outcome.get("valid_masked_accuracy")),
    }


def _nats(units: Mapping[str, Any]) -> float | None:
    bits = units.get("entropy_bits")
    return None if bits is None else bits * math.log(2)


def phones(found: Sequence[IterationSummary], plots: Mapping[str, Path]) -> Markup:
    """The tables of purity and PNMI."""
    title, evaluated = "What the units know about phones", [each for each in found if each.evaluation is not None]
    if not evaluated:
        return section(title, element("p", "No iteration has been evaluated."))
    scored = [iteration for iteration in evaluated if iteration.representations]
    if not scored:
        return section(title, element("p", evaluated[-1].evaluation.get("note", "No representation was scored.")))
    content: list[str] = [element("p", PNMI_NOTE, class_="note")]
    if len({iteration.evaluation["clusters"] for iteration in scored}) > 1:
        warning = "The iterations were evaluated with different numbers of clusters: their PNMI must not be compared."
        content.append(element("p", warning, class_="warning"))
    content += [png(plots["pnmi"], PLOT_CAPTIONS["pnmi"])] if "pnmi" in plots else []
    content += [part for iteration in scored for part in _phone_table(iteration)]
    return section(title, *content)


def _phone_table(iteration: IterationSummary) -> list[Markup]:
    evaluation, rows = iteration.evaluation, iteration.representations
    best, mfcc = iteration.best_layer(), iteration.mfcc()
    header = ["units made from", "clusters", "PNMI", "by chance", "phone purity", "cluster purity", "unit perplexity"]
    cells = [
        (
            representation_name(row, iteration),
            count(row["clusters"]),
            number(row["pnmi"]),
            number(row["chance_pnmi"]),
            number(row["phone_purity"]),
            number(row["cluster_purity"]),
            number(row["unit_perplexity"], 1),
        )
        for row in rows
    ]
    basis = (
        f"{count(evaluation['utterances'])} held-out utterances, {count(evaluation['frames'])} frames of 20 ms, "
        f"{len(evaluation['phone_frames'])} phones; clusters fitted on {count(evaluation['fit_frames'])} others."
    )
    title = element("h3", f"Iteration {iteration.number}")
    notes = [element("p", basis, class_="note")]
    if best and mfcc and best["pnmi"] <= mfcc["pnmi"]:
        text = "No layer of this model knows more about phones than MFCC does: it was trained too little for that."
        notes.append(element("p", text, class_="warning"))
    return [title, table(header, cells, strong=[rows.index(best)] if best else []), *notes]


def words() -> Markup:
    entries = [part for term, meaning in GLOSSARY.items() for part in (element("dt", term), element("dd", meaning))]
    return section("Words", element("dl", *entries))


def next_steps(run: Path, found: Sequence[IterationSummary]) -> Markup:
    trained = [iteration for iteration in found if iteration.weights.is_file()]
    if not trained:
        text = "There are no weights yet. `hubert-fast pretrain --resume` goes on with the run."
        return section("Next steps", element("p", text))
    weights = trained[-1].weights.relative_to(run)
    content: list[str] = [
        element("p", "The weights of the last iteration, below the run directory: ", element("code", str(weights)), ".")
    ]
    for library, code in loading_code(weights.as_posix(), normalize_audio=_normalizes_audio(run, trained[-1])).items():
        content += [element("h3", f"Load them with {library}"), element("pre", element("code", code))]
    curves = "All curves, step by step: ", element("code", "tensorboard --logdir ."), " in the run directory."
    return section("Next steps", *content, element("p", *curves))


def _normalizes_audio(run: Path, iteration: IterationSummary) -> bool:
    path = config_path(run)
    if not path.is_file():
        return False
    config = read_config(path, PretrainConfig())
    return config.data_of(config.iterations()[iteration.number - 1]).normalize_audio


def representation_name(row: Mapping[str, Any], iteration: IterationSummary) -> str:
    if row["layer"] is None:
        return f"the units it was trained on ({units_source(iteration.units or {})})"
    return "MFCC" if row["layer"] == 0 else f"layer {row['layer']}"


def units_source(units: Mapping[str, Any]) -> str:
    """In words: a units summary has ``source`` "mfcc" or "layer<N>"."""
    source = units.get("source")
    if source is None:
        return _ABSENT
    return "MFCC" if source == "mfcc" else f"{source.replace('layer', 'layer ')} of the iteration before"


def number(value: float | None, digits: int = 3) -> str:
    return _ABSENT if value is None else f"{value:,.{digits}f}"


def count(value: int | None) -> str:
    return _ABSENT if value is None else f"{value:,}"


def percent(share: float | None) -> str:
    return _ABSENT if share is None else f"{100 * share:.1f} %"


def realtime(outcome: Mapping[str, Any]) -> str:
    """Over the whole training, validation and saving included."""
    seconds = outcome.get("seconds")
    return f"{outcome['audio_seconds'] / seconds:,.0f} x real time" if seconds else _ABSENT


def duration(seconds: float | None) -> str:
    """In the unit that reads best."""
    if seconds is None:
        return _ABSENT
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"
