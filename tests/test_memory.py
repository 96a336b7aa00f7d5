"""rules/memory.py: what is kept of steps, of ranks that are heard together and in turns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest

from ddp_streammon.config import Intent
from ddp_streammon.rules.memory import SETS, TURNS, WINDOW, Memory, Window
from ddp_streammon.rules.view import View
from ddp_streammon.stats import StepStats
from tests.steps import ranks_of, setup, step


def heard(number: int, ranks: Sequence[int], **changes: Any) -> StepStats:
    """A step in which these ranks are heard."""
    stats = step(number, len(ranks), **changes)
    rows = [dataclasses.replace(own, rank=rank) for own, rank in zip(stats.rank_facts, ranks, strict=True)]
    return dataclasses.replace(stats, rank_facts=ranks_of(rows))


def _number(stats: StepStats) -> int:
    return stats.step


def together(window: Window, every: int, count: int) -> dict[Sequence[int], list[int]]:
    """The numbers of the steps in which ranks were heard together."""
    pairs = [*View(window, Memory(), setup(4), Intent()).together(every, count, _number)]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_steps_of_ranks_that_are_heard_together_are_kept_beyond_the_window() -> None:
    window, turns = Window(), [(0, 1), (2, 3), (), (4, 5)]
    for number in range(1, 401):
        window.append(heard(number, turns[number % 4]))
        own = [*range(number, 0, -4)][:TURNS][::-1]
        assert together(window, 1, TURNS) == ({turns[number % 4]: own} if number % 4 != 2 else {})
    assert own[0] < 400 - WINDOW
    assert {len(values) for values in window.by_turn(_number).values()} == {TURNS}
    window.append(heard(5, (0, 1)))  # not after the last one
    assert together(window, 1, 2) == {(0, 1): [5]}


def test_ranks_that_are_heard_in_turns_are_compared_in_every_fifth_of_their_own_steps_like_others() -> None:
    always, in_turns = Window(), Window()
    turns = [(0, 1), (2, 3), (), (4, 5)]
    compared: dict[Sequence[int], list[int]] = {turn: [] for turn in turns}
    for number in range(1, 241):
        always.append(heard(number, (0, 1)))
        in_turns.append(heard(number, turns[number % 4]))
        if number % 5 == 0:
            assert together(always, 5, 2) == {(0, 1): [number - 1, number]}
            for ranks, steps in together(in_turns, 5, 2).items():
                compared[ranks].append(steps[-1])
    turn_by_turn = {(0, 1): [*range(20, 241, 20)], (2, 3): [*range(17, 241, 20)], (4, 5): [*range(19, 241, 20)]}
    assert compared == {**turn_by_turn, (): []}


def test_of_sets_of_ranks_those_heard_last_are_kept() -> None:
    window = Window()
    last = 2 * SETS + 4
    for number in range(1, last + 1):
        window.append(heard(number, (0, number) if number % 2 else (1, 2)))
        together(window, 1, 1)
    kept = window.by_turn(_number)
    assert len(kept) == SETS
    assert [*kept[1, 2]] == [*range(last, 0, -2)][:TURNS][::-1]


def memory_of(*steps: StepStats) -> Memory:
    memory = Memory()
    for stats in steps:
        memory.take(stats)
    return memory


@pytest.mark.parametrize(("rates", "known"), [((0.05, 0.06, 0.06), 0.06), ((0.05, math.nan, 0.05), None)])
def test_the_rate_of_a_stream_is_that_of_most_ranks_where_all_of_them_know_it(
    rates: Sequence[float], known: float | None
) -> None:
    facts = {rank: {"lr": (rate,) * 3} for rank, rate in enumerate(rates)}
    assert memory_of(step(1, 3, facts=facts)).last_lr.get("pix") == known


def test_the_base_of_a_rate_is_that_of_most_ranks_that_were_heard() -> None:
    window = Window()
    window.append(step(1, 3, details={rank: {"base_lr": (0.1 + 0.1 * min(rank, 1),) * 3} for rank in range(3)}))
    assert View(window, Memory(), setup(3), Intent()).base_lr("pix") == 0.2


def test_modules_were_in_training_mode_where_no_rank_has_all_of_them_in_eval_mode() -> None:
    def modes(*shares: float) -> StepStats:
        return step(1, len(shares), details={rank: {"in_eval": share} for rank, share in enumerate(shares)})

    assert not memory_of(modes(0.0, 1.0)).trained_mode
    assert memory_of(modes(0.0, 0.5), modes(1.0, 1.0)).trained_mode


def test_the_order_of_batches_is_that_of_rank_0() -> None:
    told = {0: {"batch": 7.0}}
    memory = memory_of(heard(1, (0, 2), details=told), heard(2, (1, 3), details=told), heard(3, (0, 2), details=told))
    assert (memory.batches, memory.lag) == ({7.0: 3}, 2)
