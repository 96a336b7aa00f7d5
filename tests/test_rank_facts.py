"""rank_facts.py: what ranks say of themselves, by rank and by figure, from a packet and from a record."""

from __future__ import annotations

import dataclasses
import json
import math
from array import array
from collections.abc import Callable, Sequence

import pytest

from ddp_streammon.moments.sample import ABS_MAX, BAD, BITS, CONSTANT, MODULUS
from ddp_streammon.packet import Slots
from ddp_streammon.rank_facts import RankDetail, RankFacts, Ranks, StreamInput, alike
from tests.steps import cells_of, input_cells, ranks_of

NOTHING = StreamInput()
SEEN = StreamInput(2.0, 0.5, 1.25, 3.0, 1.0, 0.0, 0.25, 0.75)
FIGURES: dict[str, tuple[Callable[[Ranks], Sequence[float]], Callable[[RankFacts], float]]] = {
    "training": (lambda ranks: ranks.training, lambda row: row.training),
    "samples": (lambda ranks: ranks.samples, lambda row: row.samples),
    "step_seconds": (lambda ranks: ranks.step_seconds, lambda row: row.step_seconds),
    "busy_seconds": (lambda ranks: ranks.busy_seconds, lambda row: row.busy_seconds),
    "lr": (lambda ranks: ranks.lr(1), lambda row: row.lr[1]),
    "weight_decay": (lambda ranks: ranks.weight_decay(1), lambda row: row.weight_decay[1]),
    "loss": (lambda ranks: ranks.loss, lambda row: detail(row).loss),
    "in_eval": (lambda ranks: ranks.in_eval, lambda row: detail(row).in_eval),
    "base_lr": (lambda ranks: ranks.base_lr(1), lambda row: detail(row).base_lr[1]),
    "weights": (lambda ranks: ranks.weights(1), lambda row: detail(row).weights[1]),
    "calls": (lambda ranks: ranks.calls(1), lambda row: detail(row).inputs[1].calls),
    "abs_max": (lambda ranks: ranks.of_input(1, ABS_MAX), lambda row: detail(row).inputs[1].abs_max),
    "bad": (lambda ranks: ranks.of_input(1, BAD), lambda row: detail(row).inputs[1].nonfinite),
}


def detail(row: RankFacts) -> RankDetail:
    assert row.detail is not None
    return row.detail


def row(rank: int, streams: int = 2) -> RankFacts:
    """Facts of which no two figures, and no two ranks, are alike."""
    inputs = [dataclasses.replace(SEEN, abs_max=10.0 * rank + stream + 1) for stream in range(streams)]
    own = [tuple(rank + stream + shift for stream in range(streams)) for shift in (0.1, 0.2, 0.3, 0.4, 0.5)]
    own_detail = RankDetail(0.7 + rank, 0.25, 1000.0 + rank, own[0], own[1], own[2], tuple(inputs))
    return RankFacts(rank, own[3], own[4], 1.0, 32.0 + rank, 2.0 + rank, 0.5 + rank, own_detail)


@pytest.mark.parametrize("streams", [1, 2, 5])
def test_facts_come_back_from_their_cells(streams: int) -> None:
    facts = row(3, streams)
    cells, details = facts.cells(), cells_of(detail(facts))
    assert (len(cells), len(details)) == (RankFacts.cell_count(streams), RankDetail.cell_count(streams))
    assert RankFacts.of_cells(3, cells, details) == facts
    assert RankFacts.of_cells(3, cells).detail is None


@pytest.mark.parametrize(
    "given", [NOTHING, dataclasses.replace(NOTHING, calls=2.0), SEEN, StreamInput(1.0, *[math.nan] * 2, 3.0, 0.0, 1.0)]
)
def test_inputs_come_back_from_their_cells(given: StreamInput) -> None:
    assert repr(StreamInput.of_cells(input_cells(given, bits=7.0))) == repr(given)


def test_inputs_of_several_calls_are_constant_in_each_or_not_and_may_have_no_finite_number() -> None:
    one_of_two = [2.0, 0.0, 8.0, 8.0, 0.0, 1.0, 7.0, 1.0, 0.0, 0.0, 0.0]
    assert StreamInput.of_cells(one_of_two).constant == 0.0
    none_finite = StreamInput.of_cells([1.0, 0.0, 0.0, 0.0, 4.0, 0.0, 7.0, 0.0, 0.0, 0.0, 0.0])
    assert none_finite.nonfinite == 4.0
    assert math.isnan(none_finite.mean)
    rounded_down = [1.0, 1.0, 1.0 - 1e-16, 1.0, 0.0, 0.0, 7.0, 1.0, 1.0, 1.0 - 1e-16, 1.0]
    assert (StreamInput.of_cells(rounded_down).std, StreamInput.of_cells(rounded_down).first_std) == (0.0, 0.0)


def test_the_number_of_a_batch_is_that_of_all_streams_that_were_seen() -> None:
    nothing, plain = [0.0] * 11, [1.0, 0.0, 8.0, 8.0, 0.0, 0.0, MODULUS - 1.0, 1.0, 0.0, 0.0, 0.0]
    not_finite = [1.0, 0.0, 0.0, 0.0, 4.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0]
    settings = [0.7, 0.0, *[0.1] * 6]
    assert RankDetail.of_cells([*settings, *plain, *nothing], 2).batch == MODULUS - 1
    assert RankDetail.of_cells([*settings, *plain, *not_finite], 2).batch == 4.0
    assert math.isnan(RankDetail.of_cells([*settings, *nothing, *nothing], 2).batch)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([], True),
        ([2.0], True),
        ([2.0] * 3, True),
        ([2.0, 2.0, 3.0], False),
        ([math.nan] * 2, True),
        ([0.0, -0.0], False),
    ],
)
def test_ranks_are_alike_where_they_say_the_same_bits(column: Sequence[float], expected: bool) -> None:
    assert alike(array("d", column)) is expected


def test_what_a_rank_does_not_say_stays_unsaid() -> None:
    facts = RankFacts.of_cells(0, RankFacts(0, (math.nan,), (0.0,), 0, math.nan, math.nan, math.nan).cells())
    assert math.isnan(facts.lr[0])
    assert math.isnan(facts.samples)
    assert facts.training == 0.0


@pytest.mark.parametrize("figure", FIGURES)
def test_figures_are_those_of_the_rows_in_their_order(figure: str) -> None:
    rows = [row(rank) for rank in (0, 2, 5)]
    by_figure, of_row = FIGURES[figure]
    assert list(by_figure(ranks_of(rows))) == [of_row(own) for own in rows]


def test_of_a_packet_ranks_that_took_no_part_are_left_out() -> None:
    rows = [row(rank) for rank in range(4)]
    cells = [[0.0] * len(own.cells()) if own.rank == 2 else own.cells() for own in rows]
    details = [cells_of(detail(own)) for own in rows]
    ranks = Ranks.of_packet(range(4), Slots.of_ranks(cells), Slots.of_ranks(details))
    assert ranks.numbers == (0, 1, 3)
    assert [*ranks] == [rows[0], rows[1], rows[3]]
    assert list(ranks.samples) == [32.0, 33.0, 35.0]
    assert list(ranks.loss) == [0.7, 1.7, 3.7]
    assert ranks[-1] is ranks[2]
    assert ranks[1:] == [rows[1], rows[3]]
    with pytest.raises(IndexError):
        ranks[3]
    in_turn = Ranks.of_packet(range(1, 16, 4), Slots.of_ranks(cells), None)
    assert (in_turn.numbers, in_turn[2].rank) == ((1, 5, 13), 13)
    everyone = Ranks.of_packet(range(4), Slots.of_ranks([own.cells() for own in rows]), Slots.of_ranks(details))
    assert [*everyone] == rows
    assert everyone != ranks
    assert ranks_of(rows[:1]) != ranks_of(rows[1:2])
    nobody = Ranks.of_packet([2], Slots.of_ranks(cells[2:3]), Slots.of_ranks(details[2:3]))
    assert (len(nobody), list(nobody.samples), list(nobody.loss)) == (0, [], [])
    assert everyone == ranks_of(rows)


def test_without_ranks_or_details_columns_are_empty() -> None:
    nobody = Ranks()
    assert (len(nobody), [*nobody], list(nobody.lr(1)), list(nobody.loss)) == (0, [], [], [])
    plain = ranks_of([dataclasses.replace(row(rank), detail=None) for rank in range(2)])
    assert list(plain.lr(0)) == [0.4, 1.4]
    assert (list(plain.loss), list(plain.calls(0)), list(plain.inputs(0)), plain.without_input(0)) == ([], [], [], [])


def test_inputs_are_of_the_ranks_that_have_called_the_stream() -> None:
    zeros = dataclasses.replace(SEEN, mean=0.0, std=0.0, abs_max=0.0)
    given = [SEEN, NOTHING, zeros, dataclasses.replace(SEEN, constant=1.0, abs_max=0.5)]
    rows = [row(rank) for rank in range(4)]
    for own, seen in zip(rows, given, strict=True):
        own.detail = dataclasses.replace(detail(own), inputs=(seen, SEEN))
    ranks = ranks_of(rows)
    assert dict(ranks.inputs(0)) == {0: given[0], 2: given[2], 3: given[3]}
    assert (ranks.without_input(0), ranks.without_input(1)) == ([2], [])
    assert list(ranks.of_input(0, CONSTANT)) == [0.0, 0.0, 0.0, 2.0]
    assert list(ranks.of_input(0, BITS)) == [1000.0, 0.0, 1002.0, 1003.0]


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("detailed", [True, False])
def test_a_record_holds_what_ranks_have_said_and_numbers_that_all_of_them_say_once(count: int, detailed: bool) -> None:
    rows = [row(rank) if detailed else dataclasses.replace(row(rank), detail=None) for rank in range(count)]
    told = json.loads(json.dumps(ranks_of(rows).to_dict()))
    assert Ranks.from_dict(told) == ranks_of(rows)
    assert told["rank"] == list(range(count))
    if count:
        assert (told["training"], told["samples"]) == (1.0, [32.0, 33.0, 34.0][:count] if count > 1 else 32.0)
    nothing = dataclasses.replace(rows[0], samples=math.nan) if rows else None
    if nothing is not None:
        assert math.isnan(Ranks.from_dict(ranks_of([nothing] * 2).to_dict())[1].samples)
