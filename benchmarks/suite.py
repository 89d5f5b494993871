"""Runs cases within a time: builds the sides, checks that they do the same work, times them in turn, and notes what is left out.

A side is timed only after `peers.agreement.check`. The first call compiles and warms up, the second measures memory; the turns
after them are what is reported. A report is saved after every case, so that an interrupted run loses the case it was in.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

import hubert_fast

from . import operators
from .architecture import Architecture
from .batches import Batch, make
from .budget import Budget
from .cases import Case, Operators
from .flops import inference_flops, step_flops
from .limits import measure_limits
from .machine import available_bytes, memory_bytes
from .memory import held_by, peak_of
from .peers.agreement import DifferentWork, check
from .peers.building import build
from .peers.peer import Peer, PeerModel, Setting
from .report import NO_TIME, LeftOut, Limits, Report, Row, Seconds
from .stages import split
from .training import TrainingStep, infer, one_pass, seconds_of

OURS = "hubert_fast"

# Calls of each side: before they are timed, and timed at most and at least (fewer where many points make a curve).
_UNTIMED = 2
_MOST = {"cpu": 5, "cuda": 8}
_FEWEST = {"step": 3, "inference": 3, "scaling": 2}

# Seconds that building, checking and (where a peer is compiled) compiling take, until they are known better.
_PREPARING = {"cpu": 6.0, "cuda": 6.0}
_COMPILING = {"cpu": (40.0, 9.0), "cuda": (20.0, 5.0)}  # once, and for each layer

# Sides run at this share of the rate of products, until they are known better.
_USUAL_SHARE = 0.3

# Of the free memory that broadcast logits may take: there is more in a step than they.
_MEMORY_SHARE = 0.7

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
        report: what is found is added to it.
        device: where everything runs.
        peers: the implementations, the most important first.
        budget: how long all may take.
        say: called with what is being done, and more exactly what.
        save: called after each case.
    """

    def __init__(
        self,
        report: Report,
        device: torch.device,
        peers: Sequence[Peer],
        budget: Budget,
        *,
        say: Callable[..., None],
        save: Callable[[], None],
    ) -> None:
        self.report, self.device, self.peers = report, device, peers
        self.budget, self.say, self.save = budget, say, save
        self._weights: dict[tuple[Architecture, int], dict[str, Tensor]] = {}
        self._checked: dict[tuple[str, Architecture, torch.dtype], dict[str, float]] = {}
        self._rejected: dict[tuple[str, Architecture, torch.dtype], DifferentWork] = {}
        self._built: dict[tuple[str, Architecture, int], tuple[PeerModel, TrainingStep]] = {}
        self._pace: dict[tuple[str, torch.dtype, str], float] = {}  # seconds a FLOP
        self._split: set[torch.dtype] = set()
        self._known: dict[tuple[str, tuple], Row] = {}  # by implementation and work

    def run(self, cases: Iterable[Case | Operators]) -> None:
        for case in cases:
            if isinstance(case, Operators):
                self.measure_operators(case)
            else:
                self.measure(case)
            self.save()
        self._free()
        self._measure_limits_again()

    def measure_operators(self, case: Operators) -> None:
        self._measure_limits(case.dtype)
        until = time.monotonic() + min(case.share * self.budget.seconds, self.budget.left())
        operators.measure(
            self.report,
            device=self.device,
            dtypes=[_name(case.dtype)],
            size=case.architecture.name,
            seconds_left=lambda: until - time.monotonic(),
            progress=self.say,
        )

    def measure(self, case: Case) -> None:
        self._free(but=(case.architecture, case.num_classes))
        self._measure_limits(case.dtype)
        peers = self._that_fit(case, self._not_known(case, self._that_can(case)))
        if not peers:
            return
        batches = [
            make(list(lengths), case.architecture, case.num_classes, seed=number).to(self.device)
            for number, lengths in enumerate(case.lengths)
        ]
        # Together they take turns. Where memory does not hold all models, one after the other.
        groups = [peers] if self._hold_together(case, len(peers)) else [[peer] for peer in peers]
        finish = time.monotonic() + min(case.share * self.budget.seconds, self.budget.left())
        for number, group in enumerate(groups):
            share = (finish - time.monotonic()) / (len(groups) - number)
            self._measure_group(case, group, batches, until=time.monotonic() + share)
            if len(groups) > 1:
                self._free()

    def _measure_limits(self, dtype: torch.dtype) -> None:
        if _name(dtype) not in self.report.limits:
            self.say(f"limits in {_name(dtype)}")
            self.report.limits[_name(dtype)] = measure_limits(self.device, dtype)

    def _measure_limits_again(self) -> None:
        """What a busy machine did not reach at the beginning it may reach now; rows stand beside the best."""
        for dtype, first in self.report.limits.items():
            again = measure_limits(self.device, getattr(torch, dtype))
            self.report.limits[dtype] = Limits(*map(max, astuple(first), astuple(again)))
        self.report.rows[:] = [
            row if row.limits is None else replace(row, limits=self.report.limits[row.dtype])
            for row in self.report.rows
        ]

    def _measure_group(self, case: Case, peers: Sequence[Peer], batches: list[Batch], *, until: float) -> None:
        sides = [side for peer in peers if (side := self._prepare(case, peer, batches)) is not None]
        try:
            self._take_turns(case, sides, batches, until)
            if case.kind == "step" and case.layout == "even" and case.dtype not in self._split:
                self._split.add(case.dtype)
                self._split_by_stage(case, [side for side in sides if side.peer.name in _SPLIT], batches)
        finally:  # an interrupted case keeps what it has
            flops = self._flops_of(case, batches)
            for side in (side for side in sides if side.times):
                self.report.rows.append(self._row(case, side, flops))
                self._known[(side.peer.name, _work(case))] = self.report.rows[-1]

    def _take_turns(self, case: Case, sides: list[_Side], batches: list[Batch], until: float) -> None:
        """A side that fails is taken out of ``sides``."""
        for turn in range(_MOST[self.device.type]):
            if turn >= _FEWEST[case.kind] and (time.monotonic() > until or self.budget.left() < 0):
                break
            for side in list(sides):
                self.say(f"{case.name}, {_name(case.dtype)}: in turn", f"{turn + 1}, {side.peer.name}")
                call = self._call(case, side, batches, seed=turn)
                try:
                    side.times.append(seconds_of(call, self.device) / len(batches))
                except RuntimeError as error:  # memory that was there before, say
                    sides.remove(side)
                    self._leave_out(case, side.peer, error)

    def _prepare(self, case: Case, peer: Peer, batches: list[Batch]) -> _Side | None:
        """The side, checked, warmed up, and its memory measured; None where that fails, and the report says why."""
        setting = self._setting(case)
        try:
            self.say(f"{case.name}, {_name(case.dtype)}: checking {peer.name}")
            checked = self._check(peer, setting)
            self.say(f"{case.name}, {_name(case.dtype)}: building {peer.name}")
            model, step = self._build(peer, setting)
            side = _Side(peer, model, step, checked)
            call = self._call(case, side, batches, seed=0)
            self.say(f"{case.name}, {_name(case.dtype)}: first call of {peer.name}")
            side.first_seconds = seconds_of(call, self.device)
            started = time.monotonic()
            step_bytes = peak_of(call, self.device)
            # A graph's memory lies in a pool of its own, of which replaying it says nothing.
            side.step_bytes = None if model.overwrites_gradients else step_bytes
            flops = len(batches) * self._flops_of(case, batches)
            self._pace[(peer.name, case.dtype, case.kind)] = (time.monotonic() - started) / flops
        except DifferentWork as error:
            self._note(case, peer, f"rejected: {error}", rejected=True)
            return None
        except Exception as error:  # a peer's failure, whatever it is, must not cost the other sides their figures
            self._leave_out(case, peer, error)
            return None
        return side

    def _check(self, peer: Peer, setting: Setting) -> dict[str, float]:
        known = self._known_check(peer, setting)
        if known is None:
            key = (peer.name, setting.architecture, setting.dtype)
            if key in self._rejected:
                raise self._rejected[key]
            try:
                known = self._checked[key] = check(peer, setting)
            except DifferentWork as error:
                self._rejected[key] = error
                raise
            finally:
                self._release_memory()
        return known

    def _known_check(self, peer: Peer, setting: Setting) -> dict[str, float] | None:
        """A check for a 16-bit dtype compares in float32 too, but for compiled peers."""
        dtypes = [setting.dtype]
        if setting.dtype == torch.float32 and not peer.compiled:
            dtypes += [torch.bfloat16, torch.float16]
        found = (self._checked.get((peer.name, setting.architecture, dtype)) for dtype in dtypes)
        return next((each for each in found if each is not None), None)

    def _build(self, peer: Peer, setting: Setting) -> tuple[PeerModel, TrainingStep]:
        key = (peer.name, setting.architecture, setting.num_classes)
        if key not in self._built:
            model = build(peer, setting, self._weights_of(setting))
            self._built[key] = model, TrainingStep(model)
        return self._built[key]

    def _weights_of(self, setting: Setting) -> dict[str, Tensor]:
        key = (setting.architecture, setting.num_classes)
        if key not in self._weights:
            torch.manual_seed(0)
            arguments = setting.architecture.factory_arguments(setting.num_classes)
            with self.device:
                self._weights = {key: hubert_fast.hubert_pretrain_model(**arguments).state_dict()}
        return self._weights[key]

    def _call(self, case: Case, side: _Side, batches: list[Batch], *, seed: int) -> Callable[[], None]:
        if case.kind == "inference":
            return one_pass(partial(infer, side.model, device=self.device, dtype=case.dtype), batches, seed)
        return one_pass(partial(side.step, dtype=case.dtype), batches, seed)

    def _split_by_stage(self, case: Case, sides: list[_Side], batches: list[Batch]) -> None:
        for side in sides:
            if self.budget.left() < 4 * max(side.times):
                return
            self.say(f"{case.name}, {_name(case.dtype)}: stages of {side.peer.name}")
            call = self._call(case, side, batches[:1], seed=0)
            try:
                side.stages = split(side.model, call, self.device) or None
            except Exception as error:  # whatever a profiler does, the times are measured
                self._note(case, side.peer, f"no split by stage: {type(error).__name__}: {error}".splitlines()[0])

    def _row(self, case: Case, side: _Side, flops: float) -> Row:
        optimizer = None if case.kind == "inference" else side.step.optimizer
        held = held_by(side.model.module, optimizer)
        return Row(
            kind=case.kind,
            case=case.name,
            implementation=side.peer.name,
            version=side.peer.version(),
            device=self.device.type,
            dtype=_name(case.dtype),
            shape=_shape(case),
            seconds=Seconds.of(side.times),
            peak_bytes=None if side.step_bytes is None else held + side.step_bytes,
            step_bytes=side.step_bytes,
            audio_seconds=case.audio_seconds,
            flops=flops,
            limits=self.report.limits[_name(case.dtype)],
            first_seconds=side.first_seconds,
            stages=side.stages,
            check=side.checked,
        )

    def _that_can(self, case: Case) -> list[Peer]:
        """Those that are asked for and can run the case; the others are noted with the reason."""
        able = []
        for peer in self.peers:
            if case.peers is not None and peer.name not in case.peers:
                continue
            if peer.name in case.without:
                self._note(case, peer, "compiled anew for every dtype, model and layout, so in one case at most")
                continue
            reason = peer.why_not(self._setting(case)) or self._too_large(case, peer)
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
        usual = 1.0 / (_USUAL_SHARE * self.report.limits[_name(case.dtype)].flops_per_second)
        # Inference and scaling go at the pace of steps until they have one of their own.
        pace = self._pace.get(
            (peer.name, case.dtype, case.kind), self._pace.get((peer.name, case.dtype, "step"), usual)
        )
        padding = case.grid_seconds / case.audio_seconds
        flops = sum(step_flops(case.architecture, each, case.num_classes) for each in case.lengths)
        if case.kind == "inference":
            flops = sum(inference_flops(case.architecture, each) for each in case.lengths)
        seconds = (_UNTIMED + _FEWEST[case.kind]) * pace * padding * flops
        if self._known_check(peer, self._setting(case)) is None:
            seconds += _PREPARING[self.device.type]
        if peer.compiled and (peer.name, case.architecture, case.num_classes) not in self._built:
            once, layer = _COMPILING[self.device.type]
            seconds += once + layer * case.architecture.layers
        return seconds

    def _too_large(self, case: Case, peer: Peer) -> str | None:
        """Logits by broadcasting hold about seven float32 tensors [classes + 1, frames, final_dim]; the system would kill us."""
        available = available_bytes(self.device)
        if not peer.broadcasts_logits or available is None or case.kind == "inference":
            return None
        frames = max(len(each) * case.architecture.frames(max(each)) for each in case.lengths)
        needed = 7 * 4 * (case.num_classes + 1) * frames * case.architecture.final_dim
        if self.device.type == "cuda":
            return None  # running out of memory is an error there that can be caught
        allowed = _MEMORY_SHARE * available
        if needed < allowed:
            return None
        free = f"{_MEMORY_SHARE:.0%} of the {available / 1e9:.0f} GB that are free"
        return f"its broadcast logits need about {needed / 1e9:.0f} GB, more than {free}"

    def _hold_together(self, case: Case, peers: int) -> bool:
        memory = memory_bytes(self.device)
        weights = sum(each.numel() for each in self._weights_of(self._setting(case)).values())
        return memory is None or 16 * weights * peers < 0.6 * memory  # weights, gradients, Adam's two moments

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
        text = (str(error).strip() or repr(error)).splitlines()[0]
        broken = peer.name.startswith(OURS) and not _out_of_memory(error)
        self._note(case, peer, f"{type(error).__name__}: {text}", rejected=broken)
        self._built.pop((peer.name, case.architecture, case.num_classes), None)
        self._release_memory()

    def _note(self, case: Case, peer: Peer, reason: str, *, rejected: bool = False) -> None:
        self.report.left_out.append(LeftOut(f"{case.name}, {_name(case.dtype)}", peer.name, reason, rejected))

    def _free(self, but: tuple[Architecture, int] | None = None) -> None:
        """Forget models that are not of the architecture and number of classes that come next."""
        dropped = [key for key in self._built if key[1:] != but]
        for key in dropped:
            del self._built[key]
        if dropped:
            self._release_memory()

    def _release_memory(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
