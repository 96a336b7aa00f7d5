"""linear.py: gradients that are still to be summed, and those that cannot be: refused on every rank alike."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from ddp_streammon import MonitorConfig, StreamMonitor, linear
from ddp_streammon.config import RuleSet
from ddp_streammon.linear import LIMIT, Linear
from ddp_streammon.moments import ABS_MAX, ELEMENTS, NANS, NONFINITE, SQ_SUM, SUM, TENSORS
from ddp_streammon.plan import Plan
from ddp_streammon.stats import ScalarLike, Total
from tests.ranks import run_ranks

WORLD = 2


def _said(rows: int, columns: int, own: list[Placement], of_gradients: list[list[Placement]]) -> tuple[str, float]:
    """What a step says on this rank: the error's text, or the norm of the first stream. `of_gradients`: by rank."""
    mesh = init_device_mesh("cpu", (WORLD,))
    model = nn.Module()
    for name in ("first", "second"):
        weight = distribute_tensor(torch.zeros(rows, columns), mesh, own)
        model.add_module(name, nn.ParameterList([nn.Parameter(weight)]))
    monitor = StreamMonitor(
        model, streams={"first": "first", "second": "second"}, config=MonitorConfig(delay=0, rules=RuleSet.off)
    )
    placements = of_gradients[mesh.get_local_rank()]
    for parameter in model.parameters():
        size = (rows // WORLD, columns) if placements[0] == Shard(0) else (rows, columns)
        if placements[0] == Shard(1):
            size = (rows, columns // WORLD)
        parameter.grad = DTensor.from_local(torch.ones(size), mesh, placements)
    try:
        return "", monitor.step(loss=1.0)["first_grad_norm"]
    except ValueError as error:
        return str(error), 0.0


def test_partial_gradients_are_summed_before_they_are_squared() -> None:
    for text, norm in run_ranks(WORLD, _said, 4, 4, [Replicate()], [[Partial()]] * WORLD):
        assert (text, norm) == ("", pytest.approx(8.0))  # 16 elements of 1 + 1


LATE = 3
"""The first step with a Partial gradient."""


def _late() -> tuple[list[tuple[float, ...]], list[str], int]:
    """Norms and largest elements of both streams and the share of the second, step by step; what was warned of; and
    how often the plan was agreed on."""
    mesh = init_device_mesh("cpu", (WORLD,))
    model = nn.Module()
    for name in ("first", "second"):
        weight = distribute_tensor(torch.zeros(4, 4), mesh, [Replicate()])
        model.add_module(name, nn.ParameterList([nn.Parameter(weight), nn.Parameter(torch.zeros(3))]))
    monitor = StreamMonitor(model, streams={"first": "first", "second": "second"}, config=MonitorConfig(delay=2))
    agree, agreed, figures = monitor._steps._agree, 0, []

    def counted(numbers: Mapping[str, ScalarLike | None]) -> Plan:
        nonlocal agreed
        agreed += 1
        return agree(numbers)

    monitor._steps._agree = counted  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, LATE + 6):
            for module in (model.first, model.second):
                module[1].grad = torch.full((3,), 2.0)
            if step >= LATE:
                model.first[0].grad = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
            of = monitor.step(loss=1.0, **({} if step == LATE + 3 else {"count": Total(step)}))
            if step == LATE + 5:
                assert (of["count"], of["loss"]) == (step, 1)  # both ranks work on the same data
            names = ("first_grad_norm", "first_grad_max", "second_grad_norm", "second_grad_max", "second_grad_share")
            figures.append(tuple(of[name] for name in names))
    monitor.close()
    return figures, [str(one.message) for one in caught if "Partial" in str(one.message)], agreed


def test_partial_gradients_that_come_later_make_no_figure_that_misses_them() -> None:
    """The packet of step 3 arrives at step 5, and the next one is planned anew."""
    small, all_of_it = math.sqrt(12), math.sqrt(12 + 64)
    before, after = (small, 2, small, 2, 0.5), (all_of_it, 2, small, 2, 12 / (12 + 76))
    without = (math.nan, math.nan, small, 2, math.nan)
    for figures, warned, agreed in run_ranks(WORLD, _late):
        expected = [before] * 2 + [without] * 3 + [after] * 3
        assert figures == [pytest.approx(one, nan_ok=True) for one in expected]
        assert warned == [
            "first: gradients that are still to be summed over ranks (Partial) have come up after the packet's cells "
            "were agreed on, so norm, mean and maximum are nan in steps 3 to 5; from the next step on they are measured"
        ]
        assert agreed == 2


def _power() -> dict[str, float]:
    mesh = init_device_mesh("cpu", (WORLD,))
    model = nn.ModuleDict({name: nn.ParameterList([torch.ones(2), torch.ones(1)]) for name in ("first", "second")})
    model["first"][0] = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))
    model["first"][0].grad = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    for parameter in (model["first"][1], *model["second"]):
        parameter.grad = torch.ones_like(parameter)
    monitor = StreamMonitor(model, streams={"first": "first", "second": "second"})
    return monitor.compute_gradient_power().to_dict() | {"norm": monitor.compute_stream_gradients()["first_grad_norm"]}


def test_before_the_first_step_such_gradients_have_norms_and_no_power() -> None:
    expected = {"first_grad_power": math.nan, "second_grad_power": 3, "norm": 3}
    assert run_ranks(WORLD, _power) == [pytest.approx(expected, nan_ok=True)] * WORLD


def _average() -> str:
    return _said(4, 4, [Replicate()], [[Partial("avg")]] * WORLD)[0]


def test_averages_still_to_be_taken_are_refused() -> None:
    for text in run_ranks(WORLD, _average):
        assert "only gradients that are placed like their parameter, or Partial(sum), can be measured" in text


def _summands() -> list[float]:
    mesh = init_device_mesh("cpu", (WORLD,))
    parameter = nn.Parameter(distribute_tensor(torch.zeros(2, 2), mesh, [Replicate()]))
    parameter.grad = DTensor.from_local(torch.full((2, 2), 8.0), mesh, [Partial()])
    absent = Linear("elsewhere", 0, 3)
    tensors = (absent, Linear("here", 1, 4))
    cells = linear.cells(tensors, {"here": parameter}, {id(parameter): 4}, 0.25, torch.device("cpu"))
    return cells.tolist()


def test_summands_are_unscaled_and_shared_among_the_ranks_that_hold_the_same() -> None:
    """Four ranks hold the parameter, two and two of which hold the summands of one sum."""
    assert run_ranks(WORLD, _summands) == [[0.0] * 4 + [8 * 0.25 * 2 / 4] * 4 + [1.0]] * WORLD


def test_figures_of_sums_count_a_tensor_once_and_leave_out_what_is_not_finite() -> None:
    tensors = (Linear("a", 0, 4), Linear("empty", 0, 0), Linear("none", 1, 2))
    summed = torch.tensor([3.0, -4.0, math.nan, math.inf, 2.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    first, second = linear.moments(tensors, summed, 2)
    expected = {SUM: -1, SQ_SUM: 25, NONFINITE: 2, NANS: 1, ELEMENTS: 4, TENSORS: 2, ABS_MAX: 4}
    assert {column: first[column].item() for column in expected} == expected
    assert not second.any()


def test_a_gradient_placed_otherwise_on_one_rank_is_refused_on_all() -> None:
    answers = run_ranks(WORLD, _said, 4, 4, [Replicate()], [[Replicate()], [Shard(0)]])
    assert [text for text, _ in answers] == [
        "the gradient of first.0 is placed S(0) where the parameter is placed R: only gradients that are placed like "
        "their parameter, or Partial(sum), can be measured; redistribute it, or leave it out"
    ] * WORLD


def _refused_late() -> tuple[list[float], str]:
    """Norms until a step refuses; in step 3 rank 1 has a gradient that cannot be measured."""
    mesh = init_device_mesh("cpu", (WORLD,))
    model = nn.ModuleDict({name: nn.ParameterList([torch.ones(2)]) for name in ("first", "second")})
    model["first"][0] = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))
    monitor = StreamMonitor(model, streams={"first": "first", "second": "second"})
    norms: list[float] = []
    try:
        for step in range(1, 9):
            otherwise = step >= 3 and mesh.get_local_rank() == 1
            of_rank, placement = (torch.ones(1), Shard(0)) if otherwise else (torch.ones(2), Replicate())
            model["first"][0].grad = DTensor.from_local(of_rank, mesh, [placement])
            model["second"][0].grad = torch.ones(2)
            norms.append(monitor.step()["second_grad_norm"])
    except ValueError as error:
        return norms, str(error)
    return norms, ""


def test_a_gradient_placed_otherwise_later_is_refused_on_all_and_leaves_no_figure_until_then() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answers = run_ranks(WORLD, _refused_late)
    expected = [math.sqrt(2)] * 2 + [math.nan] * 2
    for norms, text in answers:
        assert norms == pytest.approx(expected, nan_ok=True)
        assert text.startswith("the gradient of first.0 is placed ")


def test_too_many_elements_are_refused_with_the_largest_parameter() -> None:
    answers = run_ranks(WORLD, _said, LIMIT // 256, 200, [Replicate()], [[Partial()]] * WORLD)
    assert [text for text, _ in answers] == [
        "2 parameters with 409600 elements have Partial gradients, the largest is first.0 with 204800; at most 262144 "
        "elements can be summed in the packet. Reduce these gradients in the backward pass (parameters that a tensor "
        "parallel style places Shard or Replicate), or leave them out"
    ] * WORLD


def test_parts_that_are_no_runs_of_rows_are_refused() -> None:
    answers = run_ranks(WORLD, _said, 4, 4, [Shard(1)], [[Partial()]] * WORLD)
    assert [text for text, _ in answers] == [
        "the gradient of first.0 is Partial and the parameter is placed S(1): a part that is no run of rows cannot be "
        "summed in the packet; shard it along its first dimension"
    ] * WORLD
