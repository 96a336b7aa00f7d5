"""What is done on CUDA alone, without a GPU: the tests of it in Triton's interpreter, on the emulated device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddp_streammon.graphs import WARM_UP, Graphs
from tests.emulated_cuda import emulated_cuda

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
CUDA = torch.device("cuda")


@pytest.fixture
def cuda() -> Iterator[None]:
    with emulated_cuda():
        yield


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tests", ["test_cuda.py", pytest.param("test_moments_triton.py", marks=pytest.mark.slow)])
def test_in_tritons_interpreter(tests: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{tests}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_a_tensor_is_on_cuda_and_mixes_with_none_of_the_host(cuda: None) -> None:
    tensor = torch.ones(3, device=CUDA)
    assert tensor.is_cuda and tensor.device == torch.device("cuda", 0) and not tensor.cpu().is_cuda
    with pytest.raises(RuntimeError, match="at least two devices"):
        tensor + torch.ones(3)


def test_what_is_copied_to_pinned_memory_is_there_after_its_event(cuda: None) -> None:
    host = torch.empty(2, pin_memory=True)
    host.copy_(torch.ones(2, device=CUDA), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    assert host.isnan().all() and not event.query()
    event.synchronize()
    assert host.tolist() == [1, 1]


def test_a_graph_repeats_its_operations_on_the_memory_that_it_was_recorded_on(cuda: None) -> None:
    graphs, total, source = Graphs(CUDA), torch.zeros(2, device=CUDA), torch.ones(2, device=CUDA)
    factors = iter(range(1, 100))
    for number in range(WARM_UP + 3):
        source.fill_(number)
        factor = next(factors)
        graphs.run("key", lambda factor=factor: total.add_(source * factor))  # type: ignore[misc]
    recorded = WARM_UP + 1
    expected = sum(n * (n + 1) for n in range(WARM_UP)) + sum(n * recorded for n in range(WARM_UP, WARM_UP + 3))
    assert total.tolist() == [expected, expected]  # with the factor as it was when it was recorded


@pytest.mark.parametrize(
    "work",
    [
        lambda there: there.sum().item(),
        lambda there: there.nonzero(),
        lambda there: there.copy_(torch.ones(2)),
        lambda there: there.cpu(),
        lambda there: there + torch.tensor([1.0, 2.0], device=CUDA),
    ],
    ids=["item", "nonzero", "from the host", "to the host", "new numbers"],
)
def test_what_waits_for_the_device_or_the_host_cannot_be_recorded(cuda: None, work: Callable[[Tensor], object]) -> None:
    graphs, there = Graphs(CUDA), torch.ones(2, device=CUDA)
    for _ in range(WARM_UP):
        graphs.run("key", lambda: work(there))
    with pytest.warns(RuntimeWarning, match="could not be recorded as a CUDA graph: RuntimeError: operation not perm"):
        graphs.run("key", lambda: work(there))
