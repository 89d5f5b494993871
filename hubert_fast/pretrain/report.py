"""RUN/report.html: what was run, on what speech, with which result, for a reader who was not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hubert_fast.pretrain import atomic
from hubert_fast.pretrain import report_sections as sections
from hubert_fast.pretrain.html_page import Markup, element, page
from hubert_fast.pretrain.plots import write_plots
from hubert_fast.pretrain.run_record import now
from hubert_fast.pretrain.run_summary import IterationSummary, iterations, read_json


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
        sections.summary_cards(found, manifest),
        sections.what_was_run(run),
        sections.speech(run, manifest),
        sections.training(found, plots),
        sections.phones(found, plots),
        sections.words(),
        sections.next_steps(run, found),
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
