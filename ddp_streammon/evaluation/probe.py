"""What streams' features know of the target: ridge probes in closed form, from sums that add up over ranks.

A stream is probed alone, with all others, and left out of all; every probe reads its columns of the same sums, so all
see the same items and the same projection (d differs between probes, never how a stream is seen).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddp_streammon.collective import Collective
from ddp_streammon.evaluation.intervals import Estimate, RatioSums, ratio, ratio_sums, wilson
from ddp_streammon.evaluation.together import describe, raise_together
from ddp_streammon.packet import Field, Layout

COLUMNS = 256
"""Of all streams together. More of them drown what is known: the same information with 502 idle dimensions scored 32
instead of 71 % at 300 items (evidence of this project)."""
ITEMS_PER_COLUMN = 10
ITEMS_PER_CLASS = 20
PENALTIES = tuple(10.0 ** (power / 2) for power in range(-6, 5))
"""lambda, from 0.001 to 100, relative to trace / d of the standardised features' X'X, which is the number of items. The
least keeps the condition number below 1000 d, with rounding (bf16: 4e-6 of the variance) far below it; the largest
shrinks what noise explains in training to a hundredth."""
CONSTANT = 1e-10
"""A column whose variance is below this share of its mean square is constant: the rest is rounding."""
MAX_BYTES = 64 * 2**20
_CHUNK_CELLS = 2**22


class Labelled(NamedTuple):
    """This rank's items. Shape: features [N, width] a stream, targets [N] (classes) or [N, outputs] (regression).

    `prediction` is the model's own, for the head gap: classes [N], or [N, outputs]; `groups` [N] integers, for items
    that are not independent, on whichever ranks; `order` [N] integers by which all ranks' items are put in one order.
    A rank without items gives no features and targets of length 0.
    """

    features: Mapping[str, Tensor]
    targets: Tensor
    prediction: Tensor | None = None
    groups: Tensor | None = None
    order: Tensor | None = None


@dataclass(frozen=True)
class Known:
    """Accuracy (or R^2) on the held-out items, and how much that is above the training items' majority class (or mean);
    `explained` is R^2, of the classes' indicators against the training shares: no figure of a few items tells
    nothing from a little as sharply. All are nan where `undetermined` says why."""

    score: Estimate
    advantage: Estimate
    explained: Estimate
    undetermined: str = ""


@dataclass(frozen=True)
class ProbeStats:
    """Equal on every rank. Differences are paired by item; nan where a probe that they need is undetermined.

    `complement[s]` = probe(all) - probe(all but s), and of R^2 `explained_complement`; `head_gap` = probe(all) - model.
    """

    alone: Mapping[str, Known]
    everything: Known
    complement: Mapping[str, Estimate]
    explained_complement: Mapping[str, Estimate]
    head_gap: Estimate
    items: Scores


@dataclass(frozen=True)
class Scores:
    """What each stream's probe explains of each held-out item, to compare with a later probe of the same items.

    `alone[s]` over `base` is R^2: squared error of the mean - squared error, over the former. Shape: [N] each, of all
    ranks' items.
    """

    alone: Mapping[str, Tensor]
    base: Tensor
    groups: Tensor | None = None

    def change(self, then: Tensor, stream: str, level: float) -> Estimate:
        """How much the stream's R^2 is above what it was, `then` [N] of the same items."""
        return ratio(ratio_sums(self.alone[stream] - then, self.base, self.groups), level)


@dataclass(frozen=True)
class Probe:
    """Which features are probed for which target, the same on every rank.

    `outputs` is the number of classes, or of a regression's targets (`classes=False`). Features wider than `limit` in
    all are projected by random signs (Achlioptas, J. Comput. Syst. Sci. 66, 2003, 671), every stream to its fair share
    of `limit`; narrower ones stay as they are. Of n training items `limit=min(256, n // 10)` leaves none undetermined.

    Memory: 8 (d d + d C) bytes for the sums, d <= 256, at most 64 MiB; the projection takes 8 d bytes a feature.
    """

    widths: Mapping[str, int]
    outputs: int
    classes: bool = True
    limit: int = COLUMNS
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths.values()) < 1:
            raise ValueError(f"widths must name at least one stream and be at least 1, got {dict(self.widths)}")
        if self.outputs < (2 if self.classes else 1):
            raise ValueError(f"outputs must be at least 2 classes, or 1 target of a regression, got {self.outputs}")
        if not len(self.widths) <= self.limit <= COLUMNS:
            raise ValueError(
                f"limit must be at least 1 a stream ({len(self.widths)}) and at most {COLUMNS}, got {self.limit}"
            )
        size = 8 * (self.dim**2 + self.dim * self.outputs)
        if size > MAX_BYTES:
            raise ValueError(
                f"a probe of {self.dim} columns for {self.outputs} outputs takes {size / 2**20:.0f} MiB, more than "
                f"{MAX_BYTES // 2**20}; set a lower limit, or probe for coarser classes"
            )

    @cached_property
    def columns(self) -> Mapping[str, range]:
        """Each stream's columns of X."""
        room, kept = self.limit, {}
        for done, (name, width) in enumerate(sorted(self.widths.items(), key=lambda item: item[1])):
            kept[name] = min(width, room // (len(self.widths) - done))
            room -= kept[name]
        columns, start = {}, 0
        for name in self.widths:
            columns[name] = range(start, start := start + kept[name])
        return columns

    @property
    def dim(self) -> int:
        return sum(map(len, self.columns.values()))

    @cached_property
    def layout(self) -> Layout:
        """Of the training sums: X'X, X'Y, X'1, Y'1 (the class counts), the trace of Y'Y and n."""
        d, outputs = self.dim, self.outputs
        shapes = {"xx": (d, d), "xy": (d, outputs), "x": (d,), "y": (outputs,), "yy": (), "n": ()}
        return Layout(tuple(Field(name, shape, raw=True) for name, shape in shapes.items()))

    def check(self, items: Labelled) -> None:
        """ValueError for items that are not what this probe was made for."""
        count = len(items.targets)
        shape = (count,) if self.classes else (count, self.outputs)
        if tuple(items.targets.shape) != shape:
            raise ValueError(f"targets must have shape {list(shape)}, got {list(items.targets.shape)}")
        if count and self.classes:
            low, high = int(items.targets.min()), int(items.targets.max())
            if low < 0 or high >= self.outputs:
                raise ValueError(
                    f"targets must be classes 0 to {self.outputs - 1}, got {low} to {high}; leave out others"
                )
        expected = {name: (count, width) for name, width in self.widths.items()} if count else {}
        found = {name: tuple(value.shape) for name, value in items.features.items()} if count else {}
        if found != expected:
            raise ValueError(
                f"features must have the shapes {expected}, got {found}; pool or flatten them to [N, width]"
            )
        for name in ("prediction", "groups", "order"):
            value = getattr(items, name)
            own = shape if name == "prediction" else (count,)
            if value is not None and tuple(value.shape) != own:
                raise ValueError(f"{name} must have shape {list(own)}, got {list(value.shape)}")

    def project(self, items: Labelled) -> Tensor:
        """X of the items, where their features lie. Shape: [N, d] float64."""
        if not len(items.targets):
            return torch.zeros(0, self.dim, dtype=torch.float64, device=items.targets.device)
        parts = []
        for name, width in self.widths.items():
            features, kept = items.features[name].detach().double(), len(self.columns[name])
            if kept < width:
                chance = torch.Generator().manual_seed(self.seed)
                signs = torch.randint(0, 2, (width, kept), generator=chance, device="cpu") * 2.0 - 1
                features = features @ signs.to(features)
            parts.append(features)
        return torch.cat(parts, 1)

    def sums(self, items: Labelled) -> Tensor:
        """The packet of some training items; batches and ranks add up. Shape: [K] float64. Comm, Sync: none."""
        x = self.project(items)
        targets = items.targets.to(x.device)
        if self.classes:
            xy = x.new_zeros(self.dim, self.outputs).index_add_(1, targets.long(), x.T)
            y = torch.bincount(targets.long(), minlength=self.outputs)
            yy = y.sum()
        else:
            xy, y, yy = x.T @ targets.double(), targets.double().sum(0), targets.double().square().sum()
        n = torch.tensor(len(x), dtype=torch.float64, device="cpu")
        return self.layout.pack({"xx": x.T @ x, "xy": xy, "x": x.sum(0), "y": y, "yy": yy, "n": n}, 0, x.device)


@dataclass(frozen=True)
class Fit:
    """A ridge of some streams: prediction = (x - mean) @ coefficients + offset; `undetermined` says why there is none.

    `penalty` is lambda. Shape: mean [d'], coefficients [d', outputs], offset [outputs] (the training mean, or class
    shares).
    """

    columns: Sequence[int]
    mean: Tensor
    coefficients: Tensor
    offset: Tensor
    penalty: float = math.nan
    undetermined: str = ""

    def predict(self, x: Tensor) -> Tensor:
        """Shape: x [N, d] in, values [N, outputs] out."""
        own = x[:, list(self.columns)]
        return (own - self.mean.to(x)) @ self.coefficients.to(x) + self.offset.to(x)


def fit(probe: Probe, packet: Tensor, streams: Sequence[str]) -> Fit:
    """The ridge of these streams' columns, standardised, with an unpenalised offset; float64.

    `packet` is the sum of all training packets, on the host. What `sklearn.linear_model.Ridge(alpha=penalty * n)` gives
    on standardised features; of `PENALTIES` the one of the least generalised cross-validation error (Golub, Heath and
    Wahba, Technometrics 21, 1979, 215), RSS / n / (1 - (1 + sum e / (e + lambda)) / n)^2 with the eigenvalues e of
    X'X / n: what a stream of noise explains is shrunk to nothing, so that more columns do no harm. Comm, Sync: none.
    """
    total: dict[str, Any] = probe.layout.unpack(packet)
    columns = [column for name in streams for column in probe.columns[name]]
    n = float(total["n"])
    xx, xy, mean = total["xx"][columns][:, columns], total["xy"][columns], total["x"][columns] / max(n, 1)
    offset = total["y"] / max(n, 1)
    why = _undetermined(probe, n, len(columns), total["y"])
    if not why and not bool(xx.isfinite().all() & xy.isfinite().all()):
        why = "a training item has features or a target that are not finite"
    if why:
        return Fit(columns, mean, torch.zeros_like(xy), offset, undetermined=why)
    covariance = xx / n - torch.outer(mean, mean)
    variance = covariance.diagonal()
    scale = torch.where(variance > CONSTANT * xx.diagonal() / n, variance.clamp(min=0).rsqrt(), 0.0)
    values, vectors = torch.linalg.eigh(covariance * torch.outer(scale, scale))
    values = values.clamp(min=0)
    right = vectors.T @ ((xy / n - torch.outer(mean, offset)) * scale[:, None])
    spread = float(total["yy"] / n - offset.square().sum())

    def error(penalty: float) -> float:
        shrunk = right / (values + penalty)[:, None]
        residual = spread - 2 * (right * shrunk).sum() + (values[:, None] * shrunk.square()).sum()
        used = 1 + (values / (values + penalty)).sum()
        return float(residual / (1 - used / n) ** 2)

    penalty = min(reversed(PENALTIES), key=error)
    solved = vectors @ (right / (values + penalty)[:, None])
    return Fit(columns, mean, solved * scale[:, None], offset, penalty)


def _undetermined(probe: Probe, n: float, d: int, counts: Tensor) -> str:
    if n < ITEMS_PER_COLUMN * d:
        return f"{n:.0f} training items are fewer than {ITEMS_PER_COLUMN} for each of {d} columns; set a lower limit"
    if probe.classes:
        seen = torch.where(counts > 0, counts, math.inf)  # a class that never occurs cannot be learned from anything
        if float(seen.min()) < ITEMS_PER_CLASS:
            return f"class {int(seen.argmin())} has {seen.min():.0f} training items, fewer than {ITEMS_PER_CLASS}"
    return ""


def probe_streams(
    probe: Probe, collective: Collective, train: Labelled, held_out: Labelled, level: float = 0.95
) -> ProbeStats:
    """Fit on every rank's training items, score on every rank's held-out items. See `intervals.ratio_sums` for groups.

    R^2 is of all outputs together, against the training items' mean. Moving a stream's features or multiplying them by
    a number changes nothing but rounding (relative 1e-13 (shift / deviation)^2). Not for ranking streams.

    All ranks must call it. Errors: ValueError for items of another shape than the probe's; under several ranks a
    RuntimeError on each that names the rank. Comm: one all_gather_object (errors), one all_reduce (the training sums),
    one all_gather_object (the held-out items' scores, 8 bytes an item and probe); none in a single process. Sync:
    blocks.
    """
    failure: Exception | None = None
    try:
        probe.check(train)
        probe.check(held_out)
    except Exception as error:  # raised on every rank below, so that none waits for this one
        failure = error
    place = collective.topology.data_rank
    everyone = collective.gather((None if failure is None else describe(failure), place))
    raise_together([error for error, _ in everyone], failure)
    part = 1.0 / sum(other == place for _, other in everyone)  # ranks that hold parts of one model count as one
    packet = part * probe.sums(train)
    total = collective.all_reduce(packet.to(collective.device_for(packet.device))).wait()
    names = tuple(probe.widths)
    subsets = {(name,) for name in names} | {names} | {tuple(n for n in names if n != left) for left in names}
    fits = {subset: fit(probe, total, subset) for subset in sorted(subsets) if subset}
    scores, groups = _gathered(collective, _scores(probe, fits, held_out), held_out)
    base = scores.pop(_BASE)
    ones = torch.ones_like(base)
    figure = _RIGHT if probe.classes else _EXPLAINED

    def gain(more: Any, less: Any, figure: str = figure) -> Estimate:
        change = scores[figure, more] - scores[figure, less]
        share = figure == _RIGHT
        return ratio(ratio_sums(change, ones if share else base, groups), level, unit_range=share)

    def known(subset: tuple[str, ...]) -> Known:
        own = ratio_sums(scores[figure, subset], ones if probe.classes else base, groups)
        score = _score(own, level, probe.classes)
        return Known(score, gain(subset, ()), gain(subset, (), _EXPLAINED), fits[subset].undetermined)

    others = {left: tuple(name for name in names if name != left) for left in names}
    return ProbeStats(
        {name: known((name,)) for name in names},
        known(names),
        {left: gain(names, rest) for left, rest in others.items()},
        {left: gain(names, rest, _EXPLAINED) for left, rest in others.items()},
        gain(names, _MODEL),
        Scores({name: scores[_EXPLAINED, (name,)] for name in names}, base, groups),
    )


_MODEL, _RIGHT, _EXPLAINED, _BASE = "model", "right", "explained", "base"


def _score(sums: RatioSums, level: float, classes: bool) -> Estimate:
    if classes and sums.groups == sums.items and math.isfinite(sums.y):
        return wilson(round(sums.y), round(sums.items), level)
    return ratio(sums, level, unit_range=classes, least=0.0)


def _scores(probe: Probe, fits: Mapping[tuple[str, ...], Fit], held_out: Labelled) -> dict[Any, Tensor]:
    """What each of this rank's items brings: right or not, and how much of its squared distance from the training mean
    (the base) is explained; by subset of streams, `()` for the best constant, and the model."""
    x = probe.project(held_out)
    targets = held_out.targets.to(x.device)
    offset = next(iter(fits.values())).offset.to(x)
    chunk = max(_CHUNK_CELLS // probe.outputs, 1)
    found: dict[Any, list[Tensor]] = {}

    def note(who: Any, right: Tensor, explained: Tensor) -> None:
        found.setdefault((_RIGHT, who), []).append(right)
        found.setdefault((_EXPLAINED, who), []).append(explained)

    for start in range(0, max(len(x), 1), chunk):
        rows, wanted = x[start : start + chunk], targets[start : start + chunk]
        unknown = torch.full((len(rows),), math.nan, dtype=torch.float64, device=x.device)
        truth = torch.nn.functional.one_hot(wanted.long(), probe.outputs).double() if probe.classes else wanted.double()
        base = (truth - offset).square().sum(1)
        found.setdefault(_BASE, []).append(base)
        note((), (wanted == offset.argmax()).double() if probe.classes else unknown, torch.zeros_like(base))
        right, explained = unknown, unknown
        if held_out.prediction is not None:
            predicted = held_out.prediction[start : start + chunk].to(x.device)
            if probe.classes:
                right = (predicted == wanted).double()
            else:
                explained = base - (truth - predicted.double()).square().sum(1)
        note(_MODEL, right, explained)
        for subset, fitted in fits.items():
            if fitted.undetermined:
                note(subset, unknown, unknown)
                continue
            values = fitted.predict(rows)
            right = (values.argmax(1) == wanted).double() if probe.classes else unknown
            finite = values.isfinite().all(1)
            note(subset, torch.where(finite, right, math.nan), base - (truth - values).square().sum(1))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _gathered(
    collective: Collective, scores: Mapping[Any, Tensor], held_out: Labelled
) -> tuple[dict[Any, Tensor], Tensor | None]:
    """All ranks' items, in their order: scores and groups."""
    own = torch.stack([values.double().cpu() for values in scores.values()])
    order = torch.zeros(own.shape[1], dtype=torch.long, device="cpu") if held_out.order is None else held_out.order
    integers = torch.stack([order.cpu().long(), (order if held_out.groups is None else held_out.groups).cpu().long()])
    found = collective.gather((collective.topology.data_rank, own, integers, held_out.groups is not None))
    by_place = {place: (rows, marks) for place, rows, marks, _ in reversed(found)}
    rows, marks = (torch.cat([by_place[place][which] for place in sorted(by_place)], 1) for which in (0, 1))
    places = torch.argsort(marks[0], stable=True)
    grouped = any(given for *_, given in found)
    return dict(zip(scores, rows[:, places], strict=True)), marks[1][places] if grouped else None
