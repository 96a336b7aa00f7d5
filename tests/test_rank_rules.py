"""Faults planted on one rank of two, three and four are named, nothing is in healthy runs; packets sent in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from ddp_streammon import MonitorConfig, RuleSet, StreamMonitor, stats
from ddp_streammon.config import Intent
from ddp_streammon.described import Setup
from ddp_streammon.packet import CELL_BYTES, LIMIT_BYTES, Layout
from ddp_streammon.rank_facts import RankFacts
from ddp_streammon.ranks import LocalNorms, Replicas
from ddp_streammon.rules.engine import Engine
from ddp_streammon.rules.finding import Finding
from ddp_streammon.rules.of_inputs import ConstantInput, OtherScale, SameBatch, ZeroInput
from ddp_streammon.rules.of_ranks import Diverged, OtherLoss, OtherMode, OtherSettings, Slow, Uneven
from ddp_streammon.stats import StepStats
from tests.networks import STREAMS, batch, loss_of, network, part
from tests.ranks import run_ranks
from tests.sharding import needs_fsdp2
from tests.steps import ranks_of, said, setup, step

WORLDS = [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
"""Two ranks are in the fault zoo, too."""
RULES = ("NF", "LR", "MODE", "BATCH", "SYNC", "DESYNC", "SAME", "LOSS", "SLOW")
NAMES = (*STREAMS, "shared")
FIRST = -(-(Slow().warm_up + 1) // Slow().every) * Slow().every
"""The measured step of the first look for a slow rank."""
NAMED = FIRST + (Slow().hold - 1) * Slow().every
"""That at which it has held for long enough."""
Found = tuple[str, str, "str | None", "int | None", "int | None"]
"""(rule, severity, stream, rank, step)."""


class Run:
    """A model trained under DDP by SGD, with a parameter group a stream, and what was found at each step."""

    def __init__(self, **config: Any) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.model = DistributedDataParallel(network())
        parts = {"rgb": self.model.module.rgb, "depth": self.model.module.depth, "shared": self.model.module.mix}
        self.parts: dict[str, nn.Module] = {name: parts[name] for name in NAMES}
        groups = [{"params": list(module.parameters())} for module in self.parts.values()]
        self.optimizer = torch.optim.SGD(groups, 0.05, weight_decay=1e-4)
        self.monitor = StreamMonitor(self.model, self.optimizer, STREAMS, config=MonitorConfig(**config))
        self.found: dict[int, list[Finding]] = {}

    def step(
        self, *, seconds: float = 0.0, samples: int = 8, synchronised: bool = True, loss: float | None = None
    ) -> None:
        """One step; `seconds` are spent on loading its batch."""
        self.optimizer.zero_grad()
        time.sleep(seconds)
        with contextlib.nullcontext() if synchronised else self.model.no_sync():
            value = loss_of(self.model, part(batch(seed=self.monitor.calls), self.rank, self.world))
            value.backward()
        self.monitor.step(loss=value if loss is None else loss, samples=samples)
        said = self.monitor.get_recommendations()
        self.found[self.monitor.calls] = [finding for finding in said if finding.rule in RULES]
        self.optimizer.step()

    def answer(self) -> dict[int, list[tuple[Found, str]]]:
        """{call: [(what was found, its sentence)]}, for the calls at which anything stood."""
        return {
            call: [((f.rule, f.severity.value, f.stream, f.rank, f.step), str(f)) for f in findings]
            for call, findings in self.found.items()
            if findings
        }


Answer = dict[int, list[tuple[Found, str]]]


def healthy() -> Answer:
    """Sixty steps in which every rank loads for 20 ms, so that a busy machine does not make a straggler."""
    run = Run(audit_every=5)
    for _ in range(60):
        run.step(seconds=0.02)
    return run.answer()


def desynchronised(stream: str, culprit: int) -> Answer:
    """One weight off by 1e-6 after step 3, put right after step 8."""
    run = Run(audit_every=5, delay=0)
    weight = next(run.parts[stream].parameters())
    for call in range(1, 13):
        run.step()
        with torch.no_grad():
            if call == 3 and run.rank == culprit:
                weight.view(-1)[0] += 1e-6
            if call == 8:
                dist.broadcast(weight.data, src=(culprit + 1) % run.world)
    return run.answer()


def setting(name: str, stream: str, culprit: int) -> Answer:
    """Twice the value from step 4 to step 6."""
    run = Run(delay=0)
    group = run.optimizer.param_groups[NAMES.index(stream)]
    for call in range(1, 9):
        if run.rank == culprit and call in (4, 7):
            group[name] *= 2.0 if call == 4 else 0.5
        run.step()
    return run.answer()


def mode(culprit: int) -> Answer:
    """Eval mode from step 4 to step 6."""
    run = Run(delay=0)
    for call in range(1, 9):
        run.model.train(not (run.rank == culprit and 4 <= call <= 6))
        run.step()
    return run.answer()


def sizes(culprit: int) -> Answer:
    """A smaller batch from step 2 to step 7."""
    run = Run(delay=0)
    for call in range(1, 14):
        run.step(samples=3 if run.rank == culprit and 2 <= call <= 7 else 8)
    return run.answer()


def unsynchronised() -> Answer:
    """Gradients that stay on their ranks; the optimizer leaves the weights alone until step 4."""
    run = Run(delay=0, audit_every=2)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    for call in range(1, 9):
        run.step(synchronised=call > 4)
    return run.answer()


def drifting() -> Answer:
    """Gradients that stay on their ranks, and weights that follow them."""
    run = Run(delay=0, audit_every=2)
    for _ in range(3):
        run.step(synchronised=False)
    return run.answer()


def slow(culprit: int) -> Answer:
    """One rank loads for 30 ms until it is named; then all do."""
    run = Run()
    for call in range(1, NAMED + 41):
        run.step(seconds=0.03 * (call > NAMED or run.rank == culprit))
    return run.answer()


def slow_between_measured_steps(culprit: int) -> Answer:
    """One rank loads for 20 ms, and every third step is measured."""
    run = Run(every=3)
    for _ in range(3 * NAMED):
        run.step(seconds=0.02 * (run.rank == culprit))
    return run.answer()


def flushed_alone() -> list[float]:
    """Norms of three steps with equal gradients, where one rank brings in the first audit before the others."""
    run = Run(delay=1)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(3):
        run.optimizer.zero_grad()
        loss_of(run.model, part(batch(), run.rank, run.world)).backward()
        run.monitor.step(loss=1.0)
        if run.rank == 0:
            run.monitor.state_dict()
    run.monitor.flush()
    return run.monitor.history["rgb_grad_norm"]


def _cases() -> dict[Any, Answer]:
    world = dist.get_world_size()
    answers: dict[Any, Answer] = {"no_sync": unsynchronised(), "drift": drifting()}
    for culprit in range(world):
        for stream in NAMES:
            answers["desync", stream, culprit] = desynchronised(stream, culprit)
        answers["lr", culprit] = setting("lr", NAMES[culprit % 3], culprit)
        answers["weight_decay", culprit] = setting("weight_decay", "depth", culprit)
        answers["mode", culprit] = mode(culprit)
        answers["batch", culprit] = sizes(culprit)
    answers["slow"] = slow(world - 1)
    answers["flushed"] = flushed_alone()
    return answers


@functools.cache
def cases(world: int) -> list[dict[Any, Answer]]:
    answers = run_ranks(world, _cases)
    for of_rank in answers[1:]:  # what is found is equal on every rank, to the letter
        assert of_rank == answers[0]
    return answers


def found(answer: Answer) -> dict[int, list[Found]]:
    return {call: [what for what, _ in findings] for call, findings in answer.items()}


def named(culprit: int, world: int) -> int | None:
    """Two ranks that differ have no majority: where nothing else tells them apart none is named."""
    return culprit if world > 2 else None


def of(stream: str) -> str | None:
    """A finding about what no stream owns names none."""
    return None if stream == "shared" else stream


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_nothing_is_found_in_sixty_healthy_steps(world: int) -> None:
    assert run_ranks(world, healthy) == [{}] * world


@pytest.mark.parametrize("world", WORLDS)
def test_one_weight_off_by_a_millionth_is_named_in_the_next_step_until_it_is_put_right(world: int) -> None:
    for culprit in range(world):
        for stream in NAMES:
            answer = cases(world)[0]["desync", stream, culprit]
            expected = ("DESYNC", "error", of(stream), named(culprit, world), 4)
            assert found(answer) == {call: [expected] for call in range(4, 9)}
            who = f"rank {culprit} holds" if world > 2 else "ranks 0, 1 hold"
            assert answer[4][0][1] == f"⚠️  {stream}: {who} other weights"


@pytest.mark.parametrize("world", WORLDS)
def test_a_learning_rate_that_differs_is_named_by_stream_and_rank_at_that_step(world: int) -> None:
    """Of two ranks the one whose other streams have another rate; that weights then differ is a consequence."""
    for culprit in range(world):
        stream = NAMES[culprit % 3]
        answer = cases(world)[0]["lr", culprit]
        said = found(answer)
        expected = ("LR", "error", of(stream), culprit, 4)
        assert {call: what[0] for call, what in said.items() if call < 7} == dict.fromkeys((4, 5, 6), expected)
        others = [what for call in said for what in said[call] if what != expected]
        assert others == [("DESYNC", "info", of(stream), named(culprit, world), 5)] * 4
        sentence = answer[4][0][1]
        assert f"the learning rate of {stream} differs between ranks: " in sentence
        assert f"0.1 on rank {culprit}" in sentence


@pytest.mark.parametrize("world", WORLDS)
def test_weight_decay_mode_and_batch_size_that_differ_are_named_while_they_do(world: int) -> None:
    for culprit in range(world):
        decay = ("LR", "error", "depth", named(culprit, world), 4)
        expected = {
            "weight_decay": (range(4, 7), decay, f"the weight decay of depth .*0.0002 on rank {culprit}"),
            "mode": (
                range(5, 8),
                ("MODE", "error", None, culprit, 5),
                f"rank {culprit} trains in eval mode",
            ),
            "batch": (range(6, 12), ("BATCH", "warning", None, culprit, 6), f"batches differ .*3 on rank {culprit}"),
        }
        for kind, (calls, what, sentence) in expected.items():
            answer = cases(world)[0][kind, culprit]
            said = {call: findings for call, findings in found(answer).items() if what in findings}
            assert list(said) == list(calls), kind
            assert {other[:2] for findings in found(answer).values() for other in findings} <= {
                what[:2],
                ("DESYNC", "info"),
            }
            assert re.search(sentence, answer[calls[0]][0][1])


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_that_nobody_synchronises_are_named_at_the_first_audit_and_not_after_they_are(world: int) -> None:
    answer = found(cases(world)[0]["no_sync"])
    assert answer == {call: [("SYNC", "error", None, None, 1)] for call in (1, 2, 3, 4)}


@pytest.mark.parametrize("world", WORLDS)
def test_weights_that_have_drifted_apart_are_a_consequence(world: int) -> None:
    answer = found(cases(world)[0]["drift"])
    assert answer[1] == [("SYNC", "error", None, None, 1)]
    assert answer[3] == [("DESYNC", "info", None, None, 2)]


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_that_loads_slowly_is_named_until_it_does_not(world: int) -> None:
    answer = cases(world)[0]["slow"]
    assert min(answer) == NAMED + 1  # figures arrive a call later
    assert max(answer) <= NAMED + 40
    for findings in answer.values():
        ((what, sentence),) = findings
        assert what == ("SLOW", "warning", None, world - 1, NAMED)
        assert f"rank {world - 1} is busy for " in sentence


def test_a_slow_rank_is_named_where_not_every_step_is_measured() -> None:
    first, second = run_ranks(2, slow_between_measured_steps, 1)
    assert first == second
    last = 3 * (NAMED - 1) + 1
    assert found(first) == {call: [("SLOW", "warning", None, 1, last)] for call in range(last + 1, 3 * NAMED + 1)}


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_that_brings_in_the_audit_before_the_others_reads_no_other_share(world: int) -> None:
    first, *others = cases(world)[0]["flushed"]
    assert others == pytest.approx([first] * 2, rel=1e-6)


# The pace of ranks ------------------------------------------------------------------------------------------------


def pace_of(rank: int, busy: float, step: float = 0.1) -> RankFacts:
    return RankFacts(rank, (), (), 1.0, 8.0, step, busy)


def standing(facts_at: Callable[[int], list[RankFacts]], steps: int = 100) -> list[Finding]:
    setup = Setup(64, tuple(range(64)), True, True, False, (), {})
    engine = Engine([Slow()], setup, Intent())
    result: list[Finding] = []
    for number in range(1, steps + 1):
        facts = facts_at(number)
        stats = StepStats(number, None, {}, {}, len(facts), (), False, rank_facts=ranks_of(facts))
        result = engine.take(stats)
    return result


def turn(number: int, slow: float) -> list[RankFacts]:
    """Two of the ranks 0 to 9; rank 8 is slow, and rank 4's work takes longer than that of rank 2, of another turn."""
    first = 2 * (number % 5)
    return [pace_of(rank, slow if rank == 8 else 0.03 + 0.03 * (rank in (4, 5))) for rank in (first, first + 1)]


def test_ranks_that_are_heard_in_turn_are_compared_with_those_of_their_turn() -> None:
    assert standing(lambda number: turn(number, 0.03)) == []
    (finding,) = standing(lambda number: turn(number, 0.09))
    assert (finding.rule, finding.rank) == ("SLOW", 8)
    assert standing(lambda number: turn(number, 0.09 if number <= 100 else 0.03), 200) == []


def test_of_thousands_of_ranks_the_odd_one_is_named_though_it_is_heard_every_thirty_steps() -> None:
    odd = {"details": {2: {"loss": 4.0}}, "facts": {2: {"busy_seconds": 0.09}}, "inputs": {("pix", 2): {"std": 30.0}}}
    rules = [OtherLoss(), Slow(), OtherScale()]
    engine = Engine(rules, setup(120), Intent())
    told: dict[int, set[str]] = {}
    for number in range(1, 1500):
        first = number % 30 * 4
        stats = step(number, 4, **(odd if first == 8 and number <= 750 else {}))
        heard = [dataclasses.replace(facts, rank=first + facts.rank) for facts in stats.rank_facts]
        found = engine.take(dataclasses.replace(stats, rank_facts=ranks_of(heard)))
        assert {finding.rank for finding in found} <= {10}
        told[number] = {finding.rule for finding in found}
    assert told[750] == {"LOSS", "SLOW", "INR"}
    assert sum(told[number] != told[number - 1] for number in range(2, 751)) <= 3  # raised, and never cleared between
    assert told[1499] == set()


def turn_of(number: int, fault: Mapping[str, Any], *, turns: int = 12, ranks: int = 8) -> StepStats:
    """A step in which the ranks of one of the turns are heard, those of the first with a fault."""
    stats = step(number, ranks, **(fault if number % turns == 0 else {}))
    heard = [dataclasses.replace(facts, rank=ranks * (number % turns) + facts.rank) for facts in stats.rank_facts]
    return dataclasses.replace(stats, rank_facts=ranks_of(heard))


def test_what_is_said_of_several_ranks_stands_until_their_next_turn() -> None:
    def two_odd(number: int) -> dict[str, Any]:
        own = {"loss": 4.0, "weights": (3.0,) * 3, "batch": float(number)}
        return {
            "details": {0: own, 1: own},
            "facts": {rank: {"training": 0.0, "lr": (0.06,) * 3, "samples": 7.0} for rank in (0, 1)},
            "inputs": {("pix", 0): {"std": 30.0}, ("pix", 1): {"std": 0.03}},
        }

    exact = {"MODE", "LR", "BATCH", "DESYNC", "SAME"}
    rules = [OtherLoss(), OtherScale(), OtherMode(), OtherSettings(), Uneven(), Diverged(), SameBatch()]
    engine = Engine(rules, setup(96), Intent())
    told: dict[int, set[str]] = {0: set()}
    for number in range(1, 700):
        found = engine.take(turn_of(number, two_odd(number) if number <= 360 else {}))
        assert {finding.rank for finding in found} <= {None}
        told[number] = {finding.rule for finding in found}
    assert told[371] == {"LOSS", "INR", *exact}
    raised = sum(len(told[number] - told[number - 1]) for number in range(1, 700))
    assert (raised, told[699]) == (7, set())  # each once


@pytest.mark.parametrize("everyone", [True, False])
def test_inputs_that_say_nothing_are_told_of_ranks_that_are_heard_in_turns(everyone: bool) -> None:
    bad = range(8) if everyone else [3]
    zeros, frozen = {"mean": 0.0, "std": 0.0, "abs_max": 0.0}, {"constant": 1.0}
    fault = {"inputs": {**{("pix", rank): zeros for rank in bad}, **{("fou", rank): frozen for rank in bad}}}
    engine = Engine([ZeroInput(), ConstantInput()], setup(96), Intent())
    told: list[set[tuple[str, str | None, int | None]]] = []
    for number in range(1, 200):
        found = engine.take(turn_of(number, fault if number < 100 else {}))
        told.append({(finding.rule, finding.stream, finding.rank) for finding in found})
        assert not any("every rank" in finding.seen for finding in found)
    whom = None if everyone else 3
    assert told[99] == {("INZ", "pix", whom), ("INC", "fou", whom)}
    assert [len(told[number]) for number in (11, 23, 35, 47, 59)] == [0, 0, 1, 2, 2]
    assert told[-1] == set()


@pytest.mark.parametrize(("world", "stands"), [(96, True), (95, False)])
def test_whom_a_finding_is_about_is_kept_with_the_state_of_the_same_world(world: int, stands: bool) -> None:
    fault = {"facts": {rank: {"lr": (0.06,) * 3} for rank in (0, 1)}}
    first, second = Engine([OtherSettings()], setup(96), Intent()), Engine([OtherSettings()], setup(world), Intent())
    first.take(turn_of(12, fault))
    state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state)
    assert (second.state_dict() == state) is stands
    assert bool(second.take(turn_of(13, fault))) is stands


def test_the_first_step_tells_no_pace() -> None:
    first = [pace_of(0, math.nan, math.nan), pace_of(1, math.nan, math.nan)]
    assert standing(lambda number: first if number == 1 else [pace_of(0, 0.01), pace_of(1, 0.01)]) == []
    (finding,) = standing(lambda number: first if number == 1 else [pace_of(0, 0.01), pace_of(1, 0.04)])
    assert finding.evidence == pytest.approx({"rank 0": 0.01, "rank 1": 0.04})
    assert standing(lambda _: first) == []


@pytest.mark.parametrize(("slowest", "is_named"), [(0.029, False), (0.031, True)])
def test_a_straggler_is_half_as_busy_again_as_the_median_of_the_others(slowest: float, is_named: bool) -> None:
    ranks = [pace_of(0, 0.01), pace_of(1, 0.02), pace_of(2, slowest, 0.08), pace_of(3, 0.021)]
    assert bool(standing(lambda _: ranks)) is is_named


def test_a_small_part_of_a_step_is_not_worth_a_word_and_one_rank_has_nobody_to_wait_for_it() -> None:
    assert standing(lambda _: [pace_of(0, 0.001), pace_of(1, 0.009)]) == []
    assert standing(lambda _: [pace_of(0, 0.001), pace_of(1, 0.012)]) != []
    assert standing(lambda _: [pace_of(0, 0.09)]) == []


# Which rank -------------------------------------------------------------------------------------------------------


def half(*figures: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Ranks 2 and 3 of four."""
    return dict(enumerate(figures, start=2))


TWO_OF_FOUR: dict[str, tuple[dict[str, Any], str, str]] = {
    "batches": ({"facts": half({"samples": 8.0}, {"samples": 9.0})}, "BATCH", "batches differ in size"),
    "losses": ({"details": half({"loss": 4.0}, {"loss": 4.1})}, "LOSS", "losses differ between ranks: "),
    "inputs": (
        {"inputs": {("fou", 2): {"std": 30.0, "mean": 0.2}, ("fou", 3): {"std": 31.0, "mean": 0.3}}},
        "INR",
        "fou: its inputs differ between ranks",
    ),
}


@pytest.mark.parametrize("name", TWO_OF_FOUR)
def test_where_two_of_four_ranks_differ_none_is_named(name: str) -> None:
    changes, rule, sentence = TWO_OF_FOUR[name]
    told = [f for (of_rule, *_), f in said(lambda _: changes, 60, ranks=4).items() if of_rule == rule]
    assert [finding.rank for finding in told] == [None]
    assert sentence in told[0]


@pytest.mark.parametrize("unseen", [0, 2])
@pytest.mark.parametrize(
    "of",
    [
        {"mean": math.nan, "std": math.nan},
        {"calls": 0.0, "abs_max": math.nan},
        {"mean": 0.0, "std": 0.0, "abs_max": 0.0},
    ],
)
def test_inputs_are_compared_where_a_rank_never_has_any(of: dict[str, float], unseen: int) -> None:
    inputs = {("pix", 1): {"std": 30.0}, ("pix", unseen): of}
    engine = Engine([OtherScale()], setup(3), Intent())
    for number in range(1, 41):
        stats = step(number, 3, inputs=inputs)
        if number % 7 == 0:
            stats = dataclasses.replace(stats, rank_facts=ranks_of(()))  # of a packet without facts
        found = engine.take(stats)
    assert [(f.rule, f.stream, f.rank) for f in found] == [("INR", "pix", 1)]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(("mean", "named"), [(1.5, False), (-1.5, False), (3.0, True), (-3.0, True)])
def test_inputs_are_compared_by_their_means_in_the_steps_that_have_any(mean: float, named: bool, every: int) -> None:
    def inputs(number: int) -> dict[str, Any]:
        seen = {"mean": mean, "std": 1.0} if number % every == 0 else {"mean": math.nan, "std": math.nan}
        return {"inputs": {("pix", 1): seen}}

    assert [*said(inputs, 40, ranks=3, rules=[OtherScale(factor=16.0)])] == [("INR", "pix", 1)] * named


@dataclasses.dataclass(frozen=True)
class Thorough(OtherScale):
    """Without the look that spares the medians where ranks are close."""

    def _close(self, *_: Any) -> bool:
        return False


def test_the_quick_look_at_inputs_misses_nothing_that_their_medians_would_show() -> None:
    """Rank 1 is off in scale and in mean by up to three thresholds, with noise; some inputs are missing."""
    alarmed = 0
    for seed in range(40):
        draw = random.Random(seed)
        scale, shift, noise = draw.uniform(1, 4), draw.choice([0, draw.uniform(-4, 4)]), draw.choice([0.01, 0.3])
        missing = draw.choice([0.0, 0.03, 0.4])

        def inputs(
            rank: int, draw: random.Random, scale: float, shift: float, noise: float, missing: float
        ) -> dict[str, float]:
            if draw.random() < missing:
                return {"mean": math.nan, "std": math.nan, **draw.choice([{}, {"calls": 0.0, "abs_max": math.nan}])}
            std = math.exp(draw.gauss(0, noise)) * (scale if rank == 1 else 1)
            return {"mean": draw.gauss(shift * (rank == 1), noise), "std": std}

        made = [
            {"inputs": {("fou", rank): inputs(rank, draw, scale, shift, noise, missing) for rank in range(3)}}
            for _ in range(41)
        ]
        quick, thorough = (said(made.__getitem__, 40, ranks=3, rules=[rule]) for rule in (OtherScale(), Thorough()))
        assert quick == thorough
        alarmed += bool(quick)
    assert 5 < alarmed < 35


@pytest.mark.parametrize(("facts", "details"), [({"training": 0.0}, {}), ({}, {"in_eval": 0.5})])
def test_the_rank_in_eval_mode_is_named(facts: dict[str, float], details: dict[str, float]) -> None:
    told = said(lambda _: {"facts": {1: facts}, "details": {1: details}}, 5, ranks=3, rules=[OtherMode()])
    assert [*told] == [("MODE", None, 1)]


@pytest.mark.parametrize(("place", "stream"), [(0, "fou"), (1, "pix"), (2, None)])
def test_other_weights_are_seen_in_any_stream(place: int, stream: str | None) -> None:
    def change(number: int) -> dict[str, Any]:
        weights = [float(number)] * 3
        weights[place] = -1.0
        return {"details": {1: {"weights": tuple(weights)}}}

    assert [*said(change, 3, ranks=3, rules=[Diverged()])] == [("DESYNC", stream, 1)]


@pytest.mark.parametrize(("detailed", "rates"), [(True, (0.05, 0.08)), (False, (0.05, 0.06))])
def test_the_advice_is_the_rate_that_a_schedule_starts_from_where_ranks_tell_it(
    detailed: bool, rates: tuple[float, float]
) -> None:
    stats = step(1, 3, facts={1: {"lr": (0.05, 0.06, 0.05)}}, details={1: {"base_lr": (0.05, 0.08, 0.05)}})
    rows = [own if detailed else dataclasses.replace(own, detail=None) for own in stats.rank_facts]
    engine = Engine([OtherSettings()], setup(3), Intent())
    (finding,) = engine.take(dataclasses.replace(stats, rank_facts=ranks_of(rows)))
    assert finding.action is not None
    assert (finding.rank, finding.action.value, finding.action.old) == (1, *rates)


class Patient(Slow):
    """Looks at all that ranks say of their pace."""

    def _one_lags(self, behind: Sequence[Sequence[int] | None]) -> bool:
        return sum(ranks is not None for ranks in behind) >= self.LEAST


def test_the_quick_look_at_the_pace_misses_nothing_that_the_median_would_show() -> None:
    """Rank 1 is slower by up to three thresholds in most steps, with noise; some times are not known."""
    alarmed = 0
    for seed in range(30):
        draw = random.Random(seed)
        ranks, over, often = draw.choice([2, 3, 4, 5]), draw.uniform(0.0, 0.02), draw.choice([0.8, 0.9, 0.95, 1.0])
        missing, eager = draw.choice([0.0, 0.02, 0.1]), {"hold": 1, "warm_up": 4, "clear": 0.5}
        engines = [Engine([rule], setup(ranks), Intent()) for rule in (Slow(**eager), Patient(**eager))]
        told = False
        for number in range(1, 51):
            busy = [draw.gauss(0.02, 0.001) + over * (rank == 1 and draw.random() < often) for rank in range(ranks)]
            known = [math.nan if draw.random() < missing / ranks else seconds for seconds in busy]
            stats = step(number, ranks, facts={rank: {"busy_seconds": of} for rank, of in enumerate(known)})
            quick, thorough = (engine.take(stats) for engine in engines)
            assert quick == thorough
            told = told or bool(quick)
        alarmed += told
    assert 5 < alarmed < 25


def audits(weights_differ: range) -> dict[int, list[Finding]]:
    """Of 40 steps with an audit in every tenth, which finds rank 1's weights of fou other in these."""
    engine = Engine([Diverged()], setup(3), Intent())
    found_at = {}
    for number in range(1, 41):
        of_audit = (Replicas("fou", True, number not in weights_differ, (1,) if number in weights_differ else ()),)
        found_at[number] = engine.take(step(number, 3, replicas=of_audit if number % 10 == 0 else ()))
    return {number: findings for number, findings in found_at.items() if findings}


def test_what_an_audit_alone_can_see_stands_until_the_next_one() -> None:
    found_at = audits(range(11, 26))
    assert list(found_at) == list(range(20, 30))
    assert {(f.stream, f.rank) for findings in found_at.values() for f in findings} == {("fou", 1)}


def test_a_stream_that_is_cut_over_ranks_is_compared_by_audits_alone() -> None:
    apart = lambda number: {"details": {1: {"weights": (-1.0, float(number), float(number))}}}  # noqa: E731
    rules = [Diverged()]
    assert [key[1:] for key in said(apart, 5, ranks=3, rules=rules)] == [("fou", 1)]
    assert said(apart, 5, ranks=3, built=setup(3, fou={"whole": False}), rules=rules) == {}


def test_weights_that_moved_in_less_than_half_of_the_steps_jumped() -> None:
    def one_jump(number: int) -> dict[str, Any]:
        still = {"moved": (0.0,) * 3, "weights": (1.0,) * 3}
        return {
            "details": {0: still, 1: still | ({"moved": (0.5,) * 3, "weights": (2.0,) * 3} if number == 20 else {})}
        }

    told = said(one_jump, 30, rules=[Diverged()])
    assert [(rule, rank) for rule, _, rank in told] == [("DESYNC", None)]


def test_equal_inputs_are_not_the_same_batch_where_another_stream_cannot_be_seen() -> None:
    def prompts(number: int, losses_too: bool = False) -> dict[str, Any]:
        unseen = {("pix", rank): {"calls": 0.0} for rank in (0, 1)}
        of_rank = {rank: {"batch": float(number), **({"loss": 2.0 / number} if losses_too else {})} for rank in (0, 1)}
        return {"details": of_rank, "inputs": unseen}

    assert said(prompts, 10, rules=[SameBatch()]) == {}
    assert len(said(lambda number: prompts(number, True), 10, rules=[SameBatch()])) == 1


def test_where_neither_inputs_nor_losses_are_known_gradients_of_one_norm_tell_the_same_batch() -> None:
    unseen = {(name, rank): {"calls": 0.0, "abs_max": math.nan} for name in ("pix", "fou") for rank in (0, 1)}
    silent = {rank: {"loss": math.nan} for rank in (0, 1)}

    def own(of_second: float) -> dict[str, Any]:
        local = tuple(LocalNorms(rank, (norm,) * 3, (0,) * 3, None) for rank, norm in ((0, 0.5), (1, of_second)))
        return {"details": silent, "inputs": unseen, "local": local}

    assert list(said(lambda number: own(0.5), 10, rules=[SameBatch()])) == [("SAME", None, None)]
    assert said(lambda number: own(0.6), 10, rules=[SameBatch()]) == {}


OF_TWO_SHARDS: dict[str, tuple[dict[str, Any], tuple[str, str | None, int | None]]] = {
    "fed the same batches": ({}, ("SAME", None, None)),
    "a smaller batch": ({"facts": {rank: {"samples": 8.0} for rank in (2, 3)}}, ("BATCH", None, 2)),
    "another loss": ({"details": {rank: {"loss": 4.0} for rank in (2, 3)}}, ("LOSS", None, 2)),
    "other inputs": ({"inputs": {("fou", rank): {"std": 30.0} for rank in (2, 3)}}, ("INR", "fou", 2)),
}


@pytest.mark.parametrize("name", OF_TWO_SHARDS)
def test_of_ranks_that_share_a_batch_the_first_is_compared_with_those_of_other_data(name: str) -> None:
    """Ranks 0 and 1 see the same data on purpose, and so do 2 and 3."""
    changes, expected = OF_TWO_SHARDS[name]
    built = dataclasses.replace(setup(4), data_ranks=(0, 2))

    def change(number: int) -> dict[str, Any]:
        details = {rank: {"batch": float(1000 * number + rank // 2)} for rank in range(4)}
        of_fault = changes.get("details", {})
        batch = {"batch": float(number)} if name == "fed the same batches" else {}
        return {**changes, "details": {rank: {**details[rank], **of_fault.get(rank, {}), **batch} for rank in range(4)}}

    rules = [SameBatch(), Uneven(), OtherLoss(), OtherScale()]
    assert list(said(change, 60, ranks=4, built=built, rules=rules)) == [expected]
    assert said(lambda number: {}, 60, ranks=4, built=built, rules=rules) == {}


def _mixed() -> list[tuple[str, str | None, int | None, int | None]]:
    """A stream that is cut over ranks, and one that every rank holds, of which rank 1 changes a weight after step 4."""
    torch.manual_seed(0)
    model = network()
    fully_shard(model.rgb)
    model.depth, model.mix = DistributedDataParallel(model.depth), DistributedDataParallel(model.mix)
    monitor = StreamMonitor(model, torch.optim.SGD(model.parameters(), 0.05, foreach=False), STREAMS)
    for number in range(1, 9):
        loss_of(model, part(batch(seed=number), dist.get_rank(), dist.get_world_size())).backward()
        monitor.step()
        if number == 4 and dist.get_rank() == 1:
            with torch.no_grad():
                next(model.depth.parameters()).view(-1)[0] += 1.0
    monitor.flush()
    return [(f.rule, f.stream, f.rank, f.step) for f in monitor.get_recommendations() if f.rule == "DESYNC"]


@needs_fsdp2
def test_replicas_beside_a_stream_that_is_cut_over_ranks_are_compared_in_every_step() -> None:
    assert run_ranks(3, _mixed) == [[("DESYNC", "depth", 1, 5)]] * 3


# Turns ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fake_world(ranks: int) -> Iterator[None]:
    """This process as the last rank of so many, whose collectives return at once."""
    store = torch.testing._internal.distributed.fake_pg.FakeStore()
    dist.init_process_group("fake", store=store, rank=ranks - 1, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Sizes(TorchDispatchMode):
    """The bytes of each sum over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "allreduce" in func.name():
            self.sizes += [tensor.numel() * tensor.element_size() for tensor in args[0]]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ranks", [1024, 4096])
def test_packets_of_a_thousand_ranks_stay_within_64_kib_but_for_audits(ranks: int) -> None:
    model = network()
    with fake_world(ranks), Sizes() as packets:  # it answers for all ranks what this one says, so all see the same data
        monitor = StreamMonitor(
            model, None, STREAMS, config=MonitorConfig(audit_every=20, rules=RuleSet.off), model_peers=range(ranks)
        )
        for seed in range(30):
            model.zero_grad()
            loss_of(model, batch(seed=seed)).backward()
            assert monitor.step(loss=1.0, samples=8)["shared_grad_norm"] > 0  # the last rank reads the last chunk
        monitor.flush()
    assert len(packets.sizes) == 30
    audits = [packets.sizes.pop(place) for place in (20, 0)]
    assert min(audits) > LIMIT_BYTES
    assert LIMIT_BYTES / 2 < min(packets.sizes) <= max(packets.sizes) <= LIMIT_BYTES
    assert monitor._steps._plan is not None
    assert monitor._steps._plan.layout.turns == math.ceil(
        ranks * (3 + 1 + RankFacts.cell_count(3)) * CELL_BYTES / LIMIT_BYTES
    )


TURNS = 3


def _in_turn() -> tuple[list[dict[str, float]], list[dict[str, float]], list[dict[str, float]], Answer]:
    """Twelve steps on three ranks, of which one has its slots in a packet; rank 0 sends a nan loss at step 5.

    The steps' figures; the largest gradients in what this rank read, and in all that there is.
    """
    stats.Layout = functools.partial(Layout, limit_bytes=8)  # type: ignore[misc, assignment]
    run = Run(delay=0)
    names = {f"{name}_grad_max": number for number, name in enumerate(NAMES)}
    figures, read, all_of_it = [], [], []
    for call in range(1, 13):
        meter = run.monitor._meter
        pieces = [piece for share in meter.shares for piece in share.pieces]
        run.step(loss=math.nan if call == 5 and run.rank == 0 else None)
        run.monitor.compute_stream_gradients()  # beside the steps: it takes nothing from them
        figures.append({key: run.monitor.history.latest(key) for key in names})
        read.append(
            {
                key: max((_largest(p.parameter, p.start, p.stop) for p in pieces if p.stream == number), default=0.0)
                for key, number in names.items()
            }
        )
        all_of_it.append({f"{n}_grad_max": max(map(_largest, m.parameters())) for n, m in run.parts.items()})
    assert run.monitor._steps._plan is not None
    assert run.monitor._steps._plan.layout.turns == TURNS
    return figures, read, all_of_it, run.answer()


def _largest(parameter: nn.Parameter, start: int = 0, stop: int | None = None) -> float:
    gradient = parameter.grad
    assert isinstance(gradient, Tensor)
    part = gradient.reshape(-1)[start:stop]
    return part.abs().max().item() if len(part) else 0.0


@functools.cache
def in_turn() -> list[Any]:
    return run_ranks(TURNS, _in_turn)


def test_the_largest_gradient_is_that_of_the_ranks_in_turn_since_their_last() -> None:
    figures, _, everything, _ = in_turn()[0]
    read = [of_rank[1] for of_rank in in_turn()]
    assert figures[0] == everything[0]  # the audit of the first step hears every rank
    heard_last = [0, 0, 0]
    for place in range(1, 12):
        rank = place % TURNS
        since = read[rank][heard_last[rank] + 1 : place + 1]
        assert figures[place] == {key: max(of_step[key] for of_step in since) for key in figures[place]}
        heard_last[rank] = place
    for place in range(12 - TURNS + 1):
        for key, largest in everything[place].items():
            assert max(of_step[key] for of_step in figures[place : place + TURNS]) >= largest


def test_a_stream_that_lies_with_ranks_that_are_not_heard_is_not_called_dead() -> None:
    rules = {what[0] for findings in in_turn()[0][3].values() for what, _ in findings}
    assert rules == {"NF"}


def test_a_nan_loss_is_named_from_one_turn_of_its_rank_to_the_next() -> None:
    nonfinite = {call: [what for what, _ in findings if what[0] == "NF"] for call, findings in in_turn()[0][3].items()}
    named = [("NF", "error", None, 0, 7)]
    assert {call: what for call, what in nonfinite.items() if what} == dict.fromkeys((7, 8, 9), named)
