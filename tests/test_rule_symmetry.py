"""No stream and no rank is a special one: where two change places, so do they in what rules say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import pytest

from ddp_streammon.config import Intent
from ddp_streammon.described import Setup
from ddp_streammon.rank_facts import RankFacts
from ddp_streammon.rules import evidence
from ddp_streammon.rules.engine import Engine
from ddp_streammon.rules.finding import Finding
from ddp_streammon.stats import StepStats
from tests.steps import STREAMS, ranks_of, setup, step
from tests.test_evidence_rules import DECLARED, PLANTED

T = TypeVar("T")
OTHER = dict(zip(STREAMS, reversed(STREAMS), strict=True))
Said = set[tuple[str, str | None, int | None, str]]


def turned(row: Sequence[T]) -> tuple[T, ...]:
    """The first two of a row in each other's place."""
    return (row[1], row[0], *row[2:])


def renamed(values: Mapping[str, T]) -> dict[str, T]:
    """By stream, in the order of the streams."""
    return {name: values[OTHER.get(name, name)] for name in values}


def other_streams(stats: StepStats) -> StepStats:
    rows = [_other_streams_of(rank) for rank in stats.rank_facts]
    local = tuple(replace(of, norms=turned(of.norms), nonfinite=turned(of.nonfinite)) for of in stats.local)
    replicas = tuple(replace(of, stream=OTHER.get(of.stream, of.stream)) for of in stats.replicas)
    return replace(stats, streams=renamed(stats.streams), rank_facts=ranks_of(rows), local=local, replicas=replicas)


def _other_streams_of(rank: RankFacts) -> RankFacts:
    detail = rank.detail
    if detail is not None:
        changes: dict[str, Any] = {
            name: turned(getattr(detail, name)) for name in ("base_lr", "weights", "moved", "inputs")
        }
        detail = replace(detail, **changes)
    return replace(rank, lr=turned(rank.lr), weight_decay=turned(rank.weight_decay), detail=detail)


def other_intent(intent: Intent) -> Intent:
    changes: dict[str, Any] = {}
    for field in fields(intent):
        value = getattr(intent, field.name)
        if isinstance(value, Mapping):
            changes[field.name] = {OTHER.get(name, name): of for name, of in value.items()}
        elif isinstance(value, tuple):
            changes[field.name] = tuple(OTHER.get(name, name) for name in value)
    return replace(intent, **changes)


def other_ranks(stats: StepStats) -> StepStats:
    rows = [replace(rank, rank=1 - rank.rank) for rank in stats.rank_facts][::-1]
    local = tuple(replace(of, rank=1 - of.rank) for of in stats.local)[::-1]
    replicas = tuple(replace(of, ranks=tuple(sorted(1 - rank for rank in of.ranks))) for of in stats.replicas)
    return replace(stats, rank_facts=ranks_of(rows), local=local, replicas=replicas)


def said(
    engine: Engine, steps: Sequence[StepStats], stream: Mapping[str, str], rank: Callable[[int], int]
) -> list[Said]:
    """What stands after each step, with the names of streams and ranks as they are here."""

    def key(finding: Finding) -> tuple[str, str | None, int | None, str]:
        named = None if finding.stream is None else stream.get(finding.stream, finding.stream)
        return finding.rule, named, None if finding.rank is None else rank(finding.rank), finding.severity.value

    return [{key(finding) for finding in engine.take(stats)} for stats in steps]


@pytest.mark.parametrize("name", PLANTED)
def test_streams_and_ranks_may_change_places(name: str) -> None:
    change, found, latest, intent, built = PLANTED[name]
    meant: Intent = intent or DECLARED
    made: Setup = built or setup()
    steps = [step(n, **{"loss": 0.2 + 2.1 * math.exp(-n / 40), **change(n)}) for n in range(1, latest + 6)]
    expected = said(Engine(evidence.RULES, made, meant), steps, {}, int)
    assert any(found[0] == rule for now in expected for rule, *_ in now)
    streams = Engine(evidence.RULES, replace(made, streams=renamed(made.streams)), other_intent(meant))
    assert said(streams, [other_streams(stats) for stats in steps], OTHER, int) == expected
    if made.world == 2:
        ranks = Engine(evidence.RULES, made, meant)
        assert said(ranks, [other_ranks(stats) for stats in steps], {}, lambda rank: 1 - rank) == expected
