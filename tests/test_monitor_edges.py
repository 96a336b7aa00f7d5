"""Ranks that do different things, or the same thing later: they stay in step, and figures stay right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon import MonitorConfig, StreamMonitor
from ddp_streammon.sinks import MemorySink
from tests import layouts
from tests.networks import STREAMS, batch, loss_of, network, part
from tests.ranks import run_ranks


def test_a_stream_of_zero_weights_has_no_update_ratio_and_breaks_nothing() -> None:
    model = nn.ModuleDict({"gate": nn.Linear(2, 2), "body": nn.Linear(2, 2)})
    nn.init.zeros_(model["gate"].weight)
    nn.init.zeros_(model["gate"].bias)
    monitor = StreamMonitor(model, streams={"gate": "gate", "body": "body"}, config=MonitorConfig(update_every=1))
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        figures = monitor.step().to_dict()
    assert math.isnan(figures["gate_update_ratio"])
    assert figures["body_update_norm"] == 0


def test_parameters_that_come_and_go_later_are_told_once_and_another_monitor_goes_on() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = StreamMonitor(model, optimizer, STREAMS)

    def train(monitor: StreamMonitor) -> dict[str, float]:
        model.zero_grad()
        optimizer.zero_grad()
        loss_of(model, batch()).backward()
        return monitor.step(loss=1.0).to_dict()

    train(monitor)
    monitor.log_metrics(1, {})  # nothing to say
    model.rgb[3] = nn.Linear(96, 95)
    norm = train(monitor)["rgb_grad_norm"]
    assert norm == pytest.approx(float(model.rgb[0].weight.grad.norm().hypot(model.rgb[0].bias.grad.norm())))
    said = "new rgb.3.weight, rgb.3.bias, gone rgb.3.weight, rgb.3.bias. Close this monitor and build another one"
    with pytest.warns(UserWarning, match=said):
        monitor.log_metrics(2, {})
    monitor.log_metrics(3, {})  # once
    monitor.close()
    follower = StreamMonitor(model, optimizer, STREAMS)
    follower.load_state_dict(monitor.state_dict())
    norm = train(follower)["rgb_grad_norm"]
    assert norm == pytest.approx(float(torch.stack([p.grad.norm() for p in model.rgb.parameters()]).norm()))
    assert follower.calls == 3
    follower.log_metrics(4, {})


@pytest.mark.parametrize("given", [nn.Linear(2, 2), ["sgd"], torch.optim.SGD])
def test_what_is_no_optimizer_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="^optimizer must be a torch.optim.Optimizer, or several of them, got "):
        StreamMonitor(network(), given, STREAMS)


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    monitor = StreamMonitor(network(), streams=STREAMS)
    with pytest.raises(ValueError, match=r"present\['rgb'\] must be a mask \[samples\] in a tensor, got"):
        monitor.step(present={"rgb": [True, False]})  # type: ignore[dict-item]


def test_in_a_loop_of_steps_alone_an_audit_tells_of_other_parameters() -> None:
    model = network()
    monitor = StreamMonitor(model, streams=STREAMS, config=MonitorConfig(audit_every=3))
    with pytest.warns(UserWarning, match="new rgb.new.weight, gone none"):
        for step in range(6):
            if step == 1:
                model.rgb.add_module("new", nn.Linear(95, 95, bias=False))
            loss_of(model, batch()).backward()
            monitor.step(loss=1.0)


def test_optimizers_of_which_some_are_unscaled_are_refused() -> None:
    model = network()
    optimizers = [torch.optim.SGD(model.rgb.parameters(), 0.1), torch.optim.SGD(model.depth.parameters(), 0.1)]
    scaler = torch.amp.GradScaler("cpu")
    monitor = StreamMonitor(model, optimizers, STREAMS)
    scaler.scale(loss_of(model, batch())).backward()
    scaler.unscale_(optimizers[0])
    with pytest.raises(ValueError, match=r"some optimizers are unscaled and those of others are not: call scaler\.un"):
        monitor.step(scaler=scaler)


def test_a_model_compiled_as_one_graph_can_be_watched() -> None:
    model = network()
    model.compile(backend="eager", fullgraph=True)
    monitor = StreamMonitor(model, streams=STREAMS)
    loss_of(model, batch()).backward()
    assert monitor.step()["rgb_grad_norm"] > 0


def _one_rank_asks_early() -> list[tuple[list[bool], str]]:
    rank = dist.get_rank()
    found = []
    for asking in range(2, 6):
        model = DistributedDataParallel(network())
        monitor = StreamMonitor(model, streams=STREAMS, config=MonitorConfig(delay=2, audit_every=1))
        proved = []
        for call in range(1, 7):
            model.zero_grad()
            loss_of(model, part(batch(), rank, 2)).backward()
            monitor.step()
            if rank == 0 and call == asking:
                monitor.flush()
            proved.append(all(monitor._meter.proof()["equal"]))
        monitor.flush()
        found.append((proved, repr(monitor.history.state_dict())))
    return found


def test_a_rank_that_asks_early_shares_out_when_the_others_do() -> None:
    first, second = run_ranks(2, _one_rank_asks_early)
    assert first == second
    assert all(proved == [False, False, True, True, True, True] for proved, _ in first)


def _after_join() -> tuple[bool, float, list[str]]:
    rank = dist.get_rank()
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = StreamMonitor(model, optimizer, STREAMS, config=MonitorConfig(update_every=1, local_gradients=True))

    def train(steps: int, seed: int) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(model, part(batch(seed=seed + step), rank, 2)).backward()
            monitor.step()
            optimizer.step()

    with Join([model, monitor]):
        train(2 + 2 * rank, 0)
    train(3, 10)
    monitor.flush()
    read = sum(piece.stop - piece.start for share in monitor._meter.shares for piece in share.pieces)
    return monitor._join_config.enable, read, sorted(key for key in monitor.history if key.endswith("update_ratio"))


def test_after_join_steps_are_shared_out_and_updates_seen_again() -> None:
    answers = run_ranks(2, _after_join)
    total = sum(parameter.numel() for parameter in network().parameters())
    assert sum(read for _, read, _ in answers) == total
    for enabled, _, keys in answers:
        assert not enabled
        assert keys == ["depth_update_ratio", "rgb_update_ratio", "shared_update_ratio"]


class Late(nn.Module):
    """A sequence parallel block that data-parallel rank 1 uses from the first step on, rank 0 from the second."""

    def __init__(self, model: layouts.Three) -> None:
        super().__init__()
        self.model, self.used = model, True

    def forward(self, x: Tensor) -> Tensor:
        if self.used:
            logits: Tensor = self.model(x)
            return logits
        empty = torch.zeros(len(x), 16)
        features = [empty, self.model.depth(x * x).mean(1), self.model.audio(x.abs()).mean(1)]
        return self.model.head(torch.cat(features, dim=1))


def _late_partial() -> list[float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Late(layouts._sequence_parallel(layouts.network(torch.float32), mesh["tp"]))
    monitor = StreamMonitor(model, streams=layouts.STREAMS)
    norms = []
    for step in range(6):
        model.zero_grad()
        model.used = step > 0 or mesh.get_local_rank("dp") == 1
        layouts.loss_of(model, *layouts.batch(torch.float32)).backward()
        norms.append(monitor.step()["rgb_grad_norm"])
    return norms


def test_a_gradient_that_must_be_summed_first_may_turn_up_late_on_some_ranks() -> None:
    ranks = run_ranks(4, _late_partial, timeout=60)
    expected = layouts.twin(torch.float32)["rgb_grad_norm"]
    assert all(norms == ranks[0] for norms in ranks)
    assert ranks[0][-1] == pytest.approx(expected, rel=1e-5)


def _reloaded() -> list[str]:
    """After a state is loaded replicas are compared anew: a mended difference is no longer reported."""
    rank = dist.get_rank()
    model = DistributedDataParallel(network())
    monitor = StreamMonitor(model, streams=STREAMS)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.module.depth[0].bias[0] += rank

    def step() -> list[str]:
        for _ in range(2):
            model.zero_grad()
            loss_of(model, part(batch(), rank, 2)).backward()
            monitor.step()
        monitor.flush()
        return [finding.rule for finding in monitor.get_recommendations() if finding.rule == "DESYNC"]

    before = step()
    model.load_state_dict(kept)
    monitor.load_state_dict(monitor.state_dict())
    return [*before, "then", *step()]


def test_a_reloaded_state_is_compared_anew() -> None:
    assert run_ranks(2, _reloaded) == [["DESYNC", "then"]] * 2


def _rolled_back() -> list[float]:
    """Norms after an earlier state is loaded, from when on rank 1 alone has a gradient, of one element."""
    model = network()
    monitor = StreamMonitor(model, streams=STREAMS)
    state: dict[str, Any] = {}

    def step(value: float) -> float:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        model.rgb[0].weight.grad[0, 0] += dist.get_rank() * (value == 0)
        return monitor.step()["rgb_grad_norm"]

    for call in range(1, 9):
        step(1.0)
        if call == 4:
            state = monitor.state_dict()
    assert all(monitor._meter.proof()["equal"])
    monitor.load_state_dict(state)
    return [step(0.0) for _ in range(4)]


def test_a_training_that_is_rolled_back_is_compared_anew_at_once() -> None:
    """Rank 0 would go on to read the first elements for both, and see nothing there, until call 8 comes again."""
    for norms in run_ranks(2, _rolled_back):
        assert norms == [0, 0, pytest.approx(0.5**0.5), pytest.approx(0.5**0.5)]


MANY = {f"number{place}": 1.0 for place in range(2030)}
"""Numbers that leave a packet room for the slots of one rank."""


def _heard_in_turns() -> tuple[list[float], list[tuple[int, ...]]]:
    """The largest element step by step, and, on rank 0, who sent a number that is not finite; in step 3 rank 1 has an
    element of 7 and an infinite loss."""
    rank, sink = dist.get_rank(), MemorySink()
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    monitor = StreamMonitor(model, streams={"a": "a"}, sinks=[sink])
    largest = []
    for step in range(1, 8):
        odd = (step, rank) == (3, 1)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 7.0 if odd else 1.0 + rank)
        largest.append(monitor.step(loss=math.inf if odd else 1.0, **MANY)["a_grad_max"])
    monitor.close()
    return largest, [report.stats.nonfinite_ranks for report in sink.reports if report.stats is not None]


def test_what_a_rank_saw_while_another_one_was_heard_is_told_in_its_turn() -> None:
    """In step 1, an audit, both are heard, then rank 1 in even steps and rank 0 in odd ones."""
    (largest, nonfinite), (same, _) = run_ranks(2, _heard_in_turns)
    assert largest == same == [2, 2, 1, 7, 1, 2, 1]
    assert nonfinite == [(), (), (), (1,), (), (), ()]


def _part_of_the_ranks() -> Any:
    """Streams that live on different ranks, each sharded over its own."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    meshes = [init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "dp"))["dp"]]
    fully_shard(model["a"], mesh=meshes[0])
    monitor = StreamMonitor(model, streams={"a": "a", "b": "b"})
    return [(family.stream, family.sets) for family in monitor._meter._families]


def test_a_stream_sharded_within_each_stage_has_two_copies() -> None:
    for families in run_ranks(4, _part_of_the_ranks):
        assert families == [(0, ((0, 2), (1, 3))), (1, ((0, 1, 2, 3),))]
