"""A stream stops at its best weights and buffers and nothing moves it afterwards (defect 19 of the
original)."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from ddp_streammon.train.early_stopping import Criteria, StreamEarlyStopping
from ddp_streammon.train.models import MultiStreamModel, multi_mlp
from ddp_streammon.train.optim import groups_of


def make(optimizer: str = "sgd") -> MultiStreamModel:
    torch.manual_seed(0)
    return multi_mlp({"a": 6, "b": 4}, 3, hidden=(8, 5)).compile(optimizer, 0.05, 0.01)


def train_step(model: MultiStreamModel, stopping: StreamEarlyStopping | None = None) -> None:
    model.train()
    if stopping is not None:
        stopping.apply_modes()
    model.optimizer.zero_grad()
    loss = model.criterion(model(torch.randn(16, 6), torch.randn(16, 4)), torch.randint(3, (16,)))
    loss.backward()
    model.optimizer.step()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(module.state_dict()))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_best_weights_and_buffers_come_back_and_then_stay(optimizer: str) -> None:
    model = make(optimizer)
    stopping = StreamEarlyStopping(model, model.optimizer, {"a": Criteria(2), "b": Criteria(5)})
    a, b = model.encoders["a"], model.encoders["b"]
    frozen_at = None
    best: dict[str, Tensor] = {}
    for epoch, metric in enumerate([0.3, 0.6, 0.5, 0.6, 0.9]):
        train_step(model, stopping)
        if epoch == 1:
            best = snapshot(a)
        before = snapshot(a)
        newly = stopping.update({"a": metric, "b": 0.1 * epoch}, epoch)
        if newly:
            frozen_at = epoch
            assert newly == ["a"] and not equal(before, best) and equal(snapshot(a), best)
    assert frozen_at == 3 and stopping.frozen == ("a",) and not stopping.all_frozen
    assert stopping.best["a"] == (0.6, 1)
    assert any(name.endswith("running_mean") for name in best)
    b_before = snapshot(b)
    for _ in range(3):
        train_step(model, stopping)
        assert all(p.requires_grad and p.grad is not None and p.grad.abs().sum() > 0 for p in a.parameters())
    assert equal(snapshot(a), best)
    assert not equal(snapshot(b), b_before)


def test_without_apply_modes_the_buffers_would_move() -> None:
    model = make()
    stopping = StreamEarlyStopping(model, model.optimizer, {"a": Criteria(1)})
    stopping.update({"a": 1.0}, 0)
    stopping.update({"a": 0.0}, 1)
    best = snapshot(model.encoders["a"])
    train_step(model)
    now = snapshot(model.encoders["a"])
    assert {name.split(".")[-1] for name in now if not torch.equal(now[name], best[name])} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_freezing_zeroes_the_groups_figures_only() -> None:
    model = make()
    stopping = StreamEarlyStopping(model, model.optimizer, {"a": Criteria(1)})
    stopping.update({"a": 1.0}, 0)
    assert stopping.update({"a": 1.0}, 1) == ["a"] and stopping.all_frozen
    group = groups_of(model.optimizer, "a")[0]
    assert (group["lr"], group["weight_decay"], group["momentum"], group["frozen"]) == (0.0, 0.0, 0.0, True)
    other = groups_of(model.optimizer, "b")[0]
    assert (other["lr"], other["weight_decay"], other["momentum"]) == (0.05, 0.01, 0.9)
    assert stopping.update({}, 2) == []


def test_min_mode_min_delta_and_metrics_that_are_not_finite() -> None:
    model = make()
    criteria = {"a": Criteria(3, min_delta=0.1)}
    stopping = StreamEarlyStopping(model, model.optimizer, criteria, mode="min")
    newly = [stopping.update({"a": v}, e) for e, v in enumerate([1.0, 0.95, 0.8, math.nan, 0.75, 0.71])]
    assert newly == [[], [], [], [], [], ["a"]]
    assert stopping.best == {"a": (0.8, 2)}


def test_a_stream_without_any_finite_metric_is_frozen_where_it_is() -> None:
    model = make()
    stopping = StreamEarlyStopping(model, model.optimizer, {"a": Criteria(1)})
    before = snapshot(model.encoders["a"])
    assert stopping.update({"a": math.nan}, 0) == ["a"]
    assert equal(snapshot(model.encoders["a"]), before) and stopping.best == {}


def test_given_modules_and_parameters() -> None:
    model = make()
    own = {"a": [model.encoders["a"], model.fc.bias]}
    stopping = StreamEarlyStopping(model, model.optimizer, {"a": Criteria(1)}, modules=own)
    stopping.update({"a": 1.0}, 0)
    bias = model.fc.bias.detach().clone()
    train_step(model, stopping)
    assert not torch.equal(model.fc.bias, bias)
    stopping.update({"a": 0.5}, 1)
    assert torch.equal(model.fc.bias, bias)


def test_resuming_gives_the_same_decisions_and_weights() -> None:
    model = make()
    streams = {"a": Criteria(2), "b": Criteria(1)}
    stopping = StreamEarlyStopping(model, model.optimizer, streams)
    stopping.update({"a": 0.5, "b": 0.5}, 0)
    best = snapshot(model.encoders["a"])
    train_step(model, stopping)
    assert stopping.update({"a": 0.4, "b": 0.4}, 1) == ["b"]
    saved = pickle.loads(pickle.dumps([x.state_dict() for x in (model, model.optimizer, stopping)]))

    resumed = make()
    resumed.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    again = StreamEarlyStopping(resumed, resumed.optimizer, streams)
    again.load_state_dict(saved[2])
    assert again.frozen == ("b",) and not resumed.encoders["b"].training
    assert again.update({"a": 0.4}, 2) == ["a"] and again.all_frozen
    assert equal(snapshot(resumed.encoders["a"]), best)


def test_errors() -> None:
    model = make()
    optimizer = model.optimizer
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        Criteria(0)
    with pytest.raises(ValueError, match="min_delta must not be negative, got -0.1"):
        Criteria(1, -0.1)
    with pytest.raises(ValueError, match="streams must name some of a, b, got c"):
        StreamEarlyStopping(model, optimizer, {"c": Criteria(1)})
    with pytest.raises(ValueError, match="streams must name some of a, b, got none"):
        StreamEarlyStopping(model, optimizer, {})
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="its groups carry no stream at all: build them with stream_param_groups"):
        StreamEarlyStopping(model, plain, {"a": Criteria(1)})
    stopping = StreamEarlyStopping(model, optimizer, {"a": Criteria(1), "b": Criteria(1)})
    with pytest.raises(ValueError, match="no metric for b, got a"):
        stopping.update({"a": 0.1}, 0)
    assert stopping.best == {}
    with pytest.raises(ValueError, match="the state is of streams a, here are a, b"):
        stopping.load_state_dict({"a": {}})
    stopping.update({"a": 0.1, "b": 0.1}, 0)
    state = stopping.state_dict()
    state["b"]["best_tensors"].pop()
    with pytest.raises(ValueError, match="the best tensors of b in the state do not fit"):
        stopping.load_state_dict(state)
