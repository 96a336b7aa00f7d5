"""collective.py: sums, gathers and broadcasts, with and without a process group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ddp_streammon.collective import Collective
from ddp_streammon.shards import Topology
from tests.ranks import run_ranks

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int16,
    torch.bool,
    torch.complex64,
]


def tensors(seed: int) -> list[Tensor]:
    """Buffers of mixed dtypes and layouts: dense, 0-dim, empty, transposed, and a slice with gaps."""
    torch.manual_seed(seed)
    dense = [(torch.randn(3, 4) * 9).to(dtype) for dtype in DTYPES]
    odd = [torch.tensor(float(seed)), torch.tensor(seed), torch.randn(0, 2), torch.randn(4, 3).t(), torch.randn(9)[::2]]
    return dense + odd


def test_without_a_group_it_is_one_process() -> None:
    collective = Collective()
    assert (collective.topology, collective.distributed) == (Topology.of(0, 1), False)
    packet = torch.tensor([1.0, float("inf"), 5e-324], dtype=torch.float64)
    assert collective.all_reduce(packet).wait().tolist() == [1.0, float("inf"), 5e-324]
    assert collective.gather({"a": 1}) == [{"a": 1}]
    (buffer,) = (torch.randn(3),)
    before = buffer.clone()
    collective.broadcast([buffer])
    assert torch.equal(buffer, before)
    assert collective.device_for(torch.device("cpu")) == torch.device("cpu")


def _everything() -> dict[str, Any]:
    collective = Collective()
    rank, world = dist.get_rank(), dist.get_world_size()
    assert collective.topology == Topology.of(rank, world)
    mine = tensors(rank)
    strides = [tensor.stride() for tensor in mine]
    base = torch.zeros(9)
    mine.append(base[::2])
    collective.broadcast(mine)
    assert [tensor.stride() for tensor in mine[:-1]] == strides
    packets = [torch.full((3,), float(rank + 1 + step), dtype=torch.float64) for step in range(3)]
    under_way = [collective.all_reduce(packet) for packet in packets]
    return {
        "broadcast": all(torch.equal(a, b) for a, b in zip(mine, tensors(0), strict=False)),
        "gaps": base[1::2].abs().sum().item(),
        "sums": [reduction.wait().tolist() for reduction in reversed(under_way)],
        "again": under_way[0].wait().tolist(),
        "gather": collective.gather(("rank", rank)),
        "device": str(collective.device_for(torch.device("cuda"))),
    }


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_gets_rank_zeros_tensors_all_values_and_the_sum(world: int) -> None:
    first = float(sum(range(1, world + 1)))
    for answer in run_ranks(world, _everything):
        assert answer["broadcast"]
        assert answer["gaps"] == 0
        assert answer["sums"] == [[first + world * step] * 3 for step in (2, 1, 0)]
        assert answer["again"] == [first] * 3
        assert answer["gather"] == [("rank", rank) for rank in range(world)]
        assert answer["device"] == "cpu"


def _subgroup() -> list[Any] | None:
    """Ranks 1 and 2 of three as a group of their own: rank 1 is its first."""
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    assert isinstance(group, dist.ProcessGroup)
    collective = Collective(group)
    buffer = torch.full((2,), float(dist.get_rank()))
    collective.broadcast([buffer])
    total = collective.all_reduce(torch.ones(1, dtype=torch.float64) * dist.get_rank()).wait()
    return [collective.topology, buffer.tolist(), total.item(), collective.gather(dist.get_rank())]


def test_a_group_is_its_own_world() -> None:
    rest = [[1.0, 1.0], 3.0, [1, 2]]
    assert run_ranks(3, _subgroup) == [None, [Topology.of(0, 2), *rest], [Topology.of(1, 2), *rest]]
