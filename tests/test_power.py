"""Gradient power: by its definition, under a rescale, on several ranks and sharded."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon import StreamMonitor
from tests.networks import STREAMS, TwoStreams, batch, loss_of, network
from tests.ranks import run_ranks
from tests.sharding import needs_fsdp2


def by_definition(net: nn.Module) -> dict[str, float]:
    sums = dict.fromkeys(("rgb", "depth", "shared"), 0.0)
    for name, parameter in net.named_parameters():
        stream = name.split(".")[0] if name.split(".")[0] in sums else "shared"
        if parameter.grad is not None:
            sums[stream] += float(parameter.grad.double().norm() * parameter.detach().double().norm())
    return {f"{name}_grad_power": value for name, value in sums.items()}


def trained(scale: float = 1.0) -> TwoStreams:
    """A network and its gradients; rgb's last layer times `scale`, its block of the head divided by it."""
    net = network()
    with torch.no_grad():
        net.rgb[3].weight *= scale
        net.rgb[3].bias *= scale
        net.mix.weight[:, :95] /= scale
    loss_of(net, batch()).backward()
    return net


def test_it_is_the_sum_of_products_of_norms() -> None:
    net = trained()
    assert StreamMonitor(net, streams=STREAMS).compute_gradient_power().to_dict() == pytest.approx(by_definition(net))


def test_a_rescale_that_keeps_the_function_keeps_a_streams_power_but_not_its_norm() -> None:
    plain, scaled = (StreamMonitor(trained(by), streams=STREAMS) for by in (1.0, 5.0))
    power, other = plain.compute_gradient_power(), scaled.compute_gradient_power()
    assert other["rgb_grad_power"] == pytest.approx(power["rgb_grad_power"], rel=1e-5)
    assert other["depth_grad_power"] == pytest.approx(power["depth_grad_power"], rel=1e-5)
    norms = [monitor.compute_stream_gradients()["rgb_grad_norm"] for monitor in (plain, scaled)]
    assert norms[0] > 1.5 * norms[1]


def test_without_gradients_it_is_undefined_and_a_loss_scale_is_taken_off() -> None:
    net = network()
    assert math.isnan(StreamMonitor(net, streams=STREAMS).compute_gradient_power()["rgb_grad_power"])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(net, batch())).backward()
    found = StreamMonitor(net, streams=STREAMS).compute_gradient_power(scaler)
    assert found.to_dict() == pytest.approx({key: value / 1024 for key, value in by_definition(net).items()})


def on_ranks() -> list[dict[str, float]]:
    copy = DistributedDataParallel(network())
    loss_of(copy, batch()).backward()
    monitor = StreamMonitor(copy, torch.optim.SGD(copy.parameters(), 0.1), STREAMS)
    for _ in range(3):  # the first step proves the replicas, from then on ranks share the reading
        monitor.step()
    cut = network()
    fully_shard(cut.rgb)
    fully_shard(cut)
    loss_of(cut, batch()).backward()
    monitors = [monitor, StreamMonitor(cut, streams=STREAMS)]
    return [monitor.compute_gradient_power().to_dict() for monitor in monitors]


@needs_fsdp2
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_share_the_reading_or_the_parameters_find_the_same(ranks: int) -> None:
    expected = by_definition(trained())
    for answers in run_ranks(ranks, on_ranks):
        assert answers == [pytest.approx(expected, rel=1e-5)] * 2
