"""`monitor.evaluate` on 1 to 4 ranks: every figure is that of one process, and the training never learns of it."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from ddp_streammon import Items, StreamMonitor
from ddp_streammon.evaluation import Evaluation
from tests.ranks import run_ranks
from tests.sharding import possible

EXACT = {"rel": 1e-9, "abs": 1e-12}
STREAMS = {"rgb": "rgb", "depth": "depth"}
VAL, TRAIN, SIZE = 45, 170, 8


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rgb = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout))
        self.depth = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
        self.head = nn.Linear(11, 3)
        self.double()

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat([self.rgb(rgb), self.depth(depth)], 1))
        return logits


def data(count: int, seed: int) -> TensorDataset:
    chance = torch.Generator().manual_seed(seed)
    target = torch.randint(3, (count,), generator=chance)
    inputs = [torch.randn(count, width, generator=chance, dtype=torch.float64) for width in (3, 4)]
    moved = [x + functional.one_hot(target, x.shape[1]) for x in inputs]
    return TensorDataset(*moved, target, torch.arange(count))


def score(net: nn.Module, batch: Any) -> Mapping[str, Any]:
    """Everything that a score may give."""
    rgb, depth, target, number = batch
    logits = net(rgb, depth)
    found = logits.argmax(1)
    return {
        "loss": functional.cross_entropy(logits, target, reduction="none"),
        "correct": (found == target).double(),
        "weight": 1.0 + number % 3,
        "group": number // 2 + 2**60,
        "present": {"depth": number % 5 != 0},
        "target": target,
        "prediction": found,
        "record": list(zip(target.tolist(), found.tolist(), strict=True)),
    }


def recall(records: Sequence[tuple[int, int]]) -> float:
    return sum(wanted == found == 1 for wanted, found in records) / max(sum(wanted == 1 for wanted, _ in records), 1)


class Torn(ArithmeticError):
    pass


def torn(net: nn.Module, batch: Any) -> Mapping[str, Any]:
    """One item of the training set, or else of the held-out one, cannot be scored."""
    rgb = batch[0]
    if bool((rgb == TORN).any()):
        raise Torn("item 33 is torn")
    return score(net, batch)


TORN = 1e6


def flat(found: Evaluation) -> tuple[dict[str, float], list[Any]]:
    """All figures of an evaluation, and all that has to be equal to the letter."""
    numbers = dict(found)
    for key, own in found.estimates.items():
        numbers |= {f"{key}: dof": own.dof, f"{key}: skew": own.skew, f"{key}: low": own.low, f"{key}: high": own.high}
    for name, best in found.past.best.items():
        numbers |= {f"best {name} {place}": value for place, value in enumerate(best)}
    counts = [(key, own.items, own.groups) for key, own in sorted(found.estimates.items())]
    claims = [(claim.stream, claim.statement, claim.level, dict.fromkeys(claim.bounds)) for claim in found.claims]
    return numbers, [counts, claims, found.notes, found.tried, found.look, found.replayed, found.past.count]


def same(found: tuple[dict[str, float], list[Any]], expected: tuple[dict[str, float], list[Any]]) -> None:
    assert found[1] == expected[1]
    assert found[0] == pytest.approx(expected[0], **EXACT, nan_ok=True)


class Own(IterableDataset[Any]):
    """Rank r's own items: those of every batch that is its turn."""

    def __init__(self, items: TensorDataset, rank: int, world: int) -> None:
        numbers = torch.arange(len(items)).split(SIZE)[rank::world]
        self.numbers = torch.cat(numbers).tolist() if numbers else []
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter([self.items[number] for number in self.numbers])


def given(kind: str, items: TensorDataset, rank: int, world: int) -> Items:
    """The set in a loader of its kind."""
    if kind == "sampler":
        return Items(DataLoader(items, SIZE, sampler=DistributedSampler(items, world, rank)))
    if kind == "iterable":
        return Items(DataLoader(Own(items, 0, 1), SIZE), sharded=False)
    if kind == "own":
        return Items(DataLoader(Own(items, rank, world), SIZE), sharded=True)
    if kind == "few own":  # ranks 2 and 3 of four have none
        return Items(DataLoader(Own(items, rank, world), SIZE), sharded=True, max_batches=2)
    if kind == "few":
        return Items(list(DataLoader(items, SIZE)), sharded=False, max_batches=2)
    return Items(DataLoader(items, SIZE, shuffle=True))


def figures(net: Any, kind: str, group: Any = None) -> tuple[dict[str, float], list[Any]]:
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    return twice(StreamMonitor(net, streams=STREAMS, group=group), kind, rank, world)


def twice(monitor: StreamMonitor, kind: str, rank: int, world: int) -> tuple[dict[str, float], list[Any]]:
    """Of two evaluations the second one, which has a past."""
    train = given("iterable" if kind.startswith("few") else kind, data(TRAIN, 2), rank, world)
    val = given(kind, data(VAL, 1), rank, world)
    monitor.evaluate(val, score, train=train, limit=30)
    return flat(monitor.evaluate(val, score, train=train, limit=30, reduce={"recall": recall}))


def laid_out(layout: str, group: Any) -> Any:
    """The model with buffers of this rank's own."""
    net, rank = Net(), dist.get_rank(group)
    if layout == "fsdp2":
        mesh = DeviceMesh.from_group(group, "cpu")
        for module in (net.rgb, net.depth):
            fully_shard(module, mesh=mesh)
        return fully_shard(net, mesh=mesh)
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.mul_(1 + 0.5 * rank)
    if layout == "compiled":
        net.compile(backend="eager")
    wrapped = DistributedDataParallel(net, process_group=group)
    if layout == "compiled":
        wrapped.eval()(*data(8, 1).tensors[:2])
        wrapped.train()
    return wrapped


SAME_AS = {"sampler": "loader", "few own": "few", "own": "iterable"}
RUNS = {
    1: [("ddp", "loader")],
    2: [("ddp", "loader"), ("compiled", "sampler"), ("fsdp2", "own")],
    3: [("ddp", "own"), ("fsdp2", "sampler")],
    4: [("ddp", "loader"), ("ddp", "few own"), ("ddp", "iterable"), ("fsdp2", "own")],
}
RUNS = {world: [(layout, kind) for layout, kind in runs if possible([layout])] for world, runs in RUNS.items()}


def broken(group: Any) -> tuple[list[str], tuple[dict[str, float], list[Any]]]:
    """The errors that this rank sees, and what is found after them."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    monitor = StreamMonitor(laid_out("ddp", group), streams=STREAMS, group=group)
    messages = []
    for split in ("val", "train"):
        val, train = data(VAL, 1), data(TRAIN, 2)
        items = val if split == "val" else train
        items.tensors[0][4 * SIZE + 1] = TORN  # batch 4 is rank 1's of three
        with pytest.raises(RuntimeError) as caught:
            monitor.evaluate(given("iterable", val, rank, world), torn, train=given("iterable", train, rank, world))
        messages.append(str(caught.value))
    assert monitor.state_dict()["evaluations"] == {}
    return messages, twice(monitor, "iterable", rank, world)


def everything() -> dict[int, list[Any]]:
    """What this rank finds in the groups of the first one to four ranks that it is in."""
    found: dict[int, list[Any]] = {}
    for world, runs in RUNS.items():
        group = dist.new_group(list(range(world)))
        if dist.get_rank() < world:
            found[world] = [figures(laid_out(layout, group), kind, group) for layout, kind in runs]
            if world == 3:
                found[world].append(broken(group))
    return found


def test_one_to_four_ranks_find_what_one_process_finds() -> None:
    expected = {kind: figures(Net(), kind) for kind in ("loader", "iterable", "few")}
    numbers, (counts, claims, *_) = expected["loader"]
    assert {"rgb_val_uses_recall", "full_head_gap", "rgb_to_depth_val_cover", "depth_val_present"} <= set(numbers)
    assert len(counts) > 40 and claims
    answers = run_ranks(4, everything)
    assert [sorted(found) for found in answers] == [[1, 2, 3, 4], [2, 3, 4], [3, 4], [4]]
    for found in answers:
        for world, of_world in found.items():
            for (_, kind), own in zip(RUNS[world], of_world, strict=False):
                same(own, expected[SAME_AS.get(kind, kind)])
            if world == 3:
                messages, after = of_world[-1]
                assert messages == ["the evaluation failed on rank 1: Torn: item 33 is torn"] * 2
                same(after, expected["iterable"])


# Harmless ---------------------------------------------------------------------------------------------------------


def trained(look: bool) -> tuple[dict[str, Tensor], list[float]]:
    """A training with dropout, BatchNorm and shuffling: what is left of it, and its losses."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    random.seed(rank)
    net = DistributedDataParallel(Net(dropout=0.4))
    torch.manual_seed(10 + rank)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    items = data(64, 3)
    sampler: DistributedSampler[Any] = DistributedSampler(items, world, rank)
    loader = DataLoader(items, SIZE, sampler=sampler)
    val = DataLoader(data(VAL, 1), SIZE, shuffle=True)
    monitor = StreamMonitor(net, optimizer, STREAMS)
    losses = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for number, (rgb, depth, target, _) in enumerate(loader):
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(rgb, depth), target)
            if look and number == 1:  # a graph waits for its backward
                monitor.evaluate(val, score, train=loader, reduce={"recall": recall})
            loss.backward()
            monitor.step(loss=loss)
            optimizer.step()
            losses.append(loss.item())
            if look and number == 2:
                monitor.evaluate(val, score, train=DataLoader(data(TRAIN, 2), SIZE, shuffle=True))
    state = dict(net.module.state_dict()) | {"torch": torch.get_rng_state()}
    state |= {f"exp_avg {i}": own["exp_avg"] for i, own in enumerate(optimizer.state.values())}
    state["python"] = torch.tensor(random.getstate()[1])
    return state, losses


def compared() -> tuple[list[str], bool, int]:
    (plain, losses), (looked, seen) = trained(look=False), trained(look=True)
    return [name for name, value in plain.items() if not torch.equal(value, looked[name])], losses == seen, len(plain)


def restarted() -> list[Any]:
    """The second evaluation of a monitor, and of one that goes on from its state: the same."""
    net = DistributedDataParallel(Net())
    monitor = StreamMonitor(net, streams=STREAMS)
    monitor.evaluate(DataLoader(data(VAL, 1), SIZE), score, train=DataLoader(data(TRAIN, 2), SIZE))
    file = io.BytesIO()
    torch.save(monitor.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = StreamMonitor(net, streams=STREAMS)
    other.load_state_dict(state)
    with torch.no_grad():
        for parameter in net.module.rgb.parameters():  # type: ignore[union-attr]
            parameter.zero_()
    second = [
        flat(own.evaluate(DataLoader(data(VAL, 1), SIZE), score, train=DataLoader(data(TRAIN, 2), SIZE)))
        for own in (monitor, other)
    ]
    first = [finding.to_dict() for finding in monitor.get_recommendations()]
    assert first == [finding.to_dict() for finding in other.get_recommendations()]
    return second


def two_ranks() -> tuple[Any, Any]:
    return compared(), restarted()


def test_training_is_bit_for_bit_the_same_and_a_restart_goes_on() -> None:
    (compared_, second), (compared_1, second_1) = run_ranks(2, two_ranks)
    for different, losses, count in (compared_, compared_1):
        assert different == [] and losses and count > 20
    same(second[0], second[1])
    same(second_1[0], second[0])
    assert second[0][1][4] == 2  # the look
