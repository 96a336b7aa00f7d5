"""X_update_norm and X_update_ratio: what the optimizer changed, against weights kept by hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon import MonitorConfig, StreamMonitor
from tests.networks import STREAMS, batch, loss_of, network, part
from tests.ranks import run_ranks
from tests.sharding import needs_fsdp2

STEPS = 9
SAMPLED = [(update_every, every) for update_every in (1, 3) for every in (1, 2)]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-3, weight_decay=0.1),
}
LAYOUTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "fsdp2": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),))),
}


DDP_ON_TWO = pytest.param("ddp", 2, marks=pytest.mark.slow)
FSDP2_ON_TWO = pytest.param("fsdp2", 2, marks=needs_fsdp2)


@dataclass(frozen=True)
class Answer:
    """Of one rank: for each stream {step: (norm, ratio)} from History, and {optimizer step: the same} kept by hand."""

    history: dict[str, dict[int, tuple[float, float]]]
    by_hand: dict[str, dict[int, tuple[float, float]]]
    copied: int
    """Elements of weights that are kept beside the model at the end."""


def whole(parameter: nn.Parameter) -> Tensor:
    tensor = parameter.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).double().clone()


def norm(tensors: list[Tensor]) -> float:
    return math.hypot(*(tensor.norm().item() for tensor in tensors))


def recorded(monitor: StreamMonitor, optimizer: torch.optim.Optimizer, step: Callable[[int], None]) -> Answer:
    """Nine calls of `step`, which calls the monitor's and the optimizer's."""
    streams = {stream.name: [item.parameter for item in stream.parameters] for stream in monitor.streams.streams}
    by_hand: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in streams}
    for call in range(1, STEPS + 1):
        before = {name: [whole(parameter) for parameter in held] for name, held in streams.items()}
        step(call)
        for name, held in streams.items():
            change = [whole(parameter) - old for parameter, old in zip(held, before[name], strict=True)]
            by_hand[name][call] = norm(change), norm(change) / norm(before[name])
    monitor.flush()
    history = {}
    for name in streams:
        norms, ratios = (
            {entry.step: entry.value for entry in monitor.history.series(key)} if key in monitor.history else {}
            for key in (f"{name}_update_norm", f"{name}_update_ratio")
        )
        assert norms.keys() == ratios.keys()
        history[name] = {at: (norms[at], ratios[at]) for at in norms}
    return Answer(history, by_hand, sum(copy.numel() for copy in monitor._meter._updates._copies))


def _trained(layout: str, kind: str, update_every: int, every: int) -> Answer:
    model = LAYOUTS[layout](network())
    optimizer = OPTIMIZERS[kind](model.parameters())
    config = MonitorConfig(update_every=update_every, every=every)
    monitor = StreamMonitor(model, optimizer, STREAMS, config=config)

    def step(call: int) -> None:
        optimizer.zero_grad()
        loss_of(model, part(batch(seed=call), dist.get_rank(), dist.get_world_size())).backward()
        figures = monitor.step()
        assert set(figures) == set(figures.to_dict())
        optimizer.step()

    return recorded(monitor, optimizer, step)


def _every_way(layout: str) -> dict[tuple[str, int, int], Answer]:
    return {(kind, *how): _trained(layout, kind, *how) for kind in OPTIMIZERS for how in SAMPLED}


@functools.cache
def trained(layout: str, world: int) -> list[dict[tuple[str, int, int], Answer]]:
    return run_ranks(world, _every_way, layout)


def expected_calls(update_every: int, every: int) -> dict[int, int]:
    """{measured step: the optimizer's step that its figures are of}: the latest looked at since the packet before."""
    calls: dict[int, int] = {}
    waiting = None
    for call in range(1, STEPS + 1):
        if call > 1 and (call - 2) % update_every == 0:
            waiting = call - 1
        if (call - 1) % every == 0 and waiting is not None:
            calls[call] = waiting
            waiting = None
    return calls


@pytest.mark.parametrize(("update_every", "every"), SAMPLED)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("layout", "world"), [("ddp", 1), DDP_ON_TWO, ("ddp", 3), FSDP2_ON_TWO])
def test_figures_are_those_kept_by_hand_in_the_steps_that_have_them(
    layout: str, world: int, kind: str, update_every: int, every: int
) -> None:
    calls = expected_calls(update_every, every)
    assert calls
    for of_rank in trained(layout, world):
        answer = of_rank[kind, update_every, every]
        for stream, history in answer.history.items():
            assert list(history) == list(calls)
            for at, figures in history.items():
                assert figures == pytest.approx(answer.by_hand[stream][calls[at]], rel=1e-6)


@pytest.mark.parametrize(("layout", "world"), [DDP_ON_TWO, ("ddp", 3), FSDP2_ON_TWO])
def test_ranks_agree_to_the_bit_and_keep_one_copy_together(layout: str, world: int) -> None:
    answers = trained(layout, world)
    size = sum(parameter.numel() for parameter in network().parameters())
    for how, answer in answers[0].items():
        assert all(repr(of_rank[how].history) == repr(answer.history) for of_rank in answers)
        assert sum(of_rank[how].copied for of_rank in answers) == size


def test_the_expected_steps_are_known() -> None:
    assert expected_calls(1, 1) == {call: call - 1 for call in range(2, 10)}
    assert expected_calls(3, 1) == {2: 1, 5: 4, 8: 7}
    assert expected_calls(1, 2) == {3: 2, 5: 4, 7: 6, 9: 8}
    assert expected_calls(3, 2) == {3: 1, 5: 4, 9: 7}


def _asked_in_between() -> dict[str, dict[int, tuple[float, float]]]:
    """Every third step is measured; each is clipped, and its gradients asked for."""
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = StreamMonitor(model, optimizer, STREAMS, config=MonitorConfig(update_every=3, every=3))

    def step(call: int) -> None:
        optimizer.zero_grad()
        loss_of(model, part(batch(seed=call), dist.get_rank(), dist.get_world_size())).backward()
        monitor.compute_stream_gradients()
        monitor.step()
        monitor.clip_grad_norm_(0.1)
        assert "rgb_update_norm" not in monitor.compute_stream_gradients()
        optimizer.step()

    return recorded(monitor, optimizer, step).history


def test_measurements_beside_the_steps_leave_an_update_for_the_next_step() -> None:
    for history in run_ranks(2, _asked_in_between):
        assert list(history["rgb"]) == list(expected_calls(3, 3)) == [4, 7]


# One process ------------------------------------------------------------------------------------------------------


def alone(model: nn.Module, run: Callable[[], Tensor], streams: Any = STREAMS, **config: int) -> Answer:
    """AdamW on `run`'s loss, without a process group."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    monitor = StreamMonitor(model, optimizer, streams, config=MonitorConfig(**config))

    def step(_: int) -> None:
        optimizer.zero_grad()
        run().backward()
        monitor.step()
        optimizer.step()

    return recorded(monitor, optimizer, step)


def test_a_frozen_stream_is_not_changed() -> None:
    model = network()
    model.depth.requires_grad_(False)
    answer = alone(model, lambda: loss_of(model, batch()), update_every=1)
    assert set(answer.history["depth"].values()) == {(0.0, 0.0)}
    assert min(answer.history["rgb"].values()) > (0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float8_e4m3fn])
def test_weights_that_no_optimizer_changes_are_left_out(dtype: torch.dtype) -> None:
    """Frozen bases of adapters, and masks; a stream of nothing else has no figures."""
    model = network()
    model.rgb[3].register_parameter("base", nn.Parameter(torch.ones(5, 6).to(dtype), requires_grad=False))
    model.fixed = nn.ParameterList([nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)])
    answer = alone(model, lambda: loss_of(model, batch()), STREAMS | {"fixed": "fixed"}, update_every=1)
    without = network()
    assert answer.history["rgb"] == alone(without, lambda: loss_of(without, batch()), update_every=1).history["rgb"]
    assert answer.history["fixed"] == {}


def updates_of_a_tiny_model() -> list[float]:
    model = DistributedDataParallel(nn.ModuleDict({"one": nn.Linear(2, 1)}))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = StreamMonitor(model, optimizer, {"one": "one"}, config=MonitorConfig(update_every=1))
    for _ in range(4):
        optimizer.zero_grad()
        sum(parameter.sum() for parameter in model.parameters()).backward()
        monitor.step()
        optimizer.step()
    monitor.close()
    return monitor.history["one_update_norm"]


def test_a_rank_that_has_no_share_of_the_weights_has_nothing_to_compare() -> None:
    one, two = run_ranks(2, updates_of_a_tiny_model)
    assert one == two == pytest.approx([0.1 * math.sqrt(3)] * 3)


def test_without_update_every_nothing_is_kept_and_no_key_appears() -> None:
    model = network()
    answer = alone(model, lambda: loss_of(model, batch()))
    assert answer.copied == 0
    assert answer.history == {"rgb": {}, "depth": {}, "shared": {}}


def test_an_update_is_looked_at_where_figures_arrive_in_the_same_call() -> None:
    model = network()
    answer = alone(model, lambda: loss_of(model, batch()), update_every=20, delay=0)
    assert list(answer.history["rgb"]) == [2]
    assert answer.history["rgb"][2] == pytest.approx(answer.by_hand["rgb"][1], rel=1e-6)


def test_weights_in_channels_last_memory_are_compared_element_by_element() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert not model[0].weight.is_contiguous()
    answer = alone(model, lambda: model(images).square().mean(), {"first": "0", "second": "1"}, update_every=1)
    for stream in ("first", "second"):
        for at, figures in answer.history[stream].items():
            assert figures == pytest.approx(answer.by_hand[stream][at - 1], rel=1e-6)


def test_updates_of_complex_weights_are_seen() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False, dtype=torch.complex64), "b": nn.Linear(2, 2)})
    monitor = StreamMonitor(model, streams={"a": "a", "b": "b"}, config=MonitorConfig(update_every=1))
    monitor.step()
    before = model["a"].weight.detach().clone()
    with torch.no_grad():
        model["a"].weight += torch.tensor([[3.0, 4.0j, 0], [0, 0, 0]])
    figures = monitor.step()
    assert figures["a_update_norm"] == pytest.approx(5, rel=1e-6)
    assert figures["a_update_ratio"] == pytest.approx(5 / before.norm().item(), rel=1e-6)


def test_weights_with_gaps_in_their_memory_are_compared() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    model.weight = nn.Parameter(torch.randn(4, 12)[:, ::2])
    assert model.weight.stride() == (12, 2)
    x = torch.randn(5, 6)
    answer = alone(model, lambda: model(x).square().mean(), {"all": ["weight", "bias"]}, update_every=1)
    for at, figures in answer.history["all"].items():
        assert figures == pytest.approx(answer.by_hand["all"][at - 1], rel=1e-6)


def test_a_step_that_a_grad_scaler_skips_changes_nothing() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor = StreamMonitor(model, optimizer, STREAMS, config=MonitorConfig(update_every=1))

    def step(call: int) -> None:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch(seed=call))).backward()
        if call == 4:
            model.rgb[0].weight.grad[0, 0] = math.inf
        monitor.step(scaler=scaler)
        scaler.step(optimizer)
        scaler.update()

    answer = recorded(monitor, optimizer, step)
    assert {at for at, figures in answer.history["rgb"].items() if figures == (0.0, 0.0)} == {5}
    assert answer.history["rgb"][6] == pytest.approx(answer.by_hand["rgb"][5], rel=1e-6)
