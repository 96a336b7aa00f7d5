"""Rules about what trains at all: relations that hold exactly in a training that learns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.moments.sample import BAD
from ddp_streammon.rules.engine import Kind, Rule, Signal
from ddp_streammon.rules.signals import few, single, together
from ddp_streammon.rules.view import View


@dataclass(frozen=True)
class NonFinite(Rule):
    """NF: a number is nan or infinite, in an input, in a rank's own gradient, in its loss, or in the gradient that all
    ranks see: the first of these that says where it comes from is told, of own gradients with the parameter that the
    backward pass met first. Under a GradScaler non-finite gradients are a
    skipped step, which is its business; non-finite inputs are not. No threshold."""

    id: ClassVar[str] = "NF"
    outcome: ClassVar[bool] = True
    kind: ClassVar[Kind] = Kind.nonfinite
    severity: ClassVar[Severity] = Severity.error

    def check(self, view: View) -> Iterator[Signal]:
        now = view.now
        seen = [name for name in view.streams if any(view.ranks.of_input(view.number(name), BAD))]
        for name in seen:
            bad = [rank for rank, of in view.inputs(name).items() if of.nonfinite > 0]
            yield self._signal(view, name, bad, f"the input of {name} is not finite on {few(bad)}")
        if seen:
            return
        if now.scaled:
            return
        bad_streams = [name for name, of in now.streams.items() if of.nonfinite]
        if not bad_streams and not now.nonfinite_ranks:
            return
        origins = [rank for rank in now.local if any(rank.nonfinite)]
        own = [rank.rank for rank in origins]
        ranks = own or list(now.nonfinite_ranks) or list(view.ranks.numbers)
        of_origin = {name for rank in origins for name, bad in zip(now.streams, rank.nonfinite, strict=True) if bad}
        streams = [name for name in bad_streams if not of_origin or name in of_origin]
        stream = streams[0] if len(streams) == 1 and streams[0] != keys.SHARED else None
        what = f"gradients of {', '.join(streams)}" if bad_streams else "the loss, or another number given to step"
        first = next((rank.parameter for rank in origins if rank.parameter is not None), None)
        where = "" if first is None else f", first in {view.parameter(first)}"
        yield self._signal(view, stream, ranks, f"{what}: not finite, on {few(ranks)}{where}")

    def _signal(self, view: View, stream: str | None, bad: Sequence[int], seen: str) -> Signal:
        whose = None if len(bad) == len(view.ranks) > 1 else single(bad)
        count = sum(of.nonfinite for of in view.now.streams.values())
        return Signal(
            stream,
            whose,
            f"{seen} at step {view.now.step}",
            likely="a corrupt record"
            if stream and whose is not None
            else "a corrupt record, or a step that was too long",
            do=f"look at the batch of step {view.now.step} on {few(bad)}, skip it, and go on from the last checkpoint",
            first=seen.startswith("the input"),
            confirm="this line clears and the loss is finite",
            evidence={"nonfinite": float(count)} | {f"rank {rank}": 1.0 for rank in bad[:16]},
        )


@dataclass(frozen=True)
class NoGradient(Rule):
    """DET: no parameter of a stream has a gradient, `hold` measured steps in a row, although it is to be trained.
    Batches without the stream's modality are legal: where it has come and gone, it has to last four times longer."""

    id: ClassVar[str] = "DET"
    severity: ClassVar[Severity] = Severity.error
    intermittent: ClassVar[bool] = True
    preflight: ClassVar[bool] = True

    hold: int = 4
    """A choice: and 5 where the stream was never alive for long (`fresh`)."""
    fresh: int = 20
    """Steps with a gradient, after which it is known not to be missing often: a choice."""

    def check(self, view: View) -> Iterator[Signal]:
        for stream in view.streams:
            of = view.now.streams[stream]
            if of.elements or not _takes_part(view, stream) or not view.setup.streams[stream].tensors:
                continue
            called = any(view.ranks.calls(view.number(stream)))
            used = "it is called, and detached from the loss" if called else "it is not called, or detached"
            yield Signal(
                stream,
                seen=f"{stream}: no gradients for {self.hold} steps",
                likely=f"{used}; or gradients are cleared before they are measured",
                do=f"look for .detach() or no_grad() after {stream}; if it is optional, declare it auxiliary",
                confirm="this line clears",
                evidence={"elements": 0.0},
                patience=int(view.memory.alive.get(stream, 0) < self.fresh),
            )


@dataclass(frozen=True)
class Dead(Rule):
    """DEAD: every gradient of a stream is exactly zero, `hold` measured steps in a row, at a learning rate above zero.
    A gate that starts at zero opens after a step; batches without the stream are legal, as for DET."""

    id: ClassVar[str] = "DEAD"
    outcome: ClassVar[bool] = True
    severity: ClassVar[Severity] = Severity.error
    intermittent: ClassVar[bool] = True
    preflight: ClassVar[bool] = True

    hold: int = 4
    """A choice: and 5 where the stream was never alive for long (`fresh`)."""
    fresh: int = 20
    """Steps with a gradient, after which it is known not to be missing often: a choice."""

    def check(self, view: View) -> Iterator[Signal]:
        for stream in view.streams:
            of = view.now.streams[stream]
            zero = of.elements > 0 and of.grad_max == 0 and of.grad_norm == 0 and not of.nonfinite
            if not zero or not _takes_part(view, stream) or view.lr(keys.SHARED) == 0:
                continue
            yield Signal(
                stream,
                seen=f"{stream}: every gradient is exactly zero for {self.hold} steps",
                likely="dead activations, a fusion weight of zero that cannot move, or an empty input",
                do=f"look at {stream}'s biases, its weight in the fusion, and its input; initialise it anew",
                confirm="this line clears",
                evidence={"elements": float(of.elements), "norm": 0.0},
                patience=int(view.memory.alive.get(stream, 0) < self.fresh),
            )


def _takes_part(view: View, stream: str) -> bool:
    """Whether the stream is to learn from this step: trained, not optional, and not said to be absent."""
    present = view.now.scalars.get(keys.of_stream(stream, keys.PRESENT))
    absent = present is not None and present.mean == 0
    return view.trained(stream) and stream not in view.intent.auxiliary and not absent


@dataclass(frozen=True)
class Unchanged(Rule):
    """UNC: not one of a stream's sampled weights changed in a step, though it has gradients and a learning rate above
    zero, `hold` steps in a row. Steps that a GradScaler skipped do not count. No threshold: but an update may be lost
    to rounding, which is the other thing that it says."""

    id: ClassVar[str] = "UNC"
    outcome: ClassVar[bool] = True
    severity: ClassVar[Severity] = Severity.error
    requires: ClassVar[tuple[str, ...]] = ("optimizer", "samples of weights", "consecutive steps")
    preflight: ClassVar[bool] = True

    hold: int = 5

    def check(self, view: View) -> Iterator[Signal]:
        if len(view.steps) < 2:
            return
        before = view.steps[-2]
        skipped = before.scaled and any(of.nonfinite for of in before.streams.values())
        if skipped:
            return
        yield from together(view, self._of_streams(view), lambda: self._signal(None, view))

    def _of_streams(self, view: View) -> Iterator[Signal]:
        for stream in view.streams:
            sample, before = view.sample(stream), view.steps[-2].streams[stream]
            if sample is None or sample.moved != 0 or not sample.optimized or not before.grad_norm > 0:
                continue
            rates = view.steps[-2].rank_facts.lr(view.number(stream))
            if view.trained(stream) and view.lr(stream) > 0 and rates and min(rates) > 0:
                yield self._signal(stream, view)

    def _signal(self, stream: str | None, view: View) -> Signal:
        low = any(view.setup.streams[name].low_precision for name in ([stream] if stream else view.streams))
        rate = view.lr(stream or view.streams[0])
        return Signal(
            stream,
            seen=f"{stream or 'all streams'}: no weight has changed for {self.hold} steps, at learning rate {rate:g}",
            likely="updates are lost to rounding in 16-bit weights"
            if low
            else "optimizer.step() does not reach them, or the update is below the weights' rounding",
            do="keep float32 master weights" if low else "call optimizer.step() for the optimizer that holds them",
            confirm="weights change in the next step",
            evidence={keys.LEARNING_RATE: rate, "moved": 0.0},
        )


@dataclass(frozen=True)
class NotCleared(Rule):
    """ZGR: when the first gradient of a step arrives, the one of the step before is still there, `hold` measured steps
    in a row: seen by a hook that runs before autograd adds. Later backward passes of a step add up rightly, so neither
    accumulation nor a second loss matters; parameters in no optimizer are nobody's to clear. No threshold."""

    id: ClassVar[str] = "ZGR"
    destabilises: ClassVar[bool] = True
    severity: ClassVar[Severity] = Severity.error
    requires: ClassVar[tuple[str, ...]] = ("optimizer", "samples of weights")

    hold: int = 4

    def check(self, view: View) -> Iterable[Signal]:
        found = [
            stream
            for stream in view.streams
            if (sample := view.sample(stream)) is not None and sample.uncleared > 0 and sample.optimized > 0
        ]
        if not found:
            return
        trained = [stream for stream in view.streams if view.trained(stream)]
        whole = set(found) >= set(trained)
        named: list[str | None] = [None] if whole else [*found]
        for stream in named:
            yield Signal(
                stream,
                seen=f"{stream or 'all streams'}: gradients of the step before are still there when a step begins",
                likely="optimizer.zero_grad() is missing, or comes after backward()",
                do="call optimizer.zero_grad() before the first backward() of a step",
                confirm="this line clears",
                evidence={"steps": float(self.hold)},
            )


@dataclass(frozen=True)
class LeftInEval(Rule):
    """EVAL: the model is in eval mode on every rank while it trains, and has modules that then do something
    else, or all of these were in training mode before and are no longer. Where they never were (norm layers that are
    kept frozen), information."""

    id: ClassVar[str] = "EVAL"
    requires: ClassVar[tuple[str, ...]] = ("eval modules",)
    preflight: ClassVar[bool] = True

    hold: int = 3
    """A choice: one evaluation may leave a step in eval mode."""

    def check(self, view: View) -> Iterator[Signal]:
        modes = view.ranks.training
        if view.intent.eval_modules or not modes:
            return
        inside = view.ranks.in_eval
        all_inside = bool(inside) and min(inside) == 1
        whole = (not any(modes) and (not inside or min(inside) > 0)) or (all_inside and view.memory.trained_mode)
        if not whole and not all_inside:
            return
        yield Signal(
            seen="the model trains in eval mode" if whole else "all dropout and batch norm modules are in eval mode",
            likely="model.train() is missing after an evaluation" if whole else "they are frozen on purpose",
            do="call model.train() at the start of every epoch" if whole else "nothing, if it is meant",
            confirm="this line clears",
            evidence={"training": 0.0 if whole else 1.0},
            severity=None if whole else Severity.info,
        )


@dataclass(frozen=True)
class NegativeLoss(Rule):
    """NEG: the loss of a declared classification is below zero, which no cross-entropy is. Rounding bound 1e-6."""

    id: ClassVar[str] = "NEG"
    destabilises: ClassVar[bool] = True
    severity: ClassVar[Severity] = Severity.error
    requires: ClassVar[tuple[str, ...]] = ("loss", "classification")

    hold: int = 3

    def check(self, view: View) -> Iterator[Signal]:
        loss = view.now.scalars["loss"].mean
        if loss < -1e-6:
            yield Signal(
                seen=f"the loss is {loss:.3g}, and a cross-entropy is never below 0",
                likely="a sign, or a weight below zero, in the loss",
                do="look at the loss's sign and at its class weights",
                confirm="the loss stays above 0",
                evidence={"loss": loss},
            )
