"""What is wrong with a stream is named, the right stream and no other; of healthy trainings nothing is said."""

from __future__ import annotations

import importlib.util

import pytest

from ddp_streammon.config import Severity
from ddp_streammon.rules.finding import Finding
from tests.planted_streams import HEALTHY, PLANTED, Case, Said, train

RULES = {"UNUSED", "IGNORED", "REDUNDANT", "NOTHING", "REGRESSED", "MEMORISED", "OVERFITTING"}
SEEDS = 10
FAST_PLANTED = ("ignored zer", "misaligned kar", "the same twice")
FAST_HEALTHY = ("complementary", "fou, zer, 300 items")


def findings(said: Said) -> list[Finding]:
    return [finding for finding in said.findings if finding.rule in RULES]


def is_named(case: Case, seed: int) -> bool:
    """Whether its finding stands at the end, and no evaluation blamed another stream."""
    streams = {stream for _, stream in case.named}
    everything = list(train(case, seed))
    blamed = {f.stream for said in everything for f in findings(said) if f.severity is not Severity.info}
    last = {(finding.rule, finding.stream) for finding in findings(everything[-1])}
    return bool(last & case.named) and blamed <= streams


def false_alarms(case: Case, seed: int) -> list[str]:
    return [
        f"evaluation {number}: {finding}"
        for number, said in enumerate(train(case, seed), 1)
        for finding in findings(said)
        if finding.severity is not Severity.info
    ]


def needs_data(name: str) -> None:
    if ("HTAD" in name or "audio" in name or "accelerometer" in name) and not importlib.util.find_spec(
        "multiviewstacking"
    ):
        pytest.skip("the package multiviewstacking is not installed")


@pytest.mark.parametrize("name", FAST_PLANTED)
def test_what_is_planted_is_named(name: str) -> None:
    assert is_named(PLANTED[name], 0)


@pytest.mark.parametrize("name", FAST_HEALTHY)
def test_of_a_healthy_training_nothing_is_said(name: str) -> None:
    assert false_alarms(HEALTHY[name], 0) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_named_in_nine_of_ten_seeds(name: str) -> None:
    needs_data(name)
    assert sum(is_named(PLANTED[name], seed) for seed in range(SEEDS)) >= 9


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", HEALTHY)
def test_of_ten_healthy_trainings_nothing_is_said(name: str) -> None:
    needs_data(name)
    assert [alarm for seed in range(SEEDS) for alarm in false_alarms(HEALTHY[name], seed)] == []
