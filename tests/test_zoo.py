"""The fault zoo: a part of it is run, all of it as `slow`; the scoring is held against verdicts made by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.zoo import running, scoring
from tests.zoo.adapter import FAMILY, Adapter
from tests.zoo.cases import CASES, FAMILIES, FIRST, Case, Expect, control
from tests.zoo.scoring import Judgement, Run, Verdict, judge, score
from tests.zoo.training import Training

pytestmark = pytest.mark.timeout(900)
"""Of a fixture that runs many cases, on a machine that has other things to do."""
OURS = "streammon"
FAULTS = (
    *("frozen_first", "input_zero_second", "missing_zero_grad", "vanish_first"),
    *("rank_nan_first", "rank_zero_shard", "desync_no_ddp", "same_data"),
)
CONTROLS = ("h_base", "h_conv_bn", "h_frozen", "l_text_only", "l_two_backwards")
MORE_FAULTS = ("not_in_optimizer_second", "dead_second", "nan_batch", "decay_huge_second", "x_loss_scaled")
MORE_CONTROLS = ("h_guide_rates", "h_accumulate", "l_lora")
"""Of the kinds of those above: only the slow tests run them."""
THREE_RANKS = ("h_base", "rank_nan_first", "rank_scaled_second")
"""On three ranks, with three streams."""
EPOCHS = 5
"""95 steps: less than half of a run is enough for what is run here every time."""


def on_two_ranks(*names: str) -> dict[str, Run]:
    """These cases, one after the other on the same two processes."""
    return {run.case: run for run in running.run_on(2, [(name, 0) for name in names], [OURS], epochs=EPOCHS)}


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return on_two_ranks(*FAULTS, *CONTROLS)


@pytest.fixture(scope="module")
def more_runs() -> dict[str, Run]:
    return on_two_ranks(*MORE_FAULTS, *MORE_CONTROLS)


@pytest.fixture(scope="module")
def three_ranks() -> dict[str, Run]:
    jobs = [(name, 0) for name in THREE_RANKS]
    return {run.case: run for run in running.run_on(3, jobs, [OURS], epochs=EPOCHS, views="three")}


def said(run: Run) -> Judgement:
    assert not run.errors, run.errors
    return judge(CASES[run.case], run.streams, run.verdicts[OURS])


def assert_found(run: Run) -> None:
    found = said(run)
    assert found.strict, run.verdicts
    assert found.wrong == ()


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(runs: dict[str, Run], name: str) -> None:
    assert_found(runs[name])


@pytest.mark.parametrize("name", CONTROLS)
def test_nothing_is_said_of_a_healthy_training(runs: dict[str, Run], name: str) -> None:
    assert said(runs[name]).wrong == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_FAULTS)
def test_another_planted_fault_is_found(more_runs: dict[str, Run], name: str) -> None:
    assert_found(more_runs[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_CONTROLS)
def test_nothing_is_said_of_another_healthy_training(more_runs: dict[str, Run], name: str) -> None:
    assert said(more_runs[name]).wrong == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE_RANKS)
def test_three_streams_on_three_ranks(three_ranks: dict[str, Run], name: str) -> None:
    run = three_ranks[name]
    assert (run.world, tuple(run.streams)) == (3, ("left", "right", "fou"))
    found = said(run)
    assert (found.stream, found.rank) == (True, True) if CASES[name].expect else found.wrong == ()


# The scoring ------------------------------------------------------------------------------------------------------

STREAMS = ("audio", "video")
ON_RANK = Case("x", Training, expect=Expect(("desync",), ("config",), FIRST, rank=1, onset=10))
ANYWHERE = Case("x", Training, expect=Expect(("stalled",)))


def told(case: Case, *verdicts: Verdict) -> tuple[bool, int, bool, bool, bool, int | None]:
    """(hit, wrong verdicts, strict, stream, rank, delay)."""
    judged = judge(case, STREAMS, verdicts)
    return judged.hit, len(judged.wrong), judged.strict, judged.stream, judged.rank, judged.delay


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (Verdict("desync", "audio", 1, 12), (True, 0, True, True, True, 2)),
        (Verdict("config", "audio", 1, 10), (True, 0, False, True, True, 0)),
        (Verdict("desync", None, 1, 12), (True, 0, False, False, True, 2)),
        (Verdict("desync", "audio", None, 12), (True, 0, False, True, False, 2)),
        (Verdict("desync", "audio", None, 12, undecided=True), (True, 0, True, True, True, 2)),
        (Verdict("desync", "video", 1, 12, victim="audio"), (True, 0, True, True, True, 2)),
        (Verdict("desync", "video", 1, 12), (False, 1, False, False, False, None)),
        (Verdict("desync", "audio", 0, 12), (False, 1, False, False, False, None)),
        (Verdict("desync", "audio", 1, 9), (False, 1, False, False, False, None)),
        (Verdict("frozen", "audio", 1, 12), (False, 1, False, False, False, None)),
        (Verdict("desync", "audio", 1, 12, severity="info"), (False, 0, False, False, False, None)),
    ],
)
def test_a_verdict_is_right_in_family_stream_rank_and_time(verdict: Verdict, expected: tuple[Any, ...]) -> None:
    assert told(ON_RANK, verdict) == expected


def test_a_fault_of_the_whole_model_may_be_told_by_stream_but_not_by_rank() -> None:
    assert told(ANYWHERE, Verdict("stalled", "audio", step=3)) == (True, 0, True, True, True, 3)
    assert told(ANYWHERE, Verdict("stalled", rank=0)) == (False, 1, False, False, False, None)


def test_the_first_of_equal_verdicts_counts() -> None:
    late, early = Verdict("stalled", step=50), Verdict("stalled", step=20)
    assert judge(ANYWHERE, STREAMS, [late, early]).right == (early,)


def test_whatever_is_said_of_a_healthy_training_is_wrong() -> None:
    judged = judge(Case("x", Training), STREAMS, [Verdict("stalled"), Verdict("dead", severity="info")])
    assert (judged.alarm, judged.hit, len(judged.wrong)) == (True, False, 1)


def run_of(case: str, seed: int, *verdicts: Verdict) -> Run:
    return Run(case, seed, 2, ["left", "right"], 228, 0.1, 0.9, 3.0, {"m": list(verdicts)})


FOUND = Verdict("frozen", "left", step=4)
RUNS = (
    run_of("frozen_first", 0, FOUND),
    run_of("frozen_first", 1, FOUND, Verdict("straggler", rank=1, step=7)),
    run_of("frozen_first", 2),
    run_of("lr_low_all", 0, Verdict("stalled", step=90)),
    run_of("lr_low_all", 1, Verdict("stalled", step=190)),
    run_of("straggler", 0, Verdict("straggler", rank=1, step=50)),
    run_of("h_base", 0, Verdict("straggler", rank=0)),
    run_of("h_tanh", 0),
    run_of("h_adam", 0),
    run_of("l_lora", 0),
)


def test_the_figures_of_a_monitor() -> None:
    figures = score("m", RUNS)
    assert (figures.faults, figures.majority, figures.kinds) == (6, 3, 3)
    shares = ("recall", "informative", "strict", "stream", "rank", "healthy", "legal", "false", "exact", "windowed")
    assert {name: (round(getattr(figures, name).value, 3), getattr(figures, name).items) for name in shares} == {
        "recall": (0.833, 6),
        "informative": (0.667, 6),  # straggler is also told of a healthy run
        "strict": (0.833, 6),
        "stream": (0.667, 3),
        "rank": (1.0, 1),
        "healthy": (0.333, 3),
        "legal": (0.0, 1),
        "false": (0.286, 7),
        "exact": (0.667, 3),
        "windowed": (0.667, 3),
    }
    assert (figures.delay, figures.errors) == (50, 0)


def test_intervals_are_wilsons() -> None:
    healthy = score("m", [run_of("h_base", seed) for seed in range(28)]).healthy
    assert (round(healthy.low, 12), round(healthy.high, 4)) == (0.0, 0.1206)


def test_the_table_has_a_line_for_each_monitor() -> None:
    line = scoring.table([score("m", RUNS)]).splitlines()[-1]
    assert line == (
        "| m | 3 of 3 | 0.67 | 0.83 | 0.67 | 1.00 | 1 of 3 [0.06, 0.79] | 0 of 1 [0.00, 0.79] | 0.29 | 0.67 | 0.67 "
        "| 50 |"
    )


def test_the_table_of_parts_counts_runs_and_what_was_named() -> None:
    assert scoring.by_part("m", RUNS).splitlines()[2:] == [
        "| model | 1 | 2 of 3 | 2 of 3 | - | 4 |",
        "| optimizer | 1 | 2 of 2 | - | - | 140 |",
        "| ranks | 1 | 1 of 1 | - | 1 of 1 | 50 |",
    ]


def test_what_went_wrong_is_listed() -> None:
    lines = scoring.detail("m", RUNS).splitlines()
    assert lines[0] == "frozen_first seed 1: 1 false"
    assert lines[2] == "    ! warning straggler -/1 @7: "
    assert "frozen_first seed 2: MISS" in lines
    assert "lr_low_all seed 1: late 190" in lines
    assert not any(line.startswith("h_tanh") for line in lines)


def test_runs_are_the_same_after_a_file(tmp_path: Path) -> None:
    before = [*RUNS, Run("l_regression", 0, 2, ["left"], 1, 0.5, math.nan, 1.0, {"m": [FOUND]}, {"m": "Traceback"})]
    running.save(before, tmp_path / "runs.json")
    after = running.load([tmp_path / "runs.json"])
    assert after[:-1] == before[:-1]
    assert math.isnan(after[-1].accuracy)
    assert score("m", after).errors == 1


# The cases and their runner ---------------------------------------------------------------------------------------


def test_the_zoo_is_complete() -> None:
    cases = [case for case in CASES.values() if not case.extra]
    faults = [case for case in cases if case.expect]
    legal = [case for case in cases if case.legal]
    assert (len(faults), len(cases) - len(faults) - len(legal), len(legal)) == (43, 30, 15)
    assert sum(case.expect is not None and case.expect.rank is not None for case in faults) == 10
    assert {family for case in faults if case.expect for family in case.expect.families} == set(FAMILIES)
    assert set(FAMILY.values()) == set(FAMILIES)


def test_mistakes_in_cases_are_told() -> None:
    with pytest.raises(ValueError, match=r"families must be some of nonfinite, .*, got sleepy"):
        Expect(("sleepy",))
    with pytest.raises(ValueError, match="there are two cases called 'h_base'"):
        control("h_base")(Training)
    with pytest.raises(ValueError, match="no case of kind 'faults' has a name with one of h_base"):
        running.chosen("faults", ["h_base"])
    with pytest.raises(
        ValueError, match=r"a monitor is one of streammon, guide, .*losslint or package.module:Class, got 'mine'"
    ):
        running.adapter_class("mine")


class Elsewhere(Adapter):
    package = "a_package_that_nobody_has"


def test_a_peer_that_is_not_installed_is_known() -> None:
    assert running.missing("tests.test_zoo:Elsewhere") == "a_package_that_nobody_has"
    assert running.missing(OURS) is None


class Fragile(Adapter):
    """Raises in its second step."""

    def on_after_step(self, model: Any, step: int, loss: float, seconds: float) -> None:
        if step == 1:
            raise OSError("torn")

    def finish(self) -> list[Verdict]:
        return [FOUND]


def test_an_adapter_that_raises_is_left_out_and_recorded() -> None:
    (run,) = running.run_on(2, [("h_base", 0)], ["tests.test_zoo:Fragile"], epochs=1)
    assert run.steps == 19
    assert run.verdicts == {"tests.test_zoo:Fragile": []}
    assert run.errors["tests.test_zoo:Fragile"].endswith("OSError: torn\n")


# All of it --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["h_base", "rank_nan_first", "rank_scaled_second", "rank_labels", "desync_clipping"])
def test_one_of_four_ranks_is_named(name: str) -> None:
    (run,) = running.run_on(4, [(name, 0)], [OURS], views="three")
    found = said(run)
    assert found.wrong == ()
    assert CASES[name].expect is None or (found.hit and found.rank)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_zoo() -> None:
    runs = list(running.run_all([(name, 0) for name in running.chosen("all", ())], [OURS]))
    assert [run for run in runs if not isinstance(run, Run)] == []
    figures = score(OURS, [run for run in runs if isinstance(run, Run)])
    assert figures.errors == 0
    assert figures.majority >= 38
    assert figures.strict.value >= 0.85
    assert figures.rank.value >= 0.95
    assert (figures.healthy.value, figures.legal.value) == (0, 0)
    assert figures.false.value <= 0.08
