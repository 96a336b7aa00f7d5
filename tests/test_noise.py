"""The gradient noise scale: against simulation with a known one, and against all samples' gradients on eight ranks."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scipy import stats
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon import MonitorConfig, StreamMonitor, keys
from ddp_streammon.noise import MIN_RANKS, MIN_STEPS, NoiseScale, NoiseStep, estimates, noise_scale, steps_of
from ddp_streammon.rank_facts import RankFacts
from ddp_streammon.ranks import LocalNorms
from ddp_streammon.stats import StepStats, StreamStats
from tests.networks import STREAMS, batch, loss_of, network
from tests.ranks import run_ranks
from tests.steps import ranks_of

NAMES = (*STREAMS, "shared")
RUNS = 300


# Simulation -------------------------------------------------------------------------------------------------------


def simulated(
    scale: float, samples: float = 4.0, ranks: int = 8, steps: int = 200, *, drift: float = 0.0, seed: int = 0
) -> list[NoiseStep]:
    """Gradients of 20 elements whose noise has tr(Sigma) = `scale` and unequal variances, |G|^2 = 1 on average over
    the steps; `drift`: |G|^2 falls from 1 + drift to 1 - drift."""
    generator = torch.Generator().manual_seed(seed)
    deviation = torch.linspace(0.2, 2.0, 20, dtype=torch.float64)
    deviation *= math.sqrt(scale) / deviation.norm()
    length = (1 + drift * torch.linspace(1, -1, steps, dtype=torch.float64)).sqrt()
    truth = torch.full((20,), 1 / math.sqrt(20), dtype=torch.float64) * length[:, None, None]
    drawn = torch.randn(steps, ranks, 20, generator=generator, dtype=torch.float64)
    own = truth + deviation / math.sqrt(samples) * drawn
    sq_norms, local = own.mean(dim=1).square().sum(dim=1).tolist(), own.square().sum(dim=2).mean(dim=1).tolist()
    return [NoiseStep(sq_norm, mean, samples, ranks) for sq_norm, mean in zip(sq_norms, local, strict=True)]


@functools.cache
def results(scale: float, drift: float) -> list[NoiseScale]:
    return [noise_scale(simulated(scale, drift=drift, seed=run)) for run in range(RUNS)]


@pytest.mark.parametrize(
    ("scale", "drift"),
    [(4.0, 0.0), (20.0, 0.8), (80.0, 0.0)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in ((4.0, 0.8), (20.0, 0.0), (80.0, 0.8))],
)
def test_the_interval_holds_the_truth(scale: float, drift: float) -> None:
    found = results(scale, drift)
    assert all(result.determined and result.why == "" for result in found)
    assert sum(result.low <= scale <= result.high for result in found) >= 0.9 * RUNS
    assert sorted(result.value for result in found)[RUNS // 2] == pytest.approx(scale, rel=0.02)


@pytest.mark.parametrize("scale", [200.0, 800.0, 2000.0])
def test_where_the_gradient_drowns_few_claim_a_bounded_interval_that_misses(scale: float) -> None:
    found = results(scale, 0.0)
    assert sum(not result.low <= scale <= result.high for result in found) <= 0.1 * RUNS
    if scale == 2000.0:
        assert sum(result.determined for result in found) <= 0.1 * RUNS


@pytest.mark.parametrize("steps", [MIN_STEPS, 200])
def test_a_bound_is_where_students_t_would_no_longer_tell_the_ratio_from_the_truth(steps: int) -> None:
    drawn = simulated(20.0, steps=steps)
    traces, sq_gradients = torch.tensor([estimates(step) for step in drawn]).double().T.numpy()
    found, quantile = noise_scale(drawn), stats.t.ppf(0.975, steps - 1)
    for bound, side in ((found.low, 1), (found.high, -1)):
        test = stats.ttest_1samp(traces - bound * sq_gradients, 0.0)
        assert test.statistic == pytest.approx(side * quantile, rel=0.005)
    assert found.value == pytest.approx(traces.mean() / sq_gradients.mean())


def test_both_estimators_are_unbiased() -> None:
    pairs = torch.tensor([estimates(step) for step in simulated(20.0, samples=2.0, ranks=3, steps=100_000)])
    assert pairs.mean(dim=0).tolist() == pytest.approx([20.0, 1.0], rel=0.02)


def test_they_are_those_of_the_paper() -> None:
    """|G_b|^2 = |G|^2 + tr / b, solved for b = 4 and 32."""
    trace, sq_gradient = estimates(NoiseStep(sq_norm=2.0 + 8 / 32, mean_local_sq_norm=2.0 + 8 / 4, samples=4, ranks=8))
    assert (trace, sq_gradient) == pytest.approx((8.0, 2.0))


# What is not determined ---------------------------------------------------------------------------------------------


def is_undetermined(result: NoiseScale) -> bool:
    return not result.determined and math.isnan(result.value) and (result.low, result.high) == (0.0, math.inf)


@pytest.mark.parametrize(("ranks", "named"), [(1, "1 rank"), (2, "2 ranks"), (MIN_RANKS - 1, "7 ranks")])
def test_few_ranks_determine_nothing(ranks: int, named: str) -> None:
    result = noise_scale([NoiseStep(1.0, 1.5, 4.0, ranks)] * 100)
    assert is_undetermined(result)
    assert result.why == f"{named}: at least 8 are needed"


def test_few_steps_determine_nothing() -> None:
    assert noise_scale(simulated(4.0, steps=MIN_STEPS)).determined
    for steps in (simulated(4.0, steps=MIN_STEPS - 1), []):
        result = noise_scale(steps)
        assert is_undetermined(result)
        assert result.why.startswith(f"{len(steps)} measured steps with local gradients and samples: at least 30 are")
        assert result.why.endswith("set local_gradients=True, and pass samples=n to step, on the host")


def test_noise_alone_determines_nothing() -> None:
    steps = [NoiseStep(s.sq_norm, s.mean_local_sq_norm, s.samples, s.ranks) for s in simulated(1e8)]
    result = noise_scale(steps)
    assert is_undetermined(result)
    assert result.why == (
        "the squared gradient is not told from zero in 200 steps: more steps, more ranks or a larger batch are needed"
    )
    assert is_undetermined(noise_scale([NoiseStep(1.0, 9.0, 4.0, 8)] * 100))  # |G|^2 below zero, without any spread


def test_ranks_fed_the_same_batches_show_no_noise() -> None:
    result = noise_scale([NoiseStep(s.sq_norm, s.sq_norm, 4.0, 8) for s in simulated(4.0)])
    assert (result.determined, result.value, result.low, result.high) == (True, 0.0, 0.0, 0.0)


# From measured steps ------------------------------------------------------------------------------------------------


def measured(
    norms: Sequence[Sequence[float]], samples: Sequence[float], nonfinite: int = 0, grad_norm: float = 2.0
) -> StepStats:
    """A step of streams a and b; `norms`: [ranks][streams]."""
    stream = StreamStats(grad_norm, 0.0, 1.0, 0.5, nonfinite=nonfinite, elements=10, tensors=2)
    ranks = range(len(samples))
    facts = tuple(RankFacts(rank, (), (), 1.0, samples[rank], 1.0, 1.0) for rank in ranks)
    local = tuple(LocalNorms(rank, tuple(own), (0, 0), None) for rank, own in enumerate(norms))
    names = {"a": stream, "b": StreamStats(1.0, 0.0, 1.0, 0.5, nonfinite=0, elements=10, tensors=2)}
    return StepStats(1, None, names, {}, len(samples), (), scaled=False, rank_facts=ranks_of(facts), local=local)


def test_squares_are_averaged_and_samples_harmonically() -> None:
    steps = steps_of(measured([[3.0, 1.0], [1.0, 2.0]], [2.0, 6.0]))
    assert steps == {"a": NoiseStep(4.0, 5.0, 3.0, 2), "b": NoiseStep(1.0, 2.5, 3.0, 2)}


def test_steps_that_say_nothing_are_left_out() -> None:
    assert steps_of(measured([[3.0, 1.0], [1.0, 2.0]], [2.0, math.nan])) == {}
    assert steps_of(measured([[3.0, 1.0], [1.0, 2.0]], [2.0, 0.0])) == {}
    assert steps_of(measured([], [2.0, 6.0])) == {}
    assert list(steps_of(measured([[math.nan, 1.0], [1.0, 2.0]], [2.0, 6.0]))) == ["b"]
    assert list(steps_of(measured([[3.0, 1.0], [1.0, 2.0]], [2.0, 6.0], nonfinite=1))) == ["b"]
    assert list(steps_of(measured([[3.0, 1.0], [1.0, 2.0]], [2.0, 6.0], grad_norm=math.nan))) == ["b"]


# On eight ranks -----------------------------------------------------------------------------------------------------

ITEMS, SAMPLES, STEPS = 64, 16, 60


def _measured() -> tuple[dict[str, Any], dict[str, Any]]:
    """Each stream's noise scale, each rank drawing its items anew in every step; and that of a monitor that was not
    told to measure local gradients."""
    rank = dist.get_rank()
    tensors = batch(ITEMS)
    model = DistributedDataParallel(network())
    monitor = StreamMonitor(model, None, STREAMS, config=MonitorConfig(local_gradients=True))
    without = StreamMonitor(model, None, STREAMS)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        drawn = torch.randint(ITEMS, (SAMPLES,), generator=generator)
        loss = loss_of(model, tuple(tensor[drawn] for tensor in tensors))
        model.zero_grad()
        loss.backward()
        monitor.step(loss=loss, samples=SAMPLES)
    without.step(samples=SAMPLES)
    monitor.log_metrics(1.0, {})
    without.log_metrics(1.0, {})
    scales = monitor.noise_scale()
    told = [
        keys.bound(keys.of_stream(name, keys.NOISE_SCALE), which) for name in NAMES for which in (keys.LOW, keys.HIGH)
    ]
    assert [monitor.history.latest(key) for key in told] == [
        bound for name in NAMES for bound in (scales[name].low, scales[name].high)
    ]
    assert monitor.history["rgb_noise_scale"] == [scales["rgb"].value] and "rgb_noise_scale" not in without.history
    monitor.log_metrics(1.0, {})
    assert len(monitor.history["rgb_noise_scale"]) == 1, "nothing new was measured"
    return monitor.noise_scale(), without.noise_scale()


@functools.cache
def gradients() -> dict[str, torch.Tensor]:
    """Each stream's gradient of each item alone, [items, elements]."""
    model = network().double()
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    for item in range(ITEMS):
        model.zero_grad()
        loss_of(model, tuple(tensor[item : item + 1] for tensor in batch(ITEMS))).backward()
        for name, module in zip(NAMES, (model.rgb, model.depth, model.mix), strict=True):
            rows[name].append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    return {name: torch.stack(of_items) for name, of_items in rows.items()}


def true_scale(name: str) -> float:
    mean = gradients()[name].mean(dim=0)
    return ((gradients()[name] - mean).square().sum() / ITEMS / mean.square().sum()).item()


def from_items(name: str) -> NoiseScale:
    """What the ranks' draws give, from the gradients of the items."""
    generators = [torch.Generator().manual_seed(rank) for rank in range(8)]
    steps = []
    for _ in range(STEPS):
        drawn = [torch.randint(ITEMS, (SAMPLES,), generator=generator) for generator in generators]
        own = torch.stack([gradients()[name][items].mean(dim=0) for items in drawn])
        sq_norm, local = own.mean(dim=0).square().sum().item(), own.square().sum(dim=1).mean().item()
        steps.append(NoiseStep(sq_norm, local, SAMPLES, 8))
    return noise_scale(steps)


def test_eight_ranks_find_what_all_samples_gradients_say() -> None:
    first, *others = run_ranks(8, _measured)
    assert all(repr(other) == repr(first) for other in others)  # nan is not equal to nan
    found, without = first
    for name in NAMES:
        twin = from_items(name)
        assert found[name].determined
        assert (found[name].value, found[name].low, found[name].high) == pytest.approx(
            (twin.value, twin.low, twin.high), rel=1e-5
        )
        assert found[name].value == pytest.approx(true_scale(name), rel=0.3)
        assert is_undetermined(without[name])
        assert without[name].why.startswith("0 measured steps with local gradients and samples")


def _sharing_data() -> dict[str, NoiseScale]:
    monitor = StreamMonitor(network(), None, STREAMS, model_peers=range(dist.get_world_size()))
    return monitor.noise_scale()


def test_nothing_is_determined_of_ranks_that_see_the_same_data() -> None:
    for found in run_ranks(2, _sharing_data):
        assert list(found) == list(NAMES)
        assert all(map(is_undetermined, found.values()))
        assert {scale.why for scale in found.values()} == {
            "some ranks see the same data on purpose: none of them holds the whole gradient of its data"
        }
