"""A joint model beside models that were trained on one of its streams alone: is a stream's encoder left behind?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ddp_streammon import keys
from ddp_streammon.collective import Collective
from ddp_streammon.evaluation import Estimate, Items, Plan, Score, measure, paired_proportions
from ddp_streammon.evaluation.knowledge import PROBE_ITEMS, Store, probed
from ddp_streammon.evaluation.student_t import t_quantile
from ddp_streammon.evaluation.table import LEVEL, Table
from ddp_streammon.streams import StreamLike, StreamSet

Autocast = Callable[[], AbstractContextManager[Any]]
_SPLIT = "val"


@dataclass(frozen=True)
class Comparison:
    """`<stream>_laziness` and, where every stream has references, `full_ensemble_gap`; equal on every rank."""

    estimates: Mapping[str, Estimate]
    text: str

    def values(self) -> dict[str, float]:
        """Each figure with its bounds."""
        found = {}
        for key, estimate in self.estimates.items():
            found[key] = estimate.value
            found[keys.bound(key, keys.LOW)], found[keys.bound(key, keys.HIGH)] = estimate.low, estimate.high
        return found


@dataclass(frozen=True)
class _Reference:
    """What the solo models give, which training does not change: each one's probe, by stream and seed, and which items
    the streams' models get right together, by seed."""

    probes: Mapping[str, Sequence[float]]
    right: Sequence[Tensor]


class _Averaged(nn.Module):
    """By seed the streams' log-probabilities, averaged."""

    def __init__(self, models: Mapping[str, Sequence[nn.Module]], places: Mapping[str, int]) -> None:
        super().__init__()
        self.models = nn.ModuleDict({name: nn.ModuleList(own) for name, own in models.items()})
        self.places = places
        self.seeds = min(map(len, models.values()))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """One input a stream of the joint model; returns [B, classes] a seed."""
        known: dict[str, list[Tensor]] = {}
        for name, own in self.models.items():
            assert isinstance(own, nn.ModuleList)
            known[name] = [model(inputs[self.places[name]]).float().log_softmax(1) for model in own]
        return [torch.stack([own[seed] for own in known.values()]).mean(0) for seed in range(self.seeds)]


@dataclass
class SoloReferences:
    """Models of one stream each, trained on the same items as the joint model, at least two seeds a stream.

    They are looked at once, then remembered. Memory: the models, on the device.
    """

    models: Mapping[str, Sequence[nn.Module]]
    specs: Mapping[str, StreamLike]
    names: Sequence[str]
    """The joint model's streams, in the order of its inputs."""
    device: torch.device
    _known: _Reference | None = field(default=None, init=False)

    def compare(
        self, joint: StreamSet, collective: Collective, train: Items, held_out: Items, score: Score, autocast: Autocast
    ) -> Comparison:
        """`laziness`: the score of a ridge probe of a solo model's features less that of the joint encoder's (accuracy,
        the same items and projection), the mean over seeds with t's interval over seeds, which knows nothing of other
        joint seeds. `ensemble_gap`: the accuracy of the solo models' averaged log-probabilities, one a stream, less the
        joint model's, the mean over seeds; the bounds are the lowest and the highest of the seeds' paired intervals.

        All ranks must call it. Comm: two times `measure`'s and one probe's a stream; at the first call as much again
        and one probe a solo model. Sync: blocks.
        """
        if self._known is None:
            self._known = self._look(collective, train, held_out, autocast)
        reference = self._known
        probe, table = _observed(joint, collective, train, held_out, score)
        own = {name: probe(name) for name in self.models}
        estimates = {
            keys.of_stream(name, keys.LAZINESS): over_seeds([alone - own[name] for alone in reference.probes[name]])
            for name in self.models
        }
        lines = [
            f"{name}: a probe of models of it alone is {_pp(estimates[keys.of_stream(name, keys.LAZINESS)])} above "
            f"that of its encoder here (95 % interval over {len(self.models[name])} seeds)"
            for name in self.models
        ]
        if set(self.models) == set(self.names):
            joint_right = table.figures[keys.FULL, "correct"]
            gap = _over_items([ahead(right, joint_right) for right in reference.right])
            estimates[keys.of_stream(keys.FULL, keys.ENSEMBLE_GAP)] = gap
            lines.append(
                f"the average of models of one stream each is {_pp(gap)} above this model's accuracy "
                f"(bounds over {len(reference.right)} seeds)"
            )
        return Comparison(estimates, "\n".join(lines))

    def _look(self, collective: Collective, train: Items, held_out: Items, autocast: Autocast) -> _Reference:
        places = {name: list(self.names).index(name) for name in self.models}
        ensemble = _Averaged(self.models, places).to(self.device).requires_grad_(False)
        encoders: dict[str, StreamLike] = {}
        labels = {name: [f"{name}-{seed}" for seed in range(len(own))] for name, own in self.models.items()}
        for name, own in self.models.items():
            for label, model in zip(labels[name], own, strict=True):
                roots = StreamSet.resolve(model, {name: self.specs[name]})[name].roots
                encoders[label] = [model.get_submodule(root) for root in roots]
        streams = StreamSet.resolve(ensemble, encoders)

        def score(model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
            *inputs, target = batch
            with autocast():
                log_probabilities = model(*inputs)
            right = {str(seed): (own.argmax(1) == target).double() for seed, own in enumerate(log_probabilities)}
            loss = nn.functional.nll_loss(log_probabilities[0], target, reduction="none")
            return {"loss": loss, "target": target, **right}

        probe, table = _observed(streams, collective, train, held_out, score)
        return _Reference(
            {name: [probe(label) for label in own] for name, own in labels.items()},
            [table.figures[keys.FULL, str(seed)] for seed in range(ensemble.seeds)],
        )


def _observed(
    streams: StreamSet, collective: Collective, train: Items, held_out: Items, score: Score
) -> tuple[Callable[[str], float], Table]:
    """What gives a probe's accuracy of a stream (nan where there are too few items); the held-out items' figures."""
    fitted, tried = Store(), Store()
    measure(streams, collective, {"train": train.first(PROBE_ITEMS)}, score, Plan({}), observe=fitted)
    result = measure(streams, collective, {_SPLIT: held_out.mixture()}, score, Plan({}), observe=tried)

    def probe(name: str) -> float:
        stats = probed(fitted, tried, (name,), collective).stats
        return math.nan if stats is None else stats.everything.score.value

    return probe, result.tables[_SPLIT]


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of independent values with Student's interval at 95 %, as many degrees of freedom as seeds but one."""
    mean, count = statistics.fmean(values), len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = t_quantile((1 + LEVEL) / 2, count - 1) * deviation / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count, count, count - 1, LEVEL)


def ahead(first: Tensor, second: Tensor) -> Estimate:
    """How many more of the same items the first gets right, as a share, paired. Shape: [N] of 0 and 1 each."""
    one, other = first.bool(), second.bool()
    both, ahead, behind = int((one & other).sum()), int((one & ~other).sum()), int((~one & other).sum())
    return paired_proportions(both, ahead, behind, len(one) - both - ahead - behind, LEVEL)


def _over_items(gaps: Sequence[Estimate]) -> Estimate:
    """Their mean, between the lowest and the highest bound."""
    low, high = min(gap.low for gap in gaps), max(gap.high for gap in gaps)
    return Estimate(statistics.fmean(gap.value for gap in gaps), low, high, gaps[0].items, gaps[0].groups, level=LEVEL)


def _pp(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} pp [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
