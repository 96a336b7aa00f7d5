"""One measured step: statistics, pack, and the start of the one all_reduce."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddp_streammon import linear
from ddp_streammon.clipping import clip_
from ddp_streammon.collective import Collective
from ddp_streammon.details import Details
from ddp_streammon.facts import Facts
from ddp_streammon.graphs import Graphs
from ddp_streammon.linear import Linear
from ddp_streammon.local_gradients import LocalGradients
from ddp_streammon.moments import ABS_MAX, Reader, Source, moments, reader
from ddp_streammon.packet import Draft, Layout
from ddp_streammon.plan import Measurement, Plan
from ddp_streammon.power import gradient_power
from ddp_streammon.proof import Proof, checksums, shown_cells
from ddp_streammon.scaling import inverse_scale, inverse_scale_of_backward, unscale
from ddp_streammon.shards import Family, Share, families, holdings, local, model_peers, refuse_unsupported, shares
from ddp_streammon.stats import (
    BAD,
    CHECKSUMS,
    FACTS,
    LINEAR,
    LOCAL,
    MAXIMA,
    MOMENTS,
    SCALARS,
    SHOWN,
    STATE,
    UNPLANNED,
    UPDATES,
    Figures,
    ScalarLike,
)
from ddp_streammon.streams import StreamSet
from ddp_streammon.updates import Updates
from ddp_streammon.user_numbers import finish_, user_numbers


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
        local_gradients: bool = False,
        evidence: bool = False,
        every: int = 1,
        peers: Sequence[int] | None = None,
    ) -> None:
        """`model` as it is trained, wrappers included. `peers`: the ranks that see the same data as this one.
        `evidence`: measure what the evidence rules ask for, too. `every`: calls from one measurement to the next.

        Comm: one all_gather_object of what each rank holds, and whose data it sees. Errors: ValueError for FSDP1, by
        module, and for peers that do not share out the ranks.
        """
        refuse_unsupported(model)
        self._rank = collective.topology.rank
        peers = peers or collective.places(model_peers(streams, model) or ()) or (self._rank,)
        self._parameters = {item.name: item.parameter for stream in streams.streams for item in stream.parameters}
        self._has_dtensors = any(isinstance(parameter, DTensor) for parameter in self._parameters.values())
        described = collective.gather((holdings(streams), tuple(peers), self._has_dtensors))
        collective.share_data([seen for _, seen, _ in described])
        self.shards_parameters = any(sharded for *_, sharded in described)
        """Whether any rank holds DTensors."""
        self.device = next(streams.model.parameters()).device
        self._streams = streams
        self._collective = collective
        self._optimizers = tuple(optimizers)
        self._families = families(streams, [held for held, *_ in described], self._rank)
        self._copies = {
            id(parameter): len(family.peers(self._rank)) for family in self._families for parameter in family.parameters
        }
        self.agreed: tuple[Linear, ...] = ()
        """The gradients that are squared after the sum; the same on every rank."""
        self._proof = Proof(self._families, self._rank, collective.topology.world_size)
        self._facts = Facts(self._rank, streams, model, self._optimizers)
        self._local = LocalGradients(streams, model, self.device) if local_gradients else None
        self._details: Details | None = None
        if evidence:
            self._details = Details(streams, model, self._optimizers, self.device, self._facts, every)
        self._kept = torch.zeros(len(streams.streams) + 1, dtype=torch.float64, device=self.device)
        """Of slots that were not sent: the streams' largest abs-max, and the count of non-finite numbers."""
        self._inverse = torch.ones((), dtype=torch.float64, device=self.device)
        self._cells: dict[int, tuple[Layout, Tensor]] = {}
        self._graphs = Graphs(self.device)
        self._readers = 0
        """How often readers were made."""
        self._make_readers()
        self._updates = Updates(self.weight_shares, len(streams.streams), self.device, update_every)

    def _make_readers(self) -> None:
        held = self._squared = _without(self._families, {tensor.name for tensor in self.agreed}, self._parameters)
        self._readers += 1
        number = len(self._streams.streams)
        rows = number if self._details is None else 3 * number
        layers = () if self._details is None else (self._details.layers,)
        self.shares: tuple[Share, ...] = self._proof.shares(held)
        self.weight_shares = self._proof.shares(self._families)
        self._open = self._proof.open(held)
        self._read: Reader = reader((*self.shares, *layers), rows, self.device)
        everything = shares(held, self._rank, [False] * len(held))
        self._read_in_full: Reader = reader((*everything, *layers), rows, self.device)

    @property
    def replicated(self) -> bool:
        """Whether several ranks hold the same part of anything."""
        return any(len(held) > 1 for family in self._families for held in family.sets)

    @property
    def whole(self) -> frozenset[str]:
        """The streams that every rank holds as wholes."""
        ranks = tuple(range(self._collective.topology.world_size))
        cut = {family.stream for family in self._families if family.sets != (ranks,)}
        return frozenset(name for number, name in enumerate(self._streams.names) if number not in cut)

    def summed_later(self) -> tuple[tuple[Linear, ...], str]:
        """The parameters of this rank that have gradients still to be summed, now or earlier; and why they cannot be
        summed in a packet, empty where they can: to be raised where all ranks know of it."""
        if not self._has_dtensors:
            return self.agreed, ""
        try:
            return tuple(sorted({*self.agreed, *linear.find(self._streams)})), ""
        except ValueError as error:
            return self.agreed, str(error)

    def plan(self, scalars: Mapping[str, bool], tensors: tuple[Linear, ...] = (), *, of_step: bool = True) -> Plan:
        """The plan of a packet that carries these numbers of the user's, and these tensors' gradients as they are.

        `of_step`: whether it is a step's, or the gradients' alone.
        """
        if tensors != self.agreed:
            linear.check_size(tensors)
            self.agreed = tensors
            self._make_readers()
        size = self._collective.topology.world_size
        return Plan.of(
            *(self._streams.names, scalars, tensors, self._families, size),
            updates=self._updates.every > 0,
            local=self._local is not None,
            of_step=of_step,
            evidence=self._details is not None,
        )

    def any_gradient(self) -> bool:
        """Whether any parameter has a gradient on this rank."""
        return any(p.parameter.grad is not None for stream in self._streams.streams for p in stream.parameters)

    @torch.no_grad()
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

        `audit`: send checksums of what this rank holds. `turn`: which ranks fill their slots.

        Comm: one all_reduce(SUM). Sync: none.
        """
        scaled = scaler is not None and scaler.is_enabled()
        inverse = inverse_scale(scaler, self._optimizers)
        layout = plan.audit_layout if audit else plan.layout
        draft = Draft(layout, self._rank, turn, 0 if self._details is None else self._details.aside)
        given = user_numbers(tuple(plan.scalars), numbers, samples, self.device)
        found, refused = self.summed_later()
        left_out = {tensor.stream for tensor in set(found) - set(plan.tensors)}
        draft.say(UNPLANNED, [float(bool(refused) or n in left_out) for n in range(len(self._streams.streams))])
        asks = any(parameter.grad is not None for parameter in self._open)
        draft.say(STATE, [1.0, float(scaled), math.nan if epoch is None else epoch, float(asks)])
        draft.say(SCALARS, given.cells)
        draft.say(BAD, [given.bad])
        if plan.of_step:
            draft.say(FACTS, self._facts.now(samples).cells())
            if self._details is not None:
                self._details.say(draft, plan, call, given)
        draft.send(self._cells_of(draft))
        for place, number in given.waiting:
            draft.put(SCALARS, number, place)
        if isinstance(inverse, Tensor):
            self._inverse.copy_(inverse, non_blocking=True)
        if plan.tensors:
            draft.put(LINEAR, linear.cells(plan.tensors, self._parameters, self._copies, inverse, self.device))
        updates = plan.of_step and self._updates.pending
        if plan.of_step:
            self._put_beside(draft, inverse_scale_of_backward(scaler))
        if audit:
            draft.put(CHECKSUMS, checksums(self._families, self._squared, _gradient, self.device))
            draft.put(SHOWN, shown_cells(self._families, self._squared, _gradient, self.device))
        in_turn = self._rank in layout.heard(turn)
        read = self._read_in_full if in_full else self._read
        source = _gradient if self._has_dtensors else _plain_gradient
        again = read.found(source)
        step = _Step(plan, draft, in_turn=in_turn, scaled=isinstance(inverse, Tensor), waiting=bool(given.waiting))
        if again is None or audit:  # an audit is too rare to be recorded
            self._write(step, read(source))
        else:
            generation = 0 if self._details is None else self._details.generation
            key = (id(layout), in_turn, step.scaled, step.waiting, in_full, self._readers, generation)
            self._graphs.run(key, lambda: self._write(step, again()))
        if self._details is not None:
            self._details.end()
        return self._sent(plan, call, draft.packet, turn=turn, audit=audit, shadow=False, updates=updates)

    def _write(self, step: _Step, table: Tensor) -> None:
        """What a step's packet says of the gradients and the weights, in place, after everything else.

        The same operations on the same memory for equal `key`s, and the same table in. Sync: none on CUDA.
        """
        streams, draft = len(self._streams.streams), step.draft
        if step.scaled:
            table = unscale(table, self._inverse)
        draft.at(MOMENTS).view(streams, ABS_MAX).copy_(table[:streams, :ABS_MAX])
        maxima, bad = table[:streams, ABS_MAX], draft.at(BAD)
        rows = draft.at(SCALARS).view(-1, 4)
        if step.waiting:
            bad.add_(finish_(rows))
        if self._collective.topology.model_peers > 1:
            rows[:, :3] /= self._collective.topology.model_peers
        if step.plan.of_step and self._details is not None:
            self._details.write(draft, step.plan, table[streams:], waiting=step.waiting)
        if step.plan.layout.turns > 1:
            # The largest abs-max and the count of non-finite numbers since this rank last filled its slots.
            maxima = torch.maximum(self._kept[:-1], maxima)
            bad.add_(self._kept[-1:])
            if step.in_turn:
                self._kept.zero_()
            else:
                self._kept.copy_(torch.cat([maxima, bad]))
        draft.at(MAXIMA).copy_(maxima)

    def _cells_of(self, draft: Draft) -> Tensor | None:
        """Where packets of a layout are written on the device; None on the host: nowhere in particular."""
        if self.device.type == "cpu":
            return None
        layout = draft.layout
        if id(layout) not in self._cells:
            cells = torch.zeros(draft.cell_count, dtype=torch.float64, device=self.device)
            self._cells[id(layout)] = (layout, cells)
        return self._cells[id(layout)][1]

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

    def prove(self, audit: Measurement) -> None:
        """Take over what an audit has shown: replicas that are equal are shared out from now on, others are not.

        To be called at the same call of `step` on every rank.
        """
        self._take_over(self._proof.take(audit.read(), audit.shown))

    def _take_over(self, is_new: bool) -> None:
        if is_new:
            self._make_readers()
            self._updates.share(self.weight_shares)
        self._open = self._proof.open(self._squared)

    def proof(self) -> dict[str, Any]:
        """What audits have shown to be equal so far, as plain values."""
        return self._proof.to_dict()

    def trust(self, proof: Mapping[str, Any]) -> None:
        """Take over a `proof`, where as many ranks hold as much; the next audit looks again."""
        self._take_over(self._proof.trust(proof))

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

    @torch.no_grad()
    def power(self, scaler: torch.amp.GradScaler | None) -> Figures:
        """See `power.gradient_power`. Comm: one all_reduce(SUM). Sync: none until a figure is read."""
        inverse = inverse_scale(scaler, self._optimizers)
        later = {tensor.name for tensor in self.summed_later()[0]}
        return gradient_power(self._streams, self.weight_shares, self._collective, _gradient, inverse, undefined=later)

    def is_scaled(self, scaler: torch.amp.GradScaler | None) -> bool:
        """Whether the gradients still carry the loss scale."""
        return isinstance(inverse_scale(scaler, self._optimizers), Tensor)

    def look_at_next(self, wanted: bool) -> None:
        """Whether the next backward pass is measured: local gradients are read in it, or it costs nothing."""
        if self._local is not None:
            self._local.armed = wanted
        if self._details is not None:
            self._details.look_at_next(wanted)

    def lap(self) -> None:
        """Another call of `step`, measured or not."""
        self._facts.clock.lap()

    def pause(self) -> None:
        """This rank has no step of its own to time."""
        self._facts.clock.pause()

    def look_at_update(self, call: int) -> None:
        """Before the optimizer's step number `call`: see what it did last, remember what it starts from."""
        self._updates.look(call)

    def remember_weights(self, call: int) -> None:
        """Before the optimizer's step number `call`, of which the next call is to see the change, by a sample."""
        if self._details is not None:
            self._details.remember_weights(call)

    def stop(self) -> None:
        """Take the hooks off the model."""
        self._facts.clock.stop()
        if self._local is not None:
            self._local.stop()
        if self._details is not None:
            self._details.stop()

    def _put_beside(self, draft: Draft, inverse_scale: float | Tensor) -> None:
        """What else a step's packet holds of the device: the last update, this rank's own gradient."""
        update = self._updates.take()
        if update is not None:
            draft.put(UPDATES, update)
        if self._local is not None:
            draft.put(LOCAL, self._local.take(inverse_scale))


_plain_gradient: Source = attrgetter("grad")


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    gradient = parameter.grad
    if gradient is None or (isinstance(gradient, DTensor) and any(p.is_partial() for p in gradient.placements)):
        return None
    return local(gradient)


def _without(held: Sequence[Family], names: set[str], parameters: Mapping[str, nn.Parameter]) -> tuple[Family, ...]:
    """The families without the named parameters."""
    left_out = {id(parameters[name]) for name in names if name in parameters}
    return tuple(
        replace(family, parameters=tuple(p for p in family.parameters if id(p) not in left_out)) for family in held
    )


@dataclass(frozen=True)
class _Step:
    """What decides which operations write a packet."""

    plan: Plan
    draft: Draft
    in_turn: bool
    """Whether this rank's slots are sent."""
    scaled: bool
    """Whether gradients carry the loss scale."""
    waiting: bool
    """Whether any of the user's numbers came from the device."""
