"""The suite times what does the same work, in the time it has, and says what it left out and why."""

import time

import pytest
import torch

from benchmarks import fitting, models
from benchmarks import suite as suite_module
from benchmarks.architecture import ARCHITECTURES
from benchmarks.batches import even
from benchmarks.budget import Budget
from benchmarks.cases import GPU, Case, plan
from benchmarks.peers.ours import HubertFast, ObjectiveModel, build_model
from benchmarks.report import Limits
from benchmarks.suite import Suite
from tests.benchmarks import fabricated

TINY, CPU = ARCHITECTURES["tiny"], torch.device("cpu")

pytestmark = pytest.mark.usefixtures("quick")


class Other(HubertFast):
    """Another implementation: ours under another name, as a stand-in."""

    name = "other"
    model = ObjectiveModel

    def build(self, setting, weights):
        type(self).built = getattr(type(self), "built", 0) + 1
        return self.model(build_model(setting, weights))


class Wrong(Other):
    """Its loss is 1% too large."""

    name = "wrong"

    class model(ObjectiveModel):
        def loss(self, batch):
            return 1.01 * super().loss(batch)


class Slow(Other):
    """Its loss takes a tenth of a second on the clock that the test owns."""

    name = "slow"

    def __init__(self, virtual_time):
        class Model(ObjectiveModel):
            def loss(self, batch):
                virtual_time(0.1)
                return super().loss(batch)

        self.model = Model


class Ours(HubertFast):
    """Ours, and every loss takes a hundredth of a second on that clock."""

    def __init__(self, virtual_time):
        self._virtual_time = virtual_time

    def build(self, setting, weights):
        model, virtual_time = super().build(setting, weights), self._virtual_time
        model.module.register_forward_pre_hook(lambda *_: virtual_time(0.01))
        return model


class Broken(Other):
    name = "broken"

    class model(ObjectiveModel):
        def forward_backward(self, batch, dtype):
            raise RuntimeError("it broke\nin many words")


def case(**fields):
    settings = {"share": 0.1, "kind": "step", "num_classes": 7, "dtype": torch.float32, "layout": "even"}
    return Case(architecture=TINY, **{**settings, "lengths": (tuple(even(2, 0.5)),), **fields})


def suite_of(report, *peers, budget=None, save=lambda: None):
    return Suite(report, CPU, peers, budget or Budget(600.0), save=save)


def measure(*cases, peers, seconds=600.0, saved=None):
    report = fabricated.report()
    save = (lambda: None) if saved is None else (lambda: saved.append(len(report.rows)))
    suite_of(report, *peers, budget=Budget(seconds), save=save).run(cases)
    return report


def test_every_side_is_a_row_with_what_was_measured(virtual_time):
    saved = []
    report = measure(case(), peers=[Ours(virtual_time), Slow(virtual_time)], saved=saved)
    ours, slow = report.rows
    assert (ours.implementation, slow.implementation) == ("hubert_fast", "slow") and not report.left_out
    assert (ours.seconds.median, slow.seconds.median) == (pytest.approx(0.01), pytest.approx(0.1))
    for row in report.rows:
        assert row.kind == "step" and row.case == "tiny, 7 classes, 2 x 0.5 s" and row.dtype == "float32"
        assert row.seconds.count >= 3 and row.first_seconds > 0 and row.audio_seconds == 1.0
        assert row.limits == fabricated.LIMITS and row.flops == ours.flops > 1e6
        assert 0 <= row.step_bytes < row.peak_bytes
        assert 0 <= row.check["loss"] < 1e-4 and 0 <= row.check["gradient"] < 1e-3
    assert ours.stages == {"loss": 1.0} and slow.stages is None
    assert saved == [2]


def test_a_wrong_peer_is_rejected_and_not_timed():
    report = measure(case(), peers=[HubertFast(), Wrong()])
    assert [row.implementation for row in report.rows] == ["hubert_fast"]
    (left_out,) = report.left_out
    assert left_out.implementation == "wrong" and left_out.rejected and "loss differs by 1.00%" in left_out.reason


def test_a_peer_that_breaks_costs_the_others_nothing():
    report = measure(case(), peers=[Broken(), HubertFast()])
    assert [row.implementation for row in report.rows] == ["hubert_fast"]
    assert report.left_out[0].reason == "RuntimeError: it broke" and not report.left_out[0].rejected


def test_a_failure_of_our_own_is_an_error(monkeypatch):
    monkeypatch.setattr(Broken, "name", "hubert_fast")
    assert measure(case(), peers=[Broken()]).left_out[0].rejected


def test_what_does_not_fit_into_the_time_is_left_out_with_the_reason():
    Other.built = 0
    # Its share is 7 s, and preparing one is reckoned with 6 s.
    report = measure(case(), peers=[HubertFast(), Other()], seconds=70.0)
    assert [row.implementation for row in report.rows] == ["hubert_fast"] and Other.built == 0
    assert report.left_out[0].implementation == "other" and "no time: needs about" in report.left_out[0].reason


def test_a_case_takes_no_more_than_its_share_of_the_time_beyond_three_turns(monkeypatch, virtual_time):
    monkeypatch.setattr(suite_module, "_MOST", {"cpu": 1000})
    monkeypatch.setattr(fitting, "_PREPARING", {"cpu": 0.0})
    row = measure(case(share=0.01), peers=[Slow(virtual_time)], seconds=100.0).rows[0]
    assert 3 <= row.seconds.count < 10


def test_broadcast_logits_that_would_not_fit_into_memory_are_not_tried(monkeypatch):
    monkeypatch.setattr(fitting, "available_bytes", lambda device: 100_000)
    monkeypatch.setattr(Other, "broadcasts_logits", True)
    report = measure(case(), peers=[HubertFast(), Other()])
    assert [row.implementation for row in report.rows] == ["hubert_fast"]
    assert "broadcast logits need" in report.left_out[0].reason


def test_where_memory_does_not_hold_all_models_they_go_one_after_the_other(monkeypatch):
    alive = []
    build = HubertFast.build

    def counting(self, setting, weights):
        alive.append(len(suite._models._built))
        return build(self, setting, weights)

    monkeypatch.setattr(Other, "build", counting)
    monkeypatch.setattr(fitting, "memory_bytes", lambda device: 1)
    monkeypatch.setattr(models, "check", lambda peer, setting: {})
    report = fabricated.report()
    suite = suite_of(report, HubertFast(), Other())
    suite.measure(case())
    assert [row.implementation for row in report.rows] == ["hubert_fast", "other"] and alive == [0]


def test_models_stay_for_the_next_case_of_the_same_model_and_are_checked_once():
    for cases, built in (
        (
            [case(), case(kind="inference"), case(dtype=torch.bfloat16)],
            1 + 1 + 2,
        ),  # timed; checked in one dtype, in both
        ([case(dtype=torch.bfloat16), case()], 1 + 2),  # float32 was compared already
        ([case(), case(num_classes=9)], 2 + 1),
    ):
        Other.built = 0
        measure(*cases, peers=[Other()])
        assert Other.built == built


def test_limits_are_measured_again_and_rows_stand_beside_the_best(monkeypatch):
    found = {torch.bfloat16: Limits(4e10, 2.0), torch.float32: Limits(1.0, 1e12)}
    monkeypatch.setattr(suite_module, "measure_limits", lambda device, dtype: found[dtype])
    report = measure(case(), case(dtype=torch.bfloat16), peers=[HubertFast()])
    assert report.limits == {"float32": Limits(1e10, 1e12), "bfloat16": Limits(4e10, 1e11)}  # it came with 1e10, 1e11
    assert [row.limits for row in report.rows] == [report.limits[row.dtype] for row in report.rows]


def test_batches_of_other_lengths_count_with_their_mean():
    lengths = (tuple(even(2, 0.5)), (16_000, 8_000))
    (row,) = measure(case(lengths=lengths, layout="librispeech-like"), peers=[HubertFast()]).rows
    assert row.audio_seconds == 1.25 and row.shape["batches"] == 2
    assert row.shape["padding"] == pytest.approx(1 - 2.5 / 3.0)


def test_the_same_work_is_measured_once_and_stands_in_both_cases():
    point = case(kind="scaling", axis="utterance seconds", value=0.5)
    step, scaling = measure(case(), point, peers=[HubertFast()]).rows
    assert scaling.seconds == step.seconds and (step.kind, scaling.kind) == ("step", "scaling")
    assert scaling.shape["axis"] == "utterance seconds" and scaling.shape["value"] == 0.5 and step.case != scaling.case
    assert measure(case(), case(kind="inference"), peers=[HubertFast()]).rows[1].seconds != step.seconds


def test_what_is_compiled_for_a_mask_falls_into_no_turn_and_costs_the_case_none(monkeypatch, virtual_time):
    class Compiling(Other):
        """Ten seconds for every mask that it has not seen; masks are drawn, as ours are."""

        name = "compiling"
        seen = set()

        class model(ObjectiveModel):
            def loss(self, batch):
                state = torch.get_rng_state()
                mask = int(torch.randint(1 << 30, ()))
                torch.set_rng_state(state)
                virtual_time(0.1 if mask in Compiling.seen else 10.1)
                Compiling.seen.add(mask)
                return super().loss(batch)

    report = fabricated.report()
    suite = suite_of(report, Compiling(), budget=Budget(600.0, time.monotonic()))
    suite.run([case(share=0.05)])  # 30 s, which building and warming up take
    (row,) = report.rows
    assert row.seconds.count == 5 and row.first_seconds == pytest.approx(10.1)
    assert row.seconds.median == pytest.approx(row.seconds.p80) == pytest.approx(0.1)
    assert suite._pace.seconds(case(), Compiling(), 1, 1e12, checked=True, built=True) < 0.11


def test_operators_that_are_asked_for_alone_get_all_the_time(monkeypatch, virtual_time):
    begun = []

    def measure_operators(report, *, seconds_left, **settings):
        while seconds_left() > 0.0:
            virtual_time(1.0)
            begun.append(settings["size"])

    monkeypatch.setattr(suite_module.operators, "measure", measure_operators)
    for kinds, seconds in ((["operators"], 60), (["operators", "inference"], 45)):
        begun.clear()
        suite = suite_of(fabricated.report(), budget=Budget(60.0, time.monotonic()))
        suite.run(plan(torch.device("cuda"), GPU, ["base"], [torch.bfloat16], kinds))
        assert begun == ["base"] * seconds  # shares of 0.15 and 0.05
