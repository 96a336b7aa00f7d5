"""NF, OUTLIER and SAME on real ranks with planted faults, on healthy ones, and how often OUTLIER errs by chance."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon import MonitorConfig, RuleSet, Severity, StreamMonitor
from ddp_streammon.ranks import LocalNorms
from ddp_streammon.rules.exact import check
from ddp_streammon.rules.finding import Finding
from ddp_streammon.rules.own_gradients import ALWAYS, WINDOW, OwnGradients, factor, outlier
from ddp_streammon.stats import StepStats, StreamStats
from tests.networks import STREAMS, loss_of, network
from tests.ranks import run_ranks

WORLDS = [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
"""Two ranks are in the fault zoo, too."""
NAMES = (*STREAMS, "shared")
RULES = ("NF", "OUTLIER", "SAME")
Batch = tuple[Tensor, Tensor, Tensor]
Told = tuple[str, str | None, int | None, str]
"""Rule, stream, rank and sentence of a finding."""


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
    config = MonitorConfig(local_gradients=True, delay=0, rules=RuleSet.off)
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
        assert [(rule, stream, rank) for rule, stream, rank, _ in told] == [("NF", name, victim) for name in NAMES]
        for _, _, _, sentence in told:
            assert f"at step 6 (in the own gradient of rank {victim}, first in mix.bias)" in sentence


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("poisoned", ["depth.0.weight", "rgb.3.bias", "mix.weight"])
def test_a_nan_is_traced_to_its_parameter(world: int, poisoned: str) -> None:
    cases = [(own, 6, 0, victim, poisoned) for victim in range(world)]
    stream = {"mix": "shared"}.get(poisoned.split(".")[0], poisoned.split(".")[0])
    for victim, told in enumerate(told_on(world, cases)):
        ((rule, where, rank, sentence),) = told
        assert (rule, where, rank) == ("NF", stream, victim)
        assert f"(in the own gradient of rank {victim}, first in {poisoned})" in sentence


@pytest.mark.parametrize("world", WORLDS)
def test_an_outlier_is_named(world: int) -> None:
    """One rank's inputs of a stream ten times too large, or noise."""
    cases = [(scaled, WINDOW, 0, victim) for victim in range(world)] + [(noise, WINDOW, 0, world - 1)]
    for (_, _, _, victim), told in zip(cases, told_on(world, cases), strict=True):
        assert {rule for rule, *_ in told} == {"OUTLIER"}
        assert "rgb" in [stream for _, stream, _, _ in told]
        for _, _, rank, sentence in told:
            if world == 2:
                assert rank is None
                assert "with two ranks it cannot be said which is wrong; compare the data of ranks 0 and 1" in sentence
            else:
                assert rank == victim
                assert f"compare the data of rank {victim} with that of another" in sentence


@pytest.mark.parametrize("victims", [(1,), pytest.param((0, 2), marks=pytest.mark.slow)])
def test_a_rank_with_shuffled_labels_is_named_where_its_norms_show_it(victims: tuple[int, ...]) -> None:
    """They do once the others have learned something, and not in every stream."""
    for victim, told in zip(victims, told_on(3, [(mislabelled, 3 * WINDOW, 0, v) for v in victims]), strict=True):
        assert {(rule, rank) for rule, _, rank, _ in told} == {("OUTLIER", victim)}


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_that_are_fed_the_same_batches_are_named(world: int) -> None:
    everyone, two = told_on(world, [(all_alike, 4), (two_alike, 4)])
    pair = [0, world - 1]
    for told, ranks in ((everyone, list(range(world))), (two, pair)):
        ((rule, stream, rank, sentence),) = told
        assert (rule, stream, rank) == ("SAME", None, None)
        named = ", ".join(map(str, ranks))
        assert sentence.startswith(f"⚠️  ranks {named} have had gradients of the same norm in every stream for 3 steps")
        assert sentence.endswith(
            "step 4: they are fed the same batches; use a DistributedSampler, call its set_epoch, and seed random "
            "augmentation by rank"
        )


@pytest.mark.parametrize(
    ("world", "seeds"), [(3, 1), *(pytest.param(world, 3, marks=pytest.mark.slow) for world in (2, 3, 4))]
)
def test_nothing_is_said_of_healthy_ranks(world: int, seeds: int) -> None:
    cases = [(own, 100, seed) for seed in range(seeds)]
    assert told_on(world, cases) == [[]] * len(cases)


# Sentences, and what is left out -------------------------------------------------------------------------------------


def step_of(step: int, local: Sequence[LocalNorms], names: Sequence[str] = ("rgb",), nonfinite: int = 0) -> StepStats:
    stream = StreamStats(1.0, 0.0, 1.0, 1.0, nonfinite=nonfinite, elements=10, tensors=2)
    return StepStats(step, None, dict.fromkeys(names, stream), {}, len(local), (), scaled=False, local=tuple(local))


def found(steps: Sequence[Sequence[Sequence[float]]], rule: OwnGradients | None = None) -> list[Finding]:
    """What stands after steps of norms, [steps][ranks][streams]."""
    rule = rule or OwnGradients()
    names = [f"s{number}" for number in range(len(steps[0][0]))]
    findings: list[Finding] = []
    for step, ranks in enumerate(steps, start=1):
        norms = [LocalNorms(rank, tuple(own), (0,) * len(own), None) for rank, own in enumerate(ranks)]
        findings = rule.check(step_of(step, norms, names))
    return findings


def drawn(generator: random.Random, sigma: float) -> float:
    return math.exp(generator.gauss(0.0, sigma))


def test_an_outlier_has_its_numbers() -> None:
    steps = [[[1.0 + 0.01 * (step % 3)], [4.0], [2.0]] for step in range(WINDOW)]
    assert found(steps[:-1]) == []
    (finding,) = found(steps)
    assert finding.startswith("⚠️  s0: the gradient of rank 0 is 0.34 times the median of the other ranks', before the")
    assert f"in nearly all of the {WINDOW} measured steps up to step {WINDOW}" in finding
    assert (finding.rule, finding.severity, finding.rank) == ("OUTLIER", Severity.warning, 0)
    assert finding.evidence == pytest.approx({"factor": 0.337, "rank 0": 1.01, "rank 1": 4.0, "rank 2": 2.0}, rel=1e-2)


def test_an_outlier_stands_until_a_whole_window_is_without_it() -> None:
    apart, alike = [[1.0], [4.0], [1.1]], [[1.0], [1.2], [1.1]]
    assert [f.step for f in found([apart] * WINDOW + [alike] * (WINDOW - 1))] == [WINDOW]
    assert found([apart] * WINDOW + [alike] * WINDOW) == []


def test_what_is_small_or_rare_or_missing_is_no_outlier() -> None:
    assert found([[[1.0], [1.45], [1.01]]] * WINDOW) == []
    rare = WINDOW - ALWAYS + 1
    assert found([[[1.0], [9.0], [1.1]]] * ALWAYS + [[[1.0], [0.9], [1.1]]] * (WINDOW - ALWAYS)) != []
    assert found([[[1.0], [9.0], [1.1]]] * (WINDOW - rare) + [[[1.0], [0.9], [1.1]]] * rare) == []
    assert found([[[1.0], [math.nan], [1.1]]] * WINDOW) == []
    assert found([[[1.0], [0.0], [1.1]]] * WINDOW) == []
    assert found([[[1.0]]] * WINDOW) == []


def test_ranks_heard_in_turns_are_compared_within_their_turn() -> None:
    rule = OwnGradients()
    standing: list[Finding] = []
    for step in range(1, 2 * WINDOW + 1):
        ranks = (0, 1, 2) if step % 2 else (3, 4, 5)
        norms = [LocalNorms(rank, (9.0 if rank == 4 else 1.0 + rank / 10,), (0,), None) for rank in ranks]
        standing = rule.check(step_of(step, norms))
    assert [(finding.rule, finding.rank) for finding in standing] == [("OUTLIER", 4)]


def test_ranks_are_alike_only_in_all_streams_and_several_steps() -> None:
    alike, others = [[1.0, 2.0], [1.0, 2.0], [1.0, 3.0]], [[1.0, 2.0], [1.1, 2.0], [1.0, 3.0]]
    assert [list(f.evidence) for f in found([alike] * 3)] == [["rank 0", "rank 1"]]
    assert found([alike, others, alike]) == []
    assert found([alike] * 2) == []
    assert found([alike] * 3 + [others]) == []
    assert found([[[math.nan, 0.0]] * 3] * 3) == []
    sets = [[1.0, 2.0], [5.0, 2.0], [1.0, 2.0], [5.0, 2.0 + 1e-9]]
    assert [list(f.evidence) for f in found([sets] * 3)] == [["rank 0", "rank 2"], ["rank 1", "rank 3"]]
    with_nan = [[1.0, math.nan], [7.0, math.nan], [1.0, math.nan]]
    assert [list(f.evidence) for f in found([with_nan] * 3)] == [["rank 0", "rank 2"]]


def test_ranks_that_share_their_data_on_purpose_are_not_named() -> None:
    assert found([[[1.0], [1.0]]] * 3, OwnGradients(shared_data=True)) == []


def test_two_ranks_with_a_nan_are_both_named() -> None:
    local = [LocalNorms(0, (1.0,), (2,), 1), LocalNorms(1, (1.0,), (0,), None), LocalNorms(2, (1.0,), (1,), 0)]
    (finding,) = check(step_of(3, local, nonfinite=3), parameters=["a", "b"])
    assert "(in the own gradient of rank 0, 2, first in b)" in finding
    assert finding.rank is None


# How often OUTLIER errs by chance -----------------------------------------------------------------------------------

STREAM_NUMBER = 4


def by_chance(world: int) -> float:
    """The most often that a window names one of equal ranks, in any of the streams: whatever the norms' distribution,
    each rank is the largest of a step with a probability of 1 / W, and so with the smallest."""
    p = 1 / world
    tail = sum(math.comb(WINDOW, k) * p**k * (1 - p) ** (WINDOW - k) for k in range(ALWAYS, WINDOW + 1))
    extremes = 1 if world == 2 else 2  # of two, one is the largest where the other is the smallest
    return STREAM_NUMBER * extremes * world * tail


@pytest.mark.parametrize("world", [2, 3, 4, 8, 64])
def test_the_binomial_tail_bounds_false_alarms(world: int) -> None:
    assert by_chance(world) < 1e-6


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
    assert factor([[1.0, 2.0, 8.0], [1.0, 8.0, 2.0]], 0) == pytest.approx(0.2)
    assert factor([[1.0, 4.0], [4.0, 4.0]], 1) == pytest.approx(2.0)
