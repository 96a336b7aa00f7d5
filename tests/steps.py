"""Measured steps as rules see them, made by hand: what a healthy training gives, and what is changed of it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddp_streammon.config import Intent
from ddp_streammon.described import Setup, StreamSetup
from ddp_streammon.packet import Slots
from ddp_streammon.rank_facts import INPUT_CELLS, RankDetail, RankFacts, Ranks, StreamInput
from ddp_streammon.rules import evidence
from ddp_streammon.rules.engine import Engine, Rule
from ddp_streammon.rules.finding import Finding
from ddp_streammon.stats import Sample, Scalar, StepStats, StreamStats

STREAMS = ("fou", "pix")
INPUT = StreamInput(1.0, 0.01, 1.0, 3.0, 0.0, 0.0, 0.01, 1.0)
SAMPLE = Sample(1e-2, 1.0, 5.0, 1e-2, 8e-3, 4.0, 4.0, 0.0)


def ranks_of(rows: Sequence[RankFacts]) -> Ranks:
    """The facts as they come from a packet; all of them have details, or none."""
    details = [cells_of(row.detail) for row in rows if row.detail is not None]
    facts = Slots.of_ranks([row.cells() for row in rows])
    return Ranks([row.rank for row in rows], facts, Slots.of_ranks(details) if details else None)


def cells_of(detail: RankDetail) -> list[float]:
    """The inverse of `RankDetail.of_cells`; the number of the batch is that of the first stream's inputs."""
    seen = next((number for number, given in enumerate(detail.inputs) if not math.isnan(given.abs_max)), None)
    inputs = [input_cells(given, detail.batch if number == seen else 0.0) for number, given in enumerate(detail.inputs)]
    own = [cell for pair in zip(detail.weights, detail.moved, strict=True) for cell in pair]
    return [detail.loss, detail.in_eval, *detail.base_lr, *own, *[cell for row in inputs for cell in row]]


def input_cells(given: StreamInput, bits: float) -> list[float]:
    """The inverse of `StreamInput.of_cells`, of two elements; `bits`: of the batch."""
    if math.isnan(given.abs_max):
        return [given.calls, *[0.0] * (INPUT_CELLS - 1)]
    constant = given.calls if given.constant else 0.0
    root = [*_sums(given.mean, given.std), given.nonfinite, constant, bits, given.abs_max]
    return [given.calls, *root, *_sums(given.first_mean, given.first_std)]


def _sums(mean: float, std: float) -> list[float]:
    return [2 * mean, 2 * (mean * mean + std * std), 2.0]


def setup(ranks: int = 2, **streams: Any) -> Setup:
    """A training as it is built; `streams`: other fields of a stream."""
    usual = StreamSetup(4, 4, 4, (0.05,), True, (1e-4,), 0.58, False, True, False)
    names = (*STREAMS, "shared")
    of_streams = {name: dataclasses.replace(usual, **streams.get(name, {})) for name in names}
    return Setup(ranks, tuple(range(ranks)), ranks > 1, ranks > 1, True, ("SGD",), of_streams)


def step(
    number: int,
    ranks: int = 2,
    *,
    loss: float = 1.0,
    streams: Mapping[str, Mapping[str, Any]] | None = None,
    samples: Mapping[str, Mapping[str, Any]] | None = None,
    facts: Mapping[int, Mapping[str, Any]] | None = None,
    details: Mapping[int, Mapping[str, Any]] | None = None,
    inputs: Mapping[tuple[str, int], Mapping[str, Any]] | None = None,
    scalars: Mapping[str, float] | None = None,
    scaled: bool = False,
    **changes: Any,
) -> StepStats:
    """A healthy step but for the changes: of streams and their samples, of ranks' facts, details and inputs."""
    names = (*STREAMS, "shared")
    healthy = StreamStats(0.5, 0.0, 0.1, 1 / 3, 0, 100, 4)
    of_streams = {
        name: dataclasses.replace(
            healthy,
            sample=dataclasses.replace(SAMPLE, **(samples or {}).get(name, {})),
            **(streams or {}).get(name, {}),
        )
        for name in names
    }
    of_ranks = []
    for rank in range(ranks):
        seen = tuple(dataclasses.replace(INPUT, **(inputs or {}).get((name, rank), {})) for name in STREAMS)
        detail = RankDetail(
            loss=loss + 0.01 * rank,
            in_eval=0.0,
            batch=float(1000 * number + rank),
            base_lr=(0.05,) * 3,
            weights=(float(number),) * 3,
            moved=(0.05,) * 3,
            inputs=(*seen, StreamInput()),
        )
        detail = dataclasses.replace(detail, **(details or {}).get(rank, {}))
        usual = RankFacts(rank, (0.05,) * 3, (1e-4,) * 3, 1.0, 32.0, 0.05, 0.02, detail)
        of_ranks.append(dataclasses.replace(usual, **(facts or {}).get(rank, {})))
    numbers = {"loss": Scalar(loss, loss, ranks, False), "samples": Scalar(32.0 * ranks, 32.0, ranks, True)}
    numbers |= {name: Scalar(value, value, ranks, False) for name, value in (scalars or {}).items()}
    return StepStats(number, 0.0, of_streams, numbers, ranks, (), scaled, ranks_of(of_ranks), **changes)


def said(
    change: Callable[[int], Mapping[str, Any]],
    steps: int = 150,
    *,
    ranks: int = 2,
    intent: Intent | None = None,
    built: Setup | None = None,
    rules: Sequence[Rule] = evidence.RULES,
) -> dict[tuple[str, str | None, int | None], Finding]:
    """The findings of steps with `change(number)`, at their first time; the loss falls unless it says otherwise.
    Errors: UserWarning where a rule fails."""
    engine = Engine(rules, built or setup(ranks), intent or Intent(frozen=(), classes=10, total_steps=2000))
    first: dict[tuple[str, str | None, int | None], Finding] = {}
    for number in range(1, steps + 1):
        stats = step(number, **{"ranks": ranks, "loss": 0.2 + 2.1 * math.exp(-number / 40), **change(number)})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            findings = engine.take(stats)
        for finding in findings:
            first.setdefault((finding.rule, finding.stream, finding.rank), finding)
    return first
