"""Utterances that a run leaves out because their audio can no longer be read, and how many there may be."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from hubert_fast.pretrain.atomic import write_text
from hubert_fast.pretrain.manifest import recording_of
from hubert_fast.pretrain.progress import say
from hubert_fast.pretrain.run_summary import parsed_lines

_FILE_NAME = "left_out.jsonl"
_LISTED = 3


class TooManyBadUtterancesError(RuntimeError):
    """More audio is unreadable than ``data.max_bad_utterances`` allows, or all of it is."""


class Bad(NamedTuple):
    """Why an utterance is left out, and the update of the weights at which that was noticed (0: before the first)."""

    reason: str
    step: int = 0


class LeftOut:
    """The utterances of one part of a corpus that are left out, by id.

    Args:
        utterances: how many the part has.
        share: the largest share that may be bad; those of one recording may always be, unless ``share`` is 0.
        forgotten: ids that the user took out (see `forget`); they are no fault and do not count.
        may_be_empty: nothing at all may be left.
    """

    def __init__(
        self, utterances: int, share: float, forgotten: Iterable[str] = (), *, may_be_empty: bool = False
    ) -> None:
        self._utterances, self._share, self._may_be_empty = utterances, share, may_be_empty
        self._most = ceil(share * utterances)
        self.bad: dict[str, Bad] = {}
        self.forgotten = frozenset(forgotten)

    def __contains__(self, utterance: str) -> bool:
        return utterance in self.bad or utterance in self.forgotten

    def add(self, found: Mapping[str, str], *, step: int = 0, quiet: bool = False) -> None:
        """Leave out the utterances in ``found``, with the reasons, and say so once.

        Raises:
            TooManyBadUtterancesError: they are too many now, or nothing is left.
        """
        new = {utterance: Bad(reason, step) for utterance, reason in found.items() if utterance not in self}
        first = not self.bad
        self.bad |= new
        if len(self.bad) > self._most and (self._share == 0 or len(set(map(recording_of, self.bad))) > 1):
            raise TooManyBadUtterancesError(self._too_many())
        if not self._may_be_empty and self._utterances and len(self.bad) + len(self.forgotten) >= self._utterances:
            raise TooManyBadUtterancesError(f"no utterance is left: {self._listed()}")
        if new and first and not quiet:
            utterance, (reason, _) = next(iter(new.items()))
            say(
                f"utterance {utterance!r} is left out: {reason}. Further ones are listed in left_out.jsonl without a message"
            )

    def state_dict(self) -> list[list[Any]]:
        """Plain values, from which `load_state_dict` restores what is bad."""
        return [[utterance, *bad] for utterance, bad in self.bad.items()]

    def load_state_dict(self, state: Iterable[list[Any]]) -> None:
        known = {utterance: Bad(reason, step) for utterance, reason, step in state}
        self.bad |= {utterance: bad for utterance, bad in known.items() if utterance not in self.forgotten}

    def _too_many(self) -> str:
        return (
            f"{len(self.bad)} of {self._utterances} utterances cannot be used, more than data.max_bad_utterances="
            f"{self._share:g} of them: {self._listed()}. Where the audio is there again, go on by --resume. Else "
            "--data.max-bad-utterances allows more, up to 1, and `hubert-fast forget` takes recordings out of the run"
        )

    def _listed(self) -> str:
        listed = "; ".join(f"{utterance!r}: {bad.reason}" for utterance, bad in list(self.bad.items())[:_LISTED])
        return f"{len(self.forgotten)} were forgotten" if not listed else listed + " ..." * (len(self.bad) > _LISTED)


def write_left_out(directory: Path, *parts: LeftOut) -> None:
    """List what is bad in ``directory``/left_out.jsonl, an object a line: ``id``, ``reason``, ``step``."""
    lines = [{"id": utterance, **bad._asdict()} for part in parts for utterance, bad in part.bad.items()]
    write_text(Path(directory) / _FILE_NAME, "".join(json.dumps(line) + "\n" for line in lines))


def read_left_out(directory: Path) -> list[dict[str, Any]]:
    """What `write_left_out` listed; nothing where there is no file."""
    path = Path(directory) / _FILE_NAME
    return list(parsed_lines(path, json.loads, '{"id": ..., "reason": ...}')) if path.is_file() else []
