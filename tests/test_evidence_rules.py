"""Each evidence rule: what it finds, whom it names and when, and the legal trainings of which it says nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from ddp_streammon.config import Intent, Severity
from ddp_streammon.rules import evidence
from ddp_streammon.rules.engine import Engine
from ddp_streammon.rules.finding import Finding
from tests.steps import said, setup, step

Change = Callable[[int], Mapping[str, Any]]
DECLARED = Intent(frozen=(), classes=10, total_steps=2000)


def every(**changes: Any) -> Change:
    return lambda _: changes


def after(first: int, **changes: Any) -> Change:
    return lambda number: changes if number > first else {}


def flat(loss: float, **changes: Any) -> Change:
    return lambda _: {"loss": loss, **changes}


def of_fou(**changes: Any) -> Mapping[str, Any]:
    return {"fou": changes}


NO_GRADIENT = of_fou(grad_norm=math.nan, grad_mean=math.nan, grad_max=math.nan, elements=0, tensors=0)
ZERO = of_fou(grad_norm=0.0, grad_max=0.0)
BOTH = {"fou": {"update": 1e-7}, "pix": {"update": 1e-7}}
LR = {1: {"lr": (0.5, 0.05, 0.05), "weight_decay": (1e-4,) * 3}}
PLANTED: dict[str, tuple[Change, tuple[str, str | None, int | None], int, Any, Any]] = {
    # name: the change, what is found, at the latest by step, other intent, other set-up
    "nan in one rank's input": (
        after(70, inputs={("fou", 1): {"nonfinite": 5.0}}, streams=of_fou(nonfinite=9)),
        ("NF", "fou", 1),
        71,
        None,
        None,
    ),
    "nan in the gradient": (after(70, streams=of_fou(nonfinite=9)), ("NF", "fou", None), 71, None, None),
    "frozen": (every(samples=of_fou(trainable=0.0, optimized=0.0)), ("FRZ", "fou", None), 1, None, None),
    "not in the optimizer": (every(samples=of_fou(optimized=0.0, moved=0.0)), ("OPT", "fou", None), 2, None, None),
    "another rate than declared": (
        every(),
        ("RATE", "fou", None),
        1,
        Intent(frozen=(), lr={"fou": 5e-3}),
        None,
    ),
    "a base rate of zero": (
        every(facts={r: {"lr": (0.0, 0.05, 0.05)} for r in (0, 1)}),
        ("LR0", "fou", None),
        1,
        None,
        setup(fou={"rates": (0.0,)}),
    ),
    "a huge decay": (
        every(facts={r: {"weight_decay": (1.0, 1e-4, 1e-4)} for r in (0, 1)}),
        ("DECAY", "fou", None),
        1,
        None,
        None,
    ),
    "a large start": (every(), ("INIT", "fou", None), 1, None, setup(fou={"scale": 3.5})),
    "a tiny start": (every(), ("INIT", "fou", None), 1, None, setup(fou={"scale": 6e-4})),
    "detached": (every(streams=NO_GRADIENT), ("DET", "fou", None), 5, None, None),
    "dead from the start": (every(streams=ZERO), ("DEAD", "fou", None), 5, None, None),
    "dead later": (after(100, streams=ZERO), ("DEAD", "fou", None), 104, None, None),
    "not stepped": (every(samples=of_fou(moved=0.0, update=0.0)), ("UNC", "fou", None), 7, None, None),
    "no zero_grad": (
        every(samples={"fou": {"uncleared": 2.0}, "pix": {"uncleared": 2.0}}),
        ("ZGR", None, None),
        5,
        None,
        None,
    ),
    "left in eval": (
        after(20, facts={r: {"training": 0.0} for r in (0, 1)}, details={r: {"in_eval": 1.0} for r in (0, 1)}),
        ("EVAL", None, None),
        25,
        None,
        None,
    ),
    "a negative cross-entropy": (flat(-0.1), ("NEG", None, None), 5, None, None),
    "empty input": (
        every(inputs={("fou", r): {"abs_max": 0.0} for r in (0, 1)}),
        ("INZ", "fou", None),
        5,
        None,
        None,
    ),
    "one rank's input is empty": (after(40, inputs={("fou", 1): {"abs_max": 0.0}}), ("INZ", "fou", 1), 45, None, None),
    "constant input": (
        every(inputs={("fou", r): {"constant": 1.0} for r in (0, 1)}),
        ("INC", "fou", None),
        5,
        None,
        None,
    ),
    "raw input": (
        every(inputs={("fou", r): {"mean": 60.0, "std": 70.0, "first_mean": 60.0, "first_std": 70.0} for r in (0, 1)}),
        ("INN", "fou", None),
        5,
        None,
        None,
    ),
    "one rank's input is scaled": (every(inputs={("fou", 1): {"std": 20.0}}), ("INR", "fou", 1), 15, None, None),
    "the same batches": (
        lambda number: {"details": {r: {"batch": float(number)} for r in (0, 1)}},
        ("SAME", None, None),
        5,
        None,
        None,
    ),
    "the same order": (
        lambda number: {"details": {r: {"batch": float(100 * r + number % 19)} for r in (0, 1)}},
        ("ORDER", None, None),
        24,
        None,
        None,
    ),
    "one rank's rate": (every(facts=LR, details={1: {"base_lr": (0.5, 0.05, 0.05)}}), ("LR", "fou", 1), 1, None, None),
    "one rank in eval": (every(facts={1: {"training": 0.0}}), ("MODE", None, 1), 3, None, None),
    "uneven batches": (every(facts={0: {"samples": 58.0}, 1: {"samples": 6.0}}), ("BATCH", None, 1), 5, None, None),
    "a rank's weights jump": (
        lambda number: {
            "details": {1: {"weights": (-1.0, *[float(number)] * 2), "moved": (2.0 if number == 91 else 0.05,) * 3}}
            if number > 90
            else {}
        },
        ("DESYNC", "fou", 1),
        92,
        None,
        None,
    ),
    "replicas drift": (
        lambda number: {"details": {1: {"weights": (-1.0,) * 3}} if number > 1 else {}},
        ("DESYNC", None, None),
        2,
        None,
        None,
    ),
    "one rank's loss": (lambda number: {"details": {1: {"loss": 2.5}}}, ("LOSS", None, 1), 100, None, None),
    "a slow rank": (every(facts={1: {"busy_seconds": 0.045}}), ("SLOW", None, 1), 100, None, None),
    "a rate that jumps": (
        after(120, facts={r: {"lr": (5.0,) * 3} for r in (0, 1)}),
        ("LRJ", None, None),
        121,
        None,
        None,
    ),
    "a rate that is gone": (
        after(34, facts={r: {"lr": (0.0,) * 3} for r in (0, 1)}),
        ("LRS", "fou", None),
        70,
        Intent(frozen=(), total_steps=228),
        None,
    ),
    "vanishing": (every(samples=of_fou(first=1e-7)), ("VAN", "fou", None), 100, None, None),
    "a low rate": (every(samples=of_fou(update=1e-7)), ("LRL", "fou", None), 100, None, None),
    "low rates": (every(samples=BOTH), ("LRL", None, None), 100, None, None),
    "a decay that alone moves weights": (
        flat(
            1.0,
            samples={name: {"update": 5e-5} for name in ("fou", "pix")},
            streams={name: {"grad_norm": 1e-4, "update_norm": 3e-4, "update_ratio": 5e-5} for name in ("fou", "pix")},
        ),
        ("LRL", None, None),
        100,
        None,
        None,
    ),
    "a high rate": (every(samples=of_fou(update=0.4)), ("LRH", "fou", None), 100, None, None),
    "updates apart": (
        every(samples=of_fou(update=1e-6 * 5), facts={r: {"lr": (5e-5, 0.05, 0.05)} for r in (0, 1)}),
        ("UPD", "fou", None),
        100,
        None,
        None,
    ),
    "growing weights": (
        lambda number: {"samples": of_fou(weight=5.0 * 1.04**number)},
        ("WGR", "fou", None),
        100,
        None,
        None,
    ),
    "shrinking weights": (
        lambda number: {"samples": of_fou(weight=5.0 * 0.97**number)},
        ("WSH", "fou", None),
        100,
        None,
        None,
    ),
    "clipped away": (every(), ("CLP", None, None), 100, Intent(frozen=(), clip_norm=1e-4), None),
    "at chance": (flat(2.3), ("STL", None, None), 100, Intent(frozen=(), classes=10, total_steps=1000), None),
    "diverging": (
        lambda number: {"loss": 2.3 if number < 9 else 0.3 if number < 60 else 3.0},
        ("DIV", None, None),
        100,
        None,
        None,
    ),
    "larger features": (
        every(streams=of_fou(grad_norm=5.0), samples=of_fou(first=0.1, last=0.08)),
        ("IMB", "fou", None),
        100,
        None,
        None,
    ),
    "a stream that loses its gradient": (
        after(10, streams=of_fou(grad_norm=0.05), samples=of_fou(first=1e-3, last=8e-4)),
        ("IMB", "fou", None),
        100,
        None,
        None,
    ),
}


def by_step(name: str) -> tuple[dict[tuple[str, str | None, int | None], Finding], int]:
    change, _, _, intent, built = PLANTED[name]
    return said(change, intent=intent or DECLARED, built=built), PLANTED[name][2]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_named_in_time_and_alone(name: str) -> None:
    found, latest = by_step(name)
    wanted = PLANTED[name][1]
    assert wanted in found, {key: str(finding) for key, finding in found.items()}
    finding = found[wanted]
    assert finding.severity.level >= Severity.warning.level
    assert finding.step is not None and finding.step <= latest
    assert {key for key, f in found.items() if f.severity is not Severity.info and f.rule != wanted[0]} == set()


@pytest.mark.parametrize("name", sorted({*PLANTED} - {"a rank's weights jump"}))
def test_what_stands_goes_on_standing_after_a_restart(name: str) -> None:
    """A jump is no longer seen, and a restart gives all ranks the same weights."""
    change, _, _, intent, built = PLANTED[name]
    first, second = (Engine(evidence.RULES, built or setup(), intent or DECLARED) for _ in range(2))

    def keys_of(engine: Engine) -> set[tuple[str, str | None, int | None]]:
        return {(finding.rule, finding.stream, finding.rank) for finding in engine.findings}

    for number in range(1, 201):
        stats = step(number, **{"loss": 0.2 + 2.1 * math.exp(-number / 40), **change(number)})
        first.take(stats)
        if number == 147:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            stood = keys_of(second)
        elif number > 147:
            second.take(stats)
            assert stood & keys_of(first) <= keys_of(second), number


def test_every_alarming_rule_is_planted() -> None:
    planted = {found[0] for _, found, *_ in PLANTED.values()}
    elsewhere = {"SYNC", "OUTLIER", "BF16"}  # real gradients on real ranks; information
    assert {rule.id for rule in evidence.RULES} == planted | elsewhere


def test_rules_are_evaluated_in_the_order_in_which_findings_explain_each_other() -> None:
    orders = [rule.kind.order for rule in evidence.RULES]
    assert orders == sorted(orders)
    assert set(evidence.PLAIN) < {rule.id for rule in evidence.RULES}


HEALTHY: dict[str, tuple[Change, Any, Any]] = {
    "as it should be": (every(), DECLARED, None),
    "three ranks": (every(ranks=3), DECLARED, setup(3)),
    "one rank": (every(ranks=1), DECLARED, setup(1)),
    "a frozen tower in eval mode": (
        every(
            streams=NO_GRADIENT,
            samples=of_fou(trainable=0.0, optimized=0.0, moved=0.0),
            details={r: {"in_eval": 0.5} for r in (0, 1)},
        ),
        Intent(frozen=("fou",)),
        None,
    ),
    "thawed after the other": (
        lambda number: {
            "streams": of_fou(grad_norm=5.0),
            "samples": of_fou(first=0.1, last=0.08),
            "facts": {rank: {"lr": (0.0 if number < 40 else 0.05, 0.05, 0.05)} for rank in (0, 1)},
        },
        DECLARED,
        None,
    ),
    "frozen from a step on": (after(60, streams=NO_GRADIENT), Intent(frozen=(), frozen_from={"fou": 60}), None),
    "every third batch is without the stream": (
        lambda number: (
            {"streams": ZERO, "inputs": {("fou", r): {"abs_max": 0.0} for r in (0, 1)}} if number % 3 == 0 else {}
        ),
        DECLARED,
        None,
    ),
    "an optional stream": (every(streams=NO_GRADIENT), Intent(frozen=(), auxiliary=("fou",)), None),
    "a stream that is said to be absent": (
        every(streams=ZERO, inputs={("fou", r): {"abs_max": 0.0} for r in (0, 1)}, scalars={"fou_present": 0.0}),
        DECLARED,
        None,
    ),
    "low-rank updates that start at zero": (every(samples=of_fou(first=1e-6)), DECLARED, setup(fou={"zeros": True})),
    "a trained tower at a hundredth of the rate": (
        every(samples=of_fou(update=1e-4), facts={r: {"lr": (5e-4, 0.05, 0.05)} for r in (0, 1)}),
        DECLARED,
        None,
    ),
    "a curriculum's next stage": (
        lambda number: {"loss": 2.3 * 0.9**number if number < 70 else 4.0 * 0.88 ** (number - 70)},
        DECLARED,
        None,
    ),
    "a stream that has learned all before the other": (
        lambda number: {
            "loss": 2.3 * 0.93**number,
            **({"streams": of_fou(grad_norm=0.05), "samples": of_fou(first=1e-3, last=8e-4)} if number > 45 else {}),
        },
        DECLARED,
        None,
    ),
    "a negative likelihood": (lambda number: {"loss": 1.0 - number / 50}, Intent(frozen=()), None),
    "fine-tuning begins low and stays there": (flat(0.3), DECLARED, None),
    "small updates that are the gradient's": (
        flat(
            1.0,
            samples={name: {"update": 5e-5} for name in ("fou", "pix")},
            streams={name: {"grad_norm": 0.5, "update_norm": 3e-4, "update_ratio": 5e-5} for name in ("fou", "pix")},
        ),
        DECLARED,
        None,
    ),
    "a stream thaws": (
        lambda number: {
            "facts": {r: {"lr": (0.05 * (number > 76), 0.05, 0.05)} for r in (0, 1)},
            "samples": {} if number > 77 else of_fou(moved=0.0, update=0.0),
        },
        Intent(frozen=(), classes=10, total_steps=228),
        None,
    ),
    "warm-up and a cosine": (
        lambda number: {
            "facts": {r: {"lr": (min(number / 20, 1.0) * 0.05 * math.cos(number / 100),) * 3} for r in (0, 1)}
        },
        Intent(frozen=(), classes=10, total_steps=157),
        None,
    ),
    "warm restarts": (
        lambda number: {
            "facts": {r: {"lr": (0.025 * (1 + math.cos(math.pi * (number % 57) / 57)) + 1e-9,) * 3} for r in (0, 1)}
        },
        Intent(frozen=(), total_steps=228),
        None,
    ),
    "step decays": (
        lambda number: {"facts": {r: {"lr": (0.05 * 0.1 ** (number // 50),) * 3} for r in (0, 1)}},
        Intent(frozen=(), total_steps=170),
        None,
    ),
    "norm layers make the scale meaningless": (every(), DECLARED, setup(fou={"scale": 30.0, "norm": True})),
    "uneven batches that vary": (
        lambda number: {"facts": {number % 2: {"samples": 8.0}}},
        DECLARED,
        None,
    ),
    "losses that differ by chance": (
        lambda number: {"details": {number % 4 // 3: {"loss": 0.1}, 1 - number % 4 // 3: {"loss": 3.0}}},
        DECLARED,
        None,
    ),
    "one batch again and again": (
        every(details={r: {"batch": 7.0 + r} for r in (0, 1)}),
        DECLARED,
        None,
    ),
    "a machine that stutters": (
        lambda number: {"facts": {(number // 3) % 2: {"busy_seconds": 0.06}}},
        DECLARED,
        None,
    ),
    "a scaler skips steps": (
        lambda number: {"scaled": True} | ({"streams": of_fou(nonfinite=3)} if number < 15 else {}),
        DECLARED,
        None,
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_legal_training_raises_no_alarm(name: str) -> None:
    change, intent, built = HEALTHY[name]
    found = said(change, intent=intent, built=built)
    assert {key: str(f) for key, f in found.items() if f.severity is not Severity.info} == {}


def test_what_is_meant_decides_between_error_and_information() -> None:
    frozen = every(samples=of_fou(trainable=0.0, optimized=0.0))
    assert said(frozen, 3, intent=Intent())["FRZ", "fou", None].severity is Severity.info
    assert said(frozen, 3, intent=Intent(frozen=()))["FRZ", "fou", None].severity is Severity.error
    eval_mode = every(details={r: {"in_eval": 1.0} for r in (0, 1)})
    assert said(eval_mode, 5)["EVAL", None, None].severity is Severity.info
    assert said(flat(0.8), 100, intent=Intent())["STL", None, None].severity is Severity.info


def test_of_two_ranks_none_is_named_where_nothing_says_which_is_wrong_and_of_three_the_majority_is_right() -> None:
    weights = {1: {"weights": (-1.0, 5.0, 5.0)}}
    undecided = said(lambda n: {"details": {**weights, 0: {"weights": (1.0, 5.0, 5.0)}}}, 3)
    (finding,) = (f for (rule, stream, _), f in undecided.items() if (rule, stream) == ("DESYNC", "fou"))
    assert finding.rank is None
    assert "with two ranks no vote says which is wrong" in finding.likely
    three = said(lambda n: {"ranks": 3, "details": {2: {"weights": (-1.0, float(n), float(n))}}}, 3, ranks=3)
    assert ("DESYNC", "fou", 2) in three
    declared = Intent(frozen=(), weight_decay={"fou": 1e-4})
    decays = said(every(facts={0: {"weight_decay": (0.1, 1e-4, 1e-4)}}), 3, intent=declared)
    assert ("LR", "fou", 0) in decays


def test_the_advice_is_never_what_the_evidence_shows_to_hurt() -> None:
    everything = [finding for name in PLANTED for finding in by_step(name)[0].values()]
    raising = [f for f in everything if f.action and f.action.setting == "lr" and f.action.value > f.action.old]
    assert "LRL" in {finding.rule for finding in raising} <= {"LRL", "RATE", "LR"}
    for finding in raising:
        assert finding.rule != "LRL" or "untested on your data" in finding.do


def test_a_training_that_is_too_short_for_its_decay_is_not_told_to_decay_more() -> None:
    facts = every(facts={r: {"weight_decay": (1.0, 1e-4, 1e-4)} for r in (0, 1)})  # 5 % a step
    assert not said(facts, 3, intent=Intent(frozen=(), total_steps=16))
    found = said(facts, 3, intent=Intent(frozen=(), total_steps=100))[("DECAY", "fou", None)]
    assert found.action is not None and (found.action.old, found.action.value) == (1.0, 0.2)
