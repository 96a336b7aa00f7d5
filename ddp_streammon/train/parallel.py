"""How the ranks share the model: a copy each (DDP), one over all of them (FSDP2), or one over some (HSDP)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon.collective import Collective
from ddp_streammon.streams import StreamSet
from ddp_streammon.train.config import AppConfig, ConfigError, Layout

FSDP2_ON_CPU = torch.__version__ >= "2.9"
"""Before (it compares as a version), gloo adds up where FSDP2 asks for an average, so that gradients are too large, as
many times as there are ranks; HSDP ends with an error, and under PyTorch 2.6 no forward runs."""


def wrap(streams: StreamSet, config: AppConfig, device: torch.device, collective: Collective) -> nn.Module:
    """`streams.model` as the configuration lays it out over the ranks; itself in a single process.

    Sharded, each stream's own modules are a unit that is gathered for its forward, and the rest of the model is
    another; parameters are new objects afterwards. Every rank begins with rank 0's weights and buffers.
    Errors: ConfigError where this PyTorch cannot shard on CPU. Comm: a broadcast of parameters and buffers.
    """
    model, parallel = streams.model, config.parallel
    if not collective.distributed:
        return model
    if parallel.name is Layout.ddp:
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=config.trainer.find_unused_parameters,
        )
    if device.type == "cpu" and not FSDP2_ON_CPU:
        raise ConfigError(
            f"parallel={parallel.name.value} on CPU needs PyTorch 2.9 or later, got {torch.__version__}: older ones do "
            "not average gradients there; say parallel=ddp, or train on CUDA devices"
        )
    with torch.no_grad():
        collective.broadcast([*model.parameters(), *model.buffers()])
    world_size = collective.topology.world_size
    if parallel.shard_size is None:
        mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    else:
        sizes = (world_size // parallel.shard_size, parallel.shard_size)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))
    paths = dict.fromkeys(path for name in streams.user_names for path in streams[name].roots if path)
    for module in dict.fromkeys(model.get_submodule(path) for path in paths):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextlib.contextmanager
def unsynchronised(wrapped: nn.Module) -> Iterator[None]:
    """Inside, gradients stay on their rank and add up: the micro-batches before the last one of a step."""
    if isinstance(wrapped, DistributedDataParallel):
        with wrapped.no_sync():
            yield
    elif isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            wrapped.set_requires_gradient_sync(True)
    else:
        yield


def share_buffers(wrapped: nn.Module, collective: Collective) -> None:
    """Give every rank rank 0's buffers where the wrapper does not: DDP does in each forward, FSDP2 never.

    BatchNorm's running statistics are read in eval mode alone, so that an epoch's start is often enough.
    Comm: one broadcast for each dtype of the buffers, for FSDP2 and HSDP.
    """
    if isinstance(wrapped, FSDPModule):
        collective.broadcast(list(wrapped.buffers()))
