"""The monitored steps of a job: what their packet holds, which calls are measured, and what is still under way."""

from __future__ import annotations

import logging
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ddp_streammon import stats
from ddp_streammon.collective import Collective
from ddp_streammon.config import Intent, MonitorConfig
from ddp_streammon.linear import Linear
from ddp_streammon.measurement import GradientMeter
from ddp_streammon.plan import Measurement, Plan
from ddp_streammon.stats import Figures, ScalarLike, StepStats
from ddp_streammon.streams import StreamSet

_log = logging.getLogger("ddp_streammon")
_LAST_WAIT = 2.0
"""Seconds that are given to sums under way when the job has failed."""


class Steps:
    """Counts calls, measures those of the cadence, and gives each back `delay` calls later, on every rank alike.

    What is measured depends on the count of calls alone, never on data, readiness or rank.
    """

    def __init__(self, streams: StreamSet, meter: GradientMeter, collective: Collective, config: MonitorConfig) -> None:
        self.calls = 0
        self._streams = streams
        self._meter = meter
        self._collective = collective
        self._config = config
        self._plan: Plan | None = None
        self._last: Plan | None = None
        self._gradient_plan = meter.plan({}, of_step=False)
        self._asked = False
        self._audited = False
        self._compared_at: int | None = None
        """The call at which the last audit was taken over; None while one is to come."""
        self._pause, self._paused_until = 1, 0
        """Measured steps from one audit that gradients ask for to the next, and the one before which none may be."""
        self._pending: deque[Measurement] = deque()
        self._fresh: Measurement | None = None
        self._to_act_on: deque[Measurement] = deque()

    def take(
        self,
        numbers: Mapping[str, ScalarLike | None],
        samples: float | Tensor | None,
        scaler: torch.amp.GradScaler | None,
        epoch: float | None,
        *,
        joined: bool,
    ) -> Figures:
        """One call; its figures, empty where it is not measured. `joined`: under `Join`, where ranks may have stopped.

        Comm: one all_reduce(SUM) where it is measured; at the first call also an all_gather_object. Sync: none.
        """
        plan = self._up_to_date(numbers)
        self.calls += 1
        self._fresh = None
        self._meter.lap()
        if not joined:
            self._meter.look_at_update(self.calls)
        figures = Figures((), dict)
        if self._is_measured():
            _warn_of_unknown(numbers, plan)
            self._fresh = self._meter.measure(
                *(plan, self.calls, numbers, samples, scaler),
                epoch=epoch,
                in_full=joined,
                turn=self._turn,
                audit=self._is_audit(),
            )
            self._pending.append(self._fresh)
            figures = self._fresh.figures()
        if self.calls % self._config.every == 0:
            self._meter.remember_weights(self.calls)
        self._meter.look_at_next(self.calls % self._config.every == 0)
        return figures

    def go_on_from(self, calls: int) -> None:
        """Count on from another number of calls; weights may have been loaded, so replicas are compared anew.

        What is under way has been brought in (`rest`), and is not acted on: an earlier call may be the next one.
        """
        self.calls = calls
        self._audited = False
        self._compared_at = None
        self._pause, self._paused_until = 1, 0
        self._fresh = None
        self._to_act_on.clear()
        self._meter.look_at_next(calls % self._config.every == 0)

    def shadow(self) -> None:
        """What a call of a rank without data looks like to the others: the same collectives, nothing in them."""
        plan = self._up_to_date({})
        self.calls += 1
        if self._is_measured():
            self._pending.append(self._meter.shadow(plan, self.calls, turn=self._turn, audit=self._is_audit()))
        self._meter.look_at_next(self.calls % self._config.every == 0)
        self._meter.pause()

    def gradients(self, scaler: torch.amp.GradScaler | None = None) -> Measurement:
        """The gradients now, apart from the cadence.

        Comm: one all_reduce(SUM); the first time, where any rank holds DTensors, also an all_gather_object. Sync: none.
        """
        tensors = self._meter.agreed
        if self._meter.shards_parameters and not self._asked:
            self._asked = True
            tensors = _union(self._collective.gather(self._meter.summed_later()))
        if set(tensors) - set(self._gradient_plan.tensors):
            self._gradient_plan = self._meter.plan({}, tensors, of_step=False)
        return self._meter.measure(self._gradient_plan, self.calls, {}, None, scaler, epoch=None)

    def fresh(self) -> Measurement:
        """The measurement of the present gradients: this call's, or one made now. Comm: as `gradients`, or none."""
        measured, self._fresh = self._fresh, None
        return measured or self.gradients()

    def gradients_are_used(self) -> None:
        """The optimizer has stepped: what was measured does not belong to the next gradients."""
        self._fresh = None

    def due(self) -> Iterator[Measurement]:
        """What was measured `delay` calls ago, or earlier, in order: at the same call on every rank.

        What an audit has shown is taken over then too, and not before: one rank may have asked for the `rest` alone.
        """
        while self._pending and self._pending[0].call + self._config.delay <= self.calls:
            yield self._next()
        while self._to_act_on and self._to_act_on[0].call + self._config.delay <= self.calls:
            measured = self._to_act_on.popleft()
            if measured.plan is self._plan and measured.read().unplanned:
                _warn_of_unplanned(measured.read(), self.calls)
                self._plan = None
            if measured.audit:
                self._meter.prove(measured)
                self._compared_at = self.calls
            elif measured.asks:
                self._ask_again(measured.call)

    def _ask_again(self, call: int) -> None:
        """There were gradients at `call` that no audit has compared: they were missing or zero before. Those that
        stay zero ask in vain, hence ever more rarely."""
        since_compared = self._compared_at is not None and call > self._compared_at
        if since_compared and self._turn >= self._paused_until and self._pause < self._config.audit_every:
            self._audited = False
            self._compared_at = None
            self._pause *= 2
            self._paused_until = self._turn + self._pause

    def rest(self) -> Iterator[Measurement]:
        """Everything that is under way."""
        while self._pending:
            yield self._next()

    def rest_that_arrives(self) -> Iterator[Measurement]:
        """After a failure: what comes within `_LAST_WAIT`, since other ranks may be gone."""
        deadline = time.monotonic() + _LAST_WAIT
        while self._pending:
            while not self._pending[0].reduction.arrived():
                if time.monotonic() > deadline:
                    _log.warning("the last %d measured steps did not arrive from the other ranks", len(self._pending))
                    self._pending.clear()
                    return
                time.sleep(0.001)
            yield self._next()

    def _next(self) -> Measurement:
        measured = self._pending.popleft()
        self._to_act_on.append(measured)
        return measured

    def _up_to_date(self, numbers: Mapping[str, ScalarLike | None]) -> Plan:
        """The plan; agreed at the first call, and where a gradient turns up that has to be summed first."""
        if self._plan is None:
            self._plan = self._last = self._agree(numbers)
        return self._plan

    def _agree(self, numbers: Mapping[str, ScalarLike | None]) -> Plan:
        """The plan of every step: the user's numbers that any rank names. Comm: one all_gather_object."""
        own = {name: value is not None and stats.is_total(value) for name, value in numbers.items()}
        sent = {name for name, value in numbers.items() if value is not None}
        declared = {name for name in numbers if name not in ("loss", "samples")} | sent
        if self._last is not None:
            own |= self._last.scalars
            declared |= set(self._last.scalars)
        identity = (self._streams.names, replace(self._config, intent=Intent()), self.calls)
        mine = {name: own[name] for name in sorted(declared)}
        everyone = self._collective.gather((identity, mine, self._meter.summed_later()))
        tensors = _union(found for _, _, found in everyone)
        for rank, (other, _, _) in enumerate(everyone):
            if other != everyone[0][0]:
                raise ValueError(
                    f"ranks 0 and {rank} disagree about (streams, configuration, calls so far): {everyone[0][0]} and "
                    f"{other}; build the monitor alike, and load the same state, on every rank"
                )
        names = sorted({name for _, named, _ in everyone for name in named})
        taken = [name for name in names if name in self._gradient_plan.names]
        if taken:
            raise ValueError(f"{taken[0]!r} is the key of a figure of the monitor's own; give your number another name")
        scalars = {name: any(named.get(name, False) for _, named, _ in everyone) for name in names}
        return self._meter.plan(scalars, tensors)

    def _is_measured(self) -> bool:
        return (self.calls - 1) % self._config.every == 0

    @property
    def _turn(self) -> int:
        """Which ranks fill their slots in this call's packet, where not all do."""
        return (self.calls - 1) // self._config.every

    def _is_audit(self) -> bool:
        """Whether this call compares replicas: the first of this process, every so many, and those asked for."""
        due = not self._audited or self._turn % self._config.audit_every == 0
        self._audited = True
        return due


def _warn_of_unknown(numbers: Mapping[str, ScalarLike | None], plan: Plan) -> None:
    unknown = [name for name, value in numbers.items() if value is not None and name not in plan.scalars]
    if unknown:
        warnings.warn(
            f"not sent: {', '.join(unknown)}. The packet's names are fixed at the first step "
            f"({', '.join(plan.scalars) or 'none'}); name it there too, with None if it has no value yet",
            stacklevel=5,
        )


def _warn_of_unplanned(step: StepStats, last: int) -> None:
    warnings.warn(
        f"{', '.join(step.unplanned)}: gradients that are still to be summed over ranks (Partial) have come up after "
        f"the packet's cells were agreed on, so norm, mean and maximum are nan in steps {step.step} to {last}; from "
        "the next step on they are measured",
        stacklevel=5,
    )


def _union(of_ranks: Iterable[tuple[tuple[Linear, ...], str]]) -> tuple[Linear, ...]:
    """What any rank has to sum; ValueError on all of them where one cannot."""
    found = list(of_ranks)
    refused = next((why for _, why in found if why), "")
    if refused:
        raise ValueError(refused)
    return tuple(sorted({tensor for tensors, _ in found for tensor in tensors}))
