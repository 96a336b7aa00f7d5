"""train/process.py: meeting on one store that several attempts of a job have used."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from ddp_streammon.train.process import fresh


def meet(server: dist.TCPStore, world: int, late: float = 0.0) -> list[str]:
    """What the ranks of an attempt read, each from the rank before it; `late` is what rank 0 waits before it joins."""
    found = [""] * world

    def join(rank: int) -> None:
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))
        store = fresh(client, rank, world, 20)
        store.set(f"address/{rank}", f"{id(found)}-{rank}")
        found[rank] = store.get(f"address/{(rank - 1) % world}").decode()

    threads = [threading.Timer(late * (rank == 0), join, (rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [address.removeprefix(f"{id(found)}-") for address in found]


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False)


@pytest.mark.parametrize("late", [0.0, 0.3])
def test_no_attempt_sees_the_addresses_of_another(server: dist.TCPStore, late: float) -> None:
    for world in (3, 3, 2, 1, 4):
        assert meet(server, world, late) == [str((rank - 1) % world) for rank in range(world)]


def test_a_rank_that_nobody_meets_says_so(server: dist.TCPStore) -> None:
    meet(server, 2)
    with pytest.raises(TimeoutError, match=r"rank 1 of 2 did not meet the others within 0.2 s"):
        fresh(server, 1, 2, 0.2)
