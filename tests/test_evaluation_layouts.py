"""Evaluation of sharded models: what one process finds, forwards in step, errors on every rank, no trace."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ddp_streammon import Items, StreamMonitor, StreamSet, classification
from ddp_streammon.collective import Collective
from ddp_streammon.evaluation import Past, Plan, Replacement, Request, each_alone, evaluate, measure
from ddp_streammon.evaluation.harmless import undisturbed
from ddp_streammon.train.models import MultiStreamModel, multi_mlp
from tests.faults import Broken
from tests.layouts import LAYOUTS, STREAMS, WORLD, network
from tests.ranks import run_ranks
from tests.sharding import cases, needs_fsdp2, possible

COUNT = 16
PARTS_OF_THEM = ("ddp", "fsdp2 by module", "sequence parallel", "fsdp2 x tensor parallel")
"""What they shard is sharded in others, too, or looked at in other tests."""
LOOKED_AT = tuple(
    layout for layout in LAYOUTS if layout not in ("ddp bucket views", "nobody synchronises", *PARTS_OF_THEM)
)
CLOSE = {"rel": 1e-5, "abs": 1e-6}
FULL = [f"full_val_{figure}{bound}" for figure in ("loss", "acc") for bound in ("", "_low", "_high")]


def data(count: int = COUNT) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(torch.randn(64, 4, 16, generator=generator)[:count], torch.arange(count) % 3)


class Own(IterableDataset[Any]):
    """Rank r's own items: `sizes[r]` of them."""

    def __init__(self, sizes: list[int], rank: int) -> None:
        self.start, self.stop = sum(sizes[:rank]), sum(sizes[: rank + 1])

    def __iter__(self) -> Iterator[Any]:
        return iter([data()[number] for number in range(self.start, self.stop)])


def sets() -> dict[str, Items]:
    """Many sizes: 3 and 5 items leave ranks without any, or with fewer batches than others."""
    given = {f"{count} by {size}": Items(DataLoader(data(count), size)) for count, size in ((16, 4), (5, 1), (3, 2))}
    given["shuffled"] = Items(DataLoader(data(11), 2, shuffle=True))
    given["every rank sees all"] = Items(list(DataLoader(data(5), 2)), sharded=False)
    given["every rank sees few"] = Items(list(DataLoader(data(5), 3)), sharded=False)
    given["limited"] = Items(DataLoader(data(11), 2), max_batches=3)
    return given


def figures(model: nn.Module) -> dict[str, dict[str, float]]:
    """Of each set: the figures, and how many items there were."""
    monitor = StreamMonitor(model, streams=STREAMS)
    plan = Plan(each_alone(monitor.streams.user_names, Replacement.zero))
    found: dict[str, dict[str, float]] = {}
    for name, items in sets().items():
        result = measure(monitor.streams, monitor._collective, {name: items}, classification(), plan)
        of = result.means(name)
        found[name] = {f"{variant}_{key}": value for variant in of for key, value in of[variant].items()}
        found[name]["items"] = len(result.tables[name])
    loader = DataLoader(data(), 4)
    overfitting = monitor.compute_stream_overfitting_indicators(1.0, None, 0.5, None, loader, loader)
    found["overfitting"] = overfitting.to_dict()
    return found


@functools.cache
def single() -> dict[str, dict[str, float]]:
    return figures(network(torch.float32))


def _of_layouts(function: Callable[..., Any], layouts: Sequence[str], *args: Any) -> dict[str, Any]:
    return {layout: function(layout, *args) for layout in layouts}


@functools.cache
def on_ranks(function: Callable[..., Any], layouts: tuple[str, ...], *args: Any) -> list[dict[str, Any]]:
    """`function(layout, *args)` of each layout, one after the other on the same four processes: most of what a layout
    costs is what torch does at first use."""
    return run_ranks(WORLD, _of_layouts, function, possible(layouts), *args, timeout=200)


def _figures_of(layout: str) -> dict[str, dict[str, float]]:
    return figures(LAYOUTS[layout](network(torch.float32)))


@pytest.mark.parametrize(
    "layout", [*cases(LOOKED_AT), *(pytest.param(layout, marks=pytest.mark.slow) for layout in possible(PARTS_OF_THEM))]
)
def test_every_layout_finds_what_one_process_finds(layout: str) -> None:
    for of_rank in on_ranks(_figures_of, LOOKED_AT if layout in LOOKED_AT else PARTS_OF_THEM):
        found = of_rank[layout]
        for name, of_set in single().items():
            assert found[name] == pytest.approx(of_set, **CLOSE, nan_ok=True), name
            assert found[name].get("items") == of_set.get("items")


def with_training_items(model: nn.Module) -> dict[str, float]:
    """Of 5 batches, and 13 of training items: on two ranks one has a batch less."""
    monitor = StreamMonitor(model, streams=STREAMS)
    return dict(monitor.evaluate(DataLoader(data(9), 2), train=DataLoader(data(64), 5)))


def _on_two_ranks() -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    model = network(torch.float32)
    for module in (model.rgb, model.depth):
        fully_shard(module)
    return figures(fully_shard(model)), with_training_items(model)


@needs_fsdp2
def test_two_ranks_find_what_one_process_finds() -> None:
    trained = with_training_items(network(torch.float32))
    assert math.isfinite(trained["rgb_knows"]) and math.isfinite(trained["rgb_val_ablated"])
    for found, of_training in run_ranks(2, _on_two_ranks):
        assert of_training == pytest.approx(trained, **CLOSE, nan_ok=True)
        for name, of_set in single().items():
            assert found[name] == pytest.approx(of_set, **CLOSE, nan_ok=True), name


def _without_a_batch_of_ones_own(sizes: list[int]) -> str:
    model = fully_shard(network(torch.float32))
    loader = DataLoader(Own(sizes, dist.get_rank()), 2)
    monitor = StreamMonitor(model, streams=STREAMS)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        monitor.evaluate(Items(loader, "val_loader", sharded=True))
    again = monitor.evaluate(DataLoader(data(5), 2))  # the ranks are in step after it
    assert math.isfinite(again["full_val_loss"])
    return str(caught.value)


@needs_fsdp2
def test_shards_of_ones_own_without_a_batch_are_refused_by_name() -> None:
    for message in run_ranks(2, _without_a_batch_of_ones_own, [5, 0]):
        assert message.startswith("the evaluation failed on rank 1: ValueError: val_loader: there is no batch on this")
        assert "give each rank one batch at least, or pass a DataLoader over the whole map-style data set" in message
    assert run_ranks(2, _without_a_batch_of_ones_own, [0, 0])[1].startswith("val_loader is empty")


def _uneven_shards_of_ones_own() -> dict[str, float]:
    model = fully_shard(network(torch.float32))
    loader = DataLoader(Own([9, 1, 2, 4], dist.get_rank()), 2)
    return dict(StreamMonitor(model, streams=STREAMS).evaluate(loader, sharded=True))


@needs_fsdp2
def test_uneven_shards_of_ones_own_count_every_item_once() -> None:
    shards = [list(DataLoader(Own([9, 1, 2, 4], rank), 2)) for rank in range(4)]
    in_turn = [batch for turn in itertools.zip_longest(*shards) for batch in turn if batch is not None]
    monitor = StreamMonitor(network(torch.float32), streams=STREAMS)
    expected = dict(monitor.evaluate(in_turn, sharded=False))
    whole = monitor.evaluate(DataLoader(data(), 4))
    for found in run_ranks(4, _uneven_shards_of_ones_own):
        assert found == pytest.approx(expected, **CLOSE)
        assert {key: found[key] for key in FULL} == pytest.approx({key: whole[key] for key in FULL}, **CLOSE)


# Training goes on as if nothing had happened ----------------------------------------------------------------------


def _trained(layout: str, *, look: bool) -> dict[str, Tensor]:
    model = LAYOUTS[layout](network(torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    monitor = StreamMonitor(model, optimizer, STREAMS)
    inputs, target = data().tensors
    for step in range(3):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), target)
        if look and step == 0:
            monitor.evaluate(DataLoader(data(5), 2))  # a graph waits for its backward
        loss.backward()
        if look:
            monitor.evaluate(DataLoader(data(7), 2))  # what is gathered for it must not outlive the optimizer's step
            monitor.compute_stream_activations(inputs)
        optimizer.step()
        if look:
            monitor.evaluate(DataLoader(data(3), 2))
    state = model.state_dict()
    return {name: value.to_local().clone() if isinstance(value, DTensor) else value for name, value in state.items()}


def _differences(layout: str) -> list[str]:
    plain, looked = _trained(layout, look=False), _trained(layout, look=True)
    return [name for name, value in plain.items() if not torch.equal(value, looked[name])]


TRAINED = ("fsdp2", "fsdp2 by module", "hsdp", "fsdp2 x tensor parallel", "mixed by stream")


@pytest.mark.parametrize("layout", cases(TRAINED))
def test_training_goes_on_bit_for_bit_after_evaluations(layout: str) -> None:
    assert [of_rank[layout] for of_rank in on_ranks(_differences, TRAINED)] == [[]] * WORLD


class Normed(nn.Module):
    """A stream with running statistics, wrapped by itself in DDP, beside a sharded one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rgb, self.depth = nn.Linear(16, 4), nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat([self.rgb(x[:, 0]), self.depth(x[:, 1])], 1))
        return logits


def _with_own_buffers() -> tuple[dict[str, float], bool]:
    model = Normed()
    fully_shard(model.rgb)
    model.depth = DistributedDataParallel(model.depth)
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    for buffer in buffers:
        buffer.add_(dist.get_rank())
    before = [buffer.clone() for buffer in buffers]
    found = dict(StreamMonitor(model, streams={"rgb": "rgb", "depth": "depth"}).evaluate(DataLoader(data(5), 2)))
    return found, all(map(torch.equal, before, buffers)) and model.depth.broadcast_buffers


@needs_fsdp2
def test_rank_0s_buffers_are_evaluated_and_each_rank_keeps_its_own_beside_a_nested_ddp() -> None:
    monitor = StreamMonitor(Normed(), streams={"rgb": "rgb", "depth": "depth"})
    expected = dict(monitor.evaluate(DataLoader(data(5), 2)))
    assert not any(map(math.isnan, expected.values()))
    for found, kept in run_ranks(2, _with_own_buffers):
        assert kept
        assert found == pytest.approx(expected, **CLOSE)


def _buffers_on_a_mesh() -> list[list[float]]:
    mesh, rank = init_device_mesh("cpu", (2,)), float(dist.get_rank())
    model = nn.Linear(2, 2)
    model.register_buffer("everywhere", DTensor.from_local(torch.full((1,), rank), mesh, [Replicate()]))
    model.register_buffer("cut", DTensor.from_local(torch.full((1,), rank), mesh, [Shard(0)]))
    seen = []
    with undisturbed(model, Collective()):
        seen.append([buffer.to_local().item() for buffer in model.buffers()])
    seen.append([buffer.to_local().item() for buffer in model.buffers()])
    return seen


def test_buffers_on_a_mesh_are_rank_0s_where_they_are_replicated_and_parts_where_they_are_cut() -> None:
    assert run_ranks(2, _buffers_on_a_mesh) == [[[0.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 1.0]]]


# Replay -----------------------------------------------------------------------------------------------------------


class Dependent(nn.Module):
    """depth reads rgb's features, which are all zero for the items of one rank only: to replay or not is not its own
    choice where depth holds collectives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rgb, self.depth = nn.Linear(16, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        rgb = self.rgb(x[:, 0]) * x[:, :1, 0].ne(0)
        logits: Tensor = self.head(torch.cat([rgb, self.depth(rgb)], 1))
        return logits


def _dependent(count: int = 8) -> TensorDataset:
    inputs, target = (tensor.clone() for tensor in data(count).tensors)
    inputs[::2] = 0  # rank 0's
    return TensorDataset(inputs, target)


def _replayed(shard: bool) -> dict[str, float]:
    model = Dependent()
    if shard:
        for layer in model.depth:
            fully_shard(layer)
    streams = {"rgb": "rgb", "depth": "depth"}
    return dict(StreamMonitor(model, streams=streams).evaluate(DataLoader(_dependent(), 2)))


@needs_fsdp2
def test_ranks_agree_on_what_is_replayed() -> None:
    for found in run_ranks(2, _replayed, True):
        assert found == pytest.approx(_replayed(False), **CLOSE)


# Errors -----------------------------------------------------------------------------------------------------------


def after_the_forward(net: nn.Module, batch: Any, calls: list[int]) -> Mapping[str, Tensor]:
    inputs, target = batch
    logits = net(inputs)
    calls.append(len(target))
    if dist.get_rank() == 1 and len(calls) == 6:
        raise ArithmeticError("the score failed")
    return {"loss": functional.cross_entropy(logits, target, reduction="none")}


def before_the_forward(net: nn.Module, batch: Any, calls: list[int]) -> Mapping[str, Tensor]:
    inputs, target = batch
    calls.append(len(target))
    if dist.get_rank() == 1 and len(calls) >= 9:
        raise KeyError("no such input")
    return {"loss": functional.cross_entropy(net(inputs), target, reduction="none")}


def twice(net: nn.Module, batch: Any, calls: list[int]) -> Mapping[str, Tensor]:
    inputs, target = batch
    logits = net(inputs)
    calls.append(len(target))
    if dist.get_rank() == 1 and len(calls) == 9:
        raise ArithmeticError("between two forwards")
    return {"loss": functional.cross_entropy(logits + net(-inputs), target, reduction="none")}


def without_a_loss(net: nn.Module, batch: Any, calls: list[int]) -> Mapping[str, Tensor]:
    return {"error": net(batch[0]).mean(1)}


def _error(layout: str, kind: str, expected: float) -> str:
    """The error on this rank; the ranks are in step after it, and find the expected loss."""
    model = LAYOUTS[layout](network(torch.float32))
    monitor = StreamMonitor(model, streams=STREAMS)
    scores: dict[str, Callable[..., Mapping[str, Tensor]]] = {
        "after": after_the_forward,
        "before": before_the_forward,
        "between": twice,
        "without": without_a_loss,
    }
    items: Any = data()
    score: Any = functools.partial(scores[kind], calls=[]) if kind in scores else None
    if kind == "torn":
        items = Broken(items, 6)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        monitor.compute_stream_overfitting_indicators(
            None, None, None, None, DataLoader(items, 1), DataLoader(data(), 1), score=score
        )
    assert not any("forward" in vars(module) for module in model.modules())
    again = monitor.evaluate(DataLoader(data(), 4))
    assert again["full_val_loss"] == pytest.approx(expected, **CLOSE)
    return f"{type(caught.value).__name__}: {caught.value}"


FAILING = ("fsdp2 by module", "hsdp", "fsdp2 x tensor parallel")
KINDS = {
    "torn": "OSError: item 6 is torn",
    "after": "ArithmeticError: the score failed",
    "before": "KeyError: 'no such input'",
    "between": "ArithmeticError: between two forwards",
    "without": "score must give 'loss' per item, got 'error'",
}


def _errors(layout: str, expected: float) -> dict[str, str]:
    return {kind: _error(layout, kind, expected) for kind in KINDS}


@pytest.mark.parametrize("layout", cases(FAILING))
@pytest.mark.parametrize(("kind", "text"), KINDS.items(), ids=KINDS)
def test_an_error_outside_of_the_forward_is_raised_on_every_rank_and_nobody_waits(
    layout: str, kind: str, text: str
) -> None:
    for of_rank in on_ranks(_errors, FAILING, single()["16 by 4"]["full_loss"]):
        message = of_rank[layout][kind]
        everywhere = kind == "without"
        assert message.startswith("ValueError: " if everywhere else "RuntimeError: the evaluation failed on rank ")
        assert message.endswith(text)
        assert kind == "torn" or everywhere or f"on rank 1: {text}" in message


def _out_of_the_forward() -> str:
    model = fully_shard(network(torch.float32))
    monitor = StreamMonitor(model, streams=STREAMS)
    if dist.get_rank() == 1:
        handle = model.depth.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(RuntimeError) as caught:
        monitor.evaluate(DataLoader(data(5), 2))
    if dist.get_rank() == 1:
        handle.remove()
        assert isinstance(caught.value.__cause__, OSError)
        dist.destroy_process_group()  # the others' collective fails, as at the end of the process
    assert not any(module._forward_hooks for module in (model.head, model.rgb.up))
    return str(caught.value)


@needs_fsdp2
def test_an_error_out_of_the_forward_is_read_on_the_ranks_that_wait() -> None:
    assert run_ranks(3, _out_of_the_forward) == ["the evaluation failed on rank 1: OSError: the disk is gone"] * 3


def _without_a_target() -> str:
    monitor = StreamMonitor(fully_shard(network(torch.float32)), streams=STREAMS)
    with pytest.raises(RuntimeError) as caught:
        monitor.evaluate([{"x": torch.zeros(1, 4, 16)}] * 3, sharded=False)
    return str(caught.value)


def test_an_error_before_the_first_forward_ends_all_ranks() -> None:
    for message in run_ranks(2, _without_a_target):
        assert "the batch has no target: expected one of target" in message


# analyze_pathways, activations ------------------------------------------------------------------------------------


def _model() -> MultiStreamModel:
    torch.manual_seed(0)
    model = multi_mlp({"stream1": 6, "stream2": 4}, 4, hidden=(6, 5), fusion_type="weighted")
    nn.init.normal_(model.fusion.logits)
    return model


def _views(count: int = 11) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(count, size, generator=generator) for size in (6, 4)]
    return TensorDataset(*inputs, torch.arange(count) % 4)


def _pathways(layout: str) -> dict[str, float]:
    model: Any = _model()
    if layout == "fsdp2":
        for encoder in model.encoders.values():
            fully_shard(encoder)
        fully_shard(model)
        model.eval()(*_views().tensors[:2])  # its own parameters are gathered now
    elif layout == "tensor parallel":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
        columns = {"layers.3": ColwiseParallel(output_layouts=Replicate())}
        for encoder in model.encoders.values():
            parallelize_module(encoder, mesh, columns)
    found = model.analyze_pathways(DataLoader(_views(), 2))
    shares = {f"shapley/{figure}": of for figure, of in found.pop("shapley").items()}
    parts = {part: of if isinstance(of, dict) else {"": of} for part, of in (found | shares).items()}
    return {f"{part}/{key}": value for part, of in parts.items() for key, value in of.items()}


@pytest.mark.parametrize(
    ("layout", "world"),
    [
        pytest.param("fsdp2", 4, marks=needs_fsdp2),
        ("tensor parallel", 2),
        pytest.param("fsdp2", 2, marks=[needs_fsdp2, pytest.mark.slow]),
        pytest.param("tensor parallel", 4, marks=pytest.mark.slow),
    ],
)
def test_analyze_pathways_of_a_sharded_model_is_that_of_one_process(layout: str, world: int) -> None:
    alone = _pathways("one process")
    assert alone["samples_analyzed/"] == 11
    for found in run_ranks(world, _pathways, layout):
        assert found == pytest.approx(alone, **CLOSE)


def _activations(layout: str) -> dict[str, float]:
    model = LAYOUTS[layout](network(torch.float32))
    monitor = StreamMonitor(model, streams=STREAMS)
    topology = monitor._collective.topology
    inputs = data().tensors[0][topology.data_rank :: topology.data_size]
    return monitor.compute_stream_activations(inputs).to_dict()


CUT = ("fsdp2 by module", "tensor parallel", "fsdp2 x sequence parallel")


@pytest.mark.parametrize("layout", cases(CUT))
def test_activations_of_a_sharded_model_are_those_of_one_process(layout: str) -> None:
    expected = StreamMonitor(network(torch.float32), streams=STREAMS).compute_stream_activations(data().tensors[0])
    for of_rank in on_ranks(_activations, CUT):
        found = of_rank[layout]
        cut = {key: value for key, value in expected.items() if layout != "fsdp2 by module" and key.startswith("up_")}
        assert {key: found[key] for key in cut} == pytest.approx(cut, rel=2e-3)
        assert found | cut == pytest.approx(expected.to_dict(), **CLOSE)


def _counted_twice() -> tuple[int, dict[str, float]]:
    """Items of ranks that are said to see the same data, though nothing is sharded."""
    streams = StreamSet.resolve(network(torch.float32), STREAMS)
    collective = Collective()
    collective.share_data([(0, 1, 2), (0, 1, 2), (0, 1, 2), (3,)])
    found = measure(streams, collective, {"val": Items(DataLoader(data(7), 2))}, classification(), Plan({}))
    held_out, train = Items(DataLoader(data(9), 2)), Items(DataLoader(data(64), 5))
    return len(found.tables["val"]), dict(
        evaluate(streams, collective, held_out, classification(), Request(train=train), Past())
    )


def test_ranks_that_see_the_same_data_count_as_one_also_in_uneven_groups() -> None:
    trained = with_training_items(network(torch.float32))
    for count, found in run_ranks(4, _counted_twice):
        assert count == 7
        assert found == pytest.approx(trained, **CLOSE, nan_ok=True)
