"""The ridge probe: scikit-learn's, equal on any number of ranks, blind to scale and shift, right where planted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.linear_model import Ridge
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor

from ddp_streammon.collective import Collective
from ddp_streammon.evaluation import probe as probes
from ddp_streammon.evaluation.intervals import Estimate, mean_sums, ratio
from ddp_streammon.evaluation.probe import PENALTIES, Labelled, Probe, ProbeStats, fit, probe_streams
from tests.ranks import run_ranks

WIDTHS = {"rgb": 12, "depth": 7, "audio": 5}
CLASSES = 4


def streams(count: int, seed: int, *, classes: bool = True) -> Labelled:
    """rgb knows the first half of the target, depth the second, audio nothing."""
    chance = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance, dtype=torch.float64)

    hidden = torch.randint(0, 2, (count, 2), generator=chance)
    features = {name: normal(count, width) for name, width in WIDTHS.items()}
    features["rgb"][:, :4] += 2.5 * hidden[:, :1]
    features["depth"][:, 1:4] += 2.5 * hidden[:, 1:]
    one_in_one = 2 * hidden[:, 0] + hidden[:, 1]
    targets = one_in_one if classes else torch.stack([hidden[:, 0] + 0.3 * normal(count), 0.3 * normal(count)], 1)
    return Labelled(features, targets)


def part(items: Labelled, rows: Any) -> Labelled:
    given = [None if value is None else value[rows] for value in (items.prediction, items.groups, items.order)]
    return Labelled({name: value[rows] for name, value in items.features.items()}, items.targets[rows], *given)


def flat(value: Any) -> list[float]:
    """Every number of a ProbeStats."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Estimate):
        return [value.value, value.low, value.high, value.items, value.groups]
    if isinstance(value, Mapping):
        return [number for name in sorted(value) for number in flat(value[name])]
    if hasattr(value, "__dataclass_fields__"):
        return [number for name in value.__dataclass_fields__ for number in flat(getattr(value, name))]
    return []


def run(train: Labelled, held_out: Labelled, **options: Any) -> ProbeStats:
    widths = {name: value.shape[1] for name, value in train.features.items()}
    return probe_streams(Probe(widths, **{"outputs": CLASSES, **options}), Collective(), train, held_out)


# Exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("subset", [("rgb",), ("rgb", "depth", "audio"), ("depth", "audio")])
def test_predictions_are_scikit_learns_ridge(classes: bool, subset: tuple[str, ...]) -> None:
    train, held_out = streams(500, 0, classes=classes), streams(100, 1, classes=classes)
    probe = Probe(WIDTHS, CLASSES if classes else 2, classes)
    fitted = fit(probe, probe.sums(part(train, slice(200))) + probe.sums(part(train, slice(200, None))), subset)
    x, new = (torch.cat([items.features[name] for name in subset], 1) for items in (train, held_out))
    mean, deviation = x.mean(0), x.std(0, correction=0)
    y = torch.nn.functional.one_hot(train.targets, CLASSES).double() if classes else train.targets
    assert fitted.penalty in PENALTIES
    ridge = Ridge(alpha=fitted.penalty * 500).fit(((x - mean) / deviation).numpy(), y.numpy())
    expected = torch.from_numpy(ridge.predict(((new - mean) / deviation).numpy()))
    all_columns = probe.project(held_out)
    assert torch.allclose(fitted.predict(all_columns), expected, rtol=0, atol=1e-10)


def cross_validation_error(x: Any, y: Any, penalty: float) -> float:
    """GCV by its definition: the residual of the hat matrix, over the square of the share of freedom that it leaves."""
    n = len(x)
    x, y = (x - x.mean(0)) / x.std(0), y - y.mean(0)
    hat = x @ np.linalg.inv(x.T @ x + penalty * n * np.eye(x.shape[1])) @ x.T + np.full((n, n), 1 / n)
    return float(np.square(y - hat @ y).sum() / n / np.square(np.trace(np.eye(n) - hat) / n))


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("signal", [0.0, 0.05, 1.0, 10.0])
def test_lambda_is_the_one_of_the_least_generalised_cross_validation_error(classes: bool, signal: float) -> None:
    """From noise, which asks for much, to a clear signal, which asks for little."""
    train = streams(300, 3, classes=classes)
    chance = torch.Generator().manual_seed(4)
    noisy = {
        name: signal * value + torch.randn(value.shape, generator=chance, dtype=torch.float64)
        for name, value in train.features.items()
    }
    probe = Probe(WIDTHS, CLASSES if classes else 2, classes)
    x = torch.cat(list(noisy.values()), 1).numpy()
    y = (torch.nn.functional.one_hot(train.targets, CLASSES).double() if classes else train.targets).numpy()
    errors = {penalty: cross_validation_error(x, y, penalty) for penalty in PENALTIES}
    found = fit(probe, probe.sums(train._replace(features=noisy)), tuple(WIDTHS)).penalty
    assert found == min(errors, key=lambda penalty: errors[penalty])
    assert found >= 1 if signal < 1 else found < 0.5


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("width", [4, 40])
def test_a_stream_of_noise_explains_nothing_of_four_hundred_items(classes: bool, width: int) -> None:
    for seed in range(5):
        chance = torch.Generator().manual_seed(seed)
        targets = torch.randint(0, 4, (800,), generator=chance) if classes else torch.randn(800, 2, generator=chance)
        items = Labelled({"noise": torch.randn(800, width, generator=chance)}, targets)
        options = {"classes": classes, "outputs": 4 if classes else 2}
        explained = run(part(items, slice(400)), part(items, slice(400, None)), **options).alone["noise"].explained
        assert explained.high < 0.02
        assert explained.low < 0 < explained.high or abs(explained.value) < 0.01


def test_accuracy_and_its_interval_are_those_of_the_predictions() -> None:
    train, held_out = streams(600, 0), streams(300, 1)
    found = run(train, held_out)
    probe = Probe(WIDTHS, CLASSES)
    right = fit(probe, probe.sums(train), ("rgb",)).predict(probe.project(held_out)).argmax(1) == held_out.targets
    score = found.alone["rgb"].score
    assert score.value == pytest.approx(float(right.double().mean()))
    assert (score.low, score.high) == pytest.approx(proportion_confint(int(right.sum()), 300, 0.05, "wilson"))
    majority = int(torch.bincount(train.targets).argmax())
    base = float((held_out.targets == majority).double().mean())
    assert found.alone["rgb"].advantage.value == pytest.approx(score.value - base)


def test_r2_is_against_the_training_mean() -> None:
    train, held_out = streams(400, 0, classes=False), streams(200, 1, classes=False)
    model = held_out.targets + 0.1 * torch.arange(400).double().reshape(200, 2) % 1 - 0.5
    found = run(train, held_out._replace(prediction=model), outputs=2, classes=False)
    probe = Probe(WIDTHS, 2, classes=False)
    predicted = fit(probe, probe.sums(train), tuple(WIDTHS)).predict(probe.project(held_out))
    error = (held_out.targets - predicted).square().sum()
    base = (held_out.targets - train.targets.mean(0)).square().sum()
    assert found.everything.score.value == pytest.approx(float(1 - error / base), rel=1e-9)
    of_model = 1 - (held_out.targets - model).square().sum() / base
    assert found.head_gap.value == pytest.approx(float(1 - error / base - of_model), rel=1e-9)
    assert found.everything.advantage.value == pytest.approx(found.everything.score.value)
    assert 0 < found.everything.score.low < found.everything.score.value < found.everything.score.high < 1
    assert found.complement["rgb"].low > 0.3
    assert abs(found.complement["depth"].value) < 0.05


def test_accuracy_of_items_in_groups_is_their_share_with_a_clustered_interval() -> None:
    train, held_out = streams(600, 0), streams(300, 1)
    clips = torch.arange(300) // 5
    score = run(train, held_out._replace(groups=clips)).alone["rgb"].score
    probe = Probe(WIDTHS, CLASSES)
    right = fit(probe, probe.sums(train), ("rgb",)).predict(probe.project(held_out)).argmax(1) == held_out.targets
    expected = ratio(mean_sums(right.double(), groups=clips), unit_range=True, least=0.0)
    assert flat(score) == pytest.approx(flat(expected)) and score.groups == 60


def test_several_labels_an_item_may_be_booleans() -> None:
    items, held_out = streams(400, 0), streams(200, 1)
    train, val = (torch.stack([of.targets > 1, of.targets % 2 == 1], 1) for of in (items, held_out))
    both = [
        run(
            items._replace(targets=train.to(dtype)),
            held_out._replace(targets=val.to(dtype), prediction=(~val).to(dtype)),
            outputs=2,
            classes=False,
        )
        for dtype in (torch.bool, torch.float64)
    ]
    assert flat(both[0]) == flat(both[1]) and both[0].complement["rgb"].low > 0.3


def shards(collective: Collective, bounds: Sequence[int], classes: bool) -> tuple[ProbeStats, int]:
    """Training items bounds[r] to bounds[r + 1] on rank r; held-out ones the other way round, in groups of two."""
    rank, world, outputs = collective.topology.rank, len(bounds) - 1, CLASSES if classes else 2
    train, held_out = streams(800, 0, classes=classes), streams(800, 1, classes=classes)
    held_out = held_out._replace(
        groups=torch.arange(800) // 2, prediction=held_out.targets.roll(1, 0), order=torch.arange(800)
    )
    mine = part(train, slice(bounds[rank], bounds[rank + 1]))
    other = world - 1 - rank
    scored = part(held_out, slice(bounds[other], bounds[other + 1]))
    scored, mine = (Labelled({}, shard.targets) if not len(shard.targets) else shard for shard in (scored, mine))
    calls: list[int] = []
    reduce = collective.all_reduce

    def counted(packet: Tensor) -> Any:
        calls.append(len(packet))
        return reduce(packet)

    collective.all_reduce = counted  # type: ignore[method-assign]
    return probe_streams(Probe(WIDTHS, outputs, classes, limit=18), collective, mine, scored), len(calls)


BOUNDS = ([0, 800], [0, 4, 800], [0, 0, 514, 800], [0, 300, 300, 302, 800])


def groups_of_one_to_four() -> list[tuple[ProbeStats, int]]:
    """What this rank finds in the groups of the first one to four ranks that it is in."""
    found = []
    for bounds in BOUNDS:
        world = len(bounds) - 1
        group = dist.new_group(list(range(world)))
        if dist.get_rank() < world:
            found += [shards(Collective(group), bounds, classes) for classes in (True, False)]
    return found


def test_one_to_four_ranks_agree_with_uneven_and_empty_shards() -> None:
    expected = [flat(shards(Collective(), [0, 800], classes)[0]) for classes in (True, False)]
    assert not any(math.isnan(number) for numbers in expected for number in numbers)
    answers = run_ranks(4, groups_of_one_to_four)
    assert [len(found) for found in answers] == [8, 6, 4, 2]
    for found in answers:
        for place, (stats, reductions) in enumerate(reversed(found)):
            assert flat(stats) == pytest.approx(expected[1 - place % 2], rel=1e-9, abs=1e-12)
            assert flat(stats) == flat(answers[0][-1 - place][0])
            assert reductions == 1


def wrong_shape_on_rank_1() -> str:
    collective = Collective()
    items = streams(100, 0)
    if collective.topology.rank == 1:
        items = items._replace(targets=items.targets + 9)
    try:
        probe_streams(Probe(WIDTHS, CLASSES), collective, items, items)
    except RuntimeError as error:
        return str(error)
    return ""


def test_wrong_items_of_one_rank_are_raised_on_each() -> None:
    for message in run_ranks(2, wrong_shape_on_rank_1):
        assert "on rank 1" in message
        assert "targets must be classes 0 to 3, got 9 to 12; leave out others" in message


# Invariance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [256, 18])
@pytest.mark.parametrize("classes", [True, False])
def test_scale_and_shift_of_a_stream_change_nothing(limit: int, classes: bool) -> None:
    options = {"limit": limit, "classes": classes, "outputs": CLASSES if classes else 2}
    train, held_out = streams(600, 0, classes=classes), streams(300, 1, classes=classes)
    expected = flat(run(train, held_out, **options))
    shift = torch.arange(12) - 6.0
    for change in (lambda x: 5 * x, lambda x: x + 10 * shift, lambda x: 5 * x - shift):
        moved = [Labelled(i.features | {"rgb": change(i.features["rgb"])}, i.targets) for i in (train, held_out)]
        assert flat(run(*moved, **options)) == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_streams_are_projected_to_fair_shares_and_the_same_in_every_probe() -> None:
    probe = Probe({"wide": 1000, "small": 20, "broad": 700}, 3)
    assert {name: len(columns) for name, columns in probe.columns.items()} == {"wide": 118, "small": 20, "broad": 118}
    assert probe.dim == 256
    assert Probe({"a": 200, "b": 56}, 3).dim == 256
    features = {name: torch.randn(9, width) for name, width in probe.widths.items()}
    x = probe.project(Labelled(features, torch.zeros(9)))
    assert torch.equal(x[:, list(probe.columns["small"])], features["small"].double())
    again = Probe({"wide": 1000, "small": 20, "broad": 700}, 3).project(Labelled(features, torch.zeros(9)))
    assert torch.equal(x, again)
    signs = Probe({"wide": 1000}, 3).project(Labelled({"wide": torch.eye(1000)}, torch.zeros(1000)))
    assert set(signs.flatten().tolist()) == {-1, 1} and abs(float(signs.mean())) < 0.01
    other = Probe({"wide": 1000, "small": 20, "broad": 700}, 3, seed=1).project(Labelled(features, torch.zeros(9)))
    assert not torch.equal(x, other)


def test_a_projection_keeps_what_wide_features_know() -> None:
    chance = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (4000,), generator=chance)
    features = torch.randn(4000, 600, generator=chance) + 1.5 * torch.randn(3, 600, generator=chance)[targets]
    items = Labelled({"rgb": features}, targets)
    found = run(part(items, slice(3000)), part(items, slice(3000, None)), outputs=3)
    assert found.alone["rgb"].score.low > 0.97


# Verdicts ---------------------------------------------------------------------------------------------------------


def test_planted_streams_are_found() -> None:
    train, held_out = streams(2000, 0), streams(1000, 1)
    right = torch.rand(1000, generator=torch.Generator().manual_seed(2)) < 0.3
    held_out = held_out._replace(prediction=torch.where(right, held_out.targets, (held_out.targets + 1) % CLASSES))
    found = run(train, held_out)
    assert found.alone["rgb"].advantage.low > 0.15  # one of two halves of the target: 50 % against 25 %
    assert found.alone["audio"].advantage.high < 0.05
    assert found.complement["rgb"].low > 0.3
    assert found.complement["depth"].low > 0.3
    assert -0.02 < found.complement["audio"].value < 0.02
    assert found.complement["audio"].high < 0.03
    assert found.head_gap.value == pytest.approx(found.everything.score.value - float(right.double().mean()))
    assert found.head_gap.low > 0.3
    assert found.everything.undetermined == ""


def test_features_of_noise_and_dead_features_know_no_more_than_the_majority_class() -> None:
    for seed in range(5):
        chance = torch.Generator().manual_seed(seed)
        targets = (torch.rand(3600, generator=chance) < 0.3).long()
        features = {"noise": torch.randn(3600, 100, generator=chance), "dead": torch.full((3600, 8), 3.7)}
        items = Labelled(features, targets)
        found = run(part(items, slice(1600)), part(items, slice(1600, None)), outputs=2)
        assert found.alone["noise"].advantage.high < 0.02
        dead = found.alone["dead"].advantage
        assert (dead.value, dead.low) == (0, pytest.approx(-dead.high))
        assert 0 < dead.high < 0.002  # not one item differs, which is not certainty
        assert found.alone["dead"].score.value == pytest.approx(0.7, abs=0.04)


def test_a_feature_that_is_constant_but_for_rounding_gets_no_weight() -> None:
    items = streams(300, 0)
    wobble = 1e-12 * torch.randn(300, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = {"dead": 3.7 + wobble, "rgb": items.features["rgb"]}
    probe = Probe({"dead": 1, "rgb": 12}, CLASSES)
    weights = fit(probe, probe.sums(Labelled(features, items.targets)), ("dead", "rgb")).coefficients
    assert weights[0].tolist() == [0.0] * CLASSES
    assert weights[1:].abs().max() > 0.01
    features["rgb"] += 1000  # far from zero is not constant
    moved = fit(probe, probe.sums(Labelled(features, items.targets)), ("dead", "rgb")).coefficients
    assert torch.allclose(moved, weights, rtol=0, atol=1e-6)


def test_redundant_streams_complement_nothing_though_each_knows() -> None:
    train, held_out = streams(1500, 0), streams(1000, 1)
    for items in (train, held_out):
        items.features["depth"] = items.features["rgb"] @ torch.eye(12, 7).double()
    found = run(train, held_out)
    assert found.alone["depth"].advantage.low > 0.15
    assert found.complement["depth"].high < 0.02


def test_one_stream_complements_the_majority_class() -> None:
    train, held_out = (Labelled({"rgb": i.features["rgb"]}, i.targets) for i in (streams(500, 0), streams(500, 1)))
    found = run(train, held_out)
    assert found.complement["rgb"] == found.alone["rgb"].advantage == found.everything.advantage
    assert math.isnan(found.head_gap.value)


def test_a_small_lambda_matters_little_and_the_chosen_one_is_no_worse_at_ten_items_a_column(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, held_out = streams(240, 0), streams(2000, 1)
    scores = []
    for penalties in ((1e-4,), (1e-3,), (1e-2,), PENALTIES):
        monkeypatch.setattr(probes, "PENALTIES", penalties)
        scores.append(run(train, held_out).everything.score.value)
    assert max(scores[:-1]) - min(scores[:-1]) < 0.01
    assert scores[-1] > max(scores[:-1])


# Undetermined and refused -----------------------------------------------------------------------------------------


def test_too_few_items_are_undetermined_and_say_why() -> None:
    held_out = streams(200, 1)
    found = run(streams(239, 0), held_out)
    assert found.everything.undetermined == (
        "239 training items are fewer than 10 for each of 24 columns; set a lower limit"
    )
    assert math.isnan(found.everything.score.value)
    assert found.everything.score.items == 200
    assert math.isnan(found.complement["rgb"].low)
    assert found.complement["rgb"].p_above(0) == 1
    assert found.alone["rgb"].undetermined == ""
    assert found.alone["rgb"].score.value > 0.4
    assert run(streams(239, 0), held_out, limit=23).everything.undetermined == ""


def test_a_rare_class_is_undetermined_and_one_that_never_occurs_is_not() -> None:
    train, held_out = streams(600, 0), streams(200, 1)
    rows = torch.cat([torch.where(train.targets != 2)[0], torch.where(train.targets == 2)[0][:19]])
    found = run(part(train, rows), held_out)
    assert found.alone["rgb"].undetermined == "class 2 has 19 training items, fewer than 20"
    assert run(train, held_out, outputs=9).alone["rgb"].undetermined == ""


def test_features_that_are_not_finite_are_undetermined_for_their_stream_only() -> None:
    train, held_out = streams(600, 0), streams(200, 1)
    train.features["rgb"][3, 2] = math.nan
    found = run(train, held_out)
    assert found.alone["rgb"].undetermined == "a training item has features or a target that are not finite"
    assert found.everything.undetermined == found.alone["rgb"].undetermined
    assert found.alone["depth"].score.value > 0.4
    held_out.features["depth"][0, 0] = math.inf
    assert math.isnan(run(train, held_out).alone["depth"].score.value)


def test_no_items_at_all_are_undetermined() -> None:
    nothing = Labelled({}, torch.zeros(0, dtype=torch.long))
    found = probe_streams(Probe(WIDTHS, CLASSES), Collective(), nothing, nothing)
    assert found.alone["rgb"].undetermined.startswith("0 training items")
    assert math.isnan(found.alone["rgb"].score.value)


def test_memory_is_bounded() -> None:
    probe = Probe({"rgb": 4096}, 10)
    assert probe.layout.size == 256 * 256 + 256 * 10 + 256 + 10 + 1 + 1
    with pytest.raises(
        ValueError, match=r"256 columns for 50000 outputs takes 98 MiB, more than 64; set a lower limit"
    ):
        Probe({"rgb": 4096}, 50_000)


def test_what_a_probe_cannot_be_made_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one stream and be at least 1, got \{'rgb': 0\}"):
        Probe({"rgb": 0}, 3)
    with pytest.raises(ValueError, match=r"at least 2 classes, or 1 target of a regression, got 1"):
        Probe({"rgb": 3}, 1)
    with pytest.raises(ValueError, match=r"at least 1 a stream \(2\) and at most 256, got 257"):
        Probe({"rgb": 3, "depth": 3}, 3, limit=257)


def test_items_of_another_shape_are_refused() -> None:
    items = streams(50, 0)
    with pytest.raises(ValueError, match=r"features must have the shapes .*got .*; pool or flatten them"):
        run(items, items._replace(features={"rgb": items.features["rgb"]}))
    with pytest.raises(ValueError, match=r"targets must have shape \[50, 2\], got \[50\]"):
        run(items, items, outputs=2, classes=False)
    with pytest.raises(ValueError, match=r"groups must have shape \[50\], got \[49\]"):
        run(items, items._replace(groups=torch.zeros(49)))
    with pytest.raises(ValueError, match=r"prediction must have shape \[50\], got \[50, 4\]"):
        run(items, items._replace(prediction=torch.zeros(50, 4)))
