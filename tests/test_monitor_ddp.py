"""The monitor on 1 to 4 real processes: figures against a single-process twin, and when what is communicated."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from ddp_streammon import MonitorConfig, RuleSet, Severity, StreamMonitor, Total
from tests.networks import STREAMS, TwoStreams, batch, loss_of, network, part
from tests.ranks import run_ranks

SLOW = (1, 4)
"""The same by one process, and what three ranks share out unevenly by four."""
WORLDS = [2, 3, *(pytest.param(world, marks=pytest.mark.slow) for world in SLOW)]


class Collectives(TorchDispatchMode):
    """Counts calls of c10d, as CommDebugMode does; that one tracks modules too, and fails at a second forward."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def here() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def monitor_of(model: nn.Module, optimizer: Any = None, **config: Any) -> StreamMonitor:
    """With the guide's rules, beside which every exact finding of a step is told as it is."""
    return StreamMonitor(model, optimizer, STREAMS, config=MonitorConfig(**{"rules": RuleSet.guide, **config}))


# Figures equal a twin's -------------------------------------------------------------------------------------------


def ddp(model: TwoStreams, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, **options)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def freeze_depth(model: TwoStreams) -> TwoStreams:
    model.depth.requires_grad_(False)
    return model


KINDS = {
    "ddp": lambda: ddp(network()),
    "bucket_view": lambda: ddp(network(), gradient_as_bucket_view=True),
    "small_buckets": lambda: ddp(network(), bucket_cap_mb=0.01),
    "unused": lambda: ddp(network(unused=True), find_unused_parameters=True),
    "frozen": lambda: ddp(freeze_depth(network())),
    "float64": lambda: ddp(network().double()),
    "plain": network,
    "ddp_of_compiled": lambda: ddp(compiled(network())),  # type: ignore[arg-type]
    "compiled_ddp": lambda: compiled(ddp(network())),
    "no_sync": lambda: ddp(network()),
}


def kinds_at(world: int) -> list[str]:
    """torch.compile takes seconds in each process: on up to two."""
    return [kind for kind in KINDS if world <= 2 or "compiled" not in kind]


ELEMENTS = {"rgb": 480 + 9215, "depth": 384, "shared": 576}


def backward(kind: str, model: nn.Module) -> None:
    """One optimizer step's backward: each rank its part of one batch (the plain model: every rank all of it)."""
    rank, world = here()
    tensors = batch()
    if kind == "no_sync":
        halves = [tuple(t[:12] for t in tensors), tuple(t[12:] for t in tensors)]
        assert isinstance(model, DistributedDataParallel)
        with model.no_sync():
            (loss_of(model, part(halves[0], rank, world)) / 2).backward()
        (loss_of(model, part(halves[1], rank, world)) / 2).backward()
    else:
        loss_of(model, tensors if kind == "plain" else part(tensors, rank, world)).backward()


def _figures() -> dict[str, Any]:
    """Per kind: the figures of a step, of compute_stream_gradients, and all of History as text."""
    answers = {}
    for kind in kinds_at(here()[1]):
        model = KINDS[kind]()
        monitor = monitor_of(model)
        backward(kind, model)
        figures = monitor.step().to_dict()
        answers[kind] = (figures, monitor.compute_stream_gradients().to_dict(), repr(monitor.state_dict()))
    return answers


@functools.cache
def answers_of(world: int) -> list[dict[str, Any]]:
    return run_ranks(world, _figures)


@functools.cache
def twin(kind: str) -> dict[str, float]:
    """The figures by definition, from one process' gradients of the whole batch, in float64."""
    model = network(unused=kind == "unused")
    if kind == "frozen":
        freeze_depth(model)
    model.double()
    loss_of(model, batch()).backward()
    flat = {}
    for stream in ELEMENTS:
        named = ((name.split(".")[0], p.grad) for name, p in model.named_parameters())
        owned = [g for top, g in named if g is not None and (top if top in STREAMS else "shared") == stream]
        flat[stream] = (torch.cat([g.flatten() for g in owned]) if owned else torch.zeros(0).double(), len(owned))
    total = sum(values.square().sum().item() for values, _ in flat.values())
    figures: dict[str, float] = {}
    for stream, (values, tensors) in flat.items():
        some = values.numel() > 0
        figures |= {
            f"{stream}_grad_norm": values.norm().item() if some else math.nan,
            f"{stream}_grad_mean": values.mean().item(),
            f"{stream}_grad_max": values.abs().max().item() if some else math.nan,
            f"{stream}_grad_share": values.square().sum().item() / total if some else math.nan,
            f"{stream}_grad_nonfinite": 0,
            f"{stream}_grad_elements": values.numel(),
            f"{stream}_params": tensors,
        }
    figures["rgb_to_depth_ratio"] = figures["rgb_grad_norm"] / figures["depth_grad_norm"]
    return figures


@pytest.mark.parametrize(
    ("world", "kind"),
    [
        pytest.param(world, kind, marks=pytest.mark.slow if world in SLOW else ())
        for world in (1, 2, 3, 4)
        for kind in kinds_at(world)
    ],
)
def test_figures_equal_the_single_process_twin(world: int, kind: str) -> None:
    for answer in answers_of(world):
        step, gradients, _ = answer[kind]
        assert step == pytest.approx(twin(kind), rel=1e-6, abs=1e-9, nan_ok=True)
        assert gradients == pytest.approx(step, rel=0, nan_ok=True)


@pytest.mark.parametrize("world", WORLDS)
def test_in_double_precision_the_twin_is_met_to_1e_13(world: int) -> None:
    assert answers_of(world)[0]["float64"][0] == pytest.approx(twin("float64"), rel=1e-13, abs=1e-16)


@pytest.mark.parametrize("world", WORLDS)
def test_history_is_bit_equal_on_all_ranks(world: int) -> None:
    for kind in kinds_at(world):
        assert len({answer[kind][2] for answer in answers_of(world)}) == 1


def test_counts_are_what_the_models_have() -> None:
    answer, _ = answers_of(2)
    for stream, elements in ELEMENTS.items():
        assert answer["ddp"][0][f"{stream}_grad_elements"] == elements
    assert [answer["unused"][0][f"{stream}_params"] for stream in ELEMENTS] == [4, 2, 2]


def test_a_frozen_stream_and_one_without_gradients() -> None:
    model = freeze_depth(network())
    monitor = monitor_of(model, delay=0)
    loss_of(model, batch()).backward()
    figures = monitor.step()
    assert math.isnan(figures["depth_grad_norm"])
    assert figures["depth_params"] == 0
    assert [f.rule for f in monitor.get_recommendations() if f.severity is not Severity.info] == []
    model.rgb.requires_grad_(True).zero_grad()
    for _ in range(5):
        monitor.step()
    (finding,) = [f for f in monitor.get_recommendations() if f.rule == "DET"]
    assert finding == "⚠️  rgb: no gradients for 4 steps"
    assert (finding.stream, finding.step, finding.evidence["elements"]) == ("rgb", 6, 0)


def test_zero_gradients_are_told_from_none() -> None:
    model = network()
    monitor = monitor_of(model, delay=0)
    (loss_of(model, batch()) * 0).backward()
    for _ in range(5):
        assert monitor.step()["rgb_grad_max"] == 0
    findings = [f for f in monitor.get_recommendations() if f.severity is Severity.error]
    assert [(f.rule, f.stream, f.step) for f in findings] == [("DEAD", "rgb", 5), ("DEAD", "depth", 5)]


def _differing() -> dict[str, float]:
    """A plain model on ranks that were fed different items: nothing synchronises its gradients."""
    rank, world = here()
    model = network().double()
    monitor = monitor_of(model)
    loss_of(model, part(batch(), rank, world)).backward()
    if rank == 1:
        assert model.rgb[0].bias.grad is not None
        model.rgb[0].bias.grad[0] = math.nan
    own = math.fsum(p.grad.square().sum().item() for p in model.depth.parameters() if p.grad is not None)
    return monitor.step(own=Total(own)).to_dict()


@pytest.mark.parametrize("world", [2, 3])
def test_unsynchronised_gradients_give_the_root_mean_square_norm_and_hide_no_nan(world: int) -> None:
    for figures in run_ranks(world, _differing):
        assert figures["depth_grad_norm"] == pytest.approx(math.sqrt(figures["own"] / world), rel=1e-12)
        assert figures["rgb_grad_nonfinite"] == 1
        assert math.isfinite(figures["rgb_grad_norm"])


# What is communicated ---------------------------------------------------------------------------------------------


def _counts(every: int) -> list[tuple[int, int]]:
    """(all_reduces, collectives of any kind) in each of 4 training steps after the first, which agrees on names."""
    rank, world = here()
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = monitor_of(model, optimizer, every=every)
    counts = []
    for step in range(5):
        with CommDebugMode() as mode:
            loss = loss_of(model, part(batch(seed=step), rank, world))
            loss.backward()
            monitor.step(loss=loss, samples=24 // world, correct=3)
            optimizer.step()
            optimizer.zero_grad()
        counts.append((mode.get_comm_counts()[torch.ops.c10d.allreduce_], mode.get_total_counts()))
    return counts[1:]


@pytest.mark.parametrize("world", [2, 3])
def test_a_monitored_step_costs_one_all_reduce_and_others_none(world: int) -> None:
    """CommDebugMode counts what reaches c10d's dispatcher, DDP's buckets among it: so a difference is taken."""
    off, second, on = (torch.tensor(run_ranks(world, _counts, every)) for every in (10**9, 2, 1))
    one = [1, 1]  # of all_reduces, and of all collectives
    assert (on - off).tolist() == [[one] * 4] * world
    assert (second - off).tolist() == [[[0, 0], one] * 2] * world


def _counts_of_calls() -> dict[str, int]:
    model = DistributedDataParallel(network())
    loss_of(model, batch()).backward()
    monitor = monitor_of(model)
    counts = {}
    for name in ("compute_stream_gradients", "compute_stream_weights", "get_recommendations", "flush", "state_dict"):
        with CommDebugMode() as mode:
            getattr(monitor, name)()
        counts[name] = mode.get_total_counts()
    return counts


def test_calls_communicate_what_they_say() -> None:
    expected = {"compute_stream_gradients": 1, "compute_stream_weights": 1}
    expected |= {"get_recommendations": 0, "flush": 0, "state_dict": 0}
    assert run_ranks(2, _counts_of_calls) == [expected] * 2


def _arrivals() -> list[Any]:
    found: list[Any] = []
    for delay in (0, 1, 3):
        model = network()
        monitor = monitor_of(model, delay=delay)
        loss_of(model, batch()).backward()
        lengths = []
        for call in range(5):
            monitor.step(loss=float(call), epoch=call / 2)
            lengths.append(len(monitor.history["loss"]))
        getattr(monitor, {0: "flush", 1: "state_dict", 3: "close"}[delay])()
        entries = [(entry.step, entry.epoch, entry.value) for entry in monitor.history.series("loss")]
        found.append((lengths, entries))
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_figures_of_call_n_arrive_at_call_n_plus_delay_and_at_the_end(world: int) -> None:
    entries = [(call + 1, call / 2, float(call)) for call in range(5)]
    expected = [([1, 2, 3, 4, 5], entries), ([0, 1, 2, 3, 4], entries), ([0, 0, 0, 1, 2], entries)]
    assert run_ranks(world, _arrivals) == [expected] * world


def test_steps_that_every_leaves_out_give_nothing_and_are_counted() -> None:
    model = network()
    monitor = monitor_of(model, every=3, delay=0)
    loss_of(model, batch()).backward()
    assert [len(monitor.step(loss=1.0)) for _ in range(7)] == [23, 0, 0, 23, 0, 0, 23]
    assert [entry.step for entry in monitor.history.series("loss")] == [1, 4, 7]
    assert monitor.calls == 7
    with pytest.raises(KeyError, match="no figure 'loss'; nearest: none: this step was not measured"):
        monitor.step(loss=1.0)["loss"]


# The user's own numbers -------------------------------------------------------------------------------------------


def _scalars() -> list[dict[str, float]]:
    rank, _ = here()
    model = network()
    monitor = monitor_of(model)
    samples = 4 + rank
    only = {"only_rank_0": 7.0} if rank == 0 else {}
    first = monitor.step(
        loss=torch.tensor(1.0 + rank),
        samples=samples,
        correct=rank + 1,
        tokens=torch.tensor(10),
        flag=np.int64(2),
        total=Total(0.5),
        pair=(3.0 * rank, rank),
        later=None,
        **only,
    )
    second = monitor.step(loss=None if rank == 0 else 5.0, samples=samples, correct=4, later=2.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        third = monitor.step(loss=2.0, late=1.0)
    assert ["not sent: late. The packet's names are fixed" in str(warning.message) for warning in caught] == [True]
    assert caught[0].filename == __file__
    names = [name for name in first if name.split("_")[0] not in ("rgb", "depth", "shared")]
    assert list(third) == list(first)
    return [{name: figures[name] for name in names} for figures in (first, second, third)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_users_numbers_ride_along(world: int) -> None:
    ranks = range(world)
    samples = sum(4 + rank for rank in ranks)
    nothing = dict.fromkeys(("flag", "only_rank_0", "pair", "tokens", "total"), math.nan)
    late = dict.fromkeys(("later", "correct", "samples"), math.nan)
    first = {
        "correct": sum(rank + 1 for rank in ranks),
        "flag": 2 * world,
        "later": math.nan,
        "loss": sum((4 + rank) * (1 + rank) for rank in ranks) / samples,
        "only_rank_0": 7.0,
        "pair": 3.0 if world > 1 else math.nan,  # one rank alone has weight 0
        "samples": samples,
        "tokens": 10 * world,
        "total": 0.5 * world,
    }
    second = nothing | {
        "loss": 5.0 if world > 1 else math.nan,
        "correct": 4 * world,
        "later": 2.0,
        "samples": samples,
    }
    third = nothing | late | {"loss": 2.0}
    for answer in run_ranks(world, _scalars):
        assert answer == [pytest.approx(expected, rel=1e-12, nan_ok=True) for expected in (first, second, third)]
        assert all(list(figures) == sorted(figures) for figures in answer)


def _present() -> dict[str, float]:
    rank, _ = here()
    monitor = monitor_of(network())
    mask = torch.tensor([True, rank == 0, rank == 0, False])
    with pytest.raises(KeyError, match="no stream 'audio'; streams: rgb, depth, shared"):
        monitor.step(present={"audio": mask})
    figures = monitor.step(present={"depth": mask, "rgb": torch.ones(2 + rank)})
    return {name: figures[name] for name in ("depth_present", "rgb_present")}


def test_presence_is_a_share_of_all_ranks_samples() -> None:
    assert run_ranks(2, _present) == [{"depth_present": 4 / 8, "rgb_present": 1.0}] * 2


# What is not finite -----------------------------------------------------------------------------------------------


def _bad_loss(bad: int) -> tuple[float, list[Any]]:
    rank, world = here()
    model = DistributedDataParallel(network())
    monitor = monitor_of(model, delay=0)
    loss = loss_of(model, part(batch(), rank, world))
    loss.backward()
    figures = monitor.step(loss=math.nan if rank == bad else 1.0 + rank, samples=2)
    findings = [f for f in monitor.get_recommendations() if f.rule == "NF"]
    return figures["loss"], [(f.rank, f.severity.value, str(f)) for f in findings]


@pytest.mark.parametrize(("world", "bad"), [(2, 1), (3, 0), (3, 2)])
def test_a_nan_loss_names_its_rank_on_all_ranks(world: int, bad: int) -> None:
    sentence = f"⚠️  the loss, or another number given to step: not finite, on rank {bad} at step 1"
    others = [1.0 + rank for rank in range(world) if rank != bad]
    for loss, findings in run_ranks(world, _bad_loss, bad):
        assert loss == pytest.approx(sum(others) / len(others))
        assert findings == [(bad, "error", sentence)]


def _bad_gradient() -> list[Any]:
    rank, world = here()
    model = DistributedDataParallel(network())
    monitor = monitor_of(model, delay=0)
    rgb, depth, target = part(batch(), rank, world)
    if rank == 1:
        depth = depth * math.inf  # spreads by the average to all ranks' depth gradients, and through the loss to all
    logits = model.module.mix(torch.cat([model.module.rgb(rgb), model.module.depth(depth)], 1))
    assert logits.shape == (len(target), 3)
    loss_of(model, (rgb, depth, target)).backward()
    for parameter in model.module.rgb.parameters():
        parameter.grad = torch.ones_like(parameter)
    figures = monitor.step()
    findings = monitor.get_recommendations()
    return [figures["rgb_grad_norm"], figures["depth_grad_nonfinite"], [str(f) for f in findings if f.rule == "NF"]]


def test_a_nan_gradient_names_its_stream_and_leaves_the_others_figures() -> None:
    for norm, nonfinite, findings in run_ranks(2, _bad_gradient):
        assert norm == pytest.approx(math.sqrt(ELEMENTS["rgb"]))
        assert nonfinite > 0
        assert findings == ["⚠️  gradients of depth, shared: not finite, on ranks 0, 1 at step 1"]


# AMP --------------------------------------------------------------------------------------------------------------


def scaled_model() -> tuple[TwoStreams, torch.optim.SGD, torch.amp.GradScaler]:
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return model, torch.optim.SGD(model.parameters(), 0.1), scaler


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_the_loss_scale_is_taken_out_once(unscaled: bool, known: bool) -> None:
    model, optimizer, scaler = scaled_model()
    monitor = monitor_of(model, optimizer if known else None, delay=0)
    for _ in range(2):  # the second step follows the scaler's update
        model.load_state_dict(network().state_dict())
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch())).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        figures = monitor.step(scaler=scaler).to_dict()
        assert monitor.compute_stream_gradients(scaler).to_dict() == figures
        assert figures == pytest.approx(twin("ddp"), rel=1e-6, abs=1e-9)
        scaler.step(optimizer)
        scaler.update()


def test_a_disabled_scaler_changes_nothing_and_a_fresh_one_has_scale_one() -> None:
    model = network()
    loss_of(model, batch()).backward()
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu")):
        assert monitor_of(model).step(scaler=scaler).to_dict() == pytest.approx(twin("ddp"), rel=1e-6, abs=1e-9)


def test_an_overflow_under_a_scaler_is_counted_and_is_no_alarm() -> None:
    model, optimizer, scaler = scaled_model()
    monitor = monitor_of(model, optimizer, delay=0)
    scaler.scale(loss_of(model, batch()) * 3e38).backward()
    figures = monitor.step(scaler=scaler)
    assert figures["rgb_grad_nonfinite"] + figures["shared_grad_nonfinite"] > 0
    assert [f.rule for f in monitor.get_recommendations() if f.severity is Severity.error] == []


def test_a_step_is_skipped_for_one_element_of_one_stream() -> None:
    model, optimizer, scaler = scaled_model()
    monitor = monitor_of(model, optimizer, delay=0)
    scaler.scale(loss_of(model, batch())).backward()
    model.depth[0].weight.grad[0, 0] = math.inf
    figures = monitor.step(scaler=scaler)
    assert [figures[f"{stream}_grad_nonfinite"] for stream in (*STREAMS, "shared")] == [0, 1, 0]
    assert monitor.history["step_skipped"] == [1.0]


def test_skipped_steps_are_said_and_enter_no_advice_until_all_of_them_are() -> None:
    model, optimizer, scaler = scaled_model()
    monitor = monitor_of(model, optimizer, delay=0)
    advice = []
    for overflow in (False, True, *[False] * 4, *[True] * 5):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch()) * (3e38 if overflow else 1.0)).backward()
        monitor.step(scaler=scaler)
        advice.append({finding.rule for finding in monitor.get_recommendations()})
    assert monitor.history["step_skipped"] == [0.0, 1.0, *[0.0] * 4, *[1.0] * 5]
    assert all("S-NF" not in rules for rules in advice[:-1])
    assert "S-NF" in advice[-1]


# Join: uneven inputs ----------------------------------------------------------------------------------------------


def _joined(batches: list[int], every: int) -> tuple[Any, ...]:
    """Two epochs under Join, rank r with batches[r] batches in each; counts all_reduce calls in the second."""
    rank, _ = here()
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    monitor = monitor_of(model, optimizer, every=every)
    watched = []
    for epoch in range(2):
        with Collectives() as mode, Join([model, monitor]):
            for step in range(batches[rank]):
                loss = loss_of(model, part(batch(seed=step), rank, len(batches)))
                loss.backward()
                watched.append(monitor.step(loss=loss, samples=1, epoch=float(epoch)))
                optimizer.step()
                optimizer.zero_grad()
    counts = mode.count
    state = repr(monitor.state_dict())
    norms = [figures["rgb_grad_norm"] for figures in watched if figures]
    elements = monitor.history["rgb_grad_elements"]
    return monitor.calls, monitor.history["samples"], elements, state, counts, norms


def joined_twin(batches: list[int]) -> list[float]:
    """The norms of `_joined` in one process: DDP divides the sum of who is left by the number of all ranks."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    norms = []
    for step in [*range(max(batches))] * 2:
        for rank, own in enumerate(batches):
            if step < own:
                (loss_of(model, part(batch(seed=step), rank, len(batches))) / len(batches)).backward()
        norms.append(math.hypot(*(p.grad.norm().item() for p in model.rgb.parameters() if p.grad is not None)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("batches", [[3, 5], [4, 0], [0, 2, 3], [3, 1, 0]])
def test_uneven_inputs_under_join_neither_hang_nor_differ(batches: list[int]) -> None:
    answers = run_ranks(len(batches), _joined, batches, 1)
    longest = max(batches)
    alive = [sum(step < own for own in batches) for step in range(longest)] * 2
    for calls, samples, elements, state, _, _ in answers:
        assert calls == 2 * longest
        assert samples == alive
        assert elements == [ELEMENTS["rgb"]] * calls
        assert state == answers[0][3]
    expected = joined_twin(batches)
    for own, answer in zip(batches, answers, strict=True):
        assert answer[5] == pytest.approx(expected[:own] + expected[longest : longest + own], rel=1e-5)


def test_under_join_each_rank_does_one_more_all_reduce_a_monitored_step() -> None:
    batches = [2, 4]
    off, second, on = (run_ranks(2, _joined, batches, every) for every in (10**9, 2, 1))
    for rank in range(2):
        assert on[rank][4] - off[rank][4] == 4
        assert second[rank][4] - off[rank][4] == 2


def _joined_epochs() -> tuple[list[Any], list[str]]:
    """Rank 1 has no batch: what it files, and finds, must still be the others'."""
    rank, _ = here()
    model = DistributedDataParallel(network())
    monitor = monitor_of(model)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    with Join([model, monitor]):
        for step in range(2 if rank == 0 else 0):
            scaler.scale(loss_of(model, batch()) * 3e38).backward()
            monitor.step(loss=1.0, epoch=3.5 + step, scaler=scaler)
    epochs = [entry.epoch for entry in monitor.history.series("loss")]
    return [*epochs, monitor.epoch], [str(f) for f in monitor.get_recommendations()]


def test_a_rank_without_a_batch_files_the_others_epoch_and_finds_the_same() -> None:
    answers = run_ranks(2, _joined_epochs)
    assert answers[0][0] == [3.5, 4.5, 4.5]
    assert answers[1] == answers[0]


# Ranks that disagree ----------------------------------------------------------------------------------------------


def _disagree(what: str) -> str:
    rank, _ = here()
    config = {"every": {"every": 1 + rank}, "delay": {"delay": rank}}.get(what, {"every": 2})
    streams = {"rgb": "rgb"} if what == "streams" and rank == 1 else STREAMS
    monitor = StreamMonitor(network(), None, streams, config=MonitorConfig(**config))
    if what == "calls" and rank == 0:
        monitor.load_state_dict(monitor.state_dict() | {"calls": 3})
    with pytest.raises(ValueError, match=r"ranks 0 and 1 disagree about \(streams, configuration, calls") as error:
        monitor.step(loss=1.0)
    return str(error.value)


@pytest.mark.parametrize("what", ["every", "delay", "streams", "calls"])
def test_ranks_that_disagree_get_an_error_everywhere(what: str) -> None:
    messages = run_ranks(2, _disagree, what)
    assert messages[0] == messages[1]
    assert messages[0].endswith("build the monitor alike, and load the same state, on every rank")


# State and end ----------------------------------------------------------------------------------------------------


def _saved(path: str) -> tuple[str, str]:
    monitor = monitor_of(network(), delay=2)
    with contextlib.suppress(ZeroDivisionError), monitor:
        monitor.step(loss=math.nan, epoch=1.0)
        monitor.step(loss=2.0)
        state = monitor.state_dict()
        if dist.get_rank() == 0:
            torch.save(state, path)
        raise ZeroDivisionError
    return _state(monitor), repr(monitor.history.state_dict())


def _state(monitor: StreamMonitor) -> str:
    """But for what rules remember of ranks."""
    return repr({name: value for name, value in monitor.state_dict().items() if name != "rules"})


@pytest.mark.parametrize("world", [1, 3])
def test_state_survives_torch_save_and_another_world_size(world: int, tmp_path: Any) -> None:
    path = str(tmp_path / "state.pt")
    states = run_ranks(world, _saved, path)
    assert len(set(states)) == 1
    monitor = monitor_of(network())
    monitor.load_state_dict(torch.load(path, weights_only=True))
    assert repr(monitor.history.state_dict()) == states[0][1]
    assert _state(monitor) == states[0][0]
    assert (monitor.calls, monitor.epoch) == (2, 1.0)
    assert monitor.history["loss"][1] == 2.0
    monitor.step(loss=3.0)
    monitor.flush()
    assert [entry.step for entry in monitor.history.series("loss")] == [1, 2, 3]


def test_the_gradients_and_weights_are_only_read() -> None:
    model = network()
    loss_of(model, batch()).backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters() if p.grad is not None]
    monitor = monitor_of(model)
    monitor.step(loss=1.0)
    monitor.compute_stream_gradients().to_dict()
    monitor.compute_stream_weights().to_dict()
    for parameter, (weight, gradient) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, weight)
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_figures_are_mappings_that_merge_and_name_the_nearest() -> None:
    model = network()
    loss_of(model, batch()).backward()
    figures = monitor_of(model).compute_stream_gradients()
    assert "rgb_grad_norm" in figures
    assert "x" not in figures
    assert repr(figures).startswith("Figures(under way: rgb_grad_norm, ")
    merged = {"x": 1.0} | (figures | {"rgb_grad_norm": 2.0})
    assert (merged["x"], merged["rgb_grad_norm"], len(merged)) == (1.0, 2.0, len(figures) + 1)
    assert merged["depth_grad_norm"] == pytest.approx(twin("ddp")["depth_grad_norm"], rel=1e-6)
    with pytest.raises(KeyError, match="no figure 'rgb_grad_nrom'; nearest: rgb_grad_norm"):
        figures["rgb_grad_nrom"]


def test_cleared_gradients_warn() -> None:
    with pytest.warns(UserWarning, match="no gradients: no parameter has one, so norms are nan"):
        assert math.isnan(monitor_of(network()).compute_stream_gradients()["rgb_grad_norm"])


def _alone_at_the_end() -> tuple[float, list[str]]:
    """Rank 1 lags behind; rank 0 has failed and closes. Its seconds, and what it warned of."""
    rank, _ = here()
    model = network()
    monitor = monitor_of(model)
    for _ in range(2):
        backward("plain", model)
        monitor.step()
    told: list[str] = []
    logging.getLogger("ddp_streammon").addHandler(_Kept(told))
    store = dist.distributed_c10d._get_default_store()
    start = time.monotonic()
    if rank == 0:
        monitor.step()
        monitor.close(exit_code=1)
        store.set("closed", "")
    seconds = time.monotonic() - start
    if rank == 1:
        store.wait(["closed"])
        monitor.step()
        monitor.close()
    return seconds, [len(monitor.history["rgb_grad_norm"]), *told]


class _Kept(logging.Handler):
    def __init__(self, told: list[str]) -> None:
        super().__init__()
        self.told = told

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def test_a_rank_that_fails_waits_two_seconds_at_most_for_the_others() -> None:
    (seconds, (steps, *told)), (_, (all_steps, *none)) = run_ranks(2, _alone_at_the_end)
    assert seconds < 10
    assert (steps, told) == (2, ["the last 1 measured steps did not arrive from the other ranks"])
    assert (all_steps, none) == (3, [])
