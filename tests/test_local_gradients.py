"""Each rank's own gradient, before DDP's average: against the gradient of its batch alone, in one process."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon import MonitorConfig, StreamMonitor, local_gradients
from ddp_streammon.ranks import LocalNorms
from ddp_streammon.stats import StepStats, StreamStats
from tests.networks import STREAMS, TwoStreams, batch, loss_of, network, part
from tests.ranks import run_ranks
from tests.sharding import possible

WORLDS = [2, 3, pytest.param(1, marks=pytest.mark.slow)]
STEPS = 6
NAMES = (*STREAMS, "shared")
SMALL = 0.01
"""MiB: two buckets, where a network of ours fits into one by default."""


class Choosy(TwoStreams):
    """Rank 0 does without depth."""

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        first = self.rgb(rgb)
        second = first.new_zeros(len(rgb), 96) if dist.get_rank() == 0 else self.depth(depth)
        logits: Tensor = self.mix(torch.cat([first, second], dim=1))
        return logits


def choosy() -> Choosy:
    torch.manual_seed(0)
    return Choosy()


def freeze_depth(model: TwoStreams) -> TwoStreams:
    model.depth.requires_grad_(False)
    return model


def compressed(*, as_view: bool = False) -> nn.Module:
    model = DistributedDataParallel(network(), gradient_as_bucket_view=as_view)
    model.register_comm_hook(None, fp16_compress_hook)
    return model


def built_in() -> nn.Module:
    model = DistributedDataParallel(network(), gradient_as_bucket_view=True, bucket_cap_mb=SMALL)
    model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)  # type: ignore[no-untyped-call]
    return model


def sharded() -> nn.Module:
    model = network()
    for part_of_it in (model.rgb, model.depth, model):
        fully_shard(part_of_it)
    return model


def separately() -> nn.Module:
    """Each stream under a DDP of its own."""
    model = network()
    model.rgb, model.depth, model.mix = (DDP(module) for module in (model.rgb, model.depth, model.mix))  # type: ignore[assignment]
    return model


DDP = DistributedDataParallel
KINDS: dict[str, Callable[[], nn.Module]] = {
    "ddp": lambda: DDP(network()),
    "bucket_view": lambda: DDP(network(), gradient_as_bucket_view=True, bucket_cap_mb=SMALL),
    "small_buckets": lambda: DDP(network(), bucket_cap_mb=SMALL),
    "static_graph": lambda: DDP(network(), static_graph=True, bucket_cap_mb=SMALL),
    "static_graph_unused": lambda: DDP(network(unused=True), static_graph=True),
    "unused": lambda: DDP(choosy(), find_unused_parameters=True),
    "frozen": lambda: DDP(freeze_depth(network())),
    "bfloat16": lambda: DDP(network().bfloat16(), bucket_cap_mb=SMALL),
    "comm_hook": compressed,
    "view_comm_hook": lambda: compressed(as_view=True),
    "view_builtin_hook": built_in,
    "separately": separately,
    "no_sync": lambda: DDP(network(), bucket_cap_mb=SMALL),
    "no_sync_view": lambda: DDP(network(), gradient_as_bucket_view=True, bucket_cap_mb=SMALL),
    "zero_in_place": lambda: DDP(network(), gradient_as_bucket_view=True),
    "scaled": lambda: DDP(network()),
    "unscaled": lambda: DDP(network()),
    "compiled": lambda: DDP(torch.compile(network(), backend="eager")),  # type: ignore[arg-type]
    "plain": network,
    "fsdp2": sharded,
}


def kinds_at(world: int) -> list[str]:
    """torch.compile takes seconds in each process."""
    return [kind for kind in possible(KINDS) if world == 2 or kind != "compiled"]


def halves(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    yield tuple(tensor[:12] for tensor in tensors)
    yield tuple(tensor[12:] for tensor in tensors)


def backward(kind: str, model: nn.Module, seed: int, scale: Callable[[Tensor], Tensor]) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    tensors = batch(seed=seed)
    if not kind.startswith("no_sync"):
        scale(loss_of(model, part(tensors, rank, world))).backward()
        return
    assert isinstance(model, DistributedDataParallel)
    for number, half in enumerate(halves(tensors)):
        with model.no_sync() if number == 0 else contextlib.nullcontext():
            (loss_of(model, part(half, rank, world)) / 2).backward()


def _norms(kinds: list[str]) -> dict[str, Any]:
    """Per kind: each rank's norms [step][rank][stream], the sizes of what is read together after each step, warnings,
    and the synced norms of the last step."""
    answers = {}
    for kind in kinds:
        model = KINDS[kind]()
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = MonitorConfig(local_gradients=True, delay=0)
            monitor = StreamMonitor(model, optimizer, STREAMS, config=config)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=kind in ("scaled", "unscaled"))
        sizes = []
        for seed in range(STEPS):
            backward(kind, model, seed, scaler.scale)
            if kind == "unscaled":
                scaler.unscale_(optimizer)
            monitor.compute_stream_gradients(scaler)
            monitor.step(scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=kind != "zero_in_place")
            meter = monitor._meter._local
            assert meter is not None
            sizes.append(sorted(len(bucket.numbers) for bucket in set(meter._bucket_of.values())))
        ranks = range(dist.get_world_size())
        norms = torch.tensor(
            [[monitor.history[f"{name}_local_grad_norm_rank{rank}"] for name in NAMES] for rank in ranks]
        )
        told = [str(warning.message) for warning in caught if "local gradients" in str(warning.message)]
        synced = {name: monitor.history[f"{name}_grad_norm"][-1] for name in NAMES}
        answers[kind] = (norms.permute(2, 0, 1).tolist(), sizes, told, synced)
        monitor.close()
    return answers


@functools.cache
def answers_of(world: int) -> list[dict[str, Any]]:
    return run_ranks(world, _norms, kinds_at(world))


WITHOUT = {"frozen": ["depth"], "plain": list(NAMES), "fsdp2": list(NAMES)}
"""Streams without local gradients."""


@functools.cache
def twin(dtype: torch.dtype, seed: int, rank: int, world: int, *, without_depth: bool) -> list[float]:
    """The norms of the gradient of that rank's batch alone, by definition; nan where there is none."""
    model = network().to(dtype)
    rgb, depth, target = part(batch(seed=seed), rank, world)
    if without_depth:
        logits = model.mix(torch.cat([model.rgb(rgb), rgb.new_zeros(len(rgb), 96)], dim=1))
        nn.functional.cross_entropy(logits, target).backward()
    else:
        loss_of(model, (rgb, depth, target)).backward()
    norms = []
    for module in (model.rgb, model.depth, model.mix):
        owned = [p.grad.double().flatten() for p in module.parameters() if p.grad is not None]
        norms.append(torch.cat(owned).norm().item() if owned else math.nan)
    return norms


def expected(kind: str, seed: int, rank: int, world: int) -> list[float]:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    norms = twin(dtype, seed, rank, world, without_depth=kind == "unused" and rank == 0)
    return [math.nan if name in WITHOUT.get(kind, ()) else norm for name, norm in zip(NAMES, norms, strict=True)]


@pytest.mark.parametrize(
    ("world", "kind"),
    [
        pytest.param(world, kind, marks=() if world > 1 else pytest.mark.slow)
        for world in (1, 2, 3)
        for kind in kinds_at(world)
    ],
)
def test_local_norms_equal_the_single_process_twin(world: int, kind: str) -> None:
    """In every step: before DDP's buckets are taken over, in the first step with them, and after."""
    for answer in answers_of(world):
        norms, _, _, _ = answer[kind]
        assert len(norms) == STEPS
        for seed, ranks in enumerate(norms):
            for rank, own in enumerate(ranks):
                assert own == pytest.approx(expected(kind, seed, rank, world), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("ddp", [1] * 8, [8]),
        ("small_buckets", [1] * 8, [2, 6]),
        ("bucket_view", [1] * 8, [2, 6]),
        ("view_comm_hook", [1] * 8, [1] * 8),
        ("view_builtin_hook", [1] * 8, [1] * 8),
        ("static_graph", [1] * 8, [1] * 8),
        ("unused", [1] * 8, [1] * 8),
        ("frozen", [1] * 6, [6]),
        ("separately", [1] * 8, [2, 2, 4]),
    ],
)
def test_gradients_are_read_by_ddps_buckets_where_they_can_be(
    world: int, kind: str, before: list[int], after: list[int]
) -> None:
    for answer in answers_of(world):
        sizes = answer[kind][1]
        assert (sizes[0], sizes[-2], sizes[-1]) == (before, after, after)


@pytest.mark.parametrize("world", WORLDS)
def test_streams_without_local_gradients_are_named_once(world: int) -> None:
    for answer in answers_of(world):
        for kind in kinds_at(world):
            missing = WITHOUT.get(kind, [])
            told = [
                f"no local gradients of {', '.join(missing)}: no trainable parameter of it is under "
                "DistributedDataParallel, which alone lets a rank's own gradient be seen before it is averaged "
                "(fully_shard reduces before any hook)"
            ]
            assert answer[kind][2] == (told if missing else [])


def test_a_comm_hook_of_the_users_stays_and_works() -> None:
    """Its rounding to float16 is seen in the synced norm, and the local ones have none of it."""
    for answer in answers_of(2):
        exact, rounded = answer["ddp"][3], answer["comm_hook"][3]
        assert rounded == pytest.approx(exact, rel=2.0**-10)
        assert rounded != exact
        assert answer["comm_hook"][0] == answer["ddp"][0]


def _joined() -> list[tuple[float, ...]]:
    """Each step's norms of rgb on ranks 0 to 2, of which rank r trains for r + 1 steps."""
    rank = dist.get_rank()
    model = DDP(network())
    monitor = StreamMonitor(model, None, STREAMS, config=MonitorConfig(local_gradients=True, delay=0))
    with Join([model, monitor]):
        for seed in range(rank + 1):
            model.zero_grad()
            backward("ddp", model, seed, lambda loss: loss)
            monitor.step()
    return [tuple(monitor.history[f"rgb_local_grad_norm_rank{number}"]) for number in range(3)]


def test_ranks_that_stopped_early_have_no_norms() -> None:
    for series in run_ranks(3, _joined):
        for rank, norms in enumerate(series):
            assert norms == pytest.approx([expected("ddp", seed, rank, 3)[0] for seed in range(rank + 1)], rel=1e-6)


def _ignoring_a_weight() -> list[tuple[float, float]]:
    """Steps' local norms of rgb on this rank, and what they are without the weight that DDP is told to ignore."""
    rank, world = dist.get_rank(), dist.get_world_size()
    inner, alone = network(), network()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, ["rgb.0.weight"])
    model = DistributedDataParallel(inner)
    monitor = StreamMonitor(model, None, STREAMS, config=MonitorConfig(local_gradients=True))
    expected = []
    for step in range(6):
        for one in (model, alone):
            one.zero_grad()
            loss_of(one, part(batch(seed=step), rank, world)).backward()
        monitor.step()
        own = [parameter.grad.flatten() for name, parameter in alone.rgb.named_parameters() if name != "0.weight"]
        expected.append(torch.cat(own).norm().item())
    monitor.close()
    return list(zip(monitor.history[f"rgb_local_grad_norm_rank{rank}"], expected, strict=True))


def test_what_ddp_ignores_is_left_out() -> None:
    """In DDP's buckets, of which it tells in the first steps, such parameters have no number."""
    for steps in run_ranks(2, _ignoring_a_weight):
        assert [norm for norm, _ in steps] == [pytest.approx(expected, rel=1e-5) for _, expected in steps]


def test_of_many_ranks_the_first_have_keys() -> None:
    stream = StreamStats(1.0, 0.0, 1.0, 1.0, nonfinite=0, elements=10, tensors=2)
    local = tuple(LocalNorms(rank, (float(rank),), (0,), None) for rank in range(10, 40))
    values = StepStats(1, None, {"a": stream}, {}, 40, (), scaled=False, local=local).values()
    assert {key: value for key, value in values.items() if "local" in key} == {
        f"a_local_grad_norm_rank{rank}": rank for rank in range(10, 16)
    }


# What it costs ----------------------------------------------------------------------------------------------------


def _reads(every: int, kind: str = "ddp") -> list[int]:
    """How often gradients were read in each of 7 steps."""
    reads = 0
    made = local_gradients.reader

    def counted(*arguments: Any) -> Any:
        read = made(*arguments)

        def reading(source: Any) -> Tensor:
            nonlocal reads
            reads += 1
            return read(source)

        return reading

    local_gradients.reader = counted
    try:
        model = DistributedDataParallel(network(), bucket_cap_mb=SMALL)
        config = MonitorConfig(local_gradients=True, every=every, delay=0)
        monitor = StreamMonitor(model, None, STREAMS, config=config)
        counts = []
        for seed in range(7):
            reads = 0
            backward(kind, model, seed, lambda loss: loss)
            counts.append(reads)
            monitor.step()
            model.zero_grad()
    finally:
        local_gradients.reader = made
    rank = dist.get_rank()
    last = [monitor.history[f"{name}_local_grad_norm_rank{rank}"][-1] for name in NAMES]
    assert last == pytest.approx(expected("ddp", 6, rank, dist.get_world_size()), rel=1e-6)
    return counts


def test_steps_that_every_leaves_out_read_nothing() -> None:
    assert run_ranks(2, _reads, 1) == [[8, 8, 8, 2, 2, 2, 2]] * 2
    assert run_ranks(2, _reads, 3) == [[8, 0, 0, 8, 0, 0, 2]] * 2


def test_micro_batches_before_the_last_read_nothing() -> None:
    assert run_ranks(2, _reads, 1, "no_sync") == [[8, 8, 2, 2, 2, 2, 2]] * 2


def _counts(every: int) -> list[int]:
    """Collectives of any kind in each of 4 steps after the first, which agrees on names."""
    model = DistributedDataParallel(network())
    monitor = StreamMonitor(model, None, STREAMS, config=MonitorConfig(local_gradients=True, every=every))
    counts = []
    for seed in range(5):
        with CommDebugMode() as mode:
            backward("ddp", model, seed, lambda loss: loss)
            monitor.step(loss=1.0)
            model.zero_grad()
        counts.append(mode.get_total_counts())
    return counts[1:]


def test_a_step_still_costs_one_collective() -> None:
    off, on = (torch.tensor(run_ranks(2, _counts, every)) for every in (10**9, 1))
    assert (on - off).tolist() == [[1] * 4] * 2


# What it leaves as it is --------------------------------------------------------------------------------------------


def _trained(kind: str, how: str) -> list[Tensor]:
    """The weights, and the last gradients, after 10 steps."""
    model = KINDS[kind]()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    monitor = None
    if how != "alone":
        config = MonitorConfig(local_gradients=how == "local")
        monitor = StreamMonitor(model, optimizer, STREAMS, config=config)
    for seed in range(10):
        optimizer.zero_grad()
        backward(kind, model, seed, lambda loss: loss)
        if monitor is not None:
            monitor.step()
        optimizer.step()
    return [t.detach().clone() for p in model.parameters() for t in (p, p.grad) if t is not None]


def _all_trained() -> list[str]:
    """Where the weights differ with local gradients from those without, or without a monitor."""
    different = []
    for kind in ("ddp", "bucket_view", "small_buckets", "static_graph", "unused", "no_sync", "comm_hook", "bfloat16"):
        alone = _trained(kind, "alone")
        for how in ("monitored", "local"):
            if not all(torch.equal(a, b) for a, b in zip(alone, _trained(kind, how), strict=True)):
                different.append(f"{kind} {how}")
    return different


@pytest.mark.parametrize("world", [1, 2])
def test_training_is_bit_identical(world: int) -> None:
    assert run_ranks(world, _all_trained) == [[]] * world


def _hooks() -> list[int]:
    """Hooks on the parameters: with local gradients, on a copy of the model, and after `close`."""
    model = DistributedDataParallel(network())
    monitor = StreamMonitor(model, None, STREAMS, config=MonitorConfig(local_gradients=True))
    backward("ddp", model, 0, lambda loss: loss)
    monitor.step()
    twin_of_it = copy.deepcopy(model.module)

    def count(module: nn.Module) -> int:
        return sum(len(p._post_accumulate_grad_hooks or ()) for p in module.parameters())

    counts = [count(model), count(twin_of_it)]
    monitor.close()
    return [*counts, count(model)]


def test_close_takes_the_hooks_off() -> None:
    assert run_ranks(2, _hooks) == [[8, 0, 0]] * 2
