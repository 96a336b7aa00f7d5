"""The monitored step on a CUDA device: the same figures as on the CPU, recorded as a graph, and never waited for.

With `TRITON_INTERPRET=1` on an emulated device (tests/emulated_cuda.py), as test_emulated_cuda.py runs it.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon import MonitorConfig, StreamMonitor
from ddp_streammon.sinks import MemorySink
from ddp_streammon.stats import StepStats
from tests.benchmarks import machine
from tests.emulated_cuda import emulated_cuda
from tests.test_second_device import INIT_SYNC, NO_INIT_SYNC, over_the_host

EMULATED = os.environ.get("TRITON_INTERPRET") == "1"
on_hardware = pytest.mark.skipif(EMULATED or not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = [] if EMULATED else [pytest.mark.gpu, on_hardware]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
STEPS, ITEMS = 8, 16
OF_THEIR_OWN = (".step_seconds", ".busy_seconds", ".weights.")
"""Times, and numbers that stand for bits of weights."""


@pytest.fixture(autouse=True)
def cuda() -> Iterator[None]:
    with emulated_cuda() if EMULATED else nullcontext():
        yield


class Net(nn.Module):
    """Two streams, a convolution and a linear one, with batch norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 16)
        )
        self.depth = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
        self.head = nn.Linear(32, 5)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        """[B, 3, 8, 8] and [B, 8, 8] -> logits [B, 5]."""
        return self.head(torch.cat([self.rgb(rgb), self.depth(depth)], dim=1))  # type: ignore[no-any-return]


def network(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(ITEMS, 3, 8, 8, generator=draw),
            torch.randn(ITEMS, 8, 8, generator=draw),
            torch.randint(5, (ITEMS,), generator=draw),
        )
        for _ in range(count)
    ]


Numbers = Callable[[int, Tensor], dict[str, object]]


def by_device(step: int, loss: Tensor) -> dict[str, object]:
    """Numbers of every kind, the loss on the device."""
    return {"loss": loss.detach(), "samples": ITEMS, "extra": float(step), "pair": (loss.detach() * 2, 3.0), "count": 2}


def by_host(step: int, loss: Tensor) -> dict[str, object]:
    return {"loss": 0.5 + step, "samples": ITEMS}


def trained(
    device: torch.device,
    *,
    watched: bool = True,
    numbers: Numbers = by_device,
    config: MonitorConfig | None = None,
    spoil: Callable[[int, nn.Module], None] | None = None,
    set_to_none: bool = True,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    dtype: torch.dtype | None = None,
    scaled: bool = False,
    forwards: int = 1,
) -> tuple[list[StepStats], nn.Module]:
    """What was measured in a short training, and the model."""
    model = network().to(device)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=scaled)
    sink = MemorySink()
    streams = {"rgb": "rgb", "depth": "depth"}
    monitor = StreamMonitor(wrapped, optimizer, streams, config=config, sinks=[sink]) if watched else None
    for number, (rgb, depth, target) in enumerate(batches()):
        optimizer.zero_grad(set_to_none=set_to_none)
        for part in range(forwards):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = wrapped(rgb.to(device) + part, depth.to(device))
                loss = cross_entropy(logits, target.to(device)) / forwards
            scaler.scale(loss).backward()
        if spoil is not None:
            spoil(number, model)
        if monitor is not None:
            monitor.step(scaler=scaler, **numbers(number, loss))  # type: ignore[arg-type]
        scaler.step(optimizer)
        scaler.update()
    if monitor is not None:
        monitor.close()
    return [report.stats for report in sink.reports if report.stats is not None], model


def flat(value: object, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of nested plain values with its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from flat(inner, f"{path}.{place}")
    elif isinstance(value, int | float):
        yield path, float(value)


def assert_equal(found: StepStats, expected: StepStats, rel: float) -> None:
    """All figures but those of each device's own."""
    own, twin = dict(flat(found.to_dict())), dict(flat(expected.to_dict()))
    assert own.keys() == twin.keys()
    for path, value in own.items():
        if any(name in path for name in OF_THEIR_OWN):
            continue
        assert value == pytest.approx(twin[path], rel=rel, abs=1e-6, nan_ok=True), path


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def poison(number: int, model: nn.Module) -> None:
    if number in (2, 6):
        weight = next(model.depth.parameters())  # type: ignore[union-attr]
        assert weight.grad is not None
        weight.grad[0, :2] = torch.tensor([math.nan, math.inf])


@pytest.mark.parametrize("numbers", [by_device, by_host])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("spoil", [None, poison])
def test_every_figure_is_the_cpus(
    numbers: Numbers, set_to_none: bool, spoil: Callable[[int, nn.Module], None] | None
) -> None:
    with no_warning():
        found, _ = trained(CUDA, numbers=numbers, set_to_none=set_to_none, spoil=spoil)
    twins, _ = trained(CPU, numbers=numbers, set_to_none=set_to_none, spoil=spoil)
    steps = STEPS if spoil is None else 3  # what NaN has made of the weights is not compared
    for own, twin in list(zip(found, twins, strict=True))[:steps]:
        assert_equal(own, twin, rel=2e-3)


@pytest.mark.parametrize("spoil", [None, poison])
def test_every_figure_of_scaled_gradients_is_the_cpus(spoil: Callable[[int, nn.Module], None] | None) -> None:
    found, _ = trained(CUDA, scaled=True, spoil=spoil)
    for own, twin in zip(found, trained(CPU, scaled=True, spoil=spoil)[0], strict=True):
        assert own.scaled
        assert_equal(own, twin, rel=2e-3)


@pytest.mark.parametrize("config", [MonitorConfig(update_every=2), MonitorConfig(update_every=3, every=2, delay=0)])
def test_every_figure_of_updates_is_the_cpus(config: MonitorConfig) -> None:
    found, _ = trained(CUDA, config=config)
    twins, _ = trained(CPU, config=config)
    assert any(step.streams["rgb"].update_norm > 0 for step in found)
    for own, twin in zip(found, twins, strict=True):
        assert_equal(own, twin, rel=2e-3)


def test_several_forwards_of_a_step_are_all_looked_at() -> None:
    found, _ = trained(CUDA, forwards=3)
    for own, twin in zip(found, trained(CPU, forwards=3)[0], strict=True):
        assert_equal(own, twin, rel=2e-3)


def test_gradients_that_lie_elsewhere_in_each_step_are_read_where_they_are() -> None:
    kept: list[Tensor] = []

    def move(number: int, model: nn.Module) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            kept.append(parameter.grad)
            parameter.grad = parameter.grad.clone()

    found, _ = trained(CUDA, spoil=move)
    for own, twin in zip(found, trained(CPU)[0], strict=True):
        assert_equal(own, twin, rel=2e-3)


def test_what_a_recording_does_not_hold_is_recorded_anew() -> None:
    """The loss comes from the host or from the device, a layer is frozen, and weights move."""

    def change(number: int, model: nn.Module) -> None:
        if number == 5:
            for parameter in model.rgb[0].parameters():  # type: ignore[index, union-attr]
                parameter.requires_grad_(False).grad = None
        if number == 6:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()

    def numbers(number: int, loss: Tensor) -> dict[str, object]:
        return (by_host if number == 4 else by_device)(number, loss)

    found, _ = trained(CUDA, numbers=numbers, spoil=change)
    for own, twin in zip(found, trained(CPU, numbers=numbers, spoil=change)[0], strict=True):
        assert_equal(own, twin, rel=2e-3)


def test_recorded_and_launched_one_by_one_are_bit_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, _ = trained(CUDA)
    monkeypatch.setattr("ddp_streammon.graphs.WARM_UP", 10**9)
    for own, twin in zip(recorded, trained(CUDA)[0], strict=True):
        assert_equal(own, twin, rel=0)


@on_hardware
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_precision_is_unscaled(dtype: torch.dtype) -> None:
    found, _ = trained(CUDA, dtype=dtype, scaled=dtype == torch.float16)
    full, _ = trained(CUDA)
    assert found[0].scaled == (dtype == torch.float16)
    for name, stream in found[0].streams.items():
        assert stream.grad_norm == pytest.approx(full[0].streams[name].grad_norm, rel=0.03)
        assert stream.grad_max == pytest.approx(full[0].streams[name].grad_max, rel=0.1)


def test_a_step_is_recorded_and_then_never_waits() -> None:
    model = network().to(CUDA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    config = MonitorConfig(update_every=2)
    with no_warning(), StreamMonitor(model, optimizer, {"rgb": "rgb", "depth": "depth"}, config=config) as monitor:
        for number, (rgb, depth, target) in enumerate(batches(12)):
            inputs = (rgb.to(CUDA), depth.to(CUDA), target.to(CUDA))
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if number > 4 else "default")
            try:
                optimizer.zero_grad()
                loss = cross_entropy(model(*inputs[:2]), inputs[2])
                loss.backward()
                monitor.step(loss=loss.detach(), samples=ITEMS)
                monitor.clip_grad_norm_(1.0)
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert monitor._meter._graphs._graphs


@pytest.mark.parametrize("config", [MonitorConfig(), MonitorConfig(update_every=2, every=2)])
def test_training_is_bit_identical_with_and_without(config: MonitorConfig) -> None:
    torch.backends.cudnn.deterministic = True
    try:
        _, watched = trained(CUDA, config=config)
        state = torch.cuda.get_rng_state()
        _, alone = trained(CUDA, watched=False)
    finally:
        torch.backends.cudnn.deterministic = False
    assert torch.equal(state, torch.cuda.get_rng_state())
    for own, other in zip(watched.state_dict().values(), alone.state_dict().values(), strict=True):
        assert torch.equal(own, other)


def test_clipping_is_pytorchs() -> None:
    model = network().to(CUDA)
    monitor = StreamMonitor(model, streams={"rgb": "rgb", "depth": "depth"})
    for scale in (1.0, 1e-4, math.inf):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * (scale if math.isfinite(scale) else 1.0)
        if math.isinf(scale):
            next(model.parameters()).grad[0] = math.inf  # type: ignore[index]
        twin = copy.deepcopy(model)
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = own.grad.clone()  # type: ignore[union-attr]
        expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        monitor.step(loss=1.0)
        total = monitor.clip_grad_norm_(0.5)
        assert float(total) == pytest.approx(float(expected), rel=1e-6)
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(own.grad, other.grad, rtol=1e-6, atol=0, equal_nan=True)  # type: ignore[arg-type]
    monitor.close()


def test_another_cuda_stream_may_take_over() -> None:
    model = network().to(CUDA)
    monitor = StreamMonitor(model, streams={"rgb": "rgb", "depth": "depth"}, config=MonitorConfig(delay=0))
    side = torch.cuda.Stream()
    for number in range(8):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float(number))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side if number % 2 else torch.cuda.current_stream()):
            figures = monitor.step(loss=torch.tensor(float(number), device=CUDA), samples=1)
        torch.cuda.current_stream().wait_stream(side)
        assert figures["rgb_grad_max"] == figures["loss"] == number
    monitor.close()


@pytest.mark.skipif(EMULATED and not INIT_SYNC, reason=NO_INIT_SYNC)
@pytest.mark.parametrize("as_view", [True, False])
def test_local_gradients(as_view: bool) -> None:
    """One rank: its own gradient is the average."""

    def wrap(model: nn.Module) -> nn.Module:
        if not EMULATED:
            return DistributedDataParallel(model, gradient_as_bucket_view=as_view)
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=as_view, init_sync=False)
        wrapped.register_comm_hook(None, over_the_host)
        return wrapped

    with machine.process_group("gloo" if EMULATED else "nccl"), no_warning():
        found, _ = trained(CUDA, config=MonitorConfig(local_gradients=True), wrap=wrap)
    for step in found:
        assert step.local[0].norms == pytest.approx([stream.grad_norm for stream in step.streams.values()], rel=1e-6)
        assert not any(step.local[0].nonfinite)


def test_evaluation_is_the_cpus() -> None:
    def evaluated(device: torch.device) -> dict[str, float]:
        model = network().to(device)
        monitor = StreamMonitor(model, streams={"rgb": "rgb", "depth": "depth"})
        items = [tuple(part.to(device) for part in batch) for batch in batches(6)]
        found = monitor.evaluate(items, sharded=False, train=items[:3])
        monitor.close()
        return dict(found)

    on_cuda, on_cpu = evaluated(CUDA), evaluated(CPU)
    assert on_cuda.keys() == on_cpu.keys()
    for key, value in on_cuda.items():
        assert value == pytest.approx(on_cpu[key], rel=1e-3, abs=1e-4, nan_ok=True), key
