"""Training with the monitor is the training without it, bit for bit; and a model comes back as it was lent."""

from __future__ import annotations

import copy
import functools
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

from ddp_streammon import MonitorConfig, RuleSet, StreamMonitor
from ddp_streammon.sinks import MemorySink
from tests.networks import STREAMS, batch, loss_of, network
from tests.ranks import run_ranks

SEED = 3


class Augmented(Dataset[tuple[Tensor, ...]]):
    """Items that draw from every global random state."""

    def __init__(self, items: int) -> None:
        self.tensors = batch(items)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        rgb, depth, target = (tensor[index] for tensor in self.tensors)
        return rgb * random.random() + torch.randn(4), depth + float(np.random.rand()), target


def random_states(generator: torch.Generator) -> dict[str, bytes]:
    return {
        "python": pickle.dumps(random.getstate()),
        "numpy": pickle.dumps(np.random.get_state()),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "generator": generator.get_state().numpy().tobytes(),
    }


def _bytes(values: Any) -> bytes:
    """Nested tensors as bytes that are equal only for bit-equal values."""
    if isinstance(values, Tensor):
        return values.detach().contiguous().numpy().tobytes()
    if isinstance(values, dict):
        return b"".join(str(key).encode() + _bytes(value) for key, value in values.items())
    if isinstance(values, list | tuple):
        return b"".join(map(_bytes, values))
    return repr(values).encode()


def train(watched: str) -> dict[str, bytes]:
    """Two epochs with BatchNorm, dropout, momentum and a shuffling loader; everything there is at the end."""
    rank, world = dist.get_rank(), dist.get_world_size()
    random.seed(SEED + rank)
    np.random.seed(SEED + rank)
    model: nn.Module = network(norm=True)
    model = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    torch.manual_seed(SEED + rank)
    generator = torch.Generator().manual_seed(SEED + rank)
    data = Augmented(36)
    sampler = DistributedSampler(data) if world > 1 else RandomSampler(data, generator=generator)
    loader = DataLoader(data, batch_size=6, sampler=sampler, generator=generator)
    held_out = DataLoader(Augmented(10), batch_size=4, shuffle=True, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    monitor = StreamMonitor(model, optimizer, STREAMS, sinks=[MemorySink()]) if watched == "monitored" else None
    for epoch in range(2):
        model.train()
        for tensors in loader:
            optimizer.zero_grad()
            loss = loss_of(model, tensors)
            loss.backward()
            if monitor is not None:
                monitor.step(loss=loss, samples=len(tensors[0]), epoch=epoch)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if watched == "draws":
            torch.rand(1)
        if monitor is not None:
            monitor.evaluate(held_out)
            metrics = monitor.compute_stream_gradients() | monitor.compute_stream_weights()
            metrics |= monitor.compute_stream_activations(*tensors[:2])
            metrics |= monitor.compute_stream_overfitting_indicators(1.0, 1.0, 0.5, 0.5, loader, held_out)
            monitor.log_metrics(epoch, metrics)
            assert monitor.get_recommendations()
            assert monitor.get_summary()
            monitor.load_state_dict(copy.deepcopy(monitor.state_dict()))
    if monitor is not None:
        monitor.close()
        assert len(monitor.history["loss"]) == 2 * len(loader)
    return random_states(generator) | {
        "weights and buffers": _bytes(model.state_dict()),
        "optimizer": _bytes(optimizer.state_dict()),
        "gradients": _bytes([parameter.grad for parameter in model.parameters()]),
        "modes": repr([module.training for module in model.modules()]).encode(),
    }


def _differences() -> list[list[str]]:
    """What differs from the training without a monitor: with one, and with a draw in its place."""
    plain = train("plain")
    return [[name for name, value in train(kind).items() if value != plain[name]] for kind in ("monitored", "draws")]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_is_bit_identical_with_and_without_the_monitor(world: int) -> None:
    """On 3 processes too, since 2 hides rounding of the average; the draw shows that a difference would be seen."""
    for monitored, draws in run_ranks(world, _differences):
        assert monitored == []
        assert {"torch", "weights and buffers", "optimizer", "gradients"} <= set(draws)


class Dropped(nn.Module):
    """A parametrization that draws."""

    def forward(self, weight: Tensor) -> Tensor:
        return nn.functional.dropout(weight, 0.3, self.training)


def _end_of(parametrized: Callable[[nn.Module], nn.Module], rules: RuleSet | None) -> list[bytes]:
    """Weights, buffers and random state after five steps, monitored where there are `rules`."""
    torch.manual_seed(SEED)
    model = nn.ModuleDict({"a": parametrized(nn.Linear(4, 4)), "b": nn.Linear(4, 4)})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = MonitorConfig(rules=rules or RuleSet.off)
    monitor = StreamMonitor(model, optimizer, {"a": "a", "b": "b"}, config=config) if rules else None
    for _ in range(5):
        optimizer.zero_grad()
        x = torch.randn(8, 4)
        (model["a"](x) - model["b"](x)).square().mean().backward()
        if monitor is not None:
            monitor.step()
        optimizer.step()
    return [_bytes(model.state_dict()), torch.get_rng_state().numpy().tobytes()]


@pytest.mark.parametrize("rules", [RuleSet.evidence, RuleSet.off])
@pytest.mark.parametrize("kind", ["spectral norm", "drawn"])
def test_parametrizations_with_a_state_of_their_own_are_not_run(kind: str, rules: RuleSet) -> None:
    drawn = functools.partial(parametrize.register_parametrization, tensor_name="weight", parametrization=Dropped())
    parametrized = spectral_norm if kind == "spectral norm" else drawn
    assert _end_of(parametrized, rules) == _end_of(parametrized, None)


def failing(model: nn.Module, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    torch.rand(3), random.random()
    assert not any(module.training for module in model.modules())
    model(*tensors[:2])
    raise KeyError("the score's own error")


def _left_as_it_was() -> tuple[str, list[bool]]:
    rank = dist.get_rank()
    model = network(norm=True)
    model.train()
    model.rgb.eval()
    model.depth[1].training = False
    model.rgb[1].running_mean.fill_(float(rank))  # DDP leaves these different on each rank
    monitor = StreamMonitor(model, None, STREAMS)
    generator = torch.Generator().manual_seed(rank)
    loader = DataLoader(Augmented(8), batch_size=2, shuffle=True, generator=generator)
    hooks = [(len(module._forward_hooks), "forward" in vars(module)) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    buffers = _bytes(list(model.buffers()))
    states = random_states(generator)
    with pytest.raises((KeyError, RuntimeError), match="the score's own error") as error:
        monitor.evaluate(loader, failing)
    kept = [
        [module.training for module in model.modules()] == modes,
        _bytes(list(model.buffers())) == buffers,
        random_states(generator) == states,
        [(len(module._forward_hooks), "forward" in vars(module)) for module in model.modules()] == hooks,
        torch.is_grad_enabled(),
    ]
    return str(error.value), kept


@pytest.mark.parametrize("world", [1, 2])
def test_a_model_in_mixed_modes_comes_back_as_it_was_when_score_raises(world: int) -> None:
    for message, kept in run_ranks(world, _left_as_it_was):
        assert "the score's own error" in message
        assert kept == [True] * 5
