"""Exchanged inputs: who gets whose, where they lie in a batch, through features or in the batch, and the error."""

from __future__ import annotations

import itertools
import math
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from ddp_streammon import Items, StreamSet, classification
from ddp_streammon.collective import Collective
from ddp_streammon.evaluation import EvalStats, Plan, Replacement, measure
from ddp_streammon.evaluation.exchange import exchanged, exchanged_mean, partners
from ddp_streammon.evaluation.intervals import Estimate, mean_sums, ratio

EXACT = {"rel": 1e-9, "abs": 1e-12}
TRIALS = 600
NAMES = {"rgb": "rgb", "depth": "depth"}

# Who gets whose ---------------------------------------------------------------------------------------------------


def every(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bool)


def test_items_change_places_in_pairs_and_one_odd_item_makes_a_ring_of_three() -> None:
    assert partners(every(6)).tolist() == [3, 4, 5, 0, 1, 2]
    assert partners(every(7)).tolist() == [3, 4, 5, 6, 1, 2, 0]
    assert partners(every(3)).tolist() == [1, 2, 0]
    assert partners(every(2)).tolist() == [1, 0]
    assert partners(every(1)).tolist() == [0]
    assert partners(every(0)).tolist() == []


def test_items_that_are_not_eligible_keep_their_own_and_lend_it_to_nobody() -> None:
    eligible = torch.tensor([True, False, True, True, False, True, True])
    order = partners(eligible)
    assert order[~eligible].tolist() == [1, 4]
    assert order[eligible].tolist() == [3, 5, 6, 2, 0]
    assert partners(torch.tensor([False, True, False])).tolist() == [0, 1, 2]


def test_partners_are_of_different_groups_wherever_no_group_has_more_than_half() -> None:
    large = 2**62  # and integers beyond what a float holds
    for count in range(2, 7):
        for labels in itertools.product((large, large + 1, -3), repeat=count):
            groups = torch.tensor(labels)
            order = partners(every(count), groups)
            assert sorted(order.tolist()) == list(range(count))
            assert bool((order != torch.arange(count)).all())
            if max(labels.count(label) for label in labels) <= count // 2:
                assert bool((groups[order] != groups).all()), labels


# Where they lie in a batch ----------------------------------------------------------------------------------------


class Pair(NamedTuple):
    image: Tensor
    text: Tensor


@dataclass(frozen=True)
class Record:
    image: Tensor
    label: Tensor


ORDER = torch.tensor([1, 2, 0])
IMAGE, TEXT = torch.arange(6.0).view(3, 2), torch.arange(3)
MOVED = IMAGE[ORDER]


@pytest.mark.parametrize(
    ("batch", "where", "found"),
    [
        ((IMAGE, TEXT), 0, lambda b: b[0]),
        ([IMAGE, TEXT], "0", lambda b: b[0]),
        ((TEXT, (TEXT, IMAGE)), "1.1", lambda b: b[1][1]),
        ({"x": IMAGE, "y": TEXT}, "x", lambda b: b["x"]),
        (OrderedDict(x=IMAGE), "x", lambda b: b["x"]),
        (MappingProxyType({"x": IMAGE}), "x", lambda b: b["x"]),
        ({"inputs": {"x": IMAGE}, "y": TEXT}, "inputs.x", lambda b: b["inputs"]["x"]),
        (({"x": IMAGE}, TEXT), "0.x", lambda b: b[0]["x"]),
        (Pair(IMAGE, TEXT), 0, lambda b: b.image),
        (Pair(IMAGE, TEXT), "image", lambda b: b.image),
        (Record(IMAGE, TEXT), "image", lambda b: b.image),
        (SimpleNamespace(image=IMAGE, path="x.png"), "image", lambda b: b.image),
        ({"x": {"deep": [IMAGE, TEXT]}}, "x", lambda b: b["x"]["deep"][0]),
    ],
)
def test_a_stream_lies_anywhere_in_a_batch(batch: Any, where: Any, found: Any) -> None:
    changed = exchanged(batch, where, ORDER)
    assert type(changed) is (dict if isinstance(batch, MappingProxyType) else type(batch))
    assert torch.equal(found(changed), MOVED)
    assert torch.equal(found(batch), IMAGE)  # the batch itself is left alone


def test_what_is_not_named_stays_and_several_places_move_together() -> None:
    batch = {"x": IMAGE, "mask": IMAGE > 2, "y": TEXT, "captions": ["a", "b", "c"], "size": (3, 4), "scale": 2.0}
    changed = exchanged(batch, ["x", "mask", "captions"], ORDER)
    assert torch.equal(changed["x"], MOVED) and torch.equal(changed["mask"], MOVED > 2)
    assert changed["captions"] == ["b", "c", "a"] and batch["captions"] == ["a", "b", "c"]
    assert {name: changed[name] for name in ("y", "size", "scale")} == {
        name: batch[name] for name in ("y", "size", "scale")
    }
    assert exchanged((("a", "b", "c"), TEXT), 0, ORDER)[0] == ("b", "c", "a")


@pytest.mark.parametrize(
    ("batch", "where", "message"),
    [
        ({"x": IMAGE, "y": TEXT}, "z", "swap: there is no 'z' in the batch; it has x, y"),
        ({"x": {"a": IMAGE}}, "x.b", "swap: there is no 'x.b' in the batch; it has a"),
        ((IMAGE, TEXT), 2, "swap: there is no '2' in the batch; it has 0, 1"),
        (Pair(IMAGE, TEXT), "depth", "swap: there is no 'depth' in the batch; it has 0, 1"),
        (Record(IMAGE, TEXT), "depth", "swap: there is no 'depth' in the batch; it has attributes of Record"),
        (IMAGE, "depth", "swap: there is no 'depth' in the batch; it has attributes of Tensor"),
        (
            {"x": IMAGE[:2]},
            "x",
            "swap: 'x' cannot be exchanged between items: nothing in it has 3 entries, one an item",
        ),
        ({"x": 3.0}, "x", "swap: 'x' cannot be exchanged between items: nothing in it has 3 entries, one an item"),
        (
            (["a", "b"], TEXT),
            0,
            "swap: '0' cannot be exchanged between items: nothing in it has 3 entries, one an item",
        ),
    ],
)
def test_a_place_that_is_not_there_is_named(batch: Any, where: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        exchanged(batch, where, ORDER)
    assert str(caught.value) == message


# Through features, or in the batch --------------------------------------------------------------------------------


class Two(nn.Module):
    """`kind` says what the encoders are, and what the rest does with the features."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, reads = kind, kind == "reads"
        self.rgb, self.depth = Encoder(3, kind), nn.Linear(8 if reads else 4, 5)
        self.head = nn.Linear(10, 4)
        self.double()

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        x = self.rgb(rgb) if self.kind != "twice" else self.rgb(rgb) + self.rgb(2 * rgb).square()
        y = self.depth(torch.cat([depth, x[:, :4]], 1) if self.kind == "reads" else depth)
        if self.kind == "in place":
            x.relu_()
            y.mul_(2)
        logits: Tensor = self.head(torch.cat([x.expand(len(y), -1), y], 1))
        return logits


class Encoder(nn.Linear):
    def __init__(self, width: int, kind: str) -> None:
        super().__init__(width, 5)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        features = super().forward(x)
        if self.kind == "batch":  # an item's features depend on those before it
            return features.cumsum(0)
        return features.mean(0, keepdim=True) if self.kind == "no items" else features


def data(count: int = 11, seed: int = 1) -> TensorDataset:
    chance = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(count, width, generator=chance, dtype=torch.float64) for width in (3, 4)]
    return TensorDataset(*inputs, torch.randint(4, (count,), generator=chance))


def variants(how: Replacement) -> dict[str, dict[str, Replacement]]:
    return {"rgb": {"rgb": how}, "depth": {"depth": how}, "both": {"rgb": how, "depth": how}}


def tried(net: nn.Module, plan: Plan, score: Any = None, size: int = 4) -> EvalStats:
    items = Items(DataLoader(data(), size))
    return measure(StreamSet.resolve(net, NAMES), Collective(), {"val": items}, score or classification(), plan)


def directly(net: nn.Module, streams: tuple[str, ...], size: int = 4) -> list[float]:
    """Each item's loss with the inputs themselves permuted, batch by batch."""
    losses = []
    for rgb, depth, target in DataLoader(data(), size):
        order = partners(every(len(target)))
        given = [x[order] if name in streams else x for name, x in (("rgb", rgb), ("depth", depth))]
        losses += functional.cross_entropy(net(*given), target, reduction="none").tolist()
    return losses


@pytest.mark.parametrize("by", ["features", "input"])
@pytest.mark.parametrize("kind", ["plain", "in place", "twice", "batch"])
def test_exchanged_features_are_those_of_exchanged_inputs(kind: str, by: str) -> None:
    net = Two(kind)
    swap = {"rgb": 0, "depth": "1"} if by == "input" else {}
    found = tried(net, Plan(variants(Replacement.exchange), swap=swap))
    table = found.tables["val"]
    for variant, streams in (("full", ()), ("rgb", ("rgb",)), ("depth", ("depth",)), ("both", ("rgb", "depth"))):
        assert table.figures[variant, "loss"].tolist() == pytest.approx(directly(net, streams), **EXACT)
    assert table.partner["rgb"].tolist() == table.partner["both"].tolist() == [2, 3, 0, 1, 6, 7, 4, 5, 9, 10, 8]
    assert found.readers == frozenset()
    assert found.replayed is (kind != "batch")
    assert found.seconds > 0 == tried(net, Plan({})).seconds


def runs(net: Two, plan: Plan) -> dict[str, int]:
    """How many items each encoder was run on."""
    counts = dict.fromkeys(NAMES, 0)
    for name in NAMES:
        encoder = getattr(net, name)

        def counted(given: Tensor, name: str = name, forward: Any = encoder.forward) -> Tensor:
            counts[name] += len(given)
            output: Tensor = forward(given)
            return output

        encoder.forward = counted
    tried(net, plan)
    return counts


def test_encoders_run_once_but_for_a_few_items_that_show_whether_they_may_be_replayed() -> None:
    assert runs(Two("plain"), Plan(variants(Replacement.exchange))) == {"rgb": 11 + 4, "depth": 11 + 4}
    assert runs(Two("batch"), Plan(variants(Replacement.exchange))) == {"rgb": 11 + 4 + 2 * 11, "depth": 11 + 4}


def test_partners_are_drawn_once_a_batch_whatever_the_number_of_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    module, drawn = sys.modules["ddp_streammon.evaluation.measure"], []
    monkeypatch.setattr(module, "partners", lambda *given: drawn.append(len(given[0])) or partners(*given))
    table = tried(Two("plain"), Plan(variants(Replacement.exchange))).tables["val"]
    assert drawn == [4, 4, 3]
    assert table.partner.keys() == {"rgb", "depth", "both"}


def test_a_stream_that_reads_anothers_features_is_exchanged_by_its_input_alone() -> None:
    net = Two("reads")
    by_features = tried(net, Plan(variants(Replacement.exchange)))
    assert by_features.readers == {"depth"} and not by_features.replayed
    rgb = by_features.tables["val"].figures["rgb", "loss"]
    assert rgb.tolist() == pytest.approx(directly(net, ("rgb",)), **EXACT)
    found = tried(net, Plan(variants(Replacement.exchange), swap={"depth": 1})).tables["val"]
    for variant in ("rgb", "depth"):
        assert found.figures[variant, "loss"].tolist() == pytest.approx(directly(net, (variant,)), **EXACT)
    both = tried(net, Plan(variants(Replacement.exchange), swap={"rgb": 0, "depth": 1})).tables["val"]
    assert both.figures["both", "loss"].tolist() == pytest.approx(directly(net, ("rgb", "depth")), **EXACT)


class ReadsNumber(Two):
    """depth's encoder is called with a number that is read off rgb's features."""

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        x = self.rgb(rgb)
        logits: Tensor = self.head(torch.cat([x, self.depth(depth, scale=x[0, 0].item())], 1))
        return logits


class Scaled(nn.Linear):
    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return super().forward(x) * scale


def test_an_encoder_that_is_called_with_another_number_is_not_replayed() -> None:
    net = ReadsNumber("plain")
    net.depth = Scaled(4, 5).double()
    found = tried(net, Plan(variants(Replacement.exchange)))
    assert found.readers == {"depth"} and not found.replayed
    assert found.tables["val"].figures["rgb", "loss"].tolist() == pytest.approx(directly(net, ("rgb",)), **EXACT)


def test_features_without_a_dimension_of_items_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError) as caught:
        tried(Two("no items"), Plan(variants(Replacement.exchange)))
    assert str(caught.value) == (
        "rgb: its features have no dimension of the 4 items in front, so those of stream 'rgb' cannot be exchanged; "
        "say where its input lies in the batch: swap={'rgb': <its key or position>}"
    )
    net = Two("no items")
    found = tried(net, Plan({"rgb": {"rgb": Replacement.exchange}}, swap={"rgb": 0})).tables["val"]
    assert found.figures["rgb", "loss"].tolist() == pytest.approx(directly(net, ("rgb",)), **EXACT)


def test_a_stream_without_modules_is_exchanged_in_the_batch() -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rgb = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
            self.depth = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

        def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
            return rgb @ self.rgb + depth @ self.depth

    net = Weights()
    found = tried(net, Plan(variants(Replacement.exchange), swap={"rgb": 0, "depth": 1})).tables["val"]
    assert found.figures["both", "loss"].tolist() == pytest.approx(directly(net, ("rgb", "depth")), **EXACT)
    assert found.figures["rgb", "loss"].tolist() == pytest.approx(directly(net, ("rgb",)), **EXACT)


def test_a_score_may_take_its_batch_apart() -> None:
    """`batch.pop("labels")` before `model(**batch)` is usual."""

    def score(net: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        target = batch.pop("label")
        return {"loss": functional.cross_entropy(net(**batch), target, reduction="none")}

    def mapping(items: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        return dict(zip(("rgb", "depth", "label"), map(torch.stack, zip(*items, strict=True)), strict=True))

    net = Two("plain")
    loader = DataLoader(data(), 4, collate_fn=mapping)
    plan = Plan(variants(Replacement.exchange), swap={"depth": "depth"})
    found = measure(StreamSet.resolve(net, NAMES), Collective(), {"val": Items(loader)}, score, plan).tables["val"]
    for variant in ("rgb", "depth"):
        assert found.figures[variant, "loss"].tolist() == pytest.approx(directly(net, (variant,)), **EXACT)


def test_features_at_their_mean_are_those_of_the_mean_given() -> None:
    net = Two("twice")
    given = {"rgb": data(40, 2).tensors[0], "depth": data(40, 2).tensors[1]}
    first, second = net.rgb(given["rgb"]).mean(0), net.rgb(2 * given["rgb"]).mean(0)
    depth = net.depth(given["depth"]).mean(0)
    means = {("rgb", 0): [first], ("rgb", 1): [second], ("depth", 0): [depth]}
    found = tried(net, Plan(variants(Replacement.mean), means=means)).tables["val"]
    rgb, own, target = data().tensors
    x, y = net.rgb(rgb) + net.rgb(2 * rgb).square(), net.depth(own)
    mean_x, mean_y = (first + second.square()).expand_as(x), depth.expand_as(y)
    for variant, features in (("rgb", (mean_x, y)), ("depth", (x, mean_y)), ("both", (mean_x, mean_y))):
        loss = functional.cross_entropy(net.head(torch.cat(features, 1)), target, reduction="none")
        assert found.figures[variant, "loss"].tolist() == pytest.approx(loss.tolist(), **EXACT)


def test_the_first_items_alone_are_tried_whole_batches_at_a_time() -> None:
    batches: list[int] = []
    score = classification()
    for limit, count in ((1, 4), (4, 4), (5, 8), (8, 8), (9, 11), (11, 11), (None, 11)):
        table = tried(
            Two("plain"),
            Plan(variants(Replacement.exchange), limit=limit),
            lambda net, batch: batches.append(len(batch[-1])) or score(net, batch),
        ).tables["val"]
        assert sum(batches) == 11 + 3 * count
        batches.clear()
        assert table.tried.tolist() == [True] * count + [False] * (11 - count)
        assert table.figures["rgb", "loss"].isnan().tolist() == [False] * count + [True] * (11 - count)
        assert not table.figures["full", "loss"].isnan().any()
        assert table.value("rgb", "loss") == pytest.approx(math.fsum(directly(Two("plain"), ("rgb",))[:count]) / count)
        rise = table.rise("rgb", "loss", ["rgb"])
        assert rise.items == count
        assert rise.value == pytest.approx(
            table.value("rgb", "loss") - float(table.figures["full", "loss"][:count].mean())
        )


class Foreign(list[Any]):
    """Batches of no DataLoader, which says how many items they have."""

    batch_size = 4


def test_a_batch_is_among_the_first_by_where_it_begins_as_far_as_the_loader_says() -> None:
    by_size = DataLoader(data(), 4), DataLoader(data(), batch_sampler=BatchSampler(range(11), 4, False)), Foreign()
    for loader in by_size:
        items = Items(loader)
        assert items.batch_size == 4
        assert [items.among(8, place, count) for place, count in ((0, 4), (1, 4), (2, 3))] == [True, True, False]
    whole = Items([])
    assert whole.batch_size is None and whole.among(8, 1, 7) and not whole.among(8, 1, 8) and whole.among(None, 9, 9)


# The error of the mean --------------------------------------------------------------------------------------------


def half_width(residuals: np.ndarray[Any, Any], weight: float, groups: float) -> float:
    """Of a ratio estimator with these cluster totals of the residuals."""
    return float(
        stats.t.ppf(0.975, groups - 1) * math.sqrt(float(np.square(residuals).sum()) * groups / (groups - 1)) / weight
    )


def bounds_of(estimate: Estimate) -> tuple[float, float]:
    return estimate.low, estimate.high


def test_items_that_met_are_a_cluster_each() -> None:
    rng = np.random.default_rng(0)
    for count in (12, 13):  # 13: with a ring of three
        partner = partners(every(count))
        values, weights = torch.from_numpy(rng.standard_normal(count)), torch.from_numpy(rng.uniform(1, 3, count))
        clusters: dict[frozenset[int], list[int]] = {}
        for item in range(count):
            ring = frozenset({item, int(partner[item]), int(partner[partner[item]])})
            clusters.setdefault(ring, []).append(item)
        assert sorted(map(len, clusters.values())) == [2] * 5 + [count - 10]
        mean = float((values * weights).sum() / weights.sum())
        residuals = (weights * (values - mean)).numpy()
        totals = np.array([residuals[members].sum() for members in clusters.values()])
        found = exchanged_mean(values, weights, partner, None, 0.95, unit_range=False)
        half = half_width(totals, float(weights.sum()), 6)
        assert (found.value, *bounds_of(found)) == pytest.approx((mean, mean - half, mean + half), **EXACT)
        assert (found.items, found.groups) == (count, 6)
        assert found.skew == pytest.approx((totals**3).sum() / np.square(totals).sum() ** 1.5)


def grouped(seed: int, count: int, labels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, weights, partners and groups: a value holds its own group's part and its partner's."""
    rng = np.random.default_rng(seed)
    groups = torch.from_numpy(rng.integers(0, labels, count)) * 2**40 - 3
    partner = torch.cat([partners(every(8), groups[start : start + 8]) + start for start in range(0, count, 8)])
    part = torch.from_numpy(rng.standard_normal(labels))[(groups + 3) // 2**40]
    values = part + 0.8 * part[partner] + torch.from_numpy(rng.standard_normal(count))
    return values, torch.from_numpy(rng.uniform(0.5, 2, count)), partner, groups


def test_items_that_share_a_group_at_either_end_depend_on_each_other() -> None:
    for seed in range(5):
        values, weights, partner, groups = grouped(seed, 64, 9 + seed)
        mean = float((values * weights).sum() / weights.sum())
        residuals = (weights * (values - mean)).tolist()
        ends = [{int(groups[i]), int(groups[partner[i]])} for i in range(64)]
        squares = math.fsum(residuals[i] * residuals[j] for i in range(64) for j in range(64) if ends[i] & ends[j])
        touched = len(set().union(*ends))
        dyads = {frozenset(both) for both in ends if len(both) == 2}
        count = max(touched - len(dyads), touched / 2)
        dyadic = half_width(np.array([math.sqrt(max(squares, 0))]), float(weights.sum()), count)
        plain = ratio(mean_sums(values, weights, groups))
        found = exchanged_mean(values, weights, partner, groups, 0.95, unit_range=False)
        assert found.value == pytest.approx(mean, **EXACT)
        assert found.high - found.value == pytest.approx(max(dyadic, plain.high - mean), **EXACT)
        assert dyadic > plain.high - mean or found == plain
        of_groups = [
            math.fsum(r for r, both in zip(residuals, ends, strict=True) if end in both) for end in set().union(*ends)
        ]
        of_dyads = [math.fsum(r for r, both in zip(residuals, ends, strict=True) if both == dyad) for dyad in dyads]
        cubes = math.fsum(total**3 for total in of_groups) - math.fsum(total**3 for total in of_dyads)
        assert found == plain or found.skew == pytest.approx(cubes / squares**1.5)


def test_partners_that_make_up_for_each_other_do_not_narrow_the_interval() -> None:
    groups = torch.arange(16) // 2
    partner = partners(every(16), groups)
    values = torch.linspace(1, 2, 16, dtype=torch.float64)
    values[partner[:8]] = -values[:8]  # what one loses its partner gains
    found = exchanged_mean(values, torch.ones(16).double(), partner, groups, 0.95, unit_range=False)
    assert found == ratio(mean_sums(values, None, groups))
    assert found.high > 0.3


@pytest.mark.parametrize("with_groups", [True, False])
def test_items_without_weight_count_for_nothing_whatever_their_value(with_groups: bool) -> None:
    values, weights, partner, groups = grouped(0, 32, 7)
    expected = exchanged_mean(values, weights, partner, groups if with_groups else None, 0.95, unit_range=False)
    padded = torch.cat([values, torch.tensor([math.nan, math.inf, 5.0])])
    found = exchanged_mean(
        padded,
        torch.cat([weights, torch.zeros(3)]),
        torch.cat([partner, torch.arange(32, 35)]),
        torch.cat([groups, groups[:1], torch.tensor([8, 9])]) if with_groups else None,
        0.95,
        unit_range=False,
    )
    assert (found.value, *bounds_of(found)) == pytest.approx((expected.value, *bounds_of(expected)), **EXACT)
    assert (found.items, found.groups) == (expected.items, expected.groups)


def test_nothing_exchanged_is_nan() -> None:
    nothing, rows = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.long)
    for groups in (None, rows):
        found = exchanged_mean(nothing, nothing, rows, groups, 0.95, unit_range=False)
        assert math.isnan(found.value) and found.items == found.groups == 0


@pytest.mark.parametrize(("labels", "blind"), [(None, 0.90), (30, 0.88)])
def test_the_interval_covers_the_truth_as_often_as_it_says(labels: int | None, blind: float) -> None:
    """What an item gains depends on its own input and on its partner's; knowing that, and not, 600 times."""
    rng = np.random.default_rng(0)
    count, covered, blindly = 120, 0, 0
    for _ in range(TRIALS):
        groups = None if labels is None else torch.from_numpy(rng.integers(0, labels, count))
        partner = partners(every(count), groups)
        own = rng.standard_normal(count if labels is None else labels)
        part = torch.from_numpy(own)[torch.arange(count) if groups is None else groups]
        values = part + part[partner] + 0.3 * torch.from_numpy(rng.standard_normal(count))
        found = exchanged_mean(values, torch.ones(count).double(), partner, groups, 0.95, unit_range=False)
        covered += found.low <= 0 <= found.high
        alone = ratio(mean_sums(values, None, groups))
        blindly += alone.low <= 0 <= alone.high
    assert 0.93 <= covered / TRIALS <= 0.98
    assert blindly / TRIALS < blind
