"""linear.py: gradients that are still to be summed, and those that cannot be: refused on every rank alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from ddp_streammon import MonitorConfig, StreamMonitor
from ddp_streammon.config import RuleSet
from ddp_streammon.linear import LIMIT
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


def test_a_gradient_placed_otherwise_on_one_rank_is_refused_on_all() -> None:
    answers = run_ranks(WORLD, _said, 4, 4, [Replicate()], [[Replicate()], [Shard(0)]])
    assert [text for text, _ in answers] == [
        "the gradient of first.0 is placed S(0) where the parameter is placed R: only gradients that are placed like "
        "their parameter, or Partial(sum), can be measured; redistribute it, or leave it out"
    ] * WORLD


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
