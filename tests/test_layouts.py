"""Sharded, replicated and mixed layouts on four ranks: every figure equals one process', with one collective a step."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import pytest

from tests import layouts
from tests.layouts import LAYOUTS, PRECISIONS, WORLD, error, measure, twin
from tests.ranks import run_ranks
from tests.sharding import cases, needs_fsdp2, possible

CASES = [("float32", True), ("float64", False), ("bfloat16", True)]
"""Each precision, with accumulation and without; the slow test runs all six."""
HALF = ("ddp", "fsdp2", "fsdp2 x sequence parallel", "mixed by stream")
"""Layouts of which bfloat16 is looked at here."""
APART = ("nobody synchronises", "mixed by stream")
"""Layouts in which gradients differ between ranks, so that no single process has them."""
BOUND = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 2e-2}
"""Against one process, whose own gradients are rounded otherwise."""


Answers = dict[tuple[str, bool], dict[str, Any]]


def _cases() -> dict[str, Answers]:
    return {
        layout: {case: measure(layout, *case) for case in CASES if case[0] != "bfloat16" or layout in HALF}
        for layout in possible(LAYOUTS)
    }


@functools.cache
def _of_all_layouts() -> list[dict[str, Answers]]:
    """One after the other on the same four processes: most of what a layout costs is what torch does at first use."""
    return run_ranks(WORLD, _cases, timeout=200)


def answers_of(layout: str) -> list[Answers]:
    return [of_rank[layout] for of_rank in _of_all_layouts()]


@pytest.mark.parametrize("layout", cases(LAYOUTS))
def test_figures_equal_those_by_definition_before_and_after_replicas_are_proved(layout: str) -> None:
    for of_rank in answers_of(layout):
        for answer in of_rank.values():
            assert error(answer["first"], answer["first expected"]) < 1e-6
            assert error(answer["last"], answer["expected"]) < 1e-6


@pytest.mark.parametrize("layout", cases(layout for layout in LAYOUTS if layout not in APART))
def test_figures_equal_those_of_one_process_that_sees_the_whole_batch(layout: str) -> None:
    for (precision, _), answer in answers_of(layout)[0].items():
        assert error(answer["last"], twin(PRECISIONS[precision])) < BOUND[precision]


@pytest.mark.parametrize("layout", cases(LAYOUTS))
def test_a_step_is_one_collective_and_ranks_agree_to_the_bit(layout: str) -> None:
    ranks = answers_of(layout)
    for case, answer in ranks[0].items():
        assert answer["collectives"] == [1, 1, 1]
        for other in ranks[1:]:
            assert repr(other[case]["last"]) == repr(answer["last"])


@pytest.mark.parametrize("layout", cases(LAYOUTS))
def test_ranks_that_see_the_same_data_count_once_in_the_users_numbers(layout: str) -> None:
    for answer in answers_of(layout)[0].values():
        loss, samples = answer["loss"]
        assert samples == pytest.approx(16)
        assert loss == pytest.approx(1.1, abs=0.2)


@pytest.mark.parametrize("layout", cases(LAYOUTS))
def test_clipping_halves_every_stream_whatever_its_layout(layout: str) -> None:
    for (precision, _), answer in answers_of(layout)[0].items():
        norms = {key: value for key, value in answer["expected"].items() if key.endswith("grad_norm")}
        assert answer["norm"] == pytest.approx(math.hypot(*norms.values()), rel=1e-6)
        for key, norm in norms.items():
            assert answer["clipped"][key] == pytest.approx(norm / 2, rel=1e-2 if precision == "bfloat16" else 1e-5)


EVERYTHING = 2 * (32 + 16 * 24 + 24 + 24 * 16 + 16) + 17 + 33 * 3 + 3


@pytest.mark.parametrize("layout", cases(LAYOUTS))
def test_every_element_is_read_once_except_where_nobody_synchronises(layout: str) -> None:
    read = sum(of_rank["float32", True]["read"] for of_rank in answers_of(layout))
    summed_before_squaring = {"sequence parallel": 32}.get(layout, 0)  # fully_shard sums them itself
    audio = 17
    in_full = {"nobody synchronises": 3 * EVERYTHING, "mixed by stream": 3 * audio}.get(layout, 0)
    assert read == EVERYTHING - summed_before_squaring + in_full


@pytest.mark.parametrize("layout", cases(LAYOUTS))
def test_what_nobody_synchronises_is_reported_and_nothing_else(layout: str) -> None:
    expected = {"nobody synchronises": {"all"}, "mixed by stream": {"audio"}}.get(layout, set())
    for answer in answers_of(layout)[0].values():
        assert set(answer["replicas"]) == expected


@needs_fsdp2
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_prints_the_whole_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    layouts.main()
    rows = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == len(LAYOUTS) * len(PRECISIONS) * 2
    for layout, precision, _, own, single, collectives in rows:
        assert collectives == "1"
        assert float(own) < 1e-6
        assert (layout in APART) == (single == "-")
        assert single == "-" or float(single) < BOUND[precision]
