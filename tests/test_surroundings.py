"""What a script has set for all of its tensors (a default device, a dtype, autocast) changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon import MonitorConfig, StreamMonitor
from tests.networks import STREAMS, batch, loss_of, network, part
from tests.ranks import run_ranks


@contextlib.contextmanager
def _dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


WHOLE = ("default device", "default dtype")
"""What the forward may see, too, and compute the same."""
SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "nothing": contextlib.nullcontext,
    "default device": lambda: torch.device("meta"),  # what is made there has no numbers
    "default dtype": lambda: _dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
}


def _figures(setting: str, local: bool) -> dict[str, object]:
    """What a monitor says of a training whose calls of it are made under a setting."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = network(norm=True)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    surrounding = SETTINGS[setting]
    config = MonitorConfig(update_every=2, local_gradients=local, audit_every=3)
    batches = [part(batch(seed=number), rank, world) for number in range(8)]
    with surrounding():
        monitor = StreamMonitor(ddp, optimizer, STREAMS, config=config)
    for tensors in batches:
        with surrounding() if setting in WHOLE else contextlib.nullcontext():
            optimizer.zero_grad()
            loss = loss_of(ddp, tensors)
            loss.backward()
        with surrounding():
            monitor.step(loss=loss, samples=len(tensors[0]), right=3, pair=(2.0, 4))
            monitor.clip_grad_norm_(1.0)
        optimizer.step()
    assert monitor._engine.view is not None
    said: dict[str, object] = {"of weights": [stream.sample for stream in monitor._engine.view.now.streams.values()]}
    with surrounding():
        for figures in (monitor.compute_stream_gradients(), monitor.compute_gradient_power()):
            said |= figures
        said |= monitor.compute_stream_weights()
        said |= {key: monitor.history[key] for key in monitor.history}
        monitor.close()
    return said


def _evaluated(setting: str) -> dict[str, object]:
    rank, world = dist.get_rank(), dist.get_world_size()
    monitor = StreamMonitor(network(norm=True), streams=STREAMS)
    drawn = [[part(batch(count, seed), rank, world) for seed in (1, 2, 3)] for count in (40, 602)]
    items, train = ([(rgb, depth, (rgb[:, 0] > 0).long()) for rgb, depth, _ in batches] for batches in drawn)

    def score(model: nn.Module, tensors: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        with torch.autocast("cpu", enabled=False):
            logits = model(*tensors[:2])
        target = tensors[2]
        loss, found = functional.cross_entropy(logits, target, reduction="none"), logits.argmax(1)
        return {"loss": loss, "correct": (found == target).double(), "target": target, "prediction": found}

    with SETTINGS[setting]():
        found = dict(monitor.evaluate(items, score, train=train, sharded=True))
        alone = (0.9, 1.1, 0.8, 0.7, train, items)
        return found | dict(monitor.compute_stream_overfitting_indicators(*alone, score=score, sharded=True))


def _said_under(figures: Callable[..., dict[str, object]], *options: bool) -> dict[str, str]:
    """By setting what the figures are, to the last digit."""
    return {name: str(figures(name, *options)) for name in SETTINGS}


@pytest.mark.parametrize("local", [False, True])
def test_steps_say_the_same_whatever_is_set_for_all_tensors(local: bool) -> None:
    for said in run_ranks(2, _said_under, _figures, local):
        assert "rgb_update_ratio" in said["nothing"]
        assert set(said.values()) == {said["nothing"]}, [name for name in said if said[name] != said["nothing"]]


def test_evaluations_say_the_same_whatever_is_set_for_all_tensors() -> None:
    for said in run_ranks(2, _said_under, _evaluated):
        assert "rgb_knows_low" in said["nothing"]
        assert set(said.values()) == {said["nothing"]}, [name for name in said if said[name] != said["nothing"]]
