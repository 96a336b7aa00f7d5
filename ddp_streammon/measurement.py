"""One measured step: statistics, pack, and the start of the one all_reduce."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddp_streammon import linear, stats
from ddp_streammon.clipping import clip_
from ddp_streammon.collective import Collective, Reduction
from ddp_streammon.linear import Linear
from ddp_streammon.moments import ABS_MAX, SQ_SUM, SUM, Reader, moments, reader
from ddp_streammon.packet import Layout
from ddp_streammon.ranks import Clock, RankFacts, bit_sum
from ddp_streammon.shards import Family, Share, families, holdings, local, model_peers, refuse_unsupported, shares
from ddp_streammon.stats import (
    BAD,
    CHECKSUMS,
    FACTS,
    LINEAR,
    MAXIMA,
    MOMENTS,
    SCALARS,
    STATE,
    UPDATES,
    Figures,
    ScalarLike,
    StepStats,
    Total,
)
from ddp_streammon.streams import StreamSet
from ddp_streammon.updates import Updates


@dataclass(frozen=True)
class Plan:
    """What a measurement's packet holds; fixed, so worked out once."""

    streams: tuple[str, ...]
    scalars: Mapping[str, bool]
    """The user's numbers, and whether each is added up."""
    tensors: tuple[Linear, ...]
    """Gradients that are squared after the sum."""
    families: tuple[Family, ...]
    """Those whose checksums the packet of an audit holds."""
    layout: Layout
    audit_layout: Layout
    names: tuple[str, ...]
    """The keys of its figures."""

    @classmethod
    def of(
        cls,
        streams: tuple[str, ...],
        scalars: Mapping[str, bool],
        tensors: tuple[Linear, ...],
        families: tuple[Family, ...],
        world_size: int,
        *,
        updates: bool,
    ) -> Plan:
        """The plan for these streams, numbers and tensors."""
        cells = linear.cell_count(tensors)
        layout = stats.step_layout(streams, tuple(scalars), world_size, linear=cells, updates=updates)
        audit = stats.step_layout(
            streams, tuple(scalars), world_size, linear=cells, updates=updates, families=len(families)
        )
        return cls(streams, scalars, tensors, families, layout, audit, stats.step_keys(streams, scalars))


@dataclass
class Measurement:
    """A measured step whose sum over ranks is under way."""

    call: int
    plan: Plan
    reduction: Reduction
    world_size: int
    turn: int
    audit: bool
    """Whether the packet compares replicas."""
    shadow: bool
    """Whether this rank had nothing to measure, and only took part."""
    updates: bool
    """Whether the packet holds figures of an update."""
    result: StepStats | None = None

    @property
    def layout(self) -> Layout:
        """Of its packet."""
        return self.plan.audit_layout if self.audit else self.plan.layout

    def read(self) -> StepStats:
        """The step's figures; waits for the collective the first time."""
        if self.result is None:
            sums = self.layout.unpack(self.reduction.wait(), self.turn)
            if self.plan.tensors:
                _add_linear(sums, linear.moments(self.plan.tensors, sums[LINEAR], len(self.plan.streams)))
            heard = self.layout.heard(self.turn)
            compared = self.plan.families if self.audit else ()
            self.result = stats.step_stats(
                sums, self.plan.streams, self.plan.scalars, self.call, heard, self.world_size, compared
            )
        return self.result

    def moments(self) -> Tensor:
        """The streams' additive figures over all ranks, [S, M] without the abs-max, where the packet lies.

        Sync: none on CUDA with NCCL; waits for the collective on CPU.
        """
        packet = self.reduction.summed()
        table = self.layout.view(packet, MOMENTS)
        if self.plan.tensors:
            cells = self.layout.view(packet, LINEAR)
            table = table + linear.moments(self.plan.tensors, cells, len(self.plan.streams))[:, :ABS_MAX]
        return table

    def figures(self) -> Figures:
        """The same under their keys; waits when read."""
        names = stats.update_keys(self.plan.streams) if self.updates else ()
        return Figures((*self.plan.names, *names), lambda: self.read().values())


class GradientMeter:
    """Measures the gradients of a model's streams, this rank's share of them, and sums over ranks."""

    def __init__(
        self,
        streams: StreamSet,
        model: nn.Module,
        collective: Collective,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        update_every: int = 0,
        peers: Sequence[int] | None = None,
    ) -> None:
        """`model` as it is trained, wrappers included. `peers`: the ranks that see the same data as this one.

        Comm: one all_gather_object of what each rank holds, and whose data it sees. Errors: ValueError for FSDP1, by
        module, and for peers that do not share out the ranks.
        """
        refuse_unsupported(model)
        self._rank = collective.topology.rank
        peers = peers or model_peers(streams, model) or (self._rank,)
        described = collective.gather((holdings(streams), tuple(peers)))
        collective.share_data([seen for _, seen in described])
        self.device = next(streams.model.parameters()).device
        self._streams = streams
        self._collective = collective
        self._optimizers = tuple(optimizers)
        self._model = model
        self._families = families(streams, [held for held, _ in described], self._rank)
        self._copies = {
            id(parameter): len(family.peers(self._rank)) for family in self._families for parameter in family.parameters
        }
        self._parameters = {item.name: item.parameter for stream in streams.streams for item in stream.parameters}
        self._has_dtensors = any(isinstance(parameter, DTensor) for parameter in self._parameters.values())
        self._groups = _groups_of(streams, self._optimizers)
        self._tensors: tuple[Linear, ...] = ()
        self._proved = [False] * len(self._families)
        self._clock = Clock(model)
        self._maxima: Tensor | None = None
        self._bad: Tensor | None = None
        self._make_readers()
        self._updates = Updates(self.shares, len(streams.streams), self.device, update_every)

    def _make_readers(self) -> None:
        held = self._squared = _without(self._families, {tensor.name for tensor in self._tensors}, self._parameters)
        number = len(self._streams.streams)
        self.shares: tuple[Share, ...] = shares(held, self._rank, self._proved)
        self._read: Reader = reader(self.shares, number, self.device)
        everything = shares(held, self._rank, [False] * len(held))
        self._read_in_full: Reader = reader(everything, number, self.device)

    def summed_later(self) -> tuple[Linear, ...]:
        """The parameters of this rank that have gradients still to be summed, now or earlier."""
        if not self._has_dtensors:
            return self._tensors
        return tuple(sorted({*self._tensors, *linear.find(self._streams)}))

    def plan(self, scalars: Mapping[str, bool], tensors: tuple[Linear, ...] = ()) -> Plan:
        """The plan of a packet that carries these numbers of the user's, and these tensors' gradients as they are."""
        if tensors != self._tensors:
            linear.check_size(tensors)
            self._tensors = tensors
            self._make_readers()
        size = self._collective.topology.world_size
        return Plan.of(self._streams.names, scalars, tensors, self._families, size, updates=self._updates.every > 0)

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
        turn: int = 0,
        in_full: bool = False,
        audit: bool = False,
    ) -> Measurement:
        """Measure now. `in_full`: read everything here, since another rank may have stopped (`Join`) and holds none.

        `audit`: read in full, and send checksums of what this rank holds. `turn`: which ranks fill their slots.

        Comm: one all_reduce(SUM). Sync: none.
        """
        table = (self._read_in_full if in_full or audit else self._read)(_gradient)
        scaled = scaler is not None and scaler.is_enabled()
        inverse: float | Tensor = 1.0
        if scaler is not None and scaled:
            inverse = self._inverse_scale(scaler)
            table = unscale(table, inverse)
        cells, bad = scalar_cells(tuple(plan.scalars), numbers, samples, self.device)
        cells[:, :3] /= self._collective.topology.model_peers
        maxima = table[:, ABS_MAX]
        if plan.layout.turns > 1:
            maxima, bad = self._since_last_turn(maxima, bad)
        fields = step_fields(table, cells, bad, epoch=epoch, scaled=scaled) | {MAXIMA: maxima}
        fields[FACTS] = torch.tensor(self._facts(samples).cells(), dtype=torch.float64)
        if plan.tensors:
            copies = lambda parameter: self._copies[id(parameter)]  # noqa: E731
            fields[LINEAR] = linear.cells(plan.tensors, self._parameters, copies, inverse, self.device)
        updates = self._updates.pending
        if self._updates.every:
            fields[UPDATES] = self._updates.take()
        layout = plan.audit_layout if audit else plan.layout
        if audit:
            fields[CHECKSUMS] = self._checksums()
        if self._rank in layout.heard(turn):
            self._maxima = self._bad = None
        packet = layout.pack(fields, self._rank, self.device, turn)
        return self._sent(plan, call, packet, turn=turn, audit=audit, shadow=False, updates=updates)

    def shadow(self, plan: Plan, call: int, *, turn: int = 0, audit: bool = False) -> Measurement:
        """Take part with nothing to say. Comm: one all_reduce(SUM). Sync: none."""
        packet = (plan.audit_layout if audit else plan.layout).zeros(self.device)
        updates = self._updates.pending
        return self._sent(plan, call, packet, turn=turn, audit=audit, shadow=True, updates=updates)

    def _sent(
        self, plan: Plan, call: int, packet: Tensor, *, turn: int, audit: bool, shadow: bool, updates: bool
    ) -> Measurement:
        reduction = self._collective.all_reduce(packet.to(self._collective.device_for(self.device)))
        size = self._collective.topology.world_size
        return Measurement(call, plan, reduction, size, turn, audit, shadow, updates)

    def prove(self, step: StepStats) -> None:
        """Take over what an audit has shown: replicas that are equal are shared out from now on, others are not.

        To be called at the same call of `step` on every rank.
        """
        equal = iter(step.replicas)
        proved = []
        for family in self._families:
            found = next(equal) if any(len(ranks) > 1 for ranks in family.sets) else None
            proved.append(found is None or (found.gradients and found.weights))
        if proved != self._proved:
            self._proved = proved
            self._make_readers()
            self._updates.share(self.shares)

    def clip_(self, measurement: Measurement, max_norm: float, *, per_stream: bool) -> Tensor:
        """Clip by the norms of a measurement of the present gradients; see `clipping.clip_`."""
        moments = measurement.moments().to(self.device)
        return clip_(self._streams, moments, max_norm, per_stream=per_stream)

    def clip_alone_(self, max_norm: float, *, per_stream: bool) -> Tensor:
        """Clip by what this rank holds alone: where every rank holds the same gradients. Comm: none."""
        held = [replace(family, sets=((self._rank,),)) for family in self._families]
        number = len(self._streams.streams)
        table = moments(shares(held, self._rank, [True] * len(held)), number, _gradient, self.device)
        return clip_(self._streams, table, max_norm, per_stream=per_stream)

    def is_scaled(self, scaler: torch.amp.GradScaler | None) -> bool:
        """Whether the gradients still carry the loss scale."""
        return scaler is not None and scaler.is_enabled() and isinstance(self._inverse_scale(scaler), Tensor)

    def look_at_update(self, call: int) -> None:
        """Before the optimizer's step number `call`: see what it did last, remember what it starts from."""
        self._updates.look(call)

    def stop(self) -> None:
        """Take the hooks off the model."""
        self._clock.stop()

    def _since_last_turn(self, maxima: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
        """The largest abs-max and the non-finite numbers since this rank last filled its slots."""
        self._maxima = maxima if self._maxima is None else torch.maximum(self._maxima, maxima)
        self._bad = bad if self._bad is None else self._bad + bad
        return self._maxima, self._bad

    def _facts(self, samples: float | Tensor | None) -> RankFacts:
        step, busy = self._clock.lap()
        settings = [self._optimizers[place[0]].param_groups[place[1]] if place else {} for place in self._groups]
        return RankFacts(
            rank=self._rank,
            lr=tuple(_on_host(group.get("lr")) for group in settings),
            weight_decay=tuple(_on_host(group.get("weight_decay")) for group in settings),
            training=float(self._model.training),
            samples=_on_host(samples),
            step_seconds=step,
            busy_seconds=busy,
        )

    def _checksums(self) -> Tensor:
        """[F, 2] bit-sums of the gradients and of the weights that this rank holds."""
        rows = []
        for family, squared in zip(self._families, self._squared, strict=True):
            gradients = [_gradient(parameter) for parameter in squared.parameters]
            weights = [local(parameter) for parameter in family.parameters]
            rows.append(torch.stack([bit_sum(tensors, self.device) for tensors in (gradients, weights)]))
        return torch.stack(rows) if rows else torch.zeros(0, 2, dtype=torch.float64)

    def _inverse_scale(self, scaler: torch.amp.GradScaler) -> float | Tensor:
        """1 / the loss scale, on its device; 1 where the scaler has unscaled these gradients already.

        `GradScaler.get_scale()` would wait for the device, and the stage is not public: torch/amp/grad_scaler.py.
        """
        known = {id(optimizer) for optimizer in self._optimizers}
        states = scaler._per_optimizer_states.items()
        stages = [state["stage"].name for optimizer, state in states if optimizer in known or not known]
        scale = scaler._scale
        if scale is None or any(stage != "READY" for stage in stages):
            return 1.0
        return scale.double().reciprocal()


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    gradient = parameter.grad
    return None if gradient is None else local(gradient)


def _without(held: Sequence[Family], names: set[str], parameters: Mapping[str, nn.Parameter]) -> tuple[Family, ...]:
    """The families without the named parameters."""
    left_out = {id(parameters[name]) for name in names if name in parameters}
    return tuple(
        replace(family, parameters=tuple(p for p in family.parameters if id(p) not in left_out)) for family in held
    )


def _groups_of(streams: StreamSet, optimizers: Sequence[torch.optim.Optimizer]) -> list[tuple[int, int] | None]:
    """For each stream the place (optimizer, group) of the first parameter group that holds any of its tensors."""
    places: dict[int, tuple[int, int]] = {}
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                places.setdefault(id(parameter), (i, j))
    found = [[places[id(p.parameter)] for p in s.parameters if id(p.parameter) in places] for s in streams.streams]
    return [min(of_stream, default=None) for of_stream in found]


def _on_host(value: float | Tensor | None) -> float:
    """A number; nan where it is not known without waiting for a device."""
    if value is None or (isinstance(value, Tensor) and value.device.type != "cpu"):
        return math.nan
    return float(value)


def _add_linear(sums: dict[str, Any], table: Tensor) -> None:
    """Add the figures of tensors that were squared after the sum to the fields of a packet."""
    sums[MOMENTS] = (torch.tensor(sums[MOMENTS], dtype=torch.float64) + table[:, :ABS_MAX]).tolist()
    largest = table[:, ABS_MAX].tolist()
    sums[MAXIMA] = [[max(*ranks, own)] for ranks, own in zip(sums[MAXIMA], largest, strict=True)]


def step_fields(table: Tensor, cells: Tensor, bad: Tensor, *, epoch: float | None, scaled: bool) -> dict[str, Tensor]:
    """A rank's moments [S, M], user cells [U, 4], count of non-finite numbers [] and state as fields of its packet.

    The state says that the rank takes part, whether a GradScaler is in charge, and its epoch: a rank that shadows
    the others under `Join` knows neither, and is to file the same.
    """
    state = torch.tensor([1.0, float(scaled), math.nan if epoch is None else epoch], dtype=torch.float64)
    return {STATE: state, MOMENTS: table[:, :ABS_MAX], BAD: bad, SCALARS: cells}


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
