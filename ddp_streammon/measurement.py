"""One measured step: statistics, pack, and the start of the one all_reduce."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ddp_streammon import stats
from ddp_streammon.collective import Collective, Reduction
from ddp_streammon.moments import ABS_MAX, SQ_SUM, SUM, reader
from ddp_streammon.packet import Layout
from ddp_streammon.shards import full_shares, shares
from ddp_streammon.stats import BAD, MAXIMA, MOMENTS, SCALARS, STATE, Figures, ScalarLike, StepStats, Total
from ddp_streammon.streams import StreamSet


@dataclass(frozen=True)
class Plan:
    """What a measurement's packet holds; fixed, so worked out once."""

    streams: tuple[str, ...]
    scalars: Mapping[str, bool]
    """The user's numbers, and whether each is added up."""
    layout: Layout
    names: tuple[str, ...]
    """The keys of its figures."""

    @classmethod
    def of(cls, streams: tuple[str, ...], scalars: Mapping[str, bool], world_size: int) -> Plan:
        """The plan for these streams and numbers."""
        layout = stats.step_layout(streams, tuple(scalars), world_size)
        return cls(streams, scalars, layout, stats.step_keys(streams, scalars))


@dataclass
class Measurement:
    """A measured step whose sum over ranks is under way."""

    call: int
    plan: Plan
    reduction: Reduction
    shadow: bool
    """Whether this rank had nothing to measure, and only took part."""
    result: StepStats | None = None

    def read(self) -> StepStats:
        """The step's figures; waits for the collective the first time."""
        if self.result is None:
            sums = self.plan.layout.unpack(self.reduction.wait())
            self.result = stats.step_stats(sums, self.plan.streams, self.plan.scalars, self.call)
        return self.result

    def figures(self) -> Figures:
        """The same under their keys; waits when read."""
        return Figures(self.plan.names, lambda: self.read().values())


class GradientMeter:
    """Measures the gradients of a model's streams, this rank's share of them, and sums over ranks."""

    def __init__(
        self,
        streams: StreamSet,
        model: nn.Module,
        collective: Collective,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        """`model` as it is trained, wrappers included: they say which gradients are equal on all ranks."""
        self.device = next(streams.model.parameters()).device
        self.shares = shares(streams, model, collective.topology)
        everything = full_shares(streams, collective.topology)
        self._read = reader(self.shares, len(streams.streams), self.device)
        self._read_in_full = reader(everything, len(streams.streams), self.device)
        self._streams = streams
        self._collective = collective
        self._optimizers = {id(optimizer) for optimizer in optimizers}

    def plan(self, scalars: Mapping[str, bool]) -> Plan:
        """The plan of a packet that carries these numbers of the user's."""
        return Plan.of(self._streams.names, scalars, self._collective.topology.world_size)

    def any_gradient(self) -> bool:
        """Whether any parameter has a gradient on this rank."""
        return any(p.parameter.grad is not None for stream in self._streams.streams for p in stream.parameters)

    def measure(
        self,
        plan: Plan,
        call: int,
        numbers: Mapping[str, ScalarLike | None],
        samples: float | Tensor | None,
        scaler: torch.amp.GradScaler | None,
        *,
        epoch: float | None,
        in_full: bool = False,
    ) -> Measurement:
        """Measure now. `in_full`: read everything here, since another rank may have stopped (`Join`) and holds none.

        Comm: one all_reduce(SUM). Sync: none.
        """
        read = self._read_in_full if in_full else self._read
        table = read(lambda parameter: parameter.grad)
        scaled = scaler is not None and scaler.is_enabled()
        if scaler is not None and scaled:
            table = unscale(table, self._inverse_scale(scaler))
        cells, bad = scalar_cells(tuple(plan.scalars), numbers, samples, self.device)
        fields = step_fields(table, cells, bad, epoch=epoch, scaled=scaled)
        packet = plan.layout.pack(fields, self._collective.topology.rank, self.device)
        return self._sent(plan, call, packet, shadow=False)

    def shadow(self, plan: Plan, call: int) -> Measurement:
        """Take part with nothing to say. Comm: one all_reduce(SUM). Sync: none."""
        return self._sent(plan, call, plan.layout.zeros(self.device), shadow=True)

    def _sent(self, plan: Plan, call: int, packet: Tensor, *, shadow: bool) -> Measurement:
        reduction = self._collective.all_reduce(packet.to(self._collective.device_for(self.device)))
        return Measurement(call, plan, reduction, shadow)

    def _inverse_scale(self, scaler: torch.amp.GradScaler) -> float | Tensor:
        """1 / the loss scale, on its device; 1 where the scaler has unscaled these gradients already.

        `GradScaler.get_scale()` would wait for the device, and the stage is not public: torch/amp/grad_scaler.py.
        """
        known = self._optimizers
        states = scaler._per_optimizer_states.items()
        stages = [state["stage"].name for optimizer, state in states if optimizer in known or not known]
        scale = scaler._scale
        if scale is None or any(stage != "READY" for stage in stages):
            return 1.0
        return scale.double().reciprocal()


def step_fields(table: Tensor, cells: Tensor, bad: Tensor, *, epoch: float | None, scaled: bool) -> dict[str, Tensor]:
    """A rank's moments [S, 6], user cells [U, 4], count of non-finite numbers [] and state as fields of its packet.

    The state says that the rank takes part, whether a GradScaler is in charge, and its epoch: a rank that shadows
    the others under `Join` knows neither, and is to file the same.
    """
    state = torch.tensor([1.0, float(scaled), math.nan if epoch is None else epoch], dtype=torch.float64)
    return {STATE: state, MOMENTS: table[:, :ABS_MAX], MAXIMA: table[:, ABS_MAX], BAD: bad, SCALARS: cells}


def unscale(table: Tensor, inverse_scale: float | Tensor) -> Tensor:
    """Moments of scaled gradients -> moments of the gradients. Shape: [S, 6]. Comm, Sync: none."""
    factors = torch.ones_like(table[0])
    factors[SUM] = factors[ABS_MAX] = inverse_scale
    factors[SQ_SUM] = inverse_scale * inverse_scale
    return table * factors


def scalar_cells(
    names: Sequence[str], values: Mapping[str, ScalarLike | None], samples: float | Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A rank's numbers as cells (sum, weighted sum, weight, present) and how many of them are not finite.

    Shape: [U, 4] and [] float64. Comm: none. Sync: none for numbers on `device` (those elsewhere are copied).
    """
    weight: float | Tensor = 1.0 if samples is None else samples
    if device.type == "cpu":
        rows = [_row(_floats(values.get(name)), _float(weight)) for name in names]
        finite = [all(math.isfinite(cell) for cell in row) for row in rows]
        cells = [row if good else _NOTHING for row, good in zip(rows, finite, strict=True)]
        bad = float(len(finite) - sum(finite))
        return torch.tensor(cells, dtype=torch.float64).view(-1, 4), torch.tensor(bad, dtype=torch.float64)
    matrix = _on_device([_row(values.get(name), weight) for name in names], device)
    good = torch.isfinite(matrix).all(dim=1, keepdim=True)
    return torch.where(good, matrix, 0.0), (~good).sum().double()


_Row: TypeAlias = "tuple[float | Tensor, float | Tensor, float | Tensor, float]"
_NOTHING = (0.0, 0.0, 0.0, 0.0)


def _row(value: ScalarLike | None, weight: float | Tensor) -> _Row:
    if value is None:
        return _NOTHING
    if isinstance(value, Total):
        return value.value, value.value, 1.0, 1.0
    if isinstance(value, tuple):
        return value[0], value[0], value[1], 1.0
    return value, value * weight, weight, 1.0


def _floats(value: ScalarLike | None) -> ScalarLike | None:
    """The same number with Python floats in place of tensors."""
    if value is None:
        return None
    if isinstance(value, Total):
        return Total(_float(value.value))
    return (_float(value[0]), _float(value[1])) if isinstance(value, tuple) else _float(value)


def _float(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _on_device(rows: Sequence[_Row], device: torch.device) -> Tensor:
    """Numbers and one-element tensors -> [U, 4] float64 on `device`, without waiting for it."""
    flat = [cell for row in rows for cell in row]
    if not any(isinstance(cell, Tensor) and cell.device != torch.device("cpu") for cell in flat):
        host = torch.tensor([_float(cell) for cell in flat], dtype=torch.float64)
        return host.to(device, non_blocking=True).view(-1, 4)
    cells = [
        cell.detach().double().reshape(()).to(device, non_blocking=True)
        if isinstance(cell, Tensor)
        else torch.full((), float(cell), dtype=torch.float64, device=device)
        for cell in flat
    ]
    return torch.stack(cells).view(-1, 4)
