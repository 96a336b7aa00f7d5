"""Intervals against scipy, statsmodels, closed forms, and by how often they cover the truth."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy import stats
from statsmodels.regression.linear_model import OLS, WLS
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint
from torch import Tensor

from ddp_streammon.collective import Collective
from ddp_streammon.evaluation.intervals import (
    Estimate,
    RatioSums,
    bounds,
    detectable,
    difference,
    mean_sums,
    negated,
    paired_bootstrap,
    paired_proportions,
    ratio,
    ratio_sums,
    samples_for,
    scaled,
    wilson,
)
from ddp_streammon.evaluation.student_t import t_quantile, t_tail
from ddp_streammon.packet import Field, Layout
from tests.ranks import run_ranks

DOFS = (1, 2, 3, 5.5, 10, 29, 59, 60, 61, 100, 511, 999, 12_345, 1e6, math.inf)


# Student's t ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dof", DOFS)
def test_quantiles_are_scipys(dof: float) -> None:
    law = stats.norm() if math.isinf(dof) else stats.t(dof)
    for probability in (1e-7, 1e-4, 0.025, 0.2, 0.5, 0.6, 0.8, 0.975, 0.9999, 1 - 1e-6):
        assert t_quantile(probability, dof) == pytest.approx(law.ppf(probability), rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("dof", DOFS)
def test_tails_are_scipys(dof: float) -> None:
    law = stats.norm() if math.isinf(dof) else stats.t(dof)
    for t in (-3.0, 0.0, 1e-3, 0.5, 1.0, 1.7, 2.0, 5.0, 9.0):
        assert t_tail(t, dof) == pytest.approx(law.sf(t), rel=1e-8)
    assert math.isnan(t_tail(math.nan, dof))
    assert t_tail(math.inf, dof) == 0


def test_a_quantile_needs_a_probability_and_degrees_of_freedom() -> None:
    with pytest.raises(ValueError, match="probability must lie between 0 and 1, got 1"):
        t_quantile(1, 3)
    with pytest.raises(ValueError, match=r"degrees of freedom must be above 0 \(inf for the normal .*got 0"):
        t_quantile(0.5, 0)


# Proportions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "items"), [(0, 7), (7, 7), (3, 10), (80, 160), (9_990, 10_000)])
def test_wilson_is_statsmodels(count: int, items: int) -> None:
    for level in (0.8, 0.95, 0.999):
        estimate = wilson(count, items, level)
        expected = proportion_confint(count, items, 1 - level, "wilson")
        assert (estimate.low, estimate.high) == pytest.approx(expected, abs=1e-12)
    assert (estimate.value, estimate.items, estimate.groups) == (count / items, items, items)


def test_wilson_of_160_items_is_as_wide_as_the_evidence_says() -> None:
    estimate = wilson(80, 160)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(0.0764, abs=1e-3)


@pytest.mark.parametrize("counts", [(56, 70, 48, 80), (0, 10, 0, 20), (10, 10, 0, 20), (400, 500, 380, 500)])
def test_newcombe_for_two_sets_is_statsmodels(counts: tuple[int, int, int, int]) -> None:
    first, n, second, m = counts
    estimate = difference(wilson(first, n), wilson(second, m))
    expected = confint_proportions_2indep(first, n, second, m, method="newcomb", compare="diff")
    assert (estimate.low, estimate.high) == pytest.approx(expected, abs=1e-12)
    assert estimate.value == pytest.approx(first / n - second / m)


def test_newcombe_for_pairs_covers_the_truth() -> None:
    """Every table of 30 items, by its probability: on average 95 %, and never below 91 %."""
    covered = []
    logs = [math.lgamma(k + 1) for k in range(31)]
    tables = [t for t in itertools.product(range(31), repeat=4) if sum(t) == 30]
    intervals = [paired_proportions(*table) for table in tables]
    for cells in [(0.7, 0.1, 0.1, 0.1), (0.5, 0.2, 0.05, 0.25), (0.85, 0.09, 0.03, 0.03)]:
        truth = cells[1] - cells[2]
        total = 0.0
        for table, interval in zip(tables, intervals, strict=True):
            if interval.low <= truth <= interval.high:
                chance = logs[30] + sum(k * math.log(p) - logs[k] for k, p in zip(table, cells, strict=True))
                total += math.exp(chance)
        covered.append(total)
    assert min(covered) > 0.91
    assert sum(covered) / len(covered) > 0.945


def test_newcombe_for_pairs_is_the_published_interval() -> None:
    """Airway responsiveness before and after a transplantation, Fagerland, Lydersen and Laake, Stat. Med. 33, 2014."""
    estimate = paired_proportions(1, 1, 7, 12)
    assert (estimate.low, estimate.high) == pytest.approx((-0.507, -0.026), abs=5e-4)


def test_newcombe_for_pairs_joins_wilsons_intervals_by_the_outcomes_correlation_less_half_an_item() -> None:
    counts = (40, 10, 5, 45)
    estimate = paired_proportions(*counts)
    outcomes = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], counts, axis=0)
    correlation = np.corrcoef(outcomes.T)[0, 1] - 0.5 / 100 / outcomes.std(0).prod()
    (low, high), (other_low, other_high) = (proportion_confint(n, 100, 0.05, "wilson") for n in (50, 45))
    down, up = (0.5 - low, other_high - 0.45), (high - 0.5, 0.45 - other_low)
    sides = [math.sqrt(a * a + b * b - 2 * correlation * a * b) for a, b in (down, up)]
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.05, 0.05 - sides[0], 0.05 + sides[1]))


def test_pairs_that_agree_are_told_apart_better_than_two_sets() -> None:
    pairs = paired_proportions(700, 60, 20, 220)
    sets = difference(wilson(760, 1000), wilson(720, 1000))
    assert pairs.value == pytest.approx(sets.value)
    assert pairs.high - pairs.low < 0.6 * (sets.high - sets.low)
    uncorrelated = paired_proportions(25, 25, 25, 25)
    plain = difference(wilson(50, 100), wilson(50, 100))
    assert (uncorrelated.low, uncorrelated.high) == pytest.approx((plain.low, plain.high))


def test_what_is_no_proportion_is_refused() -> None:
    with pytest.raises(ValueError, match=r"between 0 and the number of items \(3\), got 4"):
        wilson(4, 3)
    with pytest.raises(ValueError, match=r"must not be negative, got \(1, -1, 0, 0\)"):
        paired_proportions(1, -1, 0, 0)
    with pytest.raises(ValueError, match=r"one level, got 0.95 and 0.9"):
        difference(wilson(1, 3), wilson(1, 3, 0.9))
    for level in (95, 0, 1):
        with pytest.raises(ValueError, match=rf"level must lie between 0 and 1 \(0.95, say\), got {level}"):
            wilson(1, 3, level)
    assert math.isnan(wilson(0, 0).value)


# Ratios over groups -----------------------------------------------------------------------------------------------


def captions(rng: np.random.Generator, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of tokens, their weights, and their sequence; sequences differ in length and in level."""
    lengths = rng.integers(1, 12, groups)
    group = np.repeat(np.arange(groups), lengths)
    values = rng.normal(size=groups)[group] + 0.5 * rng.normal(size=len(group)) + 2
    return torch.from_numpy(values), torch.from_numpy(rng.uniform(0.5, 2, len(group))), torch.from_numpy(group)


def test_a_clustered_mean_is_statsmodels_weighted_regression() -> None:
    values, weights, groups = captions(np.random.default_rng(0), 40)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    estimate = ratio(mean_sums(values[order], weights[order], groups[order] * 7 - 3))
    # statsmodels' cov_type='cluster' with its correction for few groups; the mean is the only coefficient.
    fitted = WLS(values.numpy(), np.ones(len(values)), weights.numpy()).fit(
        cov_type="cluster", cov_kwds={"groups": groups.numpy(), "df_correction": True}, use_t=True
    )
    assert estimate.value == pytest.approx(fitted.params[0], rel=1e-12)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(fitted.conf_int()[0]), rel=1e-9)
    assert (estimate.items, estimate.groups, estimate.dof) == (len(values), 40, 39)


def test_a_mean_without_groups_is_students() -> None:
    values = torch.tensor([1.0, 4.0, 2.0, 8.0, 5.0])
    estimate = replace(ratio(mean_sums(values), level=0.9), skew=0.0)
    expected = stats.t.interval(0.9, 4, values.mean(), stats.sem(values.numpy()))
    assert (estimate.low, estimate.high) == pytest.approx(expected, rel=1e-6)
    test = stats.ttest_1samp(values.double().numpy(), 3, alternative="greater")
    assert estimate.p_above(3) == pytest.approx(test.pvalue, rel=1e-9)
    assert estimate.p_below(3) == pytest.approx(1 - test.pvalue, rel=1e-9)
    assert estimate.lower(test.pvalue) == pytest.approx(3)
    assert estimate.upper(0.05) == pytest.approx(estimate.high)


def test_two_groups_have_one_degree_of_freedom() -> None:
    estimate = ratio(mean_sums(torch.tensor([1.0, 3.0, 4.0]), groups=torch.tensor([0, 1, 0])), level=0.8)
    residuals = np.array([5 - 2 * 8 / 3, 3 - 8 / 3])
    half = stats.t.ppf(0.9, 1) * math.sqrt(2 * np.square(residuals).sum()) / 3
    assert (estimate.low, estimate.high) == pytest.approx((8 / 3 - half, 8 / 3 + half))
    error = half / stats.t.ppf(0.9, 1)
    assert replace(estimate, skew=0.0).upper(0.05) == pytest.approx(8 / 3 + stats.t.ppf(0.95, 1) * error)


def test_a_figure_the_other_way_round_or_in_another_unit_is_that_of_the_values_changed_so() -> None:
    values = torch.tensor([0.1, 0.9, 0.4, 0.0, 0.2, 0.3], dtype=torch.float64)
    estimate = replace(ratio(mean_sums(values)), least=0.0, most=1.0)
    for changed, factor in ((negated(estimate), -1.0), (scaled(estimate, 2.5), 2.5)):
        least, most = sorted((0.0, factor))
        assert astuple(changed) == pytest.approx(
            astuple(replace(ratio(mean_sums(factor * values)), least=least, most=most))
        )


def test_a_ratio_is_close_to_its_jackknife() -> None:
    rng = np.random.default_rng(1)
    groups = torch.arange(200).repeat_interleave(3)
    w = torch.from_numpy(rng.uniform(1, 3, 600))
    y = 0.7 * w + torch.from_numpy(rng.normal(size=600))
    estimate = ratio(ratio_sums(y, w, groups))
    left_out = np.array([float(y[groups != g].sum() / w[groups != g].sum()) for g in range(200)])
    error = math.sqrt(199 / 200 * ((left_out - left_out.mean()) ** 2).sum())
    half = (estimate.high - estimate.low) / 2
    assert half == pytest.approx(stats.t.ppf(0.975, 199) * error, rel=0.02)


def test_sums_add_up_and_have_an_identity() -> None:
    values, weights, groups = captions(np.random.default_rng(2), 30)
    whole = mean_sums(values, weights, groups)
    parts = [groups < 11, (groups >= 11) & (groups < 12), groups >= 12, groups < 0]
    added = sum((mean_sums(values[p], weights[p], groups[p]) for p in parts), RatioSums())
    assert added.cells().tolist() == pytest.approx(whole.cells().tolist(), rel=1e-12)
    assert whole + RatioSums() == whole
    assert mean_sums(values[:0]) == RatioSums()


def reduced(collective: Collective, bounds: Sequence[int]) -> Estimate:
    """The clustered mean of groups bounds[rank] to bounds[rank + 1] of each rank: one all_reduce."""
    values, weights, groups = captions(np.random.default_rng(3), 30)
    rank = collective.topology.rank
    mine = (groups >= bounds[rank]) & (groups < bounds[rank + 1])
    layout = Layout((Field("sums", (RatioSums.CELLS,)),))
    packet = layout.pack({"sums": mean_sums(values[mine], weights[mine], groups[mine]).cells()}, rank)
    fields = layout.unpack(collective.all_reduce(packet).wait())
    return ratio(RatioSums(*fields["sums"]))


def groups_of_two_to_four() -> list[Estimate]:
    """What this rank finds in the groups of the first two to four ranks that it is in."""
    found = []
    for edges in ([0, 4, 30], [0, 0, 29, 30], [0, 10, 10, 11, 30]):
        world = len(edges) - 1
        group = dist.new_group(list(range(world)))
        if dist.get_rank() < world:
            found.append(reduced(Collective(group), edges))
    return found


def test_one_to_four_ranks_agree_with_uneven_and_empty_shards() -> None:
    expected = reduced(Collective(), [0, 30])
    answers = run_ranks(4, groups_of_two_to_four)
    assert [len(found) for found in answers] == [3, 3, 2, 1]
    for estimate in (estimate for found in answers for estimate in found):
        assert (estimate.items, estimate.groups) == (expected.items, expected.groups)
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx(
            (expected.value, expected.low, expected.high), rel=1e-12
        )


def test_padding_and_its_values_count_for_nothing() -> None:
    values = torch.tensor([1.0, 2.0, math.nan, 4.0])
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert mean_sums(values, weights) == mean_sums(torch.tensor([1.0, 2.0, 4.0]))


def test_too_few_groups_and_values_that_are_not_finite_say_so() -> None:
    one = ratio(mean_sums(torch.tensor([1.0, 3.0]), groups=torch.tensor([5, 5])))
    assert (one.value, one.low, one.high, one.items, one.groups) == (2, -math.inf, math.inf, 2, 1)
    assert one.p_above(0) == one.p_below(9) == 1
    assert (one.lower(0.01), one.upper(0.01)) == (-math.inf, math.inf)
    none = ratio(RatioSums())
    assert math.isnan(none.value)
    assert math.isnan(none.low)
    for bad in (math.nan, math.inf):
        broken = ratio(mean_sums(torch.tensor([1.0, bad, 2.0])))
        assert not math.isfinite(broken.value)
        assert broken.p_above(-9) == broken.p_below(9) == 1


def test_what_cannot_be_summed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape \[items\], got \[\(3,\), \(2,\)\]"):
        ratio_sums(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"one shape \[items\], got \[\(1, 2\), \(1, 2\)\]"):
        ratio_sums(torch.ones(1, 2), torch.ones(1, 2))
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"weights must not be negative, and finite, got {bad}"):
            mean_sums(torch.ones(2), torch.tensor([1.0, bad]))


def covers(estimates: Sequence[Estimate], truth: float) -> float:
    return sum(estimate.low <= truth <= estimate.high for estimate in estimates) / len(estimates)


def test_clustered_intervals_cover_the_truth_and_plain_ones_do_not() -> None:
    """1000 draws of 60 sequences: 95 % within three binomial deviations (2.1 pp) and 1 pp for the linearisation."""
    rng = np.random.default_rng(4)
    draws = [captions(rng, 60) for _ in range(1000)]
    clustered = covers([ratio(mean_sums(*draw)) for draw in draws], 2.0)
    assert clustered == pytest.approx(0.95, abs=0.031)
    assert covers([ratio(mean_sums(values, weights)) for values, weights, _ in draws], 2.0) < 0.75


def test_differences_of_correctness_cover_the_truth_where_disagreement_is_rare() -> None:
    """Three of 100 items differ on average, all one way: plain Student covers 80 %, with the two extra items 95 %."""
    rng = np.random.default_rng(5)
    draws = [torch.from_numpy((rng.uniform(size=100) < 0.03).astype(float)) for _ in range(1500)]
    assert covers([ratio(mean_sums(draw)) for draw in draws], 0.03) < 0.93
    assert covers([ratio(mean_sums(draw), unit_range=True) for draw in draws], 0.03) > 0.93


@pytest.mark.parametrize("least", [-1.0, 0.0])
def test_a_share_has_the_interval_of_its_items_and_one_of_either_extreme(least: float) -> None:
    values = np.random.default_rng(3).choice([least, 0.0, 1.0], 50, p=[0.1, 0.6, 0.3])
    estimate = ratio(mean_sums(torch.from_numpy(values)), unit_range=True, least=least)
    more = np.append(values, [least, 1.0])
    half = stats.t.ppf(0.975, 49) * stats.sem(more)
    assert (estimate.low, estimate.high) == pytest.approx((more.mean() - half, more.mean() + half))
    assert estimate.skew == pytest.approx(stats.skew(more) / math.sqrt(52))
    assert (estimate.value, estimate.least, estimate.most) == (values.mean(), least, 1)


def test_no_disagreement_at_all_is_not_certainty() -> None:
    same = mean_sums(torch.zeros(100))
    assert ratio(same).high == 0
    estimate = ratio(same, unit_range=True)
    expected = stats.t.ppf(0.975, 99) * math.sqrt(2 * 102 / 101) / 102  # two of 102 values are +-1
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0, -expected, expected))
    assert (estimate.items, estimate.groups, estimate.dof) == (100, 100, 99)
    sure = ratio(mean_sums(torch.ones(5)), unit_range=True)
    assert (sure.value, sure.high) == (1, 1)
    assert sure.low > -1


@pytest.mark.parametrize(("correlated", "widest"), [(0.0, 0.03), (0.3, 0.16)])
def test_shares_of_items_in_groups_cover_the_truth_and_are_no_wider_than_that_needs(
    correlated: float, widest: float
) -> None:
    """32 batches of 32 items, 95 % right. Groups that count as one item each would make it 0.18 either way."""
    rng = np.random.default_rng(8)
    place, estimates = torch.arange(32).repeat_interleave(32), []
    for _ in range(600):
        much = (1 - correlated) / max(correlated, 1e-9)
        chance = rng.beta(0.95 * much, 0.05 * much, 32)
        right = torch.from_numpy((rng.random((32, 32)) < chance[:, None]).astype(float)).reshape(-1)
        estimates.append(ratio(mean_sums(right, None, place), unit_range=True, least=0.0))
    intervals = [bounds(estimate) for estimate in estimates]
    assert np.mean([low <= 0.95 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.03)
    assert np.mean([high - low for low, high in intervals]) < widest
    assert all(0 <= low < high <= 1 for low, high in intervals)


def test_a_share_of_many_groups_is_as_sure_as_statsmodels() -> None:
    rng = np.random.default_rng(9)
    place = np.repeat(np.arange(200), 16)
    right = (rng.random(3200) < rng.beta(8, 2, 200)[place]).astype(float)
    found = ratio(mean_sums(torch.from_numpy(right), None, torch.from_numpy(place)), unit_range=True, least=0.0)
    fitted = OLS(right, np.ones(3200)).fit(cov_type="cluster", cov_kwds={"groups": place}, use_t=True)
    assert found.high - found.low == pytest.approx(float(np.diff(fitted.conf_int()[0])[0]), rel=0.03)


def test_groups_are_worth_what_their_items_are_apart() -> None:
    place = torch.arange(64) // 8
    alike = mean_sums((place % 2).double(), None, place)
    assert alike.worth() == pytest.approx(8)
    apart = mean_sums((torch.arange(64) % 2).double(), None, place)
    assert apart.worth() == 64  # never more than the items
    assert mean_sums((torch.arange(64) % 2).double()).worth() == pytest.approx(64)
    assert mean_sums(torch.ones(64), None, place).worth() == 8


def test_one_sided_bounds_allow_for_skewness() -> None:
    values = torch.tensor([0.0] * 19 + [1.0, 3.0], dtype=torch.float64)
    estimate = ratio(mean_sums(values))
    assert estimate.skew == pytest.approx(stats.skew(values.numpy()) / math.sqrt(21), rel=1e-9)
    assert ratio(mean_sums(-values)).skew == pytest.approx(-estimate.skew)
    assert ratio(mean_sums(values + 100)).skew == pytest.approx(estimate.skew, rel=1e-6)
    assert ratio(mean_sums(torch.linspace(-1, 1, 21, dtype=torch.float64))).skew == pytest.approx(0, abs=1e-12)
    for alpha in (0.3, 0.05, 1e-4):
        assert estimate.p_below(estimate.upper(alpha)) == pytest.approx(alpha, rel=1e-9)
        assert estimate.p_above(estimate.lower(alpha)) == pytest.approx(alpha, rel=1e-9)
    assert estimate.upper(0.025) - estimate.value > 1.5 * (estimate.high - estimate.value)


def test_a_difference_is_as_skew_as_its_errors_together() -> None:
    rng = np.random.default_rng(7)
    first, second = rng.exponential(3.0, 40), rng.exponential(1.0, 25) ** 2
    estimate = difference(ratio(mean_sums(torch.from_numpy(first))), ratio(mean_sums(torch.from_numpy(second))))
    errors = stats.sem(first), stats.sem(second)
    thirds = [stats.skew(x) / math.sqrt(len(x)) * e**3 for x, e in zip((first, second), errors, strict=True)]
    assert estimate.skew == pytest.approx((thirds[0] - thirds[1]) / math.hypot(*errors) ** 3, rel=1e-9)
    assert estimate.skew < 0 < stats.skew(first)
    assert (estimate.items, estimate.groups, estimate.dof) == (65, 65, 24)
    clips = ratio(mean_sums(torch.from_numpy(first), groups=torch.arange(40) // 4))
    assert (difference(clips, clips).items, difference(clips, clips).groups) == (80, 20)
    nothing = ratio(mean_sums(torch.ones(1)))
    assert bounds(nothing) == (-math.inf, math.inf) and all(map(math.isnan, bounds(wilson(0, 0))))
    assert difference(nothing, wilson(3, 9)).skew == difference(nothing, nothing).skew == 0


def test_no_one_sided_bound_leaves_the_range_of_a_share_or_of_a_difference_of_shares() -> None:
    assert (wilson(1, 10).lower(1e-5), wilson(9, 10).upper(1e-5)) == (0, 1)
    for estimate in (difference(wilson(9, 10), wilson(1, 10)), paired_proportions(1, 8, 0, 1)):
        assert estimate.upper(1e-9) == 1 and estimate.lower(1e-9) >= -1
        assert negated(estimate).lower(1e-9) == -1


def test_one_sided_bounds_err_as_often_as_they_say_where_few_items_carry_the_mean() -> None:
    """512 items, one in ten above 0: at a level of 0.5 % the bound without the correction errs in 2 %."""
    rng = np.random.default_rng(6)
    amounts = np.where(rng.random((4000, 512)) < 0.1, rng.standard_exponential((4000, 512)), 0.0)
    estimates = [ratio(mean_sums(torch.from_numpy(row))) for row in amounts]
    plain = [replace(estimate, skew=0.0) for estimate in estimates]
    wrong, blind = (sum(e.upper(0.005) < 0.1 for e in found) / 4000 for found in (estimates, plain))
    assert wrong <= 0.005 + 3 * math.sqrt(0.005 * 0.995 / 4000)
    assert blind > 0.012


# How many items ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [20, 160, 512, 10_000])
@pytest.mark.parametrize("power", [0.8, 0.95])
def test_detectable_effects_are_those_of_the_non_central_t(items: int, power: float) -> None:
    effect = detectable(items, 2.0, 0.95, power)
    assert TTestPower().power(effect / 2.0, items, 0.05) == pytest.approx(power, abs=0.005)


def test_samples_for_is_the_inverse_of_detectable() -> None:
    for effect, power, sd in [(0.02, 0.8, 0.3), (0.5, 0.9, 1.0), (5.0, 0.8, 1.0)]:
        items = samples_for(effect, power, sd)
        assert detectable(items, sd, power=power) <= effect
        assert items == 2 or detectable(items - 1, sd, power=power) > effect
    solved = TTestPower().solve_power(0.1, alpha=0.05, power=0.8)
    assert samples_for(0.1, 0.8, 1.0) == pytest.approx(solved, abs=2)
    assert samples_for(0.1, 0.8, 0.0) == 2
    assert detectable(1, 1.0) == math.inf


def test_the_effect_that_an_estimate_can_detect() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimate = ratio(mean_sums(values))
    assert estimate.detectable(0.025) == pytest.approx(detectable(400, float(values.std())), rel=1e-9)


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(ValueError, match="effect must be above 0, got 0"):
        samples_for(0, 0.8, 1.0)
    with pytest.raises(ValueError, match="power must be at least 0.5 and below 1, got 1"):
        detectable(10, 1.0, power=1)
    with pytest.raises(ValueError, match="sd must be at least 0 and finite, got -1"):
        detectable(10, -1.0)


# Bootstrap --------------------------------------------------------------------------------------------------------


def mean(records: Sequence[float]) -> float:
    return sum(records) / len(records)


def test_the_bootstrap_of_a_mean_is_close_to_its_clustered_interval() -> None:
    rng = random.Random(0)
    groups = [f"clip{number // 4}" for number in range(400)]
    level = {group: rng.gauss(0, 1) for group in groups}
    second = [rng.gauss(0, 3) for _ in groups]
    first = [value + 0.3 + level[group] for value, group in zip(second, groups, strict=True)]
    estimate = paired_bootstrap(mean, first, second, groups, draws=2000)
    paired = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    expected = ratio(mean_sums(paired, groups=torch.arange(400) // 4))
    assert estimate.value == pytest.approx(expected.value)
    assert (estimate.items, estimate.groups) == (400, 100)
    half = (expected.high - expected.low) / 2
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=0.15 * half)


def test_the_bootstrap_is_the_same_again_and_leaves_the_global_state_alone() -> None:
    first, second = [1.0, 4.0, 2.0, 6.0] * 10, [0.0, 5.0, 2.0, 3.0] * 10
    state = random.getstate()
    again = [paired_bootstrap(mean, first, second, draws=200) for _ in range(2)]
    assert random.getstate() == state
    assert again[0] == again[1] != paired_bootstrap(mean, first, second, draws=200, seed=1)


def test_draws_without_a_value_widen_the_interval() -> None:
    def rare(records: Sequence[float]) -> float:
        return mean(records) if max(records) == 9 else math.nan

    estimate = paired_bootstrap(rare, [9.0, *[1.0] * 19], [9.0, *[0.5] * 19], draws=200)
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)
    assert estimate.value == pytest.approx(0.5 * 19 / 20)


def test_records_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="same items are needed in both, got 2 and 1 records and 2 groups"):
        paired_bootstrap(mean, [1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="draws must be at least 100 for an interval, got 99"):
        paired_bootstrap(mean, [1.0], [1.0], draws=99)
    assert math.isnan(paired_bootstrap(mean, [], []).value)
