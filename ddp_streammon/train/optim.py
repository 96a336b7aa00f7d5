"""Optimizers and learning rate schedules with one parameter group a stream.

Every group carries `"stream": <name>`, the rest of the model is the group `shared`. A frozen group carries
`"frozen": True`; see `freeze_group`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import MultiplicativeLR

from ddp_streammon.keys import FULL, SHARED
from ddp_streammon.streams import unwrap

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("cosine", "step", "plateau")
MODES = ("max", "min")


@dataclass(frozen=True)
class StreamOptim:
    """Settings of one stream; None falls back to the base value."""

    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        _check_rate("lr", self.lr)
        _check_rate("weight_decay", self.weight_decay)


def encoders_of(model: nn.Module) -> dict[str, nn.Module]:
    """Stream name -> encoder, of a model (wrapped or not) with an `encoders` ModuleDict.

    Raises TypeError when there is none.
    """
    encoders = getattr(unwrap(model), "encoders", None)
    if not isinstance(encoders, nn.ModuleDict):
        raise TypeError(
            f"{type(unwrap(model)).__name__} has no `encoders` ModuleDict that names its streams: "
            "say which parameters (claimed=) or modules (modules=) belong to which stream"
        )
    return dict(encoders.items())


def stream_param_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.0,
    streams: Mapping[str, StreamOptim] | None = None,
    claimed: Mapping[str, Sequence[nn.Parameter]] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: one a stream, then `shared`, each with stream, lr and
    weight_decay.

    `claimed` says which parameters belong to which stream (default: those of `model.encoders`); every other
    trainable parameter is `shared`. `streams` holds settings that differ from the base values, `shared`
    included. Parameters that do not require a gradient are left out, and so is a group that has none left.

    Raises ValueError for settings of a stream that the model does not have or that has nothing to train, for
    a parameter claimed twice or not in the model, for a model with nothing to train, and for negative
    figures.
    """
    _check_rate("learning_rate", learning_rate)
    _check_rate("weight_decay", weight_decay)
    settings = dict(streams or {})
    if claimed is None:
        claimed = {name: list(encoder.parameters()) for name, encoder in encoders_of(model).items()}
    if SHARED in claimed:
        raise ValueError(f"{SHARED!r} is the name of what no stream claims, it cannot be a stream's")
    names = (*claimed, SHARED)
    unknown = [name for name in settings if name not in names]
    if unknown:
        raise ValueError(f"settings for {', '.join(unknown)}, but the model's streams are {', '.join(names)}")
    owner = _owners(model, claimed)
    members: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    for parameter in model.parameters():
        if parameter.requires_grad:
            members[owner.get(id(parameter), SHARED)].append(parameter)
    if not any(members.values()):
        raise ValueError("the model has no parameter that requires a gradient: nothing to train")
    groups = []
    for name, parameters in members.items():
        chosen = settings.get(name, StreamOptim())
        if parameters:
            lr = learning_rate if chosen.lr is None else chosen.lr
            decay = weight_decay if chosen.weight_decay is None else chosen.weight_decay
            groups.append({"params": parameters, "stream": name, "lr": float(lr), "weight_decay": float(decay)})
        elif chosen != StreamOptim():
            raise ValueError(f"settings for {name}, but none of its parameters requires a gradient")
    return groups


def _owners(model: nn.Module, claimed: Mapping[str, Sequence[nn.Parameter]]) -> dict[int, str]:
    """id of a parameter -> the one stream that claims it."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    owner: dict[int, str] = {}
    for stream, parameters in claimed.items():
        for parameter in parameters:
            if id(parameter) not in known:
                raise ValueError(
                    f"{stream} claims a parameter of shape {tuple(parameter.shape)} that is not in the model"
                )
            if owner.setdefault(id(parameter), stream) != stream:
                raise ValueError(
                    f"parameter {known[id(parameter)]} is claimed by {owner[id(parameter)]} and by {stream}: "
                    "leave a tied parameter to one of them, or to neither (shared)"
                )
    return owner


def build_optimizer(
    name: str,
    groups: Sequence[dict[str, Any]],
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """adamw, adam (both with `betas`) or sgd (with `momentum`) over groups that carry their own lr and
    weight_decay.

    Raises ValueError for an unknown name.
    """
    parameters = list(groups)
    if name == "adamw":
        return torch.optim.AdamW(parameters, betas=betas)
    if name == "adam":
        return torch.optim.Adam(parameters, betas=betas)
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=momentum)
    raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")


def groups_of(optimizer: torch.optim.Optimizer, stream: str) -> list[dict[str, Any]]:
    """The optimizer's groups that carry `"stream": stream`; ValueError when there is none."""
    found = [group for group in optimizer.param_groups if group.get("stream") == stream]
    if not found:
        names = [str(group["stream"]) for group in optimizer.param_groups if "stream" in group]
        raise ValueError(
            f"the optimizer has no parameter group with stream={stream!r}, its groups carry "
            f"{', '.join(dict.fromkeys(names)) or 'no stream at all'}: build them with stream_param_groups"
        )
    return found


def freeze_group(group: dict[str, Any]) -> None:
    """Stop a group where it is: lr, weight_decay and SGD's momentum to zero, `frozen` to True.

    requires_grad stays as it is: a parameter that stops producing a gradient leaves DistributedDataParallel
    waiting for it in the next step. With lr 0 each of SGD, Adam and AdamW subtracts exact zeros, whatever its
    moments hold, so Adam's betas need no change (its moments go on moving, which is of no consequence). A
    non-finite gradient is the exception: 0 x inf is nan, so such a step has to be skipped as for any other
    parameter.
    """
    group["frozen"] = True
    for key in ("lr", "weight_decay", "momentum"):
        if key in group:
            group[key] = 0.0


@dataclass(frozen=True)
class Schedule:
    """A learning rate schedule; its time counts calls of `StreamSchedulers.step` (an epoch, usually)."""

    kind: str
    """cosine, step or plateau."""
    total: int = 100
    """cosine: calls until the lowest rate, which then stays."""
    floor: float = 0.0
    """cosine, plateau: lowest rate as a fraction of the group's base rate."""
    step_size: int = 30
    """step: calls between two reductions."""
    factor: float = 0.1
    """step, plateau: what a reduction multiplies the rate by."""
    patience: int = 10
    """plateau: calls in a row without an improvement that are tolerated; the next one reduces."""
    min_delta: float = 0.0
    """plateau: an improvement is more than this."""
    mode: str = "max"
    """plateau: max where a higher metric is better, min where a lower one is."""

    def __post_init__(self) -> None:
        _check_choice("scheduler", self.kind, SCHEDULES)
        _check_choice("mode", self.mode, MODES)
        if self.total < 1 or self.step_size < 1:
            raise ValueError(f"total and step_size must be at least 1, got {self.total} and {self.step_size}")
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"floor must be in [0, 1], got {self.floor}")
        if not 0.0 < self.factor < 1.0:
            raise ValueError(f"factor must be in (0, 1), got {self.factor}")
        if self.patience < 0 or self.min_delta < 0.0:
            raise ValueError(f"patience and min_delta must not be negative, got {self.patience} and {self.min_delta}")

    def fraction(self, time: int) -> float:
        """cosine, step: the rate after `time` calls, as a fraction of the base rate."""
        if self.kind == "cosine":
            progress = min(time, self.total) / self.total
            return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
        return float(self.factor ** (time // self.step_size))


class BestSoFar:
    """How long a metric has not improved: `update(value) -> improved`. A nan or infinite value never
    improves.
    """

    def __init__(self, mode: str = "max", min_delta: float = 0.0) -> None:
        _check_choice("mode", mode, MODES)
        self.sign = 1.0 if mode == "max" else -1.0
        self.min_delta = min_delta
        self.best: float | None = None
        self.waited = 0

    def update(self, value: float) -> bool:
        """Take one value; True when it is the first finite one or better than the best by more than
        min_delta.
        """
        better = math.isfinite(value) and (self.best is None or self.sign * (value - self.best) > self.min_delta)
        if better:
            self.best = value
            self.waited = 0
        else:
            self.waited += 1
        return better

    def state_dict(self) -> dict[str, Any]:
        """best (None before the first finite value) and waited."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.best, self.waited = state["best"], state["waited"]


class StreamSchedulers:
    """One schedule over every parameter group, each from its own base learning rate.

    cosine and step multiply the current rate by the ratio of two neighbouring values of the schedule (torch's
    MultiplicativeLR), so a rate that was changed by hand on the way keeps its change and a frozen group stays
    at 0. plateau follows one metric per stream: the stream's own, and `full` for the group `shared`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
        self.optimizer = optimizer
        self.schedule = schedule
        self._ratios: MultiplicativeLR | None = None
        self._plateaus: list[BestSoFar] = []
        if schedule.kind == "plateau":
            for group in optimizer.param_groups:
                _stream_of(group)
                group.setdefault("initial_lr", group["lr"])
                self._plateaus.append(BestSoFar(schedule.mode, schedule.min_delta))
        else:
            self._ratios = MultiplicativeLR(optimizer, [_ratio(schedule)] * len(optimizer.param_groups))

    def step(self, metrics: Mapping[str, float] | None = None) -> None:
        """Advance by one; call it after the optimizer's step.

        `metrics` (plateau only; must be equal on every rank): stream name -> its validation metric, and
        `full` for the whole model. Raises ValueError when a group's metric is missing.
        """
        if self._ratios is not None:
            self._ratios.step()
            return
        active = [
            (group, plateau)
            for group, plateau in zip(self.optimizer.param_groups, self._plateaus, strict=True)
            if not group.get("frozen", False)
        ]
        values = [_metric(metrics, _stream_of(group)) for group, _ in active]
        for (group, plateau), value in zip(active, values, strict=True):
            plateau.update(value)
            if plateau.waited > self.schedule.patience:
                lowest = min(group["lr"], self.schedule.floor * group["initial_lr"])
                group["lr"] = max(group["lr"] * self.schedule.factor, lowest)
                plateau.waited = 0

    def learning_rates(self) -> dict[str, float]:
        """Stream name -> its group's current rate."""
        return {_stream_of(group): float(group["lr"]) for group in self.optimizer.param_groups}

    def state_dict(self) -> dict[str, Any]:
        """Everything but the rates themselves, which are in the optimizer's state."""
        return {
            "kind": self.schedule.kind,
            "ratios": None if self._ratios is None else self._ratios.state_dict(),
            "plateaus": [plateau.state_dict() for plateau in self._plateaus],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; load the optimizer's state as well.

        Raises ValueError when the state is of another schedule or of another number of groups.
        """
        saved = (state["kind"], len(state["plateaus"]))
        own = (self.schedule.kind, len(self._plateaus))
        if saved != own:
            raise ValueError(f"the state is of (schedule, plateaus) {saved}, this scheduler has {own}")
        if self._ratios is not None:
            self._ratios.load_state_dict(dict(state["ratios"]))
        for plateau, given in zip(self._plateaus, state["plateaus"], strict=True):
            plateau.load_state_dict(given)


def _ratio(schedule: Schedule) -> Callable[[int], float]:
    """time -> fraction(time) / fraction(time - 1); 0 once the rate has reached 0."""

    def ratio(time: int) -> float:
        before = schedule.fraction(time - 1)
        return schedule.fraction(time) / before if before > 0.0 else 0.0

    return ratio


def _stream_of(group: Mapping[str, Any]) -> str:
    if "stream" not in group:
        raise ValueError("a parameter group carries no 'stream': build the groups with stream_param_groups")
    return str(group["stream"])


def _metric(metrics: Mapping[str, float] | None, stream: str) -> float:
    key = FULL if stream == SHARED else stream
    if metrics is None or key not in metrics:
        given = ", ".join(metrics) if metrics else "none"
        raise ValueError(f"the plateau schedule of {stream} needs the metric {key!r}, got {given}")
    return float(metrics[key])


def _check_rate(name: str, value: float | None) -> None:
    if value is not None and not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def _check_choice(name: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(valid)}, got {value!r}")
