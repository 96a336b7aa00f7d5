"""shards.py: every element is read by one rank, and what is not supported is refused."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon import StreamMonitor
from ddp_streammon.shards import (
    CHUNK,
    Family,
    Piece,
    Topology,
    families,
    holdings,
    model_peers,
    refuse_unsupported,
    shares,
)
from ddp_streammon.streams import StreamSet
from tests.ranks import run_ranks

SIZES = {
    "odd": [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17],
    "tiny": [1, 2, 3],
    "one": [5 * CHUNK + 1],
    "empty": [0, 7, 0, CHUNK, 0],
    "nothing": [0],
}


def families_of(sizes: list[int], world: int, sets: tuple[tuple[int, ...], ...] | None = None) -> list[Family]:
    """Parameters of two streams in turn, held by all ranks alike or by `sets`."""
    held = sets or (tuple(range(world)),)
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    return [Family(number % 2, held, (parameter,), size=1, first=True) for number, parameter in enumerate(parameters)]


def read(families: list[Family], world: int) -> list[list[Piece]]:
    """The pieces that each rank reads where replicas are equal."""
    of_ranks = [shares(families, rank, [True] * len(families)) for rank in range(world)]
    assert all(share.weight == 1 for read in of_ranks for share in read)
    return [[piece for share in read for piece in share.pieces] for read in of_ranks]


@pytest.mark.parametrize(("kind", "world"), list(itertools.product(SIZES, range(1, 8))))
def test_the_cut_covers_every_element_once_and_is_balanced(kind: str, world: int) -> None:
    families = families_of(SIZES[kind], world)
    ranks = read(families, world)
    for family in families:
        (parameter,) = family.parameters
        reads = torch.zeros(parameter.numel(), dtype=torch.int64)
        mine = [piece for pieces in ranks for piece in pieces if piece.parameter is parameter]
        for piece in mine:
            assert piece.stream == family.stream
            reads[piece.start : piece.stop] += 1
        assert torch.all(reads == 1)
        assert sum(piece.counts for piece in mine) == 1  # the rank that counts the tensor
    loads = [sum(piece.stop - piece.start for piece in pieces) for pieces in ranks]
    assert sum(loads) == sum(SIZES[kind])
    assert max(loads) - min(loads) <= CHUNK


def test_only_ranks_that_hold_the_same_part_share_it_out() -> None:
    families = families_of([4 * CHUNK], 4, sets=((0, 2), (1, 3)))
    for rank, (piece,) in enumerate(read(families, 4)):
        assert (piece.start, piece.stop) == ((0, 2 * CHUNK) if rank < 2 else (2 * CHUNK, 4 * CHUNK))


def test_whole_is_said_of_whole_pieces() -> None:
    assert [[piece.whole for piece in pieces] for pieces in read(families_of([2 * CHUNK], 2), 2)] == [[False], [False]]
    assert [piece.whole for piece in read(families_of([2 * CHUNK], 1), 1)[0]] == [True]


def test_what_is_not_proved_equal_is_read_in_full_for_its_part_of_the_mean() -> None:
    families = families_of([10, 20], 3)
    for rank in range(3):
        alone, shared = shares(families, rank, [False, True])[::-1]
        assert (alone.weight, [piece.stop for piece in alone.pieces]) == (1 / 3, [10])
        assert shared.weight == 1
    (share,) = shares(families_of([10, 20], 1), 0, [False, False])
    assert share.weight == 1  # one process holds no replicas


def test_a_part_without_the_first_elements_counts_no_tensor() -> None:
    family = Family(0, ((0, 1),), (nn.Parameter(torch.zeros(2 * CHUNK)),), size=1, first=False)
    for rank, proved in itertools.product((0, 1), (True, False)):
        assert [piece.counts for share in shares([family], rank, [proved]) for piece in share.pieces] == [False]


def _apart() -> dict[str, float]:
    """Streams whose meshes are one rank each, as stages of a pipeline are; the gradients say whose they are."""
    rank = dist.get_rank()
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    for holder, module in enumerate(model.values()):
        mesh = DeviceMesh("cpu", [holder])
        module.weight = nn.Parameter(DTensor.from_local(torch.ones(4 * (rank == holder), 4), mesh, [Shard(0)]))
        if rank == holder:
            module.weight.grad = DTensor.from_local(torch.full((4, 4), 1.0 + holder), mesh, [Shard(0)])
    return StreamMonitor(model, streams=PARTS).compute_stream_gradients().to_dict()


def test_ranks_outside_of_a_parameters_mesh_hold_nothing_of_it() -> None:
    for figures in run_ranks(2, _apart):
        assert (figures["a_grad_norm"], figures["b_grad_norm"]) == (4, 8)
        assert (figures["a_grad_elements"], figures["b_params"]) == (16, 1)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 12), nn.Linear(12, 3)


PARTS = {"a": "a", "b": "b"}


def _layouts() -> dict[str, Any]:
    """Of each layout on four ranks: each family's stream and sets, its parameters here, and who sees the same data."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    answers: dict[str, Any] = {}

    def note(name: str, model: nn.Module) -> None:
        streams = StreamSet.resolve(model, PARTS)
        of_ranks: list[Any] = [None] * world
        dist.all_gather_object(of_ranks, holdings(streams))
        found = families(streams, of_ranks, rank)
        answers[name] = (
            [(family.stream, family.sets, len(family.parameters), family.first) for family in found],
            model_peers(streams, model),
        )

    note("plain", Parts())
    note("fsdp2", fully_shard(Parts(), mesh=init_device_mesh("cpu", (4,))))
    note("hsdp", fully_shard(Parts(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))))
    mixed = Parts()
    fully_shard(mixed.a, mesh=init_device_mesh("cpu", (4,)))
    note("one sharded", mixed)
    note("tp", parallelize_module(Parts(), mesh["tp"], {"a": ColwiseParallel(), "b": RowwiseParallel()}))
    both = parallelize_module(Parts(), mesh["tp"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
    note("fsdp2 x tp", fully_shard(both, mesh=mesh["dp"]))
    both = parallelize_module(Parts(), mesh["tp"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
    note("ddp x tp", DistributedDataParallel(both, device_mesh=mesh["dp"]))
    return answers


def test_families_and_data_ranks_of_layouts() -> None:
    answers = run_ranks(4, _layouts)
    alone, pairs, everyone = ((0,), (1,), (2,), (3,)), ((0, 2), (1, 3)), ((0, 1, 2, 3),)
    for rank, answer in enumerate(answers):
        tp_peers = (0, 1) if rank < 2 else (2, 3)
        assert answer["plain"] == ([(0, everyone, 2, True), (1, everyone, 2, True)], None)
        first = rank == 0
        assert answer["fsdp2"] == ([(0, alone, 2, first), (1, alone, 2, first)], None)
        assert answer["hsdp"] == ([(0, pairs, 2, rank % 2 == 0), (1, pairs, 2, rank % 2 == 0)], None)
        assert answer["one sharded"] == ([(0, alone, 2, first), (1, everyone, 2, True)], None)
        families, peers = answer["tp"]
        assert peers == tp_peers
        assert families == [(0, pairs, 2, rank % 2 == 0), (1, pairs, 1, rank % 2 == 0), (1, everyone, 1, True)]
        assert answer["ddp x tp"] == answer["tp"]
        families, peers = answer["fsdp2 x tp"]
        assert peers == tp_peers
        data_sets = ((0, 1), (2, 3))
        assert families == [(0, alone, 2, first), (1, alone, 1, first), (1, data_sets, 1, rank < 2)]


def _refusal() -> str:
    model = Parts()
    model.a = FullyShardedDataParallel(model.a, device_id=torch.device("cpu"))  # type: ignore[assignment]
    with pytest.raises(ValueError, match="FSDP1") as caught:
        refuse_unsupported(model)
    return str(caught.value)


def test_fsdp1_is_refused_by_name_on_every_rank() -> None:
    assert (
        run_ranks(2, _refusal)
        == [
            "module 'a' is wrapped in FullyShardedDataParallel (FSDP1), which flattens parameters of several streams "
            "into one; use torch.distributed.fsdp.fully_shard (FSDP2) or DistributedDataParallel"
        ]
        * 2
    )


def test_data_ranks_are_numbered_by_who_sees_the_same_data() -> None:
    peers = [(0, 2), (1, 3), (0, 2), (1, 3)]
    found = [Topology.of(rank, 4, peers) for rank in range(4)]
    assert [(topology.data_rank, topology.data_size, topology.model_peers) for topology in found] == [
        (0, 2, 2.0),
        (1, 2, 2.0),
        (0, 2, 2.0),
        (1, 2, 2.0),
    ]
    with pytest.raises(ValueError, match=r"do not share out the 3 ranks: \[\(0, 1\), \(1, 2\)\]; pass model_peers="):
        Topology.of(0, 3, [(0, 1), (0, 1), (1, 2)])


def test_an_optimizer_in_the_backward_pass_is_refused_by_parameter() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, which this module still uses
        from torch.distributed.optim import _apply_optimizer_in_backward

    model = Parts()
    _apply_optimizer_in_backward(torch.optim.SGD, model.b.parameters(), {"lr": 0.1})
    with pytest.raises(
        ValueError, match=r"parameter b\.weight has an optimizer that steps in the backward pass.*build"
    ):
        refuse_unsupported(model)
