"""NF, OUTLIER and SAME on real ranks with planted faults, on healthy ones, and how often OUTLIER errs by chance."""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon import Intent, MonitorConfig, Severity, StreamMonitor
from ddp_streammon.described import Setup, StreamSetup
from ddp_streammon.rank_facts import RankFacts
from ddp_streammon.ranks import LocalNorms
from ddp_streammon.rules.engine import Engine, Rule
from ddp_streammon.rules.finding import Finding
from ddp_streammon.rules.of_inputs import SameBatch
from ddp_streammon.rules.of_own_gradients import ALWAYS, FEW, MANY, WINDOW, Outlier, outlier, times
from ddp_streammon.rules.of_training import NonFinite
from ddp_streammon.stats import StepStats, StreamStats
from tests.networks import STREAMS, loss_of, network
from tests.ranks import run_ranks
from tests.steps import ranks_of

WORLDS = [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
"""Two ranks are in the fault zoo, too."""
NAMES = (*STREAMS, "shared")
RULES = ("NF", "OUTLIER", "SAME")
NAMED = WINDOW + Outlier().every
"""Measured steps after which it has held for long enough."""
Batch = tuple[Tensor, Tensor, Tensor]
Told = tuple[str, str | None, int | None, str]
"""Rule, stream, rank and sentence of a finding."""


def named(victim: int, world: int) -> int | None:
    """Two ranks that differ have no majority: none is named."""
    return victim if world > 2 else None


# Real ranks -------------------------------------------------------------------------------------------------------


def items(seed: int, count: int = 16) -> Batch:
    """Both streams have something to say of the target."""
    generator = torch.Generator().manual_seed(seed)
    rgb, depth = torch.randn(count, 4, generator=generator), torch.randn(count, 3, generator=generator)
    return rgb, depth, (rgb[:, :3] + depth).argmax(dim=1)


def own(seed: int, step: int, rank: int, victim: int) -> Batch:
    return items(seed * 1_000_003 + step * 101 + rank)


def scaled(seed: int, step: int, rank: int, victim: int) -> Batch:
    rgb, depth, target = own(seed, step, rank, victim)
    return rgb * (10 if rank == victim else 1), depth, target


def mislabelled(seed: int, step: int, rank: int, victim: int) -> Batch:
    rgb, depth, target = own(seed, step, rank, victim)
    generator = torch.Generator().manual_seed(step)
    return rgb, depth, torch.randint(3, target.shape, generator=generator) if rank == victim else target


def noise(seed: int, step: int, rank: int, victim: int) -> Batch:
    rgb, depth, target = own(seed, step, rank, victim)
    if rank == victim:
        rgb = 3 * torch.randn(rgb.shape, generator=torch.Generator().manual_seed(step))
    return rgb, depth, target


def all_alike(seed: int, step: int, rank: int, victim: int) -> Batch:
    return items(seed * 1_000_003 + step * 101)


def two_alike(seed: int, step: int, rank: int, victim: int) -> Batch:
    return own(seed, step, 0 if rank == dist.get_world_size() - 1 else rank, victim)


def nan_input(seed: int, step: int, rank: int, victim: int) -> Batch:
    rgb, depth, target = own(seed, step, rank, victim)
    if rank == victim and step == 5:
        rgb[0, 0] = math.nan
    return rgb, depth, target


Feed = Callable[[int, int, int, int], Batch]


def _told(feed: Feed, steps: int, seed: int = 0, victim: int = 0, poisoned: str = "") -> list[Told]:
    """What stands after `steps` of training; `poisoned`: a parameter whose gradient is nan on the victim at step 5."""
    rank = dist.get_rank()
    model = DistributedDataParallel(network(seed))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = MonitorConfig(local_gradients=True, delay=0)
    monitor = StreamMonitor(model, optimizer, STREAMS, config=config)
    step = 0

    def poison(gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, math.nan) if rank == victim and step == 5 else gradient

    if poisoned:
        model.module.get_parameter(poisoned).register_hook(poison)
    ever = set()
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, feed(seed, step, rank, victim)).backward()
        monitor.step()
        optimizer.step()
        ever |= {told.rule for told in monitor.get_recommendations()}
    standing = [(f.rule, f.stream, f.rank, str(f)) for f in monitor.get_recommendations() if f.rule in RULES]
    monitor.close()
    return (
        standing if ever & set(RULES) == {rule for rule, *_ in standing} else [("NOT ONLY AT THE END", None, None, "")]
    )


def _all_told(cases: list[tuple[Any, ...]]) -> list[list[Told]]:
    return [_told(*case) for case in cases]


def told_on(world: int, cases: Sequence[tuple[Any, ...]]) -> list[list[Told]]:
    """What each case tells, the same on every rank."""
    first, *others = run_ranks(world, _all_told, list(cases))
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize("world", WORLDS)
def test_a_nan_is_traced_to_its_rank(world: int) -> None:
    cases = [(nan_input, 6, 0, victim) for victim in range(world)]
    for victim, told in enumerate(told_on(world, cases)):
        sentence = f"⚠️  the input of rgb is not finite on rank {victim} at step 6"
        assert told == [("NF", "rgb", victim, sentence)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("poisoned", ["depth.0.weight", "rgb.3.bias", "mix.weight"])
def test_a_nan_is_traced_to_its_parameter(world: int, poisoned: str) -> None:
    cases = [(own, 6, 0, victim, poisoned) for victim in range(world)]
    stream = {"mix": "shared"}.get(poisoned.split(".")[0], poisoned.split(".")[0])
    where = None if stream == "shared" else stream
    for victim, told in enumerate(told_on(world, cases)):
        sentence = f"⚠️  gradients of {stream}: not finite, on rank {victim}, first in {poisoned} at step 6"
        assert told == [("NF", where, victim, sentence)]


@pytest.mark.parametrize("world", WORLDS)
def test_an_outlier_is_named(world: int) -> None:
    """One rank's inputs of a stream ten times too large, or noise."""
    planted = [(scaled, victim) for victim in range(world)]  # of three, by default, noise on one
    planted += [(noise, victim) for victim in range(world) if world != 3 or victim == 2]
    cases = [(feed, NAMED, 0, victim) for feed, victim in planted]
    for (_, _, _, victim), told in zip(cases, told_on(world, cases), strict=True):
        assert {rule for rule, *_ in told} == {"OUTLIER"}
        assert "rgb" in [stream for _, stream, _, _ in told]
        for _, _, rank, sentence in told:
            assert rank == named(victim, world)
            assert re.search(f"the own gradient of rank {victim} is .* times that of the others, before the", sentence)


@pytest.mark.parametrize("victims", [(1,), pytest.param((0, 2), marks=pytest.mark.slow)])
def test_a_rank_with_shuffled_labels_is_named_where_its_norms_show_it(victims: tuple[int, ...]) -> None:
    """They do once the others have learned something, and not in every stream."""
    for victim, told in zip(victims, told_on(3, [(mislabelled, 150, 0, v) for v in victims]), strict=True):
        assert {(rule, rank) for rule, _, rank, _ in told} == {("OUTLIER", victim)}


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_that_are_fed_the_same_batches_are_named(world: int) -> None:
    everyone, two = told_on(world, [(all_alike, 4), (two_alike, 4)])
    pair = [0, world - 1]
    for told, ranks in ((everyone, list(range(world))), (two, pair)):
        ((rule, stream, rank, sentence),) = told
        assert (rule, stream, rank) == ("SAME", None, None)
        assert sentence == f"⚠️  ranks {', '.join(map(str, ranks))} are fed the same batches"


@pytest.mark.parametrize(
    ("world", "seeds"), [(3, 1), *(pytest.param(world, 3, marks=pytest.mark.slow) for world in (2, 3, 4))]
)
def test_nothing_is_said_of_healthy_ranks(world: int, seeds: int) -> None:
    cases = [(own, 100, seed) for seed in range(seeds)]
    assert told_on(world, cases) == [[]] * len(cases)


# What is left out ----------------------------------------------------------------------------------------------------


def engine_of(rule: Rule, streams: Sequence[str], data_ranks: int = 64) -> Engine:
    setups = dict.fromkeys(streams, StreamSetup(2, 2, 2))
    return Engine(
        [rule], Setup(64, tuple(range(data_ranks)), True, True, False, (), setups), Intent(), parameters=["a", "b"]
    )


def step_of(step: int, local: Sequence[LocalNorms], names: Sequence[str], nonfinite: int = 0) -> StepStats:
    stream = StreamStats(1.0, 0.0, 1.0, 1.0, nonfinite=nonfinite, elements=10, tensors=2)
    nan = (math.nan,) * len(names)
    facts = ranks_of([RankFacts(of.rank, nan, nan, 1.0, 8.0, 0.1, 0.1) for of in local])
    streams = dict.fromkeys(names, stream)
    return StepStats(step, None, streams, {}, len(local), (), scaled=False, rank_facts=facts, local=tuple(local))


def found(
    rule: Rule, steps: Sequence[Mapping[int, Sequence[float]] | Sequence[Sequence[float]]], data_ranks: int = 64
) -> list[Finding]:
    """What stands after steps of norms, of each step by rank, [streams]."""
    by_rank = [step if isinstance(step, Mapping) else dict(enumerate(step)) for step in steps]
    names = [f"s{number}" for number in range(len(next(iter(by_rank[0].values()))))]
    engine = engine_of(rule, names, data_ranks)
    findings: list[Finding] = []
    for step, ranks in enumerate(by_rank, start=1):
        norms = [LocalNorms(rank, tuple(own), (0,) * len(own), None) for rank, own in ranks.items()]
        findings = engine.take(step_of(step, norms, names))
    return findings


def outliers(steps: Sequence[Any]) -> list[Finding]:
    return found(Outlier(), steps)


def same(steps: Sequence[Any], data_ranks: int = 64) -> list[Finding]:
    return found(SameBatch(), steps, data_ranks)


def drawn(generator: random.Random, sigma: float) -> float:
    return math.exp(generator.gauss(0.0, sigma))


def test_an_outlier_has_its_numbers() -> None:
    steps = [[[1.0 + 0.01 * (step % 3)], [4.0], [2.0]] for step in range(NAMED)]
    assert outliers(steps[:-1]) == []
    (finding,) = outliers(steps)
    assert finding == "⚠️  s0: the own gradient of rank 0 is 0.34 times that of the others, before the average"
    assert (finding.rule, finding.severity, finding.rank) == ("OUTLIER", Severity.warning, 0)
    assert (finding.likely, finding.do) == (
        "the data of rank 0 are others",
        "compare the data of rank 0 with another rank's",
    )
    assert finding.evidence == pytest.approx({"factor": 0.337, "threshold": 1.5}, rel=1e-2)


def test_an_outlier_stands_until_nearly_all_steps_are_without_it() -> None:
    apart, alike = [[1.0], [4.0], [1.1]], [[1.0], [0.9], [1.1]]
    assert [f.step for f in outliers([apart] * NAMED + [alike] * 10)] == [NAMED]
    assert outliers([apart] * NAMED + [alike] * 20) == []


def test_what_is_small_or_rare_or_missing_is_no_outlier() -> None:
    assert outliers([[[1.0], [1.45], [1.01]]] * NAMED) == []
    assert outliers([[[1.0], [9.0], [1.1]]] * NAMED) != []
    for every, is_named in ((10, True), (5, False)):
        rare = [[[1.0], [0.9 if step % every == 0 else 9.0], [1.1]] for step in range(100)]
        assert bool(outliers(rare)) is is_named
    assert outliers([[[1.0], [math.nan], [1.1]]] * NAMED) == []
    assert outliers([[[1.0], [0.0], [1.1]]] * NAMED) == []
    assert outliers([[[1.0]]] * NAMED) == []


@pytest.mark.parametrize(("ranks", "own"), [(3, 50), (MANY, 30)])
@pytest.mark.parametrize("turns", [7, 20])
def test_ranks_heard_in_turns_are_compared_within_their_turn(ranks: int, own: int, turns: int) -> None:
    """In every tenth of their own steps, twice: few ranks need a whole window of them, of many a part is enough."""
    steps = []
    for step in range(own * turns):
        heard = range(step % turns * ranks, (step % turns + 1) * ranks)
        steps.append({rank: [9.0 if rank == 1 else 1.0 + rank / 10 + step % 3] for rank in heard})
    assert outliers(steps[: -9 - turns]) == []
    assert [(finding.rule, finding.rank) for finding in outliers(steps)] == [("OUTLIER", 1)]


def test_ranks_are_alike_only_in_all_streams_and_several_steps() -> None:
    alike, others = [[1.0, 2.0], [1.0, 2.0], [1.0, 3.0]], [[1.0, 2.0], [1.1, 2.0], [1.0, 3.0]]
    assert [list(f.evidence) for f in same([alike] * 3)] == [["rank 0", "rank 1"]]
    assert same([alike, others, alike]) == []
    assert same([alike] * 2) == []
    assert same([alike] * 3 + [others] * 3) == []
    assert same([[[math.nan, 0.0]] * 3] * 3) == []
    assert same([[[0.0, 0.0]] * 3] * 3) == []
    sets = [[1.0, 2.0], [5.0, 2.0], [1.0, 2.0], [5.0, 2.0 + 1e-9]]
    assert [list(f.evidence) for f in same([sets] * 3)] == [["rank 0", "rank 1", "rank 2", "rank 3"]]


def test_ranks_that_share_their_data_on_purpose_are_not_named() -> None:
    assert same([[[1.0], [1.0]]] * 3, data_ranks=32) == []


def test_two_ranks_with_a_nan_are_both_told() -> None:
    local = [LocalNorms(0, (1.0,), (2,), 1), LocalNorms(1, (1.0,), (0,), None), LocalNorms(2, (1.0,), (1,), 0)]
    (finding,) = engine_of(NonFinite(), ["rgb"]).take(step_of(3, local, ["rgb"], nonfinite=3))
    assert finding == "⚠️  gradients of rgb: not finite, on ranks 0, 2, first in b at step 3"
    assert finding.rank is None


# How often OUTLIER errs by chance -----------------------------------------------------------------------------------

STREAM_NUMBER = 4


def by_chance(world: int, steps: int) -> float:
    """The most often that a window names one of equal ranks, in any of the streams: whatever the norms' distribution,
    each rank is the largest of a step with a probability of 1 / W, and so with the smallest."""
    p, least = 1 / world, math.ceil(ALWAYS * steps)
    tail = sum(math.comb(steps, k) * p**k * (1 - p) ** (steps - k) for k in range(least, steps + 1))
    extremes = 1 if world == 2 else 2  # of two, one is the largest where the other is the smallest
    return STREAM_NUMBER * extremes * world * tail


@pytest.mark.parametrize(
    ("world", "steps"), [*((world, WINDOW) for world in (2, 3, 4, 8, 64)), (MANY, FEW), (100, FEW)]
)
def test_the_binomial_tail_bounds_false_alarms(world: int, steps: int) -> None:
    assert by_chance(world, steps) < 1e-6


@functools.cache
def alarms(world: int, sigma: float, windows: int, shift: float = 1.0) -> int:
    """In how many of the windows of log-normal norms a rank is named, the last rank's norms `shift` times as large."""
    generator = random.Random(world)
    total = 0
    for _ in range(windows):
        rows = [[drawn(generator, sigma) for _ in range(world)] for _ in range(WINDOW)]
        total += outlier([[*row[:-1], row[-1] * shift] for row in rows]) is not None
    return total


EVERY = [(world, sigma) for world in (2, 4, 8) for sigma in (0.1, 0.3, 0.5)]
FAST = ((2, 0.5), (4, 0.3), (8, 0.1))


@pytest.mark.parametrize(
    ("world", "sigma"), [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY]
)
def test_no_rank_of_equals_is_named_in_simulation(world: int, sigma: float) -> None:
    assert alarms(world, sigma, 2000) == 0


@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_rank_with_gradients_four_times_as_large_is_named_in_simulation(world: int) -> None:
    assert alarms(world, 0.3, 200, shift=4.0) == 200


def test_the_factor_is_against_the_median_of_the_others() -> None:
    assert times([[1.0, 2.0, 8.0], [1.0, 8.0, 2.0]], 0) == pytest.approx(0.2)
    assert times([[1.0, 4.0], [4.0, 4.0]], 1) == pytest.approx(2.0)
