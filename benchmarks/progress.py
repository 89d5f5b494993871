"""A progress bar of the time that a run was given, with what is being done beside it."""

from __future__ import annotations

import sys
from types import TracebackType

from .budget import Budget


class Progress:
    """On standard error, where it does not mix with tables. Nothing is drawn where that is no terminal: only new lines."""

    def __init__(self, budget: Budget) -> None:
        from tqdm import tqdm

        self._budget, self._said = budget, ""
        self._lines = not sys.stderr.isatty()
        form = "{percentage:3.0f}%|{bar:20}| {elapsed} of {total_fmt} s  {desc}"
        self._bar = tqdm(total=round(budget.seconds), bar_format=form, file=sys.stderr, disable=self._lines)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def say(self, doing: str, detail: str = "") -> None:
        """``detail`` is for those who watch: it makes no lines of its own."""
        if not self._lines:
            self._bar.n = min(round(self._budget.spent()), self._bar.total)
            self._bar.set_description_str(f"{doing} {detail}")
        elif doing != self._said:
            print(f"[{self._budget.spent():5.0f} s] {doing}", file=sys.stderr, flush=True)
        self._said = doing
