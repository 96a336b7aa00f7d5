"""Parameter groups per stream and schedules per group."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ddp_streammon.train.models import multi_mlp
from ddp_streammon.train.optim import (
    BestSoFar,
    Schedule,
    StreamOptim,
    StreamSchedulers,
    build_optimizer,
    encoders_of,
    freeze_group,
    groups_of,
    stream_param_groups,
)


def model() -> nn.Module:
    torch.manual_seed(0)
    return multi_mlp({"a": 3, "b": 2}, 2, hidden=(4,))


def optimizer(name: str = "sgd") -> torch.optim.Optimizer:
    streams = {"b": StreamOptim(lr=0.01)}
    return build_optimizer(name, stream_param_groups(model(), 0.1, 1e-3, streams))


def rates(schedulers: StreamSchedulers, steps: int) -> list[dict[str, float]]:
    found = []
    for _ in range(steps):
        schedulers.optimizer.step()
        schedulers.step()
        found.append(schedulers.learning_rates())
    return found


def test_groups_cover_every_parameter_once() -> None:
    net = model()
    groups = stream_param_groups(net, 0.1, 0.0, {"shared": StreamOptim(weight_decay=0.3)})
    assert [g["stream"] for g in groups] == ["a", "b", "shared"]
    assert [g["weight_decay"] for g in groups] == [0.0, 0.0, 0.3]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in net.parameters())


def test_groups_from_claims_of_any_module() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 1))
    groups = stream_param_groups(net, 0.1, claimed={"first": list(net[0].parameters())})
    assert {g["stream"]: sum(p.numel() for p in g["params"]) for g in groups} == {"first": 9, "shared": 21}
    with pytest.raises(TypeError, match=r"Sequential has no `encoders` ModuleDict.*say which parameters \(claimed=\)"):
        stream_param_groups(net, 0.1)


def test_wrapped_models_have_the_same_encoders() -> None:
    net = model()
    assert list(encoders_of(torch.compile(net, backend="eager"))) == ["a", "b"]  # type: ignore[arg-type]


def test_frozen_parameters_are_left_out_and_settings_for_them_refused() -> None:
    net = model()
    for p in encoders_of(net)["a"].parameters():
        p.requires_grad_(False)
    assert [g["stream"] for g in stream_param_groups(net, 0.1)] == ["b", "shared"]
    with pytest.raises(ValueError, match="settings for a, but none of its parameters requires a gradient"):
        stream_param_groups(net, 0.1, streams={"a": StreamOptim(lr=1.0)})
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        stream_param_groups(net, 0.1)


def test_group_errors() -> None:
    net = model()
    a, b = (list(encoder.parameters()) for encoder in encoders_of(net).values())
    with pytest.raises(ValueError, match="settings for c, but the model's streams are a, b, shared"):
        stream_param_groups(net, 0.1, streams={"c": StreamOptim()})
    with pytest.raises(ValueError, match=r"parameter encoders.a.layers.0.weight is claimed by x and by y"):
        stream_param_groups(net, 0.1, claimed={"x": a, "y": [*b, a[0]]})
    with pytest.raises(ValueError, match=r"x claims a parameter of shape \(7,\) that is not in the model"):
        stream_param_groups(net, 0.1, claimed={"x": [nn.Parameter(torch.zeros(7))]})
    with pytest.raises(ValueError, match="'shared' is the name of what no stream claims"):
        stream_param_groups(net, 0.1, claimed={"shared": a})
    with pytest.raises(ValueError, match="learning_rate must be finite and not negative, got nan"):
        stream_param_groups(net, math.nan)
    with pytest.raises(ValueError, match="weight_decay must be finite and not negative, got -1"):
        StreamOptim(weight_decay=-1)


def test_the_guides_adaptive_pattern_finds_its_group() -> None:
    built = optimizer()
    matched = [g["stream"] for g in built.param_groups if g.get("stream") == "b" and "'b'" in str(g)]
    assert matched == ["b"] and groups_of(built, "b")[0]["lr"] == 0.01
    with pytest.raises(ValueError, match="no parameter group with stream='c', its groups carry a, b, shared"):
        groups_of(built, "c")


def test_cosine_runs_from_each_groups_own_rate() -> None:
    found = rates(StreamSchedulers(optimizer(), Schedule("cosine", total=10, floor=0.1)), 12)
    for t, now in enumerate(found, start=1):
        share = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(t, 10) / 10))
        assert now == pytest.approx({"a": 0.1 * share, "b": 0.01 * share, "shared": 0.1 * share}, rel=1e-12)
    to_zero = rates(StreamSchedulers(optimizer(), Schedule("cosine", total=3)), 5)
    assert [now["a"] for now in to_zero[2:]] == [0.0, 0.0, 0.0]


def test_step_schedule() -> None:
    found = rates(StreamSchedulers(optimizer(), Schedule("step", step_size=2, factor=0.5)), 5)
    assert [now["b"] for now in found] == pytest.approx([0.01, 0.005, 0.005, 0.0025, 0.0025], rel=1e-12)


def test_plateau_follows_each_streams_own_metric() -> None:
    built = optimizer()
    schedulers = StreamSchedulers(built, Schedule("plateau", patience=1, factor=0.5, floor=0.3))
    for epoch in range(6):
        schedulers.step({"a": 0.5, "b": 0.1 * epoch, "full": 0.9})
    # Epoch 0 is the best of a and shared; epochs 2 and 4 reduce: 0.05, then 0.025 raised to the floor 0.03.
    assert schedulers.learning_rates() == pytest.approx({"a": 0.03, "b": 0.01, "shared": 0.03})
    with pytest.raises(ValueError, match="the plateau schedule of shared needs the metric 'full', got a, b"):
        schedulers.step({"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="the plateau schedule of a needs the metric 'a', got none"):
        schedulers.step()


@pytest.mark.parametrize("kind", ["cosine", "step", "plateau"])
def test_a_frozen_stream_stays_at_zero(kind: str) -> None:
    built = optimizer()
    schedulers = StreamSchedulers(built, Schedule(kind, total=10, step_size=2, patience=0, floor=0.2))
    freeze_group(groups_of(built, "a")[0])
    for _ in range(6):
        built.step()
        schedulers.step({"b": 0.5, "full": 0.5})
        assert schedulers.learning_rates()["a"] == 0.0
    assert 0.0 < schedulers.learning_rates()["b"] < 0.01


def test_a_rate_changed_by_hand_keeps_its_change() -> None:
    built = optimizer()
    schedulers = StreamSchedulers(built, Schedule("cosine", total=10))
    groups_of(built, "a")[0]["lr"] *= 0.5
    now = rates(schedulers, 4)[-1]
    assert now["a"] == pytest.approx(0.5 * now["shared"], rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "plateau"])
def test_state_dict_resumes_exactly(kind: str) -> None:
    schedule = Schedule(kind, total=20, patience=2, factor=0.5)
    metrics = [{"a": 0.1, "b": 0.01 * t, "full": 0.2} for t in range(12)]

    def run(schedulers: StreamSchedulers, part: list[dict[str, float]]) -> list[dict[str, float]]:
        found = []
        for given in part:
            schedulers.optimizer.step()
            schedulers.step(given)
            found.append(schedulers.learning_rates())
        return found

    whole = run(StreamSchedulers(optimizer(), schedule), metrics)
    first = StreamSchedulers(optimizer(), schedule)
    run(first, metrics[:5])
    second = StreamSchedulers(optimizer(), schedule)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert run(second, metrics[5:]) == whole[5:]
    with pytest.raises(ValueError, match="the state is of"):
        StreamSchedulers(optimizer(), Schedule("step")).load_state_dict(first.state_dict())


def test_build_optimizer() -> None:
    assert isinstance(optimizer("adam"), torch.optim.Adam)
    assert optimizer("sgd").param_groups[0]["momentum"] == 0.9
    assert optimizer("adamw").param_groups[2]["weight_decay"] == 1e-3
    with pytest.raises(ValueError, match="optimizer must be one of adamw, adam, sgd, got 'rmsprop'"):
        optimizer("rmsprop")


def test_schedule_checks_its_fields() -> None:
    with pytest.raises(ValueError, match=r"factor must be in \(0, 1\), got 1.5"):
        Schedule("step", factor=1.5)
    with pytest.raises(ValueError, match="mode must be one of max, min, got 'up'"):
        Schedule("plateau", mode="up")
    with pytest.raises(ValueError, match="total and step_size must be at least 1, got 0 and 30"):
        Schedule("cosine", total=0)
    with pytest.raises(ValueError, match=r"floor must be in \[0, 1\], got 2"):
        Schedule("cosine", floor=2)
    with pytest.raises(ValueError, match="patience and min_delta must not be negative, got -1 and 0.0"):
        Schedule("plateau", patience=-1)


def test_best_so_far_ignores_what_is_not_finite() -> None:
    lowest = BestSoFar("min", min_delta=0.1)
    assert [lowest.update(v) for v in (math.nan, 1.0, 0.95, math.inf, 0.8)] == [
        False,
        True,
        False,
        False,
        True,
    ]
    assert lowest.best == 0.8 and lowest.waited == 0
