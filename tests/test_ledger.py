"""sinks/ledger.py: when a finding stood, the verdict of a run, and the pace of alerts."""

from __future__ import annotations

import pytest

from ddp_streammon.config import Severity
from ddp_streammon.report import STOPPED
from ddp_streammon.rules.finding import Action, Finding
from ddp_streammon.sinks.ledger import COLUMNS, MOST_ENTRIES, Ledger, Pace


def found(sentence: str, rule: str = "R", severity: Severity = Severity.warning, **more: object) -> Finding:
    return Finding(sentence, rule=rule, severity=severity, **more)


CLEAR = found("no alarm from 25 rules", rule="OK", severity=Severity.info)


def table(ledger: Ledger) -> list[dict[str, object]]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in ledger.rows()]


def test_a_finding_of_steps_is_cleared_by_a_step_and_one_of_epochs_by_an_epoch() -> None:
    ledger = Ledger()
    of_steps, of_epochs = found("a norm of 3 is large"), found("it overfits", rule="E", stream="rgb")
    assert ledger.take("step", 1, [of_steps]) == [of_steps]
    assert ledger.take("epoch", 1, [of_epochs]) == [of_epochs]
    again = found("a norm of 4 is large", evidence={"norm": 4.0}, action=Action("lr", "rgb", 0.1, 0.2))
    assert ledger.take("step", 2, [again]) == []
    assert ledger.take("epoch", 2, [of_steps, of_epochs]) == []
    assert [row["cleared"] for row in table(ledger)] == [None, None]
    assert ledger.changes == 2
    assert ledger.take("step", 3, []) == []
    assert [row["cleared"] for row in table(ledger)] == [3, None]
    assert ledger.take("epoch", 4, []) == []
    assert ledger.changes == 4
    assert ledger.take("step", 5, [of_steps]) == [of_steps]
    assert ledger.changes == 5
    first, second = table(ledger)
    assert (first["raised"], first["cleared"], first["times"]) == (1, None, 2)
    assert (second["raised"], second["cleared"], second["times"], second["stream"]) == (1, 4, 1, "rgb")


def test_a_row_has_the_latest_numbers_and_the_override() -> None:
    ledger = Ledger()
    ledger.take("step", 1, [found("a norm of 3")])
    action = Action("lr", "rgb", 0.1, 0.2, how="optim.streams.rgb.lr=0.1")
    ledger.take("step", 2, [found("a norm of 4", rank=1, evidence={"norm": 4.0, "ratio": 0.5}, action=action)])
    first, second = table(ledger)  # another rank is another finding
    assert (first["finding"], first["cleared"], first["override"], first["evidence"]) == ("a norm of 3", 2, "", "")
    assert (second["finding"], second["rank"], second["severity"]) == ("a norm of 4", 1, "warning")
    assert (second["evidence"], second["override"]) == ("norm=4, ratio=0.5", "optim.streams.rgb.lr=0.1")


def test_the_verdict_is_the_worst_finding_or_what_looked() -> None:
    ledger = Ledger()
    assert ledger.verdict() == "no alarm"
    ledger.take("epoch", 1, [CLEAR, found("a hint", severity=Severity.info)])
    assert ledger.verdict() == "no alarm from 25 rules"
    assert ledger.verdict(exit_code=1) == "the run failed; no alarm from 25 rules"
    assert ledger.verdict(exit_code=STOPPED) == "the run was stopped; no alarm from 25 rules"
    assert [row["finding"] for row in table(ledger)] == ["a hint"]
    cause = found("⚠️ a cause", rule="B")
    ledger.take("epoch", 2, [found("a consequence", rule="A", explained_by="B"), cause])
    assert ledger.verdict() == "B: a cause [2 warnings]"
    ledger.take("epoch", 3, [cause, found("3 NaN", rule="NF", severity=Severity.error)])
    ledger.take("epoch", 4, [])
    assert ledger.verdict() == "NF: 3 NaN (until step 4) [1 error, 2 warnings]"


def test_what_no_report_had_is_added_once() -> None:
    ledger = Ledger()
    known, late = found("known"), found("late", step=7)
    ledger.take("step", 1, [known])
    assert ledger.rest([known, late, CLEAR]) == [late] and ledger.rest([late]) == []
    assert [row["raised"] for row in table(ledger)] == [1, 7]


def test_a_flood_of_findings_is_bounded() -> None:
    ledger = Ledger()
    assert len(ledger.take("step", 1, [found("f", rank=rank) for rank in range(MOST_ENTRIES + 9)])) == MOST_ENTRIES
    assert len(ledger.rows()) == MOST_ENTRIES


@pytest.mark.parametrize(("seconds", "allowed"), [(1.0, False), (599.0, False), (600.0, True)])
def test_a_rule_alerts_once_in_ten_minutes_of_a_stream(seconds: float, allowed: bool) -> None:
    pace = Pace()
    assert pace.allows(found("1", stream="rgb"), 0.0)
    assert pace.allows(found("1", stream="rgb"), seconds) is allowed
    assert pace.allows(found("1", stream="depth"), seconds)


def test_a_flood_of_warnings_leaves_room_for_an_error() -> None:
    pace = Pace(most=3)
    sent = [pace.allows(found("f", stream=f"s{number}"), 1.0) for number in range(5)]
    assert sent == [True, True, True, False, False]
    assert pace.allows(found("f", severity=Severity.error), 1.0)
    assert not pace.allows(found("f", stream="s4"), 600.9)
    assert pace.allows(found("f", stream="s4"), 601.0)
