"""`python -m ddp_streammon.replay RUN_DIR [rules=evidence] [mute=A,B] [RULE.threshold=value]`, or `streammon-replay`

Prints what rules would have said of a finished run, and when, from its JSONL file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp_streammon.config import Intent, RuleSet
from ddp_streammon.described import Setup
from ddp_streammon.history import History
from ddp_streammon.rules import evidence, guide
from ddp_streammon.rules.engine import Engine, Rule
from ddp_streammon.rules.finding import Finding
from ddp_streammon.sinks.jsonl import all_floats, read_jsonl
from ddp_streammon.stats import StepStats
from ddp_streammon.version import __version__

JSONL = "metrics.jsonl"
"""The file's name in a run directory."""


@dataclass(frozen=True)
class Event:
    """At `step` a finding was raised, or cleared."""

    step: int
    raised: bool
    finding: Finding

    def __str__(self) -> str:
        if not self.raised:
            return f"step {self.step}: {self.finding.rule} is over: {self.finding.seen}"
        severity = (
            f"consequence of {self.finding.explained_by}" if self.finding.explained_by else self.finding.severity.value
        )
        return f"step {self.step}: {severity} {self.finding.rule}: {self.finding.told()}"


def replay(
    records: Iterable[Mapping[str, Any]],
    *,
    rules: RuleSet = RuleSet.evidence,
    mute: Sequence[str] = (),
    thresholds: Mapping[str, float] | None = None,
    extra: Sequence[Rule] = (),
) -> Iterator[Event | str]:
    """The events of a run's records (`read_jsonl`), in their order, and at the end what could not be evaluated.

    Errors: ValueError for records without a run's description, or without what the rules need.
    """
    described = next((record for record in records if record["type"] == "run"), None)
    if described is None:
        raise ValueError("there is no run record: the file was not written by the JSONL sink")
    if rules is RuleSet.evidence:
        return _evidence(records, described, mute, thresholds or {}, extra)
    if rules is RuleSet.guide:
        return _guide(records, described["streams"])
    raise ValueError(f"rules must be {RuleSet.evidence.value} or {RuleSet.guide.value} to replay, got {rules.value}")


def _evidence(
    records: Iterable[Mapping[str, Any]],
    described: Mapping[str, Any],
    mute: Sequence[str],
    thresholds: Mapping[str, float],
    extra: Sequence[Rule],
) -> Iterator[Event | str]:
    if described["config"]["monitor"]["rules"] != RuleSet.evidence.value:
        raise ValueError("the run was recorded without rules=evidence: what these rules look at was not measured")
    intent = all_floats(described["config"]["monitor"]["intent"])
    whole: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in intent.items()}
    setup = Setup.from_dict(all_floats(described["config"]["setup"]))
    engine = Engine((*evidence.RULES, *extra), setup, Intent(**whole), mute=mute, thresholds=thresholds)
    stood: dict[tuple[str, str | None, int | None], Finding] = {}
    for record in records:
        if "measured" in record:
            step = record["step"]
            stands = {(f.rule, f.stream, f.rank): f for f in engine.take(StepStats.from_dict(record["measured"]))}
            yield from (Event(step, True, finding) for key, finding in stands.items() if key not in stood)
            yield from (Event(step, False, finding) for key, finding in stood.items() if key not in stands)
            stood = stands
    yield str(engine.nothing_found())


def _guide(records: Iterable[Mapping[str, Any]], streams: Sequence[str]) -> Iterator[Event]:
    history = History()
    told: set[str] = set()
    for record in records:
        if record["type"] in ("step", "epoch"):
            history.append(record["step"], record["epoch"], record["values"])
        if record["type"] == "epoch":
            for finding in guide.recommend(history, streams, {}):
                if finding not in told:
                    yield Event(record["step"], True, finding)
            told = set(guide.recommend(history, streams, {}))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the events of the run whose directory, or file, is named."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        raise SystemExit(__doc__)
    told = {"-h": __doc__, "--help": __doc__, "--version": __version__}
    if given[0] in told:
        print(told[given[0]])
        return
    path = Path(given[0])
    parts = [option.partition("=") for option in given[1:]]
    options = {name: value for name, _, value in parts}
    mute = tuple(name for name in options.pop("mute", "").split(",") if name)
    try:
        rules = RuleSet(options.pop("rules", RuleSet.evidence.value))
        thresholds = {name: float(value) for name, value in options.items()}
        records = read_jsonl(path / JSONL if path.is_dir() else path)
        for event in replay(records, rules=rules, mute=mute, thresholds=thresholds):
            print(event)
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot replay {str(path)!r}: {error}") from None


if __name__ == "__main__":
    main()
