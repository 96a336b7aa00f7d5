"""Faults planted on one rank of two, three and four are named, nothing is in healthy runs; packets sent in turn."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from ddp_streammon import MonitorConfig, StreamMonitor, stats
from ddp_streammon.config import RuleSet
from ddp_streammon.packet import CELL_BYTES, LIMIT_BYTES, Layout
from ddp_streammon.ranks import RankFacts
from ddp_streammon.rules.finding import Finding
from ddp_streammon.rules.ranks import WINDOW, Pace
from ddp_streammon.stats import StepStats
from tests.networks import STREAMS, batch, loss_of, network, part
from tests.ranks import run_ranks

WORLDS = [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
"""Two ranks are in the fault zoo, too."""
NAMES = (*STREAMS, "shared")
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
        self.monitor = StreamMonitor(
            self.model, self.optimizer, STREAMS, config=MonitorConfig(rules=RuleSet.off, **config)
        )
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
        self.found[self.monitor.calls] = self.monitor.get_recommendations()
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
    """A larger batch from step 4 to step 6."""
    run = Run(delay=0)
    for call in range(1, 9):
        run.step(samples=12 if run.rank == culprit and 4 <= call <= 6 else 8)
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
    """One rank loads for 30 ms in the first window; all for 15 ms in the second."""
    run = Run()
    for call in range(1, 2 * WINDOW + 2):
        run.step(seconds=0.015 if call > WINDOW else 0.03 * (run.rank == culprit))
    return run.answer()


def slow_between_measured_steps(culprit: int) -> Answer:
    """One rank loads for 20 ms, and every third step is measured."""
    run = Run(every=3)
    for _ in range(3 * WINDOW):
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
    """Two ranks that differ have no majority: both are in the sentence, and none in the field."""
    return culprit if world > 2 else None


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_nothing_is_found_in_sixty_healthy_steps(world: int) -> None:
    assert run_ranks(world, healthy) == [{}] * world


@pytest.mark.parametrize("world", WORLDS)
def test_one_weight_off_by_a_millionth_is_named_at_the_next_audit_until_it_is_put_right(world: int) -> None:
    for culprit in range(world):
        for stream in NAMES:
            answer = cases(world)[0]["desync", stream, culprit]
            expected = ("DESYNC", "error", stream, named(culprit, world), 6)
            assert found(answer) == {call: [expected] for call in range(6, 11)}
            who = f"rank {culprit} differs from the others" if world > 2 else "ranks 0, 1 differ, and no majority says"
            assert who in answer[6][0][1]


@pytest.mark.parametrize("world", WORLDS)
def test_a_learning_rate_that_differs_is_named_by_stream_and_rank_at_that_step(world: int) -> None:
    for culprit in range(world):
        stream = NAMES[culprit % 3]
        answer = cases(world)[0]["lr", culprit]
        assert found(answer) == {call: [("LR", "error", stream, named(culprit, world), call)] for call in (4, 5, 6)}
        sentence = answer[4][0][1]
        assert f"the learning rate of {stream} differs between ranks at step 4: " in sentence
        assert f"0.1 on rank {culprit}" in sentence


@pytest.mark.parametrize("world", WORLDS)
def test_weight_decay_mode_and_batch_size_that_differ_are_named_while_they_do(world: int) -> None:
    for culprit in range(world):
        rank = named(culprit, world)
        expected = {
            "weight_decay": ("LR", "error", "depth", rank, f"the weight decay of depth .*0.0002 on rank {culprit}"),
            "mode": ("MODE", "error", None, rank, f"the model's mode differs .*eval on rank {culprit}"),
            "batch": ("BATCH", "info", None, rank, f"the batch size differs .*12 on rank {culprit}"),
        }
        for kind, (*what, sentence) in expected.items():
            answer = cases(world)[0][kind, culprit]
            assert found(answer) == {call: [(*what, call)] for call in (4, 5, 6)}
            assert re.search(sentence, answer[4][0][1])


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_that_nobody_synchronises_are_named_at_the_first_audit_and_not_after_they_are(world: int) -> None:
    answer = cases(world)[0]["no_sync"]
    for call in range(1, 5):
        audit = call - (call - 1) % 2
        assert found(answer)[call] == [("SYNC", "warning", stream, None, audit) for stream in NAMES]
    assert set(answer) == {1, 2, 3, 4}


@pytest.mark.parametrize("world", WORLDS)
def test_weights_that_have_drifted_apart_are_an_error(world: int) -> None:
    answer = found(cases(world)[0]["drift"])
    assert [what[:2] for what in answer[1]] == [("SYNC", "warning")] * 3
    assert answer[3] == [("DESYNC", "error", stream, None, 3) for stream in NAMES]


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_that_loads_slowly_is_named_after_a_window_until_a_window_is_without_it(world: int) -> None:
    answer = cases(world)[0]["slow"]
    assert set(answer) == set(range(WINDOW + 1, 2 * WINDOW + 1))  # figures arrive a call later
    for findings in answer.values():
        ((what, sentence),) = findings
        assert what == ("SLOW", "warning", None, world - 1, WINDOW)
        assert f"rank {world - 1} is busy for " in sentence


def test_a_slow_rank_is_named_where_not_every_step_is_measured() -> None:
    first, second = run_ranks(2, slow_between_measured_steps, 1)
    assert first == second
    answer = found(first)
    assert answer == {3 * WINDOW - 1: [("SLOW", "warning", None, 1, 3 * WINDOW - 2)]} | {
        3 * WINDOW: [("SLOW", "warning", None, 1, 3 * WINDOW - 2)]
    }


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_that_brings_in_the_audit_before_the_others_reads_no_other_share(world: int) -> None:
    first, *others = cases(world)[0]["flushed"]
    assert others == pytest.approx([first] * 2, rel=1e-6)


# The pace of ranks ------------------------------------------------------------------------------------------------


def step_of(number: int, *facts: RankFacts) -> StepStats:
    return StepStats(number, None, {}, {}, len(facts), (), False, rank_facts=facts)


def pace_of(rank: int, busy: float, step: float = 0.1) -> RankFacts:
    return RankFacts(rank, (), (), 1.0, 8.0, step, busy)


def standing(facts_at: Callable[[int], list[RankFacts]], steps: int = WINDOW) -> list[Finding]:
    pace = Pace()
    result: list[Finding] = []
    for number in range(1, steps + 1):
        result = pace.check(step_of(number, *facts_at(number)))
    return result


def test_ranks_that_are_heard_in_turn_are_not_slow_for_being_heard_more_often() -> None:
    turns = 19  # 50 = 2 * 19 + 12: twelve ranks are heard three times, the others twice
    assert standing(lambda number: [pace_of(number % turns, 0.05)]) == []
    (finding,) = standing(lambda number: [pace_of(number % turns, 0.09 if number % turns == 18 else 0.03)])
    assert (finding.rank, finding.step) == (18, WINDOW)


def test_the_first_step_tells_no_pace() -> None:
    first = [pace_of(0, math.nan, math.nan), pace_of(1, math.nan, math.nan)]
    assert standing(lambda number: first if number == 1 else [pace_of(0, 0.01), pace_of(1, 0.01)]) == []
    (finding,) = standing(lambda number: first if number == 1 else [pace_of(0, 0.01), pace_of(1, 0.04)])
    assert finding.evidence == pytest.approx({"busy": 0.4, "others": 0.1})
    assert standing(lambda _: first) == []


@pytest.mark.parametrize(("slowest", "is_named"), [(0.029, False), (0.031, True)])
def test_a_straggler_is_half_as_busy_again_as_the_median_of_the_others(slowest: float, is_named: bool) -> None:
    ranks = [pace_of(0, 0.01), pace_of(1, 0.02), pace_of(2, slowest), pace_of(3, 0.021)]
    assert bool(standing(lambda _: ranks)) is is_named


def test_a_small_part_of_a_step_is_not_worth_a_word_and_one_rank_has_nobody_to_wait_for_it() -> None:
    assert standing(lambda _: [pace_of(0, 0.001), pace_of(1, 0.009)]) == []
    assert standing(lambda _: [pace_of(0, 0.001), pace_of(1, 0.012)]) != []
    assert standing(lambda _: [pace_of(0, 0.09)]) == []


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


def test_a_nan_loss_is_named_when_the_turn_of_its_rank_comes() -> None:
    nonfinite = {call: [what for what, _ in findings if what[0] == "NF"] for call, findings in in_turn()[0][3].items()}
    assert {call: what for call, what in nonfinite.items() if what} == {7: [("NF", "error", None, 0, 7)]}
