"""described.py: what a training is made of, as it is built."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from ddp_streammon.described import Setup, StreamSetup, describe
from ddp_streammon.streams import StreamSet


def described(model: nn.Module, *optimizers: torch.optim.Optimizer, streams: Sequence[str]) -> Setup:
    found = StreamSet.resolve(model, {name: name for name in streams})
    return describe(found, model, optimizers, world=1, data_ranks=[0], replicated=False, whole={"a"})


def scale_of(*layers: nn.Linear | nn.Conv2d) -> float:
    """The root mean square of all weights, each times the root of what goes into its unit."""
    scaled = [layer.weight.detach().flatten() * math.sqrt(layer.weight[0].numel()) for layer in layers]
    return torch.cat(scaled).square().mean().sqrt().item()


def test_the_scale_is_that_of_layers_which_are_not_zero_each_once() -> None:
    first, twice, zero = nn.Conv2d(3, 8, 3), nn.Linear(8, 20), nn.Linear(20, 4)
    nn.init.kaiming_normal_(twice.weight)
    nn.init.zeros_(zero.weight)
    a = nn.ModuleList([nn.Sequential(first, nn.BatchNorm2d(8), zero, twice), nn.Sequential(twice)])  # two roots
    empty = nn.Linear(4, 1)
    empty.weight = nn.Parameter(torch.zeros(0, 4))
    b = nn.Sequential(nn.Embedding(9, 2), nn.Linear(2, 2, dtype=torch.complex64), nn.LayerNorm(2), empty)
    model = nn.ModuleDict({"a": a, "b": b, "c": nn.ParameterList([torch.ones(2)])})
    streams = described(model, streams=["a", "b", "c"]).streams
    assert streams["a"].scale == pytest.approx(scale_of(first, twice))
    assert (streams["a"].zeros, streams["a"].norm, streams["a"].whole, streams["a"].visible) == (True,) * 4
    assert math.isnan(streams["b"].scale)
    assert (streams["b"].zeros, streams["b"].norm, streams["b"].whole) == (False, True, False)
    assert streams["c"] == StreamSetup(1, 1, 0, scale=pytest.approx(math.nan, nan_ok=True), whole=False)


def test_a_stream_knows_what_is_trained_held_and_of_16_bits() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abcd"})
    model["b"].weight.data = model["b"].weight.data.half()
    model["c"].weight.data = model["c"].weight.data.bfloat16()
    model["d"].weight.data = model["d"].weight.data.bfloat16()
    model["d"].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([*model["a"].parameters(), *model["d"].parameters()], 0.1)
    setup = described(model, optimizer, streams="abcd")
    assert [(of.tensors, of.trainable, of.optimized) for of in setup.streams.values()] == [
        *((2, 2, 2), (2, 2, 0), (2, 2, 0)),
        (2, 1, 1),
    ]
    assert [of.low_precision for of in setup.streams.values()] == [False, True, True, False]
    assert not (setup.moded or setup.wrapped)
    assert described(nn.ModuleDict({"a": model["a"], "drop": nn.Dropout(0.5)}), streams="a").moded


def test_rates_are_those_that_schedulers_start_from_and_go_up_to() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abc"})
    plain = torch.optim.SGD([{"params": model["a"].parameters(), "lr": torch.tensor(0.5)}, {"params": []}], 0.25)
    cycled = torch.optim.AdamW([model["b"].weight, *model["c"].parameters()], 0.1, weight_decay=0.0)
    torch.optim.lr_scheduler.OneCycleLR(cycled, max_lr=2.0, total_steps=10, div_factor=4.0)
    plain.add_param_group({"params": [model["b"].bias], "lr": 0.125, "weight_decay": 0.75})
    setup = described(model, plain, cycled, streams="abc")
    of_streams = setup.streams.values()
    assert [(of.rates, of.scheduled) for of in of_streams] == [
        ((0.5,), False),
        ((0.5, 2.0, 0.125), True),
        ((0.5, 2.0), True),
    ]
    assert [of.decays for of in of_streams] == [(0.0,), (0.0, 0.75), (0.0,)]
    assert Setup.from_dict(json.loads(json.dumps(setup.to_dict()))).streams["b"].rates == (0.5, 2.0, 0.125)


@pytest.mark.parametrize(
    ("kinds", "adaptive"),
    [([], False), (["Adam"], True), (["SGD"], False), (["AdamW", "SGD"], False), (["AdamW", "RMSprop"], True)],
)
def test_a_training_is_adaptive_if_all_its_optimizers_are(kinds: list[str], adaptive: bool) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    optimizers = [getattr(torch.optim, kind)(model.parameters(), lr=0.1) for kind in kinds]
    setup = described(model, *optimizers, streams="a")
    assert (setup.optimizers, setup.adaptive) == (tuple(kinds), adaptive)
