"""This process and its peers: how it finds them under torchrun, and how it goes when it is asked to."""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ddp_streammon.train.config import Device, TrainerSection

_POLL_SECONDS = 0.02


@contextlib.contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Let the first SIGTERM raise SystemExit, so that what is open is closed. In the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


@contextlib.contextmanager
def process_group(config: TrainerSection) -> Iterator[torch.device]:
    """The process group that torchrun asks for (none without it), and this rank's device."""
    wanted = config.device
    use_cuda = wanted is Device.cuda or (wanted is Device.auto and torch.cuda.is_available())
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if not dist.is_torchelastic_launched():
        yield device
        return
    timeout = timedelta(seconds=config.timeout_s)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    dist.init_process_group(
        "nccl" if use_cuda else "gloo",
        store=fresh(store, rank, world_size, config.timeout_s),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if use_cuda else None,
    )
    try:
        yield device
    finally:
        gc.collect()  # what else refers to the group, see loop._run
        dist.destroy_process_group()


def fresh(store: Store, rank: int, world_size: int, seconds: float) -> Store:
    """`store` under a prefix that is new in this attempt and the same on all its ranks.

    torchrun (torch 2.13) keeps one store over its restarts, and a rank that reads the address of a killed peer there
    ends the restarted job too; TORCHELASTIC_RESTART_COUNT is no prefix, since each host counts its own. So every rank
    writes a name of its own, rank 0 offers a prefix to the names that it reads, and goes on offering until all have
    answered: a name, an offer or an answer of an earlier attempt never fits. Errors: TimeoutError after `seconds`.
    """
    deadline = time.monotonic() + seconds
    others = range(1, world_size)
    own = secrets.token_hex(8)
    common = PrefixStore("ddp_streammon", store)
    common.set(f"name/{rank}", own)
    prefix = own if rank == 0 else ""
    while not prefix or (rank == 0 and not _answered(common, others, own)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {rank} of {world_size} did not meet the others within {seconds:g} s")
        if rank == 0:
            common.set("offer", " ".join([own, *(common.get(f"name/{other}").decode() for other in others)]))
        else:
            offered, *names = common.get("offer").decode().split()
            if own in names:
                prefix = offered
                common.set(f"answer/{rank}", offered)
        time.sleep(_POLL_SECONDS)
    return PrefixStore(prefix, store)


def _answered(store: Store, others: range, offered: str) -> bool:
    keys = [f"answer/{other}" for other in others]
    return all(store.check([key]) and store.get(key).decode() == offered for key in keys)
