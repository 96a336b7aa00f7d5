"""What this rank holds and what it reads: every element of the job is read by one rank only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon.streams import StreamSet

CHUNK = 4096
"""Elements; the cut between ranks falls on multiples of it, so shares differ by at most one chunk."""


@dataclass(frozen=True)
class Topology:
    """This process among those that train the same model."""

    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of one parameter (in memory order), read by this rank for stream number `stream`."""

    stream: int
    parameter: nn.Parameter
    start: int
    stop: int
    whole: bool
    """Whether this is all of the parameter."""


@dataclass(frozen=True)
class Share:
    """Pieces of one kind, and what their figures count for in the sum over ranks.

    `weight` is 1 where ranks read different elements of the same replicas, and 1 / world size where every rank
    reads in full, because nothing says that the gradients are the same everywhere: the sum over ranks is then
    the mean over ranks.
    """

    pieces: tuple[Piece, ...]
    weight: float


def replicated_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters whose gradients DistributedDataParallel keeps equal on all ranks."""
    replicas: set[int] = set()
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            ignored = module.parameters_to_ignore
            named = module.module.named_parameters()
            replicas.update(id(parameter) for name, parameter in named if name not in ignored)
    return replicas


def shares(streams: StreamSet, model: nn.Module, topology: Topology) -> tuple[Share, ...]:
    """What this rank reads. `model` is the model as the user trains it, wrappers included.

    Replicas under DistributedDataParallel are cut by chunk over the ranks; everything else is read in full.
    Errors: ValueError for a DTensor, by name: sharded layouts are not supported.
    """
    _refuse_sharded(streams)
    replicas = replicated_parameters(model) if topology.world_size > 1 else set()
    cut = [(number, parameter) for number, parameter in _parameters(streams) if id(parameter) in replicas]
    full = [(number, parameter) for number, parameter in _parameters(streams) if id(parameter) not in replicas]
    result = []
    if cut:
        result.append(Share(tuple(_cut(cut, topology)), 1.0))
    if full:
        result.append(_in_full(full, topology))
    return tuple(result)


def full_shares(streams: StreamSet, topology: Topology) -> tuple[Share, ...]:
    """Everything, on each rank: what is read under `Join`, where a rank that has stopped holds no gradients."""
    return (_in_full(_parameters(streams), topology),)


def _parameters(streams: StreamSet) -> list[tuple[int, nn.Parameter]]:
    return [(number, p.parameter) for number, stream in enumerate(streams.streams) for p in stream.parameters]


def _in_full(parameters: Iterable[tuple[int, nn.Parameter]], topology: Topology) -> Share:
    pieces = tuple(Piece(number, parameter, 0, parameter.numel(), whole=True) for number, parameter in parameters)
    return Share(pieces, 1.0 / topology.world_size)


def _cut(parameters: Sequence[tuple[int, nn.Parameter]], topology: Topology) -> Iterable[Piece]:
    """This rank's part of the flat element range over `parameters`, in whole chunks; empty tensors are rank 0's."""
    total = sum(parameter.numel() for _, parameter in parameters)
    chunks = -(-total // CHUNK)
    first = chunks * topology.rank // topology.world_size * CHUNK
    last = min(chunks * (topology.rank + 1) // topology.world_size * CHUNK, total)
    offset = 0
    for number, parameter in parameters:
        start, stop = max(first - offset, 0), min(last - offset, parameter.numel())
        if start < stop:
            yield Piece(number, parameter, start, stop, whole=stop - start == parameter.numel())
        elif parameter.numel() == 0 and topology.rank == 0:
            yield Piece(number, parameter, 0, 0, whole=True)
        offset += parameter.numel()


def _refuse_sharded(streams: StreamSet) -> None:
    for stream in streams.streams:
        for item in stream.parameters:
            if isinstance(item.parameter, DTensor):
                raise ValueError(
                    f"parameter {item.name} of stream {stream.name!r} is a DTensor (FSDP2 or tensor parallel): sharded "
                    "layouts are not supported; wrap the model in DistributedDataParallel, or leave it plain"
                )
