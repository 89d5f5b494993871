"""Runs cases within a time: builds the sides, checks that they do the same work, times them in turn, and notes what is left out.

A side is timed only after `peers.agreement.check`. The first call compiles and warms up, the second measures memory; the turns
after them are what is reported. A report is saved after every case, so that an interrupted run loses the case it was in. What a
report has already is not measured again, so that a run whose device was lost goes on in another process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from functools import partial

import torch

from . import operators
from .batches import Batch, make
from .budget import Budget
from .cases import Case
from .fitting import Pace, hold_together, why_too_large
from .flops import inference_flops, step_flops
from .limits import measure_limits
from .lost_device import ALL, DeviceLost, answers, first_line, lost, why_no_more
from .memory import held_by, peak_of
from .models import Models
from .peers.agreement import DifferentWork
from .peers.peer import Peer, PeerModel, Setting
from .report import ELSEWHERE, NO_TIME, LeftOut, Limits, Report, Row, Seconds, dtype_name
from .stages import split
from .table import OURS
from .training import TrainingStep, infer, seconds_of

# Of the random numbers of every call.
_SEED = 0

# Calls of each side: before they are timed, and timed at most and at least (fewer where many points make a curve).
_UNTIMED = 2
_MOST = {"cpu": 5, "cuda": 8}
_FEWEST = {"step": 3, "inference": 3, "scaling": 2}

# Of a case's time, at least so much goes to turns: compiling for the first time takes longer than was reckoned.
_TURNS_SHARE = 0.3

# Implementations whose time is split by stage in the first case of each dtype.
_SPLIT = (OURS, "torchaudio", "transformers sdpa")


@dataclass
class _Side:
    """One implementation in one case."""

    peer: Peer
    model: PeerModel
    step: TrainingStep
    checked: dict[str, float]
    first_seconds: float = 0.0
    step_bytes: int | None = None
    times: list[float] = field(default_factory=list)
    stages: dict[str, float] | None = None


class Suite:
    """Measures cases into ``report``.

    Args:
        report: what is found is added to it. It has the limits in the cases' dtypes.
        device: where everything runs.
        peers: the implementations, the most important first.
        budget: how long all may take; what is being done is said there.
        save: called after each case.
    """

    def __init__(
        self,
        report: Report,
        device: torch.device,
        peers: Sequence[Peer],
        budget: Budget,
        *,
        save: Callable[[], None],
    ) -> None:
        self.report, self.device, self.peers = report, device, peers
        self.budget, self.save = budget, save
        self._models, self._pace = Models(device), Pace(device)
        self._known: dict[tuple[str, tuple], Row] = {}  # by implementation and work

    def run(self, cases: Iterable[Case]) -> None:
        """Measure ``cases``, but for what the report has of them already.

        Raises:
            DeviceLost: nothing more can be measured in this process; another may go on with the same report and cases.
        """
        for case in cases:
            with self._losses_noted(case.title) as begin:
                if begin:
                    (self.measure_operators if case.kind == "operators" else self.measure)(case)
                elif case.kind != "operators":
                    for peer in self._that_can(case):
                        reason = "the device was lost in this case, by no implementation in particular"
                        self._note(case, peer, f"not run: {reason}")
            self.save()
        with self._losses_noted("limits") as begin:
            if begin:
                self._models.forget_all()
                self._measure_limits_again()

    @contextmanager
    def _losses_noted(self, case: str) -> Iterator[bool]:
        """Notes a device that is lost beside any implementation. Gives whether to begin: not where that happened before."""
        before = [each for each in self.report.left_out if each.lost_device and each.implementation == ALL]
        try:
            yield all(each.case != case for each in before)
        except DeviceLost:
            raise
        except Exception as error:
            if answers(self.device):
                raise
            raise lost(self.report, case, ALL, error) from error

    def measure_operators(self, case: Case) -> None:
        until = time.monotonic() + min(case.share * self.budget.seconds, self.budget.left())
        operators.measure(
            self.report,
            device=self.device,
            dtype=case.dtype,
            size=case.architecture.name,
            seconds_left=lambda: until - time.monotonic(),
            progress=self.budget.say,
        )

    def measure(self, case: Case) -> None:
        self._models.forget_all(but=(case.architecture, case.num_classes))
        peers = self._that_fit(case, self._not_known(case, self._that_can(case)))
        if not peers:
            return
        batches = [
            make(list(lengths), case.architecture, case.num_classes, seed=number).to(self.device)
            for number, lengths in enumerate(case.lengths)
        ]
        # Together they take turns. Where memory does not hold all models, one after the other.
        parameters = sum(each.numel() for each in self._models.weights(self._setting(case)).values())
        groups = [peers] if hold_together(parameters, len(peers), self.device) else [[peer] for peer in peers]
        finish = time.monotonic() + min(case.share * self.budget.seconds, self.budget.left())
        for number, group in enumerate(groups):
            share = (finish - time.monotonic()) / (len(groups) - number)
            self._measure_group(case, group, batches, share)
            if len(groups) > 1:
                self._models.forget_all()

    def _measure_limits_again(self) -> None:
        """What a busy machine did not reach at the beginning it may reach now; rows stand beside the best."""
        for dtype, first in self.report.limits.items():
            again = measure_limits(self.device, getattr(torch, dtype))
            self.report.limits[dtype] = Limits(*map(max, astuple(first), astuple(again)))
        self.report.rows[:] = [
            row if row.limits is None else replace(row, limits=self.report.limits[row.dtype])
            for row in self.report.rows
        ]

    def _measure_group(self, case: Case, peers: Sequence[Peer], batches: list[Batch], seconds: float) -> None:
        started = time.monotonic()
        sides = [side for peer in peers if (side := self._prepare(case, peer, batches)) is not None]
        try:
            self._take_turns(case, sides, batches, max(started + seconds, time.monotonic() + _TURNS_SHARE * seconds))
            was_split = any(row.stages and row.dtype == dtype_name(case.dtype) for row in self.report.rows)
            if case.kind == "step" and case.layout == "even" and not was_split:
                self._split_by_stage(case, [side for side in sides if side.peer.name in _SPLIT], batches)
        except DeviceLost:  # another process times anew those that had few turns
            sides = [side for side in sides if len(side.times) >= _FEWEST[case.kind]]
            raise
        finally:  # an interrupted case keeps what it has
            flops = self._flops_of(case, batches)
            for side in (side for side in sides if side.times):
                self.report.rows.append(self._row(case, side, flops))
                self._known[(side.peer.name, _work(case))] = self.report.rows[-1]

    def _take_turns(self, case: Case, sides: list[_Side], batches: list[Batch], until: float) -> None:
        """A side that fails is taken out of ``sides``."""
        self.budget.say(f"{case.title}: in turn")
        for turn in range(_MOST[self.device.type]):
            if turn >= _FEWEST[case.kind] and (time.monotonic() > until or self.budget.left() < 0):
                break
            for side in list(sides):
                try:
                    side.times.append(seconds_of(self._call(case, side, batches), self.device) / len(batches))
                except Exception as error:  # memory that was there before, say
                    sides.remove(side)
                    self._leave_out(case, side.peer, error)

    def _prepare(self, case: Case, peer: Peer, batches: list[Batch]) -> _Side | None:
        """The side, checked, warmed up, and its memory measured; None where that fails, and the report says why."""
        setting = self._setting(case)
        try:
            self.budget.say(f"{case.title}: checking {peer.name}")
            checked = self._models.check(peer, setting)
            self.budget.say(f"{case.title}: building {peer.name}")
            model, step = self._models.build(peer, setting)
            side = _Side(peer, model, step, checked)
            call = self._call(case, side, batches)
            self.budget.say(f"{case.title}: first call of {peer.name}")
            side.first_seconds = seconds_of(call, self.device)
            started = time.monotonic()
            step_bytes = peak_of(call, self.device)
            # A graph's memory lies in a pool of its own, of which replaying it says nothing.
            side.step_bytes = None if model.overwrites_gradients else step_bytes
            flops = len(batches) * self._flops_of(case, batches)
            self._pace.learn(case, peer, time.monotonic() - started, flops)
        except DifferentWork as error:
            self._note(case, peer, f"rejected: {error}", rejected=True)
            return None
        except Exception as error:  # a peer's failure, whatever it is, must not cost the other sides their figures
            self._leave_out(case, peer, error)
            return None
        return side

    def _call(self, case: Case, side: _Side, batches: list[Batch]) -> Callable[[], None]:
        """The same masks every time: shapes follow from them, and a shape that is new may be compiled, captured or tuned for."""
        step = partial(infer, side.model, device=self.device) if case.kind == "inference" else side.step

        def call() -> None:
            torch.manual_seed(_SEED)
            for batch in batches:
                step(batch, dtype=case.dtype)

        return call

    def _split_by_stage(self, case: Case, sides: list[_Side], batches: list[Batch]) -> None:
        for side in sides:
            if self.budget.left() < 4 * max(side.times):
                return
            self.budget.say(f"{case.title}: stages of {side.peer.name}")
            call = self._call(case, side, batches[:1])
            try:
                side.stages = split(side.model, call, self.device) or None
            except Exception as error:  # whatever a profiler does, the times are measured
                if not answers(self.device):
                    raise lost(self.report, case.title, side.peer.name, error) from error
                self._note(case, side.peer, f"no split by stage: {first_line(error)}")

    def _row(self, case: Case, side: _Side, flops: float) -> Row:
        optimizer = None if case.kind == "inference" else side.step.optimizer
        held = held_by(side.model.module, optimizer)
        return Row(
            kind=case.kind,
            case=case.name,
            implementation=side.peer.name,
            version=side.peer.version(),
            device=self.device.type,
            dtype=dtype_name(case.dtype),
            shape=_shape(case),
            seconds=Seconds.of(side.times),
            peak_bytes=None if side.step_bytes is None else held + side.step_bytes,
            step_bytes=side.step_bytes,
            audio_seconds=case.audio_seconds,
            flops=flops,
            limits=self.report.limits[dtype_name(case.dtype)],
            first_seconds=side.first_seconds,
            stages=side.stages,
            check=side.checked,
        )

    def _that_can(self, case: Case) -> list[Peer]:
        """Those that are asked for and can run the case; the others are noted with the reason."""
        able, settled = [], self.report.settled(case.kind, case.name, dtype_name(case.dtype))
        for peer in self.peers:
            if peer.name in settled or (case.peers is not None and peer.name not in case.peers):
                continue
            if peer.name in case.without:
                self._note(case, peer, ELSEWHERE)
                continue
            reason = why_no_more(self.report, peer.name, _is_of_models) or peer.why_not(self._setting(case))
            reason = reason or why_too_large(case, peer, self.device)
            if reason is None:
                able.append(peer)
            else:
                self._note(case, peer, reason)
        return able

    def _not_known(self, case: Case, peers: list[Peer]) -> list[Peer]:
        """Those that have not done the same work in another case; the others' rows are used again."""
        known = {peer.name: row for peer in peers if (row := self._known.get((peer.name, _work(case)))) is not None}
        for row in known.values():
            self.report.rows.append(replace(row, kind=case.kind, case=case.name, shape=_shape(case), stages=None))
        return [peer for peer in peers if peer.name not in known]

    def _that_fit(self, case: Case, peers: list[Peer]) -> list[Peer]:
        """Those for which there is time, the case's share of it."""
        fitting, left = [], min(self.budget.left(), case.share * self.budget.seconds)
        for peer in peers:
            seconds = self._seconds_needed(case, peer)
            if seconds <= left:
                fitting.append(peer)
                left -= seconds
            else:
                self._note(
                    case, peer, f"{NO_TIME}: needs about {seconds:.0f} s, and {max(left, 0.0):.0f} s were left for it"
                )
        return fitting

    def _seconds_needed(self, case: Case, peer: Peer) -> float:
        rate, setting = self.report.limits[dtype_name(case.dtype)].flops_per_second, self._setting(case)
        checked, built = self._models.known_check(peer, setting) is not None, self._models.is_built(peer, setting)
        return self._pace.seconds(case, peer, _UNTIMED + _FEWEST[case.kind], rate, checked=checked, built=built)

    def _setting(self, case: Case) -> Setting:
        return Setting(case.architecture, case.num_classes, self.device, case.dtype, case.layout != "even")

    def _flops_of(self, case: Case, batches: Sequence[Batch]) -> float:
        """Of one of ``batches``, the mean: of a step, or of inference."""
        if case.kind == "inference":
            flops = [inference_flops(case.architecture, batch.samples) for batch in batches]
        else:
            flops = [
                step_flops(case.architecture, batch.samples, case.num_classes, int(batch.mask.sum()))
                for batch in batches
            ]
        return sum(flops) / len(flops)

    def _leave_out(self, case: Case, peer: Peer, error: Exception) -> None:
        """A failure of our own is an error of the whole run. The model goes: what it holds may be what the others lack."""
        broken = peer.name.startswith(OURS) and not _out_of_memory(error)
        if not answers(self.device):
            raise lost(self.report, case.title, peer.name, error, rejected=broken) from error
        self._note(case, peer, first_line(error), rejected=broken)
        self._models.forget(peer, self._setting(case))

    def _note(self, case: Case, peer: Peer, reason: str, *, rejected: bool = False) -> None:
        entry = LeftOut(case.title, peer.name, reason, rejected)
        if entry not in self.report.left_out:
            self.report.left_out.append(entry)


def _is_of_models(title: str) -> bool:
    return title.partition(": ")[0] not in operators.OPERATORS


def _work(case: Case) -> tuple:
    """What cases that are the same work for an implementation have in common."""
    inference = case.kind == "inference"
    return case.architecture, case.num_classes, case.dtype, tuple(sorted(set(case.lengths))), inference


def _shape(case: Case) -> dict[str, str | int | float]:
    shape = {
        "model": case.architecture.name,
        "classes": case.num_classes,
        "utterances": len(case.lengths[0]),
        "audio_seconds": case.audio_seconds,
        "padding": 1.0 - case.audio_seconds / case.grid_seconds,
        "lengths": case.layout,
        "batches": len(case.lengths),
    }
    return shape if case.axis is None else shape | {"axis": case.axis, "value": case.value}


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
