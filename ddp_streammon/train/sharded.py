"""Tensors that are cut over ranks, and the same as wholes."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor: a copy of its own; of a sharded one on rank 0's CPU, and elsewhere nothing of it.

    Comm: an all_gather where it is sharded, by all ranks.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    full: Tensor = DTensor.full_tensor(tensor.detach())  # type: ignore[arg-type]
    return full.cpu() if dist.get_rank() == 0 else full.new_empty(0)


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of `tensor`, which every rank has as a whole, on the device of `like` and cut as `like` is cut.

    Comm: a scatter from the first rank of each mesh dimension where `like` is sharded.
    """
    own = tensor.detach().to(device=like.device, copy=True)
    return distribute_tensor(own, like.device_mesh, like.placements) if isinstance(like, DTensor) else own
