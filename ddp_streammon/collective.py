"""The only place where figures cross ranks. Everything works the same without a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ddp_streammon.shards import Topology

T = TypeVar("T")


class Reduction:
    """A sum over ranks on its way. `wait()` gives it on the host, [K] float64; bit-equal on every rank."""

    def __init__(self, packet: Tensor, work: dist.Work | None) -> None:
        self._packet = packet
        self._work = work
        self._event: torch.cuda.Event | None = None
        if packet.is_cuda:
            # From PyTorch's own ring of pinned memory, which is not given out again before the copy is done.
            self._host = torch.empty(packet.shape, dtype=packet.dtype, pin_memory=True, device="cpu")
            self._host.copy_(packet, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._host = packet if packet.device.type == "cpu" else packet.clone()  # the next one is written there

    def wait(self) -> Tensor:
        """The sum. Sync: waits for the collective (CPU) or for the copy to the host (any other device)."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host.cpu()

    def arrived(self) -> bool:
        """Whether `wait` would return at once; ranks may disagree, so nothing that trains depends on it. Sync: none."""
        if self._work is not None and not self._work.is_completed():
            return False
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def summed(self) -> Tensor:
        """The sum where the packet lies, for use on the current stream. Sync: none on CUDA; waits on CPU."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._packet


class Collective:
    """The ranks of one process group, or this process alone."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        self.group = group
        rank, size = (dist.get_rank(group), dist.get_world_size(group)) if self.distributed else (0, 1)
        self.topology = Topology.of(rank, size)
        backend = dist.get_backend(group) if self.distributed else ""
        self._device_type = {"nccl": "cuda", "gloo": "cpu"}.get(backend)

    def share_data(self, peers: Sequence[Sequence[int]]) -> None:
        """Take over which ranks see the same data: for each rank those, itself included."""
        self.topology = Topology.of(self.topology.rank, self.topology.world_size, peers)

    def places(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """The ranks of the group that these global ranks are; those outside of it are left out."""
        if self.group is None:
            return tuple(ranks)
        members = dist.get_process_group_ranks(self.group)
        return tuple(members.index(rank) for rank in ranks if rank in members)

    def device_for(self, device: torch.device) -> torch.device:
        """Where a packet has to lie: `device`, unless the backend cannot take it from there."""
        if self._device_type is None or self._device_type == device.type:
            return device
        return torch.device("cuda", torch.cuda.current_device()) if self._device_type == "cuda" else torch.device("cpu")

    def all_reduce(self, packet: Tensor) -> Reduction:
        """Start the sum of `packet` over ranks, in place.

        Shape: [K] float64. Comm: one all_reduce(SUM) on the group, none in a single process. Sync: none.
        """
        if self.topology.world_size == 1:
            return Reduction(packet, None)
        work = dist.all_reduce(packet, op=dist.ReduceOp.SUM, group=self.group, async_op=packet.device.type == "cpu")
        return Reduction(packet, work)

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in rank order; any object that pickles. Comm: all_gather_object. Sync: blocks."""
        if self.topology.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.topology.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite `tensors` with rank 0's. Comm: one broadcast a dtype. Sync: blocks on CPU."""
        if self.topology.world_size == 1:
            return
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        by_type: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for (_, device), members in by_type.items():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in members]).to(self.device_for(device))
            dist.broadcast(flat.view(torch.uint8), src=source, group=self.group)  # bytes: gloo refuses some dtypes
            parts = torch.split(flat.to(device), [tensor.numel() for tensor in members])
            for tensor, part in zip(members, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))
