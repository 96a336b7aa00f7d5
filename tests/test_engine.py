"""The engine: warm-up, hold, hysteresis, consequences, what cannot be evaluated, its state, and rules of one's own."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import pytest

from ddp_streammon import MonitorConfig, StreamMonitor
from ddp_streammon.config import Intent, Severity
from ddp_streammon.ranks import LocalNorms
from ddp_streammon.rules import evidence
from ddp_streammon.rules.engine import Engine, Kind, Rule, Signal
from ddp_streammon.rules.finding import SCHEMA, Finding
from ddp_streammon.rules.view import View
from tests.networks import network
from tests.ranks import run_ranks
from tests.steps import INPUT, SAMPLE, STREAMS, said, setup, step


@dataclass(frozen=True)
class Loud(Rule):
    """The loss is above `most`."""

    id: ClassVar[str] = "LOUD"
    kind: ClassVar[Kind] = Kind.windowed
    requires: ClassVar[tuple[str, ...]] = ("loss",)

    most: float = 10.0
    hold: int = 3
    clear: float = 0.5
    warm_up: int = 2

    def check(self, view: View) -> Iterator[Signal]:
        loss = view.now.scalars["loss"].mean
        yield Signal("fou", seen="loud", strength=loss / self.most, evidence={"loss": loss})


@dataclass(frozen=True)
class Early(Loud):
    """The same, exact and at once."""

    id: ClassVar[str] = "EARLY"
    kind: ClassVar[Kind] = Kind.exact
    hold: int = 1
    warm_up: int = 0


@dataclass(frozen=True)
class ComesAndGoes(Early):
    id: ClassVar[str] = "GOES"
    intermittent: ClassVar[bool] = True
    hold: int = 2


def told(losses: list[float], *rules: Rule, **options: Any) -> list[list[str]]:
    """The rules that stand after each loss; a consequence in lower case."""
    engine = Engine(rules, setup(), Intent(), **options)
    standing = []
    for number, loss in enumerate(losses, start=1):
        found = engine.take(step(number, loss=loss))
        standing.append([f.rule.lower() if f.explained_by else f.rule for f in found])
    return standing


def test_a_finding_is_raised_after_warm_up_and_hold_and_cleared_below_a_looser_threshold() -> None:
    losses = [20, 20, 20, 20, 20, 7, 7, 7, 7, 4, 4, 4, 20]
    assert told(losses, Loud()) == [*[[]] * 4, *[["LOUD"]] * 7, [], []]
    assert told([20, 20, 20, 20, 4, 20, 20, 20], Loud())[-2:] == [[], ["LOUD"]]


def test_a_later_finding_that_an_earlier_reason_explains_is_a_consequence() -> None:
    assert told([20] * 5, Early(), Loud()) == [["EARLY"]] * 4 + [["EARLY", "loud"]]
    engine = Engine((Early(), Loud()), setup(), Intent())
    for number in range(1, 6):
        engine.take(step(number, loss=20))
    consequence = engine.findings[-1]
    assert (consequence.severity, consequence.explained_by) == (Severity.info, "EARLY")
    assert "Explained by EARLY" in consequence.told()


def test_a_reason_that_is_over_explains_what_follows_in_its_window() -> None:
    assert told([20, 1, 12, 12, 12], Early(most=15.0), Loud()) == [["EARLY"], [], [], [], ["loud"]]


def test_what_comes_and_goes_has_to_last_four_times_longer_than_ever_before() -> None:
    assert told([20, 20], ComesAndGoes())[-1] == ["GOES"]
    once = [1, 20, 1]
    assert told([*once, *[20] * 5], ComesAndGoes())[-1] == []
    assert told([*once, *[20] * 6], ComesAndGoes())[-1] == ["GOES"]


def test_mute_and_thresholds() -> None:
    assert told([20] * 6, Loud(), Early(), mute=("EARLY",))[-1] == ["LOUD"]
    assert told([20] * 6, Early(), thresholds={"EARLY.most": 30.0})[-1] == []
    with pytest.raises(ValueError, match="there is no rule 'LUOD'; nearest: LOUD"):
        told([1], Loud(), mute=("LUOD",))
    with pytest.raises(ValueError, match="rule LOUD has no threshold 'least'; it has .*most"):
        told([1], Loud(), thresholds={"LOUD.least": 1.0})
    with pytest.raises(ValueError, match="two rules have the id 'LOUD'"):
        told([1], Loud(), Loud())


@dataclass(frozen=True)
class Broken(Rule):
    id: ClassVar[str] = "BROKEN"

    def check(self, view: View) -> Iterator[Signal]:
        yield Signal(strength=3 / (3 - view.now.step))


def test_a_rule_that_fails_is_left_out_and_ends_nothing() -> None:
    engine = Engine((Broken(), Loud()), setup(), Intent())
    for number in (1, 2):
        assert "BROKEN" in {finding.rule for finding in engine.take(step(number))}
    with pytest.warns(UserWarning, match="rule BROKEN is left out from now on: it failed at step 3: ZeroDivisionError"):
        engine.take(step(3))
    engine.take(step(4, loss=20))
    assert engine.not_evaluated() == {"BROKEN": "it failed at step 3: ZeroDivisionError: division by zero"}


def anything(chance: random.Random, usual: float) -> float:
    """A number that a packet can carry, one in four an extreme one."""
    extremes = (0.0, math.nan, 1e-300, 1e-30, 1e30, 1e300)
    return chance.choice(extremes) if chance.random() < 0.25 else usual * math.exp(chance.gauss(0, 2))


def changed(chance: random.Random, healthy: Any, **others: Any) -> dict[str, Any]:
    """Every number of a dataclass."""
    numbers = {item.name: getattr(healthy, item.name) for item in fields(healthy)}
    floats = {name: anything(chance, value or 1.0) for name, value in numbers.items() if isinstance(value, float)}
    return floats | {name: value(chance) for name, value in others.items()}


@pytest.mark.parametrize("seed", range(20))
def test_no_numbers_make_a_rule_fail(seed: int, recwarn: pytest.WarningsRecorder) -> None:
    chance = random.Random(seed)
    ranks = chance.choice((1, 2, 3, 4))
    rates = chance.choice(({}, {"fou": 0.0}, {"fou": 0.05, "pix": 0.05}))
    engine = Engine(evidence.RULES, setup(ranks), Intent(frozen=(), classes=10, lr=rates, weight_decay=rates))
    usual = step(1, ranks)
    for number in range(1, 100):
        if number == 1 or chance.random() < 0.3:  # what lasts reaches the windows
            facts, detail = usual.rank_facts[0], usual.rank_facts[0].detail
            three = {"base_lr": 0.05, "weights": 1.0, "moved": 0.05}
            changes: dict[str, Any] = {
                "loss": anything(chance, 1.0),
                "streams": {
                    name: changed(
                        chance, of, elements=lambda c: c.choice((0, 100)), nonfinite=lambda c: c.choice((0, 0, 3))
                    )
                    for name, of in usual.streams.items()
                },
                "samples": {name: changed(chance, SAMPLE) for name in usual.streams},
                "facts": {r: changed(chance, facts, lr=triple(0.05), weight_decay=triple(1e-4)) for r in range(ranks)},
                "details": {
                    r: changed(chance, detail, **{n: triple(v) for n, v in three.items()}) for r in range(ranks)
                },
                "inputs": {(name, r): changed(chance, INPUT) for name in STREAMS for r in range(ranks)},
                "scaled": chance.random() < 0.1,
                "local": tuple(LocalNorms(r, triple(0.5)(chance), (0, 0, 0), None) for r in range(ranks)),
            }
        engine.take(step(number, ranks, **changes))
    assert [str(warning.message) for warning in recwarn] == []


def triple(usual: float) -> Callable[[random.Random], tuple[float, ...]]:
    return lambda chance: tuple(anything(chance, usual) for _ in range(3))


def test_where_nothing_is_found_it_says_how_many_rules_looked_and_which_could_not() -> None:
    engine = Engine((Loud(), Early(), *evidence.RULES), setup(ranks=1), Intent())
    engine.take(step(1, ranks=1))
    text = str(engine.nothing_found())
    assert text.startswith("no alarm from ")
    assert "healthy" not in text
    assert engine.not_evaluated()["LOUD"] == "not enough steps yet"
    assert engine.not_evaluated()["LR"] == "one rank sees all data"
    assert "not declared as classification (intent.classes)" in text
    assert "EARLY" not in engine.not_evaluated()
    assert f"{len(engine.not_evaluated())} not evaluated" in text


def test_the_state_goes_on_where_it_was_also_through_json() -> None:
    losses = [1, 20, 1, *[20] * 3]
    rules = (ComesAndGoes(), Loud(), *evidence.RULES)
    first = Engine(rules, setup(), Intent())
    for number, loss in enumerate(losses, start=1):
        first.take(step(number, loss=loss))
    second = Engine(rules, setup(), Intent())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert json.dumps(second.state_dict()) == json.dumps(first.state_dict())
    for number in range(7, 13):
        mine, theirs = (engine.take(step(number, loss=20)) for engine in (first, second))
        assert [f.to_dict() for f in mine] == [f.to_dict() for f in theirs]
    assert "GOES" in {finding.rule for finding in second.findings}


def test_how_weights_began_is_known_after_a_restart_with_trained_ones() -> None:
    first = Engine(evidence.RULES, setup(fou={"scale": 5.0}, pix={"zeros": True}), Intent())
    (found,) = first.take(step(1))
    second = Engine(evidence.RULES, setup(fou={"scale": 1.0}, pix={"scale": 9.0}), Intent())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.setup == first.setup
    assert (found.rule, found.stream) == ("INIT", "fou")
    assert [finding.to_dict() for finding in second.take(step(2))] == [found.to_dict()]


def test_with_another_number_of_ranks_what_is_known_of_ranks_is_forgotten() -> None:
    first = Engine(evidence.RULES, setup(), Intent())
    for number in range(1, 8):
        first.take(step(number, inputs={("fou", 1): {"abs_max": 0.0}}))
    assert {(f.rule, f.rank) for f in first.findings} == {("INZ", 1)}
    second = Engine(evidence.RULES, setup(3), Intent())
    second.load_state_dict(first.state_dict())
    assert second.findings == []


def test_a_claim_is_told_until_the_next_evaluation_and_may_be_explained() -> None:
    engine = Engine((Early(),), setup(), Intent())
    claim = Finding("⚠️  fou: unused", rule="UNUSED", severity=Severity.warning, stream="fou", step=1)
    engine.take(step(1))
    assert [f.explained_by for f in engine.claim([claim])] == [None]
    assert engine.claim([]) == []
    engine.take(step(2, loss=20))
    assert [f.explained_by for f in engine.claim([claim])] == [None, "EARLY"]


def check(schema: Any, value: Any) -> None:
    """The part of JSON Schema that the finding's uses."""
    kinds = {"object": dict, "string": str, "number": (int, float), "integer": int, "null": type(None)}
    if "enum" in schema:
        assert value in schema["enum"]
        return
    wanted = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    assert any(isinstance(value, kinds[kind]) for kind in wanted), (schema, value)
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value)
        for name, item in value.items():
            more = schema.get("additionalProperties", True)
            assert name in schema.get("properties", {}) or more is not False, name
            part = schema.get("properties", {}).get(name, more)
            if isinstance(part, dict):
                check(part, item)


def test_findings_fit_their_schema() -> None:
    found = said(lambda n: {"inputs": {("fou", 1): {"abs_max": 0.0}}, "samples": {"pix": {"update": 0.5}}}, 60)
    assert {rule for rule, _, _ in found} >= {"INZ", "LRH"}
    for finding in found.values():
        values = json.loads(json.dumps(finding.to_dict()))
        check(SCHEMA, values)
        assert all(values[name] for name in ("seen", "likely", "do", "confirm", "rule", "severity"))
        assert values["since"] <= values["step"]
        assert Finding.from_dict(values).to_dict() == finding.to_dict()


def _own_rule() -> tuple[list[str], str]:
    config = MonitorConfig(extra_rules=(Early(most=0.5),), intent=Intent(classes=3))
    monitor = StreamMonitor(network(), None, {"rgb": "rgb", "depth": "depth"}, config=config)
    for _ in range(3):
        monitor.step(loss=1.0, samples=4)
    monitor.flush()
    return [finding.rule for finding in monitor.get_recommendations()], str(monitor.state_dict()["rules"])


def test_a_rule_of_ones_own_stands_beside_the_others_and_all_ranks_agree() -> None:
    (first, state), second = run_ranks(2, _own_rule)
    assert "EARLY" in first
    assert (first, state) == second
