"""What this rank holds and what it reads: every element of the job is read by one rank only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from ddp_streammon.streams import NamedParameter, StreamSet

CHUNK = 4096
"""Elements; the cut between ranks falls on multiples of it, so shares differ by at most one chunk."""
MODEL_DIMENSIONS = frozenset({"tp", "sp", "cp", "ep", "pp", "mp", "tensor", "model", "context", "expert", "pipeline"})
"""Names of mesh dimensions along which ranks work on the same data; all others are taken as data parallel."""


@dataclass(frozen=True)
class Topology:
    """This process among those that train the same model.

    Ranks that hold parts of one replica (tensor parallel, ...) see the same data: they have one `data_rank`, and
    each stands for 1 / `model_peers` of what it reports.
    """

    rank: int = 0
    world_size: int = 1
    data_rank: int = 0
    data_size: int = 1
    first_ranks: tuple[int, ...] = (0,)
    """Of those that see the same data the first, for each data rank."""

    @classmethod
    def of(cls, rank: int, world_size: int, peers: Sequence[Sequence[int]] | None = None) -> Topology:
        """`peers`: for each rank those that see the same data, itself included; None: every rank sees its own.

        Errors: ValueError where they do not share out the ranks.
        """
        groups = sorted({tuple(sorted(group)) for group in peers or [[member] for member in range(world_size)]})
        if sorted(member for group in groups for member in group) != list(range(world_size)):
            raise ValueError(
                f"the ranks that work on the same data do not share out the {world_size} ranks: {groups}; pass "
                "model_peers=(the ranks that see this rank's data, itself included) on every rank"
            )
        place = next(number for number, group in enumerate(groups) if rank in group)
        return cls(rank, world_size, place, len(groups), tuple(group[0] for group in groups))

    @property
    def model_peers(self) -> float:
        """How many ranks see the same data, on average over the data ranks."""
        return self.world_size / self.data_size


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of this rank's part of a parameter (in memory order), read for stream number `stream`."""

    stream: int
    parameter: nn.Parameter
    start: int
    stop: int
    whole: bool
    """Whether this is all that the rank holds of the parameter."""
    counts: bool = True
    """Whether the piece begins with the parameter's first element: it then counts as one tensor."""


@dataclass(frozen=True)
class Share:
    """Pieces of one kind, and what their figures count for in the sum over ranks.

    `weight` is 1 where ranks read different elements, and 1 / R where R ranks that hold the same part each read all
    of it, because nothing says that its gradients are the same everywhere: the sum over ranks is then their mean.
    """

    pieces: tuple[Piece, ...]
    weight: float


@dataclass(frozen=True)
class Family:
    """Parameters of one stream that are laid out alike over the ranks.

    `sets` are the ranks that hold the same part, for each part there is; `parameters` those of this rank (none if it
    is in no set), `size` how many there are; `first`: whether its part begins with the parameters' first elements.
    """

    stream: int
    sets: tuple[tuple[int, ...], ...]
    parameters: tuple[nn.Parameter, ...]
    size: int
    first: bool

    def peers(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold what `rank` holds, itself included; () if it holds nothing."""
        return next((ranks for ranks in self.sets if rank in ranks), ())


_Part: TypeAlias = "tuple[tuple[str, int, int], ...]"
"""Where a rank's part lies: (placement, parts, this part) along each mesh dimension that cuts the parameter."""
_Kind: TypeAlias = "tuple[int, tuple[tuple[str, int], ...], str, int]"
"""What ranks have in common: stream, (placement, parts) of each cut, digest of the parameters' names and shapes, and
their number."""
Holdings: TypeAlias = "tuple[tuple[_Kind, tuple[int, ...]], ...]"
"""What a rank holds, in few words that can be compared across ranks."""


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor. Comm, Sync: none."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def holdings(streams: StreamSet) -> Holdings:
    """What this rank holds of the streams' parameters. Comm: none."""
    return tuple((kind, tuple(index for _, _, index in part)) for (kind, part), _ in _grouped(streams))


def families(streams: StreamSet, of_ranks: Sequence[Holdings], rank: int) -> tuple[Family, ...]:
    """The families of the job, equal on every rank but for what it holds itself.

    `of_ranks`: every rank's `holdings`.
    """
    sets: dict[_Kind, dict[tuple[int, ...], list[int]]] = {}
    for holder, holding in enumerate(of_ranks):
        for kind, part in holding:
            sets.setdefault(kind, {}).setdefault(part, []).append(holder)
    own = {kind: (part, parameters) for (kind, part), parameters in _grouped(streams)}
    result = []
    for kind, parts in sets.items():
        mine, parameters = own.get(kind, ((), []))
        first = not any(index for _, _, index in mine)
        held = tuple(tuple(ranks) for ranks in parts.values())
        result.append(Family(kind[0], held, tuple(parameters), size=kind[-1], first=first))
    return tuple(result)


def shares(families: Sequence[Family], rank: int, proved: Sequence[bool]) -> tuple[Share, ...]:
    """What this rank reads. `proved`: for each family, whether its replicas are known to be equal.

    Equal replicas are cut by chunk over the ranks that hold them; everything else is read in full by each.
    """
    cut: dict[tuple[int, ...], list[tuple[Family, nn.Parameter]]] = {}
    full: dict[int, list[Piece]] = {}
    for family, equal in zip(families, proved, strict=True):
        peers = family.peers(rank)
        for parameter in family.parameters:
            if equal:
                cut.setdefault(peers, []).append((family, parameter))
            else:
                size = local(parameter).numel()
                full.setdefault(len(peers), []).append(
                    Piece(family.stream, parameter, 0, size, whole=True, counts=family.first)
                )
    result = [Share(tuple(_cut(held, peers.index(rank), len(peers))), 1.0) for peers, held in cut.items()]
    return (*result, *(Share(tuple(pieces), 1.0 / ranks) for ranks, pieces in full.items()))


def _cut(held: Sequence[tuple[Family, nn.Parameter]], place: int, places: int) -> Iterator[Piece]:
    """The part of the flat element range over `held` that falls to one of `places`, in whole chunks.

    Parameters without elements are the first one's.
    """
    sizes = [local(parameter).numel() for _, parameter in held]
    total = sum(sizes)
    chunks = -(-total // CHUNK)
    first = chunks * place // places * CHUNK
    last = min(chunks * (place + 1) // places * CHUNK, total)
    offset = 0
    for (family, parameter), size in zip(held, sizes, strict=True):
        start, stop = min(max(first - offset, 0), size), max(min(last - offset, size), 0)
        if start < stop or (size == 0 and place == 0):
            counts = family.first and start == 0
            yield Piece(family.stream, parameter, start, stop, whole=stop - start == size, counts=counts)
        offset += size


def _grouped(streams: StreamSet) -> list[tuple[tuple[_Kind, _Part], list[nn.Parameter]]]:
    """This rank's parameters by kind and part."""
    groups: dict[tuple[int, _Part], list[NamedParameter]] = {}
    for number, stream in enumerate(streams.streams):
        for item in stream.parameters:
            if _held(item.parameter):
                groups.setdefault((number, _part(item.parameter)), []).append(item)
    result = []
    for (number, part), items in groups.items():
        words = "\n".join(f"{item.name} {tuple(item.parameter.shape)}" for item in items)
        digest = hashlib.sha256(words.encode()).hexdigest()[:16]
        kind = (number, tuple((placement, parts) for placement, parts, _ in part), digest, len(items))
        result.append(((kind, part), [item.parameter for item in items]))
    return result


def _layout(parameter: nn.Parameter) -> Any:
    """What says how a parameter is laid out, with `placements` and `mesh`; None for a plain one.

    DDP over tensor parallelism trains plain tensors that carry it: torch/distributed/tensor/parallel/ddp.py.
    """
    return parameter._spec if isinstance(parameter, DTensor) else getattr(parameter, "_st_info", None)


def _held(parameter: nn.Parameter) -> bool:
    """Whether this rank is in the parameter's mesh."""
    layout = _layout(parameter)
    return layout is None or layout.mesh.get_coordinate() is not None


def _part(parameter: nn.Parameter) -> _Part:
    layout = _layout(parameter)
    if layout is None:
        return ()
    coordinate = layout.mesh.get_coordinate()
    cuts = zip(layout.placements, layout.mesh.shape, coordinate, strict=True)
    return tuple((str(placement), parts, index) for placement, parts, index in cuts if not placement.is_replicate())


def model_peers(streams: StreamSet, model: nn.Module) -> tuple[int, ...] | None:
    """The ranks that see the same data as this one, itself included; None where every rank sees its own.

    Along a mesh dimension with one of the names `MODEL_DIMENSIONS` ranks see the same data. A dimension without a name
    is data parallel where the model was sharded by `fully_shard`, and tensor parallel otherwise.
    """
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    widest: tuple[int, ...] | None = None
    for stream in streams.streams:
        for item in stream.parameters:
            if (layout := _layout(item.parameter)) is not None:
                peers = _along_model(layout.mesh, sharded)
                if len(peers) > len(widest or (0,)):
                    widest = peers
    return widest


def _along_model(mesh: DeviceMesh, sharded: bool) -> tuple[int, ...]:
    """The global ranks that differ from this one only along the mesh's model dimensions."""
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return ()
    ranks = mesh.mesh
    for dimension in reversed(range(mesh.ndim)):
        name = names[dimension]
        if not (name in MODEL_DIMENSIONS or (not name and not sharded)):
            ranks = ranks.select(dimension, coordinate[dimension])
    return tuple(ranks.reshape(-1).tolist())


def refuse_unsupported(model: nn.Module) -> None:
    """ValueError where gradients cannot be read by parameter after the backward pass. Comm: none.

    That is under FSDP1, and where an optimizer steps, and clears gradients, within the backward pass.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "_in_backward_optimizers"):  # torch/distributed/optim/apply_optimizer_in_backward.py
            raise ValueError(
                f"parameter {name} has an optimizer that steps in the backward pass, which leaves no gradient to "
                "measure or to clip; build the optimizer without _apply_optimizer_in_backward, and call its step after "
                "monitor.step"
            )
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                f"module {name or type(module.module).__name__!r} is wrapped in FullyShardedDataParallel (FSDP1), "
                "which flattens parameters of several streams into one; use torch.distributed.fsdp.fully_shard (FSDP2) "
                "or DistributedDataParallel"
            )
