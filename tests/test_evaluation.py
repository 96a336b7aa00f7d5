"""Evaluation: every item once on some rank, streams replayed through the rest of the model, no trace left."""

from __future__ import annotations

import copy
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from ddp_streammon import EvalStats, Items, StreamMonitor, StreamSet, classification
from ddp_streammon.collective import Collective
from ddp_streammon.evaluation import Plan, Replacement, activation_moments, each_alone, measure
from ddp_streammon.train.models import MultiStreamModel, multi_mlp
from tests.ranks import run_ranks

COUNT = 23
EXACT = {"rel": 1e-9, "abs": 1e-12}


def model(fusion: str = "gated", streams: int = 2, **options: Any) -> MultiStreamModel:
    """float64, so that a batch's composition moves no digit that is looked at; the gate is not at its neutral start."""
    torch.manual_seed(0)
    widths = {name: 3 + number for number, name in enumerate(("rgb", "depth", "audio")[:streams])}
    made = multi_mlp(widths, 4, hidden=(6, 5), fusion_type=fusion, **{"dropout_p": 0.3, **options}).double()
    for parameter in made.fusion.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def data(count: int = COUNT, streams: int = 2) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(count, 3 + s, generator=generator, dtype=torch.float64) for s in range(streams)]
    return TensorDataset(*inputs, torch.randint(4, (count,), generator=generator))


def first(count: int) -> TensorDataset:
    return TensorDataset(*(tensor[:count] for tensor in data().tensors))


def evaluate(net: nn.Module, *items: Items, score: Any = None) -> EvalStats:
    splits = {str(number): each for number, each in enumerate(items)}
    named = {"rgb": "rgb", "depth": "depth"} if isinstance(net, TwoStreams) else None
    streams = StreamSet.resolve(net, named)
    plan = Plan(each_alone(streams.user_names, Replacement.zero))
    return measure(streams, Collective(), splits, score or classification(), plan)


def figures(net: nn.Module, loader: Any, **options: Any) -> dict[str, float]:
    """`{"full_loss": ..., "rgb_correct": ..., "items": ...}` of one loader."""
    result = evaluate(net, Items(loader, "loader", **options))
    flat = {f"{variant}_{name}": value for variant, of in result.means("0").items() for name, value in of.items()}
    return flat | {"items": len(result.tables["0"])}


def buffers_apart(net: nn.Module, rank: int) -> dict[str, Tensor]:
    """Give this rank buffers of its own, as BatchNorm under DDP does; returns what they are now."""
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.mul_(1 + 0.5 * rank)
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


# Sharding ----------------------------------------------------------------------------------------------------------


def evaluate_with_own_buffers(count: int, batch_size: int) -> tuple[dict[str, float], bool]:
    net = model(streams=3)
    mine = buffers_apart(net, dist.get_rank() if dist.is_initialized() else 0)
    found = figures(net, DataLoader(data(count, 3), batch_size))
    return found, all(torch.equal(mine[name], buffer) for name, buffer in net.named_buffers())


@pytest.mark.parametrize(
    ("world", "count"),
    [(2, COUNT), (3, COUNT), (4, 3)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in ((1, COUNT), (4, COUNT), (1, 3), (2, 3), (3, 3))],
)
def test_any_number_of_ranks_gives_the_same_and_each_rank_keeps_its_buffers(world: int, count: int) -> None:
    alone, _ = evaluate_with_own_buffers(count, 4)
    net, (*inputs, target) = model(streams=3).eval(), data(count, 3).tensors
    logits = net(*inputs)
    assert alone["full_loss"] == pytest.approx(functional.cross_entropy(logits, target).item(), **EXACT)
    assert alone["full_correct"] * count == pytest.approx((logits.argmax(1) == target).sum().item(), abs=1e-9)
    assert len(alone) == 2 * 7 + 1 and alone["items"] == count
    for found, restored in run_ranks(world, evaluate_with_own_buffers, count, 4):
        assert restored
        assert found == pytest.approx(alone, **EXACT)
        corrects = [key for key in alone if key.endswith("correct")]
        assert [round(found[key] * count) for key in corrects] == [round(alone[key] * count) for key in corrects]


class Shards(IterableDataset):
    """Rank r's own items: `sizes[r]` of them."""

    def __init__(self, sizes: list[int], rank: int) -> None:
        self.start, self.stop = sum(sizes[:rank]), sum(sizes[: rank + 1])

    def __iter__(self) -> Iterator[Any]:
        return iter([data()[i] for i in range(self.start, self.stop)])


def evaluate_shards(sizes: list[int]) -> dict[str, float]:
    return figures(model(), DataLoader(Shards(sizes, dist.get_rank()), 4), sharded=True)


@pytest.mark.parametrize("sizes", [[3, 12, 8], [0, 23, 0]])
def test_uneven_and_empty_shards_count_every_item_once(sizes: list[int]) -> None:
    alone = figures(model(), DataLoader(data(), 4))
    for found in run_ranks(3, evaluate_shards, sizes):
        assert found == pytest.approx(alone, **EXACT)


def loaders(rank: int, world: int) -> dict[str, Items]:
    """Loaders of many kinds that all stand for the same 23 items."""
    everything = data()
    torch.manual_seed(rank)  # ranks whose random states differ
    batches = list(DataLoader(everything, 4))
    pairs = DataLoader(everything, 5, collate_fn=nested)
    own = DistributedSampler(everything, world, rank)
    return {
        "random": Items(DataLoader(everything, 4, shuffle=True)),
        "own generator": Items(DataLoader(everything, 4, shuffle=True, generator=torch.Generator())),
        "padded": Items(DataLoader(everything, 4, sampler=DistributedSampler(everything, 4, rank))),
        "padded, said to be sharded": Items(DataLoader(everything, 4, sampler=own), sharded=True),
        "batch sampler of padded": Items(DataLoader(everything, batch_sampler=BatchSampler(own, 4, False))),
        "drop_last": Items(DataLoader(everything, 4, drop_last=True)),
        "every rank sees all": Items(batches, sharded=False),
        "a shuffled loader said to be the same": Items(DataLoader(everything, 4, shuffle=True), sharded=False),
        "iterable": Items(DataLoader(Shards([COUNT], 0), 4), sharded=False),
        "buckets": Items(DataLoader(everything, batch_sampler=Buckets(COUNT))),
        "no automatic batches": Items(DataLoader(Whole(), batch_size=None)),
        "collate_fn": Items(pairs),
        "mapping": Items(DataLoader(everything, 5, collate_fn=mapping)),
        "nested mapping": Items(DataLoader(everything, 5, collate_fn=nested_mapping)),
        "workers": Items(DataLoader(everything, 4, shuffle=True, num_workers=1, multiprocessing_context="fork")),
    }


def nested(items: list[tuple[Tensor, ...]]) -> Any:
    rgb, depth, target = map(torch.stack, zip(*items, strict=True))
    return (rgb, depth), target


def mapping(items: list[tuple[Tensor, ...]]) -> Any:
    return dict(zip(("rgb", "depth", "label"), map(torch.stack, zip(*items, strict=True)), strict=True))


def nested_mapping(items: list[tuple[Tensor, ...]]) -> Any:
    rgb, depth, target = map(torch.stack, zip(*items, strict=True))
    return {"depth": depth, "rgb": rgb}, target


class Buckets:
    """A batch sampler without a batch size: batches of 1, 2, 3, ... in random order."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.count).tolist()
        size = 1
        while order:
            yield order[:size]
            order, size = order[size:], size + 1


class Whole(Dataset):
    """Items that are batches already."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return tuple(tensor[5 * index : 5 * index + 5] for tensor in data().tensors)


def evaluate_kinds() -> dict[str, dict[str, float]]:
    kinds = loaders(dist.get_rank(), dist.get_world_size())
    return {kind: figures(model(), items.loader, sharded=items.sharded) for kind, items in kinds.items()}


def test_every_kind_of_loader_is_shared_out_with_each_item_once() -> None:
    alone = figures(model(), DataLoader(data(), 4))
    for found in run_ranks(2, evaluate_kinds):
        for kind, each in found.items():
            assert each == pytest.approx(alone, **EXACT), kind


def seen_items(loader: Any, **options: Any) -> Counter[int]:
    """How often each item was scored on this rank, found by its number."""
    seen: Counter[int] = Counter()

    def score(net: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        *inputs, number = batch
        if net.scored % 3 == 0:  # whole, rgb alone, depth alone
            seen.update(number.tolist())
        net.scored += 1
        return {"loss": net(*inputs).mean(1)}

    net = model()
    net.scored = 0
    evaluate(net, Items(loader, "loader", **options), score=score)
    return seen


def numbered(count: int = 10) -> TensorDataset:
    return TensorDataset(*data(count).tensors[:2], torch.arange(count))


def seen_by_ranks() -> dict[str, Counter[int]]:
    every = numbered()
    torch.manual_seed(dist.get_rank())
    subset = SubsetRandomSampler([1, 3, 4, 7, 9])
    weighted = WeightedRandomSampler([1.0] * 5 + [0.0] * 5, 8)
    return {
        "all": seen_items(DataLoader(every, 4, sampler=DistributedSampler(every, 3, 0))),
        "subset": seen_items(DataLoader(every, 2, sampler=subset)),
        "subset in a batch sampler": seen_items(DataLoader(every, batch_sampler=BatchSampler(subset, 2, False))),
        "weighted": seen_items(DataLoader(every, 2, sampler=weighted)),
        "two batches": seen_items(DataLoader(every, 3), max_batches=2),
        "two batches, shuffled": seen_items(DataLoader(every, 3, shuffle=True), max_batches=2),
        "seven items": seen_items(DataLoader(every, 3), max_items=7),
        "six items in buckets": seen_items(DataLoader(every, batch_sampler=Buckets(10)), max_items=5),
        "two batches of what all see": seen_items(list(DataLoader(every, 3)), sharded=False, max_batches=2),
        "three batches of shards": seen_items(
            list(DataLoader(every, 1, sampler=range(dist.get_rank(), 10, 2))), sharded=True, max_batches=3
        ),
    }


class Drawn:
    """A sampler that draws with python's own generator."""

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(10), 5))


def test_a_sampler_that_draws_gives_the_same_items_whatever_was_drawn_before() -> None:
    found = []
    for seed in range(3):
        random.seed(seed)
        state = random.getstate()
        found.append(seen_items(DataLoader(numbered(), 2, sampler=Drawn())))  # type: ignore[arg-type]
        assert random.getstate() == state
    assert found[0] == found[1] == found[2] and found[0].total() == 5


def test_samplers_and_limits_choose_items_and_ranks_share_them() -> None:
    ranks = run_ranks(2, seen_by_ranks)
    total = {kind: sum((rank[kind] for rank in ranks), Counter()) for kind in ranks[0]}
    once = {kind: sorted(items) for kind, items in total.items() if max(items.values()) == 1}
    assert once["all"] == list(range(10))
    assert once["subset"] == once["subset in a batch sampler"] == [1, 3, 4, 7, 9]
    assert total["weighted"].total() == 8 and max(total["weighted"]) < 5
    assert once["two batches"] == once["two batches of what all see"] == [0, 1, 2, 3, 4, 5]
    assert len(once["two batches, shuffled"]) == 6 != sum(i < 6 for i in once["two batches, shuffled"])
    assert once["seven items"] == [0, 1, 2, 3, 4, 5, 6] and len(once["six items in buckets"]) == 5
    assert once["three batches of shards"] == [0, 1, 2]
    assert sorted(ranks[0]["all"]) == [0, 1, 2, 3, 8, 9] and sorted(ranks[1]["all"]) == [4, 5, 6, 7]  # by batches
    assert sorted(ranks[0]["seven items"]) == [0, 1, 2, 6] and sorted(ranks[1]["subset"]) == [4, 7]


# Errors ------------------------------------------------------------------------------------------------------------


def message(kind: str) -> str:
    """The error of an evaluation that goes wrong on some rank, as this rank sees it."""
    rank, everything = (dist.get_rank(), data()) if dist.is_initialized() else (0, data())
    with pytest.raises((ValueError, RuntimeError)) as caught:
        if kind == "unsaid":
            figures(model(), DataLoader(Shards([COUNT], 0), 4))
        elif kind == "drop_last":
            sampler = DistributedSampler(everything, 2, rank, drop_last=True)
            figures(model(), DataLoader(everything, 4, sampler=sampler))
        elif kind == "lengths":
            figures(model(), DataLoader(data(COUNT - rank), 4))
        elif kind == "orders":
            generator = torch.Generator().manual_seed(rank)
            sampler = WeightedRandomSampler([1.0] * COUNT, COUNT, generator=generator)
            figures(model(), DataLoader(everything, 4, sampler=sampler))
        elif kind == "empty":
            figures(model(), DataLoader(data(0), 4))
        elif kind == "empty shards":
            figures(model(), DataLoader(Shards([0, 0], rank), 4), sharded=True)
        elif kind == "one batch":
            batches = list(DataLoader(everything, 4))
            if rank == 1:
                batches[3] = (batches[3][0], batches[3][1].float(), batches[3][2])  # not the model's dtype
            figures(model(), batches, sharded=False)
    with pytest.raises(ValueError, match="empty"):  # and the ranks are in step after it
        figures(model(), [], sharded=False)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("unsaid", "ValueError: loader: a DataLoader over an iterable source cannot be shared out among 2 ranks"),
        ("drop_last", "ValueError: loader: its DistributedSampler has drop_last=True.*build it with drop_last=False"),
        ("lengths", "ValueError: loader: the data sets have 23, 22 items on ranks 0 to 1; give every rank"),
        ("orders", "ValueError: loader: its sampler gives different items on different ranks.*seed it alike"),
        ("empty", "ValueError: loader is empty: there is no item to evaluate; pass a loader with at least one batch"),
        ("empty shards", "ValueError: loader is empty"),
        ("one batch", "RuntimeError: the evaluation failed on rank 1: RuntimeError: .*(dtype|Double|Float)"),
    ],
)
def test_an_error_is_raised_on_every_rank_alike(kind: str, text: str) -> None:
    for answer in run_ranks(2, message, kind):
        assert re.match(text, answer)


def test_errors_of_one_process() -> None:
    assert "loader is empty" in message("empty")
    with pytest.raises(ValueError, match=r"max_batches must be at least 1 \(or None for all\), got 0"):
        Items([], max_batches=0)
    with pytest.raises(ValueError, match="loader: a number of items can only be asked of a DataLoader.*got a list"):
        figures(model(), [], max_items=3)
    with pytest.raises(ValueError, match=r"loader: a TensorDataset gives single items, .* pass a DataLoader over it"):
        figures(model(), data())
    with pytest.raises(ValueError, match="score must give 'loss' per item, got 'correct'"):
        evaluate(model(), Items(DataLoader(data(), 4)), score=lambda net, batch: {"correct": batch[-1].double()})
    with pytest.raises(ValueError, match=r"one loss per item, shape \[items\], got shape \(\)"):
        evaluate(model(), Items(DataLoader(data(), 4)), score=lambda net, batch: {"loss": net(*batch[:-1]).mean()})
    with pytest.raises(ValueError, match=r"one error per item, shape \[4\], got shape \(4, 4\)"):
        score = lambda net, batch: {"loss": net(*batch[:-1]).mean(1), "error": net(*batch[:-1])}  # noqa: E731
        evaluate(model(), Items(DataLoader(data(), 4)), score=score)
    with pytest.raises(ValueError, match="the batch has no target: expected one of target.*got rgb, depth"):
        figures(model(), [{"rgb": torch.zeros(1, 3), "depth": torch.zeros(1, 4)}])


class Collectives(TorchDispatchMode):
    """Counts them. CommDebugMode, which also follows modules, stumbles over a second forward."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count_collectives() -> dict[str, int]:
    with Collectives() as calls:
        figures(model(), DataLoader(data(), 4))
    return dict(calls.counts)


def test_one_all_reduce_and_one_broadcast_for_each_dtype_of_the_buffers() -> None:
    counts = run_ranks(2, count_collectives)
    assert counts == [{"broadcast_": 2, "allgather_": 2, "allreduce_": 1}] * 2  # names and errors: sizes, then objects


# No trace ----------------------------------------------------------------------------------------------------------


def fails_on_the_second_forward(net: nn.Module, batch: Any) -> Mapping[str, Tensor]:
    *inputs, _ = batch
    logits = net(*inputs)
    if net.encoders["rgb"](inputs[0]).eq(0).all():  # rgb is replaced
        raise ArithmeticError("the score failed")
    return {"loss": logits.mean(1)}


@pytest.mark.parametrize("score", [classification(), fails_on_the_second_forward])
def test_modes_buffers_random_states_and_hooks_are_left_as_they_were(score: Any) -> None:
    net = model()
    net.encoders["rgb"].eval()
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(data(), 4, shuffle=True, generator=generator)
    batch_sampler = BatchSampler(RandomSampler(data(), True, 9, generator=generator), 4, False)
    buffers = dict(net.named_buffers())
    modes = [module.training for module in net.modules()]
    values = [torch.get_rng_state(), generator.get_state(), *[buffer.clone() for buffer in buffers.values()]]
    for each in (loader, DataLoader(data(), batch_sampler=batch_sampler)):
        if score is fails_on_the_second_forward:
            with pytest.raises(ArithmeticError, match="the score failed"):
                evaluate(net, Items(each), score=score)
        else:
            assert len(evaluate(net, Items(each), score=score).tables["0"]) in (COUNT, 9)
        now = [torch.get_rng_state(), generator.get_state(), *buffers.values()]
        assert all(torch.equal(a, b) for a, b in zip(values, now, strict=True))
        assert all(dict(net.named_buffers())[name] is buffer for name, buffer in buffers.items())
        assert [module.training for module in net.modules()] == modes
        assert not any("forward" in vars(module) or module._forward_hooks for module in net.modules())
        assert torch.is_grad_enabled()


def test_a_graph_that_waits_for_its_backward_is_not_disturbed() -> None:
    net, batch = model(dropout_p=0.0), next(iter(DataLoader(data(), COUNT)))
    gradients = []
    for look in (False, True):
        twin = copy.deepcopy(net)
        loss = twin.criterion(twin(*batch[:-1]), batch[-1])
        if look:
            figures(twin, DataLoader(data(), 4))
        loss.backward()
        gradients.append([parameter.grad for parameter in twin.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# Replay ------------------------------------------------------------------------------------------------------------


def by_hand(net: MultiStreamModel, kept: set[str]) -> float:
    """The loss with the features of all but `kept` zero, through fusion and head, computed directly."""
    net.eval()
    *inputs, target = data(streams=len(net.stream_names)).tensors
    features = [
        feature if name in kept else torch.zeros_like(feature)
        for name, feature in zip(net.stream_names, net.encode(*inputs), strict=True)
    ]
    return functional.cross_entropy(net.fc(net.fusion(*features)), target).item()


@pytest.mark.parametrize("fusion", ["concat", "weighted", "gated"])
def test_a_stream_alone_is_zeroed_features_through_fusion_and_head(fusion: str) -> None:
    found = figures(model(fusion, 3), DataLoader(data(streams=3), 4))
    names = {"rgb", "depth", "audio"}
    assert found["full_loss"] == pytest.approx(by_hand(model(fusion, 3), names), **EXACT)
    for name in names:
        assert found[f"{name}_loss"] == pytest.approx(by_hand(model(fusion, 3), {name}), **EXACT)
        assert found[f"without_{name}_loss"] == pytest.approx(by_hand(model(fusion, 3), names - {name}), **EXACT)
    assert len({round(value, 9) for key, value in found.items() if key.endswith("_loss")}) == 7


def test_encoders_run_once_a_batch() -> None:
    net = model(streams=3)
    calls: Counter[str] = Counter()
    for name, encoder in net.encoders.items():
        encoder.layers.register_forward_hook(lambda *_, name=name: calls.update([name]))
    net.fc.register_forward_hook(lambda *_: calls.update(["fc"]))
    figures(net, DataLoader(data(streams=3), 4))
    assert calls == {"rgb": 6, "depth": 6, "audio": 6, "fc": 6 * 7}


class TwoStreams(nn.Module):
    """`kind` says what the rest of the model does with the features."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.rgb, self.depth = nn.Linear(3, 5), nn.Linear(8 if kind == "depends" else 4, 5)
        self.head = nn.Linear(10, 4)
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        rgb = self.rgb(x) if self.kind != "twice" else self.rgb(x) + self.rgb(2 * x)
        depth = self.depth(torch.cat([y, rgb[:, :4]], 1) if self.kind == "depends" else y)
        if self.kind == "in place":
            rgb.relu_()
            depth.mul_(2)
        return self.head(torch.cat([rgb, depth], 1))


def alone(net: TwoStreams, stream: str) -> float:
    """The figure with the other stream's layer replaced by one that gives zeros, whatever comes in."""
    twin, (*inputs, target) = copy.deepcopy(net), data().tensors
    other = twin.depth if stream == "rgb" else twin.rgb
    nn.init.zeros_(other.weight)
    nn.init.zeros_(other.bias)
    return functional.cross_entropy(twin(*inputs), target).item()


@pytest.mark.parametrize("kind", ["plain", "in place", "twice", "depends"])
def test_replay_equals_the_direct_computation(kind: str) -> None:
    net = TwoStreams(kind)
    found = figures(net, DataLoader(data(), 4))
    assert found["rgb_loss"] == pytest.approx(alone(net, "rgb"), **EXACT)
    assert found["depth_loss"] == pytest.approx(alone(net, "depth"), **EXACT)
    assert found["rgb_loss"] != pytest.approx(found["depth_loss"], abs=1e-3)


@pytest.mark.parametrize("where", ["torch.compile", "module.compile", "a stream", "around the streams"])
def test_compiled_models_are_evaluated_as_their_eager_twin_and_nothing_is_recompiled(where: str) -> None:
    expected = figures(model(), DataLoader(data(), 4))
    net: Any = model().eval()
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(1)
        return graph.forward

    torch._dynamo.reset()
    if where == "torch.compile":
        net = torch.compile(net, backend=backend)
    elif where == "module.compile":
        nn.Module.compile(net, backend=backend)
    elif where == "a stream":
        net.encoders["rgb"] = torch.compile(net.encoders["rgb"], backend=backend)
    else:
        net.encode = torch.compile(net.encode, backend=backend)
    net(*data().tensors[:2])
    before = len(compiled)
    assert before > 0
    assert figures(net, DataLoader(data(), 4)) == pytest.approx(expected, **EXACT)
    assert activations(net) == pytest.approx(activations(model()), **EXACT)
    assert len(compiled) == before
    net(*data().tensors[:2])
    assert len(compiled) == before


class Block(nn.Module):
    """Both streams' weights in one module: no stream can be called by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stream1_weight = nn.Parameter(torch.ones(3, 3))
        self.stream2_weight = nn.Parameter(torch.ones(4, 3))
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(x @ self.stream1_weight + y @ self.stream2_weight)


def test_streams_that_cannot_be_replaced_are_refused_with_the_way_out() -> None:
    specs = {"a": "stream1_weight", "b": "stream2_weight"}
    streams = StreamSet.resolve(Block(), specs)
    items = {"val": Items(DataLoader(data(), 4))}
    with pytest.raises(ValueError, match="stream 'b' has no module of its own.*give each stream a module"):
        measure(streams, Collective(), items, classification(), Plan(each_alone("ab", Replacement.zero)))
    net = TwoStreams("plain")
    net.unused = nn.Linear(2, 2)
    streams = StreamSet.resolve(net, {"rgb": "rgb", "other": "unused"})
    with pytest.raises(ValueError, match=r"stream 'other': its modules \(unused\) are not called by the model's"):
        measure(streams, Collective(), items, classification(), Plan({"other": {"other": Replacement.exchange}}))


def evaluate_under_ddp() -> tuple[dict[str, float], int]:
    net = DistributedDataParallel(model())
    found = figures(net, DataLoader(data(), 4, shuffle=True))
    loss = net(*data().tensors[:2]).mean()
    loss.backward()
    return found, sum(parameter.grad is not None for parameter in net.parameters())


def test_a_wrapped_model_is_evaluated_unwrapped_and_trains_on() -> None:
    alone_ = figures(model(), DataLoader(data(), 4))
    for found, gradients in run_ranks(2, evaluate_under_ddp):
        assert found == pytest.approx(alone_, **EXACT)
        assert gradients == len(list(model().parameters()))


# Scores ------------------------------------------------------------------------------------------------------------


class Focal(nn.Module):
    """A criterion of one's own, without `reduction`."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        each = functional.cross_entropy(logits, target, reduction="none")
        return ((1 - (-each).exp()) ** 2 * each).mean()


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(label_smoothing=0.2),
        nn.CrossEntropyLoss(ignore_index=2),
        Focal(),
        lambda logits, target: functional.multi_margin_loss(logits, target),
        lambda logits, target, reduction="mean": functional.mse_loss(  # one value an item and class
            logits, functional.one_hot(target, logits.shape[1]).to(logits), reduction=reduction
        ),
    ],
)
def test_the_loss_is_that_of_the_criterion_over_all_items(criterion: Any) -> None:
    net = model()
    found = evaluate(net, Items(DataLoader(data(), 4)), score=classification(criterion)).means("0")["full"]
    net.eval()
    *inputs, target = data().tensors
    assert found["loss"] == pytest.approx(criterion(net(*inputs), target).item(), **EXACT)
    net.criterion = Focal()
    own = figures(net, DataLoader(data(), 4))["full_loss"]
    assert own == pytest.approx(Focal()(net.eval()(*inputs), target).item(), **EXACT)


def regression(net: nn.Module, batch: Any) -> Mapping[str, Tensor]:
    *inputs, target = batch
    error = net(*inputs).mean(1) - target
    return {"loss": error.square(), "bias": error, "weight": target.double()}


def evaluate_regression() -> Mapping[str, Mapping[str, float]]:
    return evaluate(model(), Items(DataLoader(data(), 4)), score=regression).means("0")


def test_a_score_without_accuracy_gives_overfitting_scores_of_the_loss_alone() -> None:
    train, val = DataLoader(data(), 4), DataLoader(first(9), 4)
    monitor = StreamMonitor(model())
    found = monitor.compute_stream_overfitting_indicators(1.0, 1.5, 0.0, 0.0, train, val, score=regression)
    for name in ("rgb", "depth"):
        gap = found[f"{name}_val_loss"] - found[f"{name}_train_loss"]
        assert found[f"{name}_overfitting_score"] == gap != 0
        assert math.isnan(found[f"{name}_acc_gap"]) and math.isfinite(found[f"{name}_val_bias"])
    assert found["full_model_loss_gap"] == 0.5


def test_a_score_of_ones_own_is_averaged_by_its_weights() -> None:
    net, (*inputs, target) = model().eval(), data().tensors
    error = net(*inputs).mean(1) - target
    weight = target.double() / target.sum()
    expected = {"loss": (error.square() * weight).sum().item(), "bias": (error * weight).sum().item()}
    for found in [evaluate_regression(), *run_ranks(3, evaluate_regression)]:
        assert found["full"] == pytest.approx(expected, **EXACT)
        assert set(found["rgb"]) == {"loss", "bias"}


def overfitting_with_numbers_of_rank_1_only() -> dict[str, float]:
    numbers = (1.0, (6.0, 4.0), 0.5, 0.25) if dist.get_rank() == 1 else (None, None, 0.0, 0.25)
    items = DataLoader(data(), 4)
    return StreamMonitor(model()).compute_stream_overfitting_indicators(*numbers, items, items).to_dict()


def test_a_number_that_a_rank_leaves_out_counts_for_nothing_there() -> None:
    for found in run_ranks(2, overfitting_with_numbers_of_rank_1_only):
        assert found["full_model_loss_gap"] == 0.5 and found["full_model_acc_gap"] == 0.0


# Activations -------------------------------------------------------------------------------------------------------


def activations(net: nn.Module, inputs: tuple[Tensor, ...] | None = None) -> Mapping[str, float]:
    return activation_moments(StreamSet.resolve(net), Collective(), inputs or data().tensors[:2])


def activations_of_a_share() -> tuple[Mapping[str, float], bool]:
    rank, world = dist.get_rank(), dist.get_world_size()
    net = model()
    mine = buffers_apart(net, rank)
    found = activations(net, tuple(tensor[rank::world] for tensor in data().tensors[:2]))
    return found, all(torch.equal(mine[name], buffer) for name, buffer in net.named_buffers())


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_activation_moments_are_those_of_all_samples(world: int) -> None:
    net = model().eval()
    x, y = data().tensors[:2]
    rgb, depth = net.encoders["rgb"].layers(x), net.encoders["depth"].layers(y)
    expected = {"layers_rgb_mean": rgb.mean(), "layers_rgb_std": rgb.std()}
    expected |= {"layers_depth_mean": depth.mean(), "layers_depth_std": depth.std()}
    for found, restored in run_ranks(world, activations_of_a_share):
        assert restored
        assert found == pytest.approx({key: value.item() for key, value in expected.items()}, **EXACT)


def failing_activations() -> str:
    inputs = data().tensors[:2] if dist.get_rank() == 0 else data().tensors[:1]
    with pytest.raises(RuntimeError) as caught:
        activations(model(), inputs)
    assert not any(module._forward_hooks for module in model().modules())
    return str(caught.value)


def test_activations_that_fail_on_one_rank_fail_on_all() -> None:
    text = "the evaluation failed on rank 1: TypeError: the model has 2 streams (rgb, depth), got 1 inputs"
    assert run_ranks(2, failing_activations) == [text] * 2


# analyze_pathways --------------------------------------------------------------------------------------------------


def pathways(items: TensorDataset | None = None, num_samples: int | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    net = multi_mlp({"stream1": 3, "stream2": 4}, 4, hidden=(6, 5), fusion_type="weighted").double()
    nn.init.normal_(net.fusion.logits)
    return net.analyze_pathways(DataLoader(items or data(), 4), num_samples)


def test_analyze_pathways_is_the_monitors_evaluation_and_the_same_on_any_number_of_ranks() -> None:
    found = pathways()
    torch.manual_seed(0)
    net = multi_mlp({"stream1": 3, "stream2": 4}, 4, hidden=(6, 5), fusion_type="weighted").double()
    nn.init.normal_(net.fusion.logits)
    items = DataLoader(data(), 4)
    seen = StreamMonitor(net).compute_stream_overfitting_indicators(None, None, None, None, items, items)
    norms = [feature.norm(dim=1) for feature in net.eval().encode(*data().tensors[:2])]
    full = seen["full_val_acc"]
    assert found["samples_analyzed"] == COUNT
    assert found["loss"] == pytest.approx(
        {
            "full_model": seen["full_val_loss"],
            "stream1_only": seen["stream1_val_loss"],
            "stream2_only": seen["stream2_val_loss"],
            "color_only": seen["stream1_val_loss"],
            "brightness_only": seen["stream2_val_loss"],
        },
        **EXACT,
    )
    contributions = {name: seen[f"{name}_val_acc"] / full for name in ("stream1", "stream2")}
    assert found["accuracy"] == pytest.approx(
        {
            "full_model": full,
            "stream1_only": seen["stream1_val_acc"],
            "stream2_only": seen["stream2_val_acc"],
            "color_only": seen["stream1_val_acc"],
            "brightness_only": seen["stream2_val_acc"],
            "stream1_contribution": contributions["stream1"],
            "stream2_contribution": contributions["stream2"],
            "color_contribution": contributions["stream1"],
            "brightness_contribution": contributions["stream2"],
        },
        **EXACT,
    )
    expected = {}
    for names, norm in zip((("stream1", "color"), ("stream2", "brightness")), norms, strict=True):
        for name in names:
            expected |= {f"{name}_mean": norm.mean().item(), f"{name}_std": norm.std().item()}
    expected["stream1_to_stream2_ratio"] = expected["stream1_mean"] / expected["stream2_mean"]
    expected["color_to_brightness_ratio"] = expected["stream1_to_stream2_ratio"]
    assert found["feature_norms"] == pytest.approx(expected, **EXACT)
    exchanged = StreamMonitor(net).evaluate(items, train=items)
    for figure, key in (("loss", "val_shapley"), ("accuracy", "val_shapley_acc")):
        shares = {name: exchanged[f"{name}_{key}"] for name in ("stream1", "stream2")}
        shares |= {"color": shares["stream1"], "brightness": shares["stream2"]}
        assert found["shapley"][figure] == pytest.approx(shares, **EXACT)
    assert found["shapley"]["loss"]["color"] != 0
    for ranked in run_ranks(3, pathways):
        assert flat(ranked) == pytest.approx(flat(found), **EXACT)


def flat(analysis: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part, of in analysis.items():
        found |= {f"{part}/{key}": value for key, value in flat(of).items()} if isinstance(of, dict) else {part: of}
    return found


def test_analyze_pathways_looks_at_so_many_items_and_names_three_streams_by_their_own_names() -> None:
    assert flat(pathways(num_samples=9)) == pytest.approx(flat(pathways(first(9))), **EXACT)
    assert pathways(num_samples=999)["samples_analyzed"] == COUNT
    net = model(streams=3)
    nn.init.zeros_(net.fc.weight)
    net.fc.bias.data = torch.tensor([0.0, 0.0, 0.0, 9.0], dtype=torch.float64)
    tensors = data(streams=3).tensors
    found = net.analyze_pathways(DataLoader(TensorDataset(*tensors[:3], 0 * tensors[3]), 4))
    assert found["accuracy"]["full_model"] == 0 and math.isnan(found["accuracy"]["rgb_contribution"])
    assert set(found["accuracy"]) == {"full_model"} | {
        f"{name}_{figure}" for name in net.stream_names for figure in ("only", "contribution")
    }
    ratios = {"rgb_to_depth_ratio", "rgb_to_audio_ratio", "depth_to_audio_ratio"}
    assert ratios == {key for key in found["feature_norms"] if key.endswith("_ratio")}
    with pytest.raises(ValueError, match="loader is empty"):
        net.analyze_pathways(DataLoader(data(0, 3), 4))
