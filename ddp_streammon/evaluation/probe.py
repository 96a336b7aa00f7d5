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
PENALTY = 1e-3
"""lambda relative to trace / d of the standardised features' X'X, which is the number of items. Directions with less
than this share of the mean variance are hardly used: rounding (bf16: 4e-6 of the variance) lies far below it, and the
condition number stays below d / PENALTY. Chosen for that, not tuned; scores move little with it (a test)."""
CONSTANT = 1e-10
"""A column whose variance is below this share of its mean square is constant: the rest is rounding."""
MAX_BYTES = 64 * 2**20
_CHUNK_CELLS = 2**22


class Labelled(NamedTuple):
    """This rank's items. Shape: features [N, width] a stream, targets [N] (classes) or [N, outputs] (regression).

    `prediction` is the model's own, for the head gap: classes [N], or [N, outputs]; `groups` [N] integers, for items
    that are not independent. A rank without items gives no features and targets of length 0.
    """

    features: Mapping[str, Tensor]
    targets: Tensor
    prediction: Tensor | None = None
    groups: Tensor | None = None


@dataclass(frozen=True)
class Known:
    """Accuracy or R^2 on the held-out items, and how much that is above the training items' majority class (or mean).
    Both are nan where `undetermined` says why."""

    score: Estimate
    advantage: Estimate
    undetermined: str = ""


@dataclass(frozen=True)
class ProbeStats:
    """Equal on every rank. Differences are paired by item; nan where a probe that they need is undetermined.

    `complement[s]` = probe(all) - probe(all but s); `head_gap` = probe(all) - model.
    """

    alone: Mapping[str, Known]
    everything: Known
    complement: Mapping[str, Estimate]
    head_gap: Estimate


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
        """Of the training sums: X'X, X'Y, X'1, Y'1 (the class counts) and n."""
        d, outputs = self.dim, self.outputs
        shapes = {"xx": (d, d), "xy": (d, outputs), "x": (d,), "y": (outputs,), "n": ()}
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
        for name in ("prediction", "groups"):
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
                signs = torch.randint(0, 2, (width, kept), generator=chance) * 2.0 - 1
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
        else:
            xy, y = x.T @ targets.double(), targets.double().sum(0)
        n = torch.tensor(float(len(x)))
        return self.layout.pack({"xx": x.T @ x, "xy": xy, "x": x.sum(0), "y": y, "n": n}, 0, x.device)


@dataclass(frozen=True)
class Fit:
    """A ridge of some streams: prediction = (x - mean) @ coefficients + offset; `undetermined` says why there is none.

    Shape: mean [d'], coefficients [d', outputs], offset [outputs] (the training mean, or class shares).
    """

    columns: Sequence[int]
    mean: Tensor
    coefficients: Tensor
    offset: Tensor
    undetermined: str = ""

    def predict(self, x: Tensor, classes: bool) -> Tensor:
        """Shape: x [N, d] in; classes [N] (-1 where features are not finite), or values [N, outputs], out."""
        own, mean, coefficients = x[:, list(self.columns)], self.mean.to(x), self.coefficients.to(x)
        parts = []
        for rows in torch.split(own, max(_CHUNK_CELLS // len(self.offset), 1)):
            values = (rows - mean) @ coefficients + self.offset.to(x)
            parts.append(torch.where(values.isfinite().all(1), values.argmax(1), -1) if classes else values)
        return torch.cat(parts)


def fit(probe: Probe, packet: Tensor, streams: Sequence[str]) -> Fit:
    """The ridge of these streams' columns, standardised, with an unpenalised offset; float64, by Cholesky.

    `packet` is the sum of all training packets, on the host. What `sklearn.linear_model.Ridge(alpha=PENALTY * n)` gives
    on standardised features. Comm, Sync: none.
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
        return Fit(columns, mean, torch.zeros_like(xy), offset, why)
    covariance = xx / n - torch.outer(mean, mean)
    variance = covariance.diagonal()
    scale = torch.where(variance > CONSTANT * xx.diagonal() / n, variance.clamp(min=0).rsqrt(), 0.0)
    gram = covariance * torch.outer(scale, scale) + PENALTY * torch.eye(len(columns), dtype=torch.float64)
    right = (xy / n - torch.outer(mean, offset)) * scale[:, None]
    solved = torch.cholesky_solve(right, torch.linalg.cholesky(gram))
    return Fit(columns, mean, solved * scale[:, None], offset)


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
    RuntimeError on each that names the rank. Comm: one all_gather_object (errors) and two all_reduces (the training
    sums; the held-out ones); none in a single process. Sync: blocks.
    """
    failure: Exception | None = None
    try:
        probe.check(train)
        probe.check(held_out)
    except Exception as error:  # raised on every rank below, so that none waits for this one
        failure = error
    raise_together(collective.gather(None if failure is None else describe(failure)), failure)
    packet = probe.sums(train)
    total = collective.all_reduce(packet.to(collective.device_for(packet.device))).wait()
    names = tuple(probe.widths)
    subsets = {(name,) for name in names} | {names} | {tuple(n for n in names if n != left) for left in names}
    fits = {subset: fit(probe, total, subset) for subset in sorted(subsets) if subset}
    figures = _figures(probe, fits, held_out)
    layout = Layout((Field("sums", (len(figures), RatioSums.CELLS)),))
    cells = torch.stack([sums.cells() for sums in figures.values()])
    small = layout.pack({"sums": cells}, 0).to(collective.device_for(packet.device))
    fields = layout.unpack(collective.all_reduce(small).wait())["sums"]
    found = {name: RatioSums(*row) for name, row in zip(figures, fields, strict=True)}

    def gain(more: Sequence[str], less: Any) -> Estimate:
        return ratio(found[tuple(more), less], level, unit_range=probe.classes)

    def known(subset: tuple[str, ...]) -> Known:
        return Known(_score(found[subset, _NOTHING], level, probe.classes), gain(subset, ()), fits[subset].undetermined)

    complement = {left: gain(names, tuple(n for n in names if n != left)) for left in names}
    return ProbeStats({name: known((name,)) for name in names}, known(names), complement, gain(names, _MODEL))


_NOTHING = "nothing"
_MODEL = "model"


def _score(sums: RatioSums, level: float, classes: bool) -> Estimate:
    if classes and sums.groups == sums.items and math.isfinite(sums.y):
        return wilson(round(sums.y), round(sums.items), level)
    return ratio(sums, level)


def _figures(
    probe: Probe, fits: Mapping[tuple[str, ...], Fit], held_out: Labelled
) -> dict[tuple[tuple[str, ...], Any], RatioSums]:
    """Sums of (what is scored, what is taken off it): `()` the best constant, another subset, the model, or nothing.

    An item's score is correctness over 1, or (squared error of the mean - squared error) over the former.
    """
    x = probe.project(held_out)
    targets = held_out.targets.to(x.device)
    names = tuple(probe.widths)
    offset = fits[names].offset.to(x)
    constant = offset.argmax().expand(len(x)) if probe.classes else offset.expand(len(x), -1)
    base = torch.ones(len(x)) if probe.classes else (targets.double() - constant).square().sum(1)

    def scored(prediction: Tensor) -> Tensor:
        if probe.classes:
            return torch.where(prediction < 0, math.nan, (prediction == targets).double())
        return base - (targets.double() - prediction).square().sum(1)

    unknown = torch.full((len(x),), math.nan, dtype=torch.float64, device=x.device)
    scores: dict[Any, Tensor] = {(): scored(constant), _NOTHING: torch.zeros_like(unknown)}
    scores[_MODEL] = unknown if held_out.prediction is None else scored(held_out.prediction.to(x.device))
    for subset, fitted in fits.items():
        scores[subset] = unknown if fitted.undetermined else scored(fitted.predict(x, probe.classes))
    wanted: list[tuple[tuple[str, ...], Any]] = [(subset, less) for subset in fits for less in (_NOTHING, ())]
    wanted += [(names, tuple(n for n in names if n != left)) for left in names if len(names) > 1]
    wanted.append((names, _MODEL))
    return {(more, less): ratio_sums(scores[more] - scores[less], base, held_out.groups) for more, less in wanted}
