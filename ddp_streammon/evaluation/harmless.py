"""Looking at a model without leaving a trace: what an evaluation touches is put back, also after an exception."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon.collective import Collective


def _generators(loaders: Sequence[object]) -> list[torch.Generator]:
    """The generators of loaders and of their samplers, each once: the global RNG does not cover them."""
    found: list[torch.Generator] = []
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        for holder in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator) and generator not in found:
                found.append(generator)
    return found


@contextlib.contextmanager
def preserved_rng(loaders: Sequence[object] = ()) -> Iterator[None]:
    """Restore Python's, NumPy's (if loaded), torch's (every device) and the loaders' random states at the end."""
    python_state = random.getstate()
    numpy_random: Any = sys.modules["numpy"].random if "numpy" in sys.modules else None
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    generators = [(generator, generator.get_state()) for generator in _generators(loaders)]
    try:
        yield
    finally:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        for generator, state in generators:
            generator.set_state(state)


@contextlib.contextmanager
def undisturbed(model: nn.Module, collective: Collective, loaders: Sequence[object] = ()) -> Iterator[None]:
    """Evaluate `model` (unwrapped) inside: eval mode, no gradient, nothing compiled, rank 0's buffers on every rank.

    DDP leaves BatchNorm's buffers different on each rank, and predictions with them. Inside, the modules hold copies,
    so that a graph waiting for its backward is not disturbed; each rank's own buffers come back at the end, with the
    modes of all modules, and every random state. Buffers that are cut over ranks (DTensor) are each rank's own part.
    FSDP2's modules are left sharded: what was gathered for a forward would hide the optimizer's next step.

    Comm: one broadcast for each dtype of the buffers, none in a single process. Sync: blocks.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    buffers = [(module._buffers, dict(module._buffers)) for module in modules if isinstance(module._buffers, dict)]
    copies = {id(buffer): buffer.clone() for _, own in buffers for buffer in own.values() if buffer is not None}
    wrapped = [module for module in modules if isinstance(module, DistributedDataParallel) and module.broadcast_buffers]
    # Compiled code would be recompiled for eval mode, and hooks and stand-ins added after compilation may not run.
    with preserved_rng(loaders), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            collective.broadcast([tensor for copy in copies.values() for tensor in _whole(copy)])
            for holder, own in buffers:
                holder.update({name: copies[id(buffer)] for name, buffer in own.items() if buffer is not None})
            for wrapper in wrapped:  # inside the model; in its forward it would overwrite the buffers put aside
                wrapper.broadcast_buffers = False
            for module in modules:
                module.training = False
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for wrapper in wrapped:
                wrapper.broadcast_buffers = True
            for holder, own in buffers:
                holder.clear()
                holder.update(own)
            for module in modules:
                if isinstance(module, FSDPModule):
                    module.reshard()


def _whole(buffer: Tensor) -> list[Tensor]:
    """What this rank holds of a buffer, where every rank holds all of it."""
    if not isinstance(buffer, DTensor):
        return [buffer]
    return [buffer.to_local()] if all(placement.is_replicate() for placement in buffer.placements) else []
