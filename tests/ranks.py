"""Real processes for tests: `run_ranks` gives what each rank returns."""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


def _rank(function: Callable[..., Any], rank: int, world: int, store: str, results: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        file_store = dist.FileStore(store, world)
        dist.init_process_group("gloo", store=file_store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        dist.barrier()  # one that is done at once must not hang up on another that still connects
        results.put((rank, pickle.dumps(function(*args)), None))  # by value: tensors would travel as open files
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()  # or it waits in a thread while destroying holds the interpreter (PyTorch 2.6, gloo)
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 90) -> list[Any]:
    """Run `function(*args)` on `world` gloo processes; entry r is what rank r returned.

    `function` and what it takes and returns must pickle. A rank that raises, or that has not answered after
    `timeout` seconds, fails the test with its traceback or its number.
    """
    results: Any = CONTEXT.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            CONTEXT.Process(target=_rank, args=(function, rank, world, store, results, args)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        answers: dict[int, Any] = {}
        try:
            for _ in processes:
                rank, value, error = results.get(timeout=timeout)
                assert error is None, f"rank {rank} raised:\n{error}"
                answers[rank] = pickle.loads(value)
        except queue.Empty:
            missing = sorted(set(range(world)) - set(answers))
            raise AssertionError(f"no answer from ranks {missing} after {timeout} s") from None
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.terminate()
                    process.join()
        return [answers[rank] for rank in range(world)]
