"""shards.py: every element is read by one rank, and what is not supported is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon.shards import CHUNK, Piece, Topology, _cut, replicated_parameters, shares
from ddp_streammon.streams import StreamSet
from tests.ranks import run_ranks

SIZES = {
    "odd": [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17],
    "tiny": [1, 2, 3],
    "one": [5 * CHUNK + 1],
    "empty": [0, 7, 0, CHUNK, 0],
    "nothing": [0],
}


def parameters_of(sizes: list[int]) -> list[tuple[int, nn.Parameter]]:
    return [(stream % 2, nn.Parameter(torch.zeros(size))) for stream, size in enumerate(sizes)]


def cut(parameters: list[tuple[int, nn.Parameter]], world: int) -> list[list[Piece]]:
    return [list(_cut(parameters, Topology(rank, world))) for rank in range(world)]


@pytest.mark.parametrize(("kind", "world"), list(itertools.product(SIZES, range(1, 8))))
def test_the_cut_covers_every_element_once_and_is_balanced(kind: str, world: int) -> None:
    parameters = parameters_of(SIZES[kind])
    ranks = cut(parameters, world)
    for stream, parameter in parameters:
        reads = torch.zeros(parameter.numel(), dtype=torch.int64)
        mine = [piece for pieces in ranks for piece in pieces if piece.parameter is parameter]
        for piece in mine:
            assert piece.stream == stream
            reads[piece.start : piece.stop] += 1
        assert torch.all(reads == 1)
        assert sum(piece.start == 0 for piece in mine) == 1  # the rank that counts the tensor
    loads = [sum(piece.stop - piece.start for piece in pieces) for pieces in ranks]
    assert sum(loads) == sum(SIZES[kind])
    assert max(loads) - min(loads) <= CHUNK


def test_whole_is_said_of_whole_pieces() -> None:
    (_, parameter), *_ = parameters_of([2 * CHUNK])
    assert [[piece.whole for piece in pieces] for pieces in cut([(0, parameter)], 2)] == [[False], [False]]
    assert [piece.whole for piece in cut([(0, parameter)], 1)[0]] == [True]


def test_one_process_reads_everything_at_full_weight() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    (share,) = shares(StreamSet.resolve(model), model, Topology())
    assert share.weight == 1
    assert [(piece.stream, piece.whole) for piece in share.pieces] == [(0, True), (0, True), (1, True), (1, True)]


def test_without_ddp_every_rank_reads_all_for_its_part_of_the_mean() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    for rank in range(3):
        (share,) = shares(StreamSet.resolve(model), model, Topology(rank, 3))
        assert share.weight == 1 / 3
        assert sum(piece.stop - piece.start for piece in share.pieces) == 24


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(100, 100), nn.Linear(100, 30)


def _ownership() -> list[object]:
    torch.manual_seed(0)
    rank = Topology(dist.get_rank(), dist.get_world_size())
    whole = DistributedDataParallel(Parts())
    (share,) = shares(StreamSet.resolve(whole), whole, rank)
    part = Parts()
    part.a = DistributedDataParallel(part.a)  # type: ignore[assignment]
    found = [(s.weight, sum(p.stop - p.start for p in s.pieces)) for s in shares(StreamSet.resolve(part), part, rank)]
    ignoring = Parts()
    ignored = ["b.weight"]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ignoring, ignored)
    replicas = replicated_parameters(DistributedDataParallel(ignoring))
    kept = [name for name, parameter in ignoring.named_parameters() if id(parameter) in replicas]
    return [(share.weight, sum(p.stop - p.start for p in share.pieces)), found, kept]


def test_under_ddp_a_rank_reads_its_part_and_in_full_what_ddp_does_not_hold() -> None:
    kept = ["a.weight", "a.bias", "b.bias"]
    assert run_ranks(2, _ownership) == [
        [(1.0, 2 * CHUNK), [(1.0, CHUNK), (0.5, 3030)], kept],
        [(1.0, 13130 - 2 * CHUNK), [(1.0, 10100 - CHUNK), (0.5, 3030)], kept],
    ]


def _refusals() -> list[str]:
    messages = []
    mesh = init_device_mesh("cpu", (1,))
    tensor_parallel = Parts()
    tensor_parallel.b.weight = nn.Parameter(distribute_tensor(tensor_parallel.b.weight, mesh, [Replicate()]))
    for model in (tensor_parallel, fully_shard(Parts(), mesh=mesh)):
        with pytest.raises(ValueError, match="is a DTensor") as caught:
            shares(StreamSet.resolve(model), model, Topology())
        messages.append(str(caught.value))
    return messages


def test_dtensors_are_refused_by_name() -> None:
    ((tensor_parallel, fsdp2),) = run_ranks(1, _refusals)
    assert tensor_parallel == (
        "parameter b.weight of stream 'b' is a DTensor (FSDP2 or tensor parallel): sharded layouts are not supported; "
        "wrap the model in DistributedDataParallel, or leave it plain"
    )
    assert fsdp2.startswith("parameter a.weight of stream 'a' is a DTensor")
