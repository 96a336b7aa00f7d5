"""What the evidence rules see beside the gradients' norms, against its definitions, on real ranks.

The network is so small that every sample is all there is, but for the gradient of rgb's last layer.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon import MonitorConfig, StreamMonitor
from ddp_streammon.facts import Facts
from ddp_streammon.moments import COLUMNS, sample
from ddp_streammon.rank_facts import RankDetail
from ddp_streammon.sampled import ELEMENTS, LAYER, SUMS, Sampled
from ddp_streammon.sinks import MemorySink
from ddp_streammon.stats import StepStats
from ddp_streammon.streams import StreamSet
from tests.networks import STREAMS, batch, loss_of, network, part
from tests.ranks import run_ranks

CONSTANT, UNCLEARED, TWICE, BROKEN = 3, 4, 5, 6
"""Steps: equal items on rank 0, gradients left standing, two forwards, an infinite input on the last rank."""
RATE = {"rgb": 0.1, "depth": 0.02, "shared": 0.05}


def _of_streams(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    found: dict[str, list[nn.Parameter]] = {name: [] for name in (*STREAMS, "shared")}
    for name, parameter in model.named_parameters():
        found[name.split(".")[0] if name.split(".")[0] in found else "shared"].append(parameter)
    return found


def _whole(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([parameter.detach().double().reshape(-1) for parameter in parameters])


def _inputs(rank: int, world: int, step: int) -> tuple[Tensor, ...]:
    rgb, depth, target = (tensor.clone() for tensor in part(batch(seed=step), rank, world))
    if step == BROKEN and rank == world - 1:
        depth[1, 2] = math.inf
    if step == CONSTANT and rank == 0:
        rgb[:] = rgb[:1].clone()
    return rgb, depth, target


def _figures_of(tensor: Tensor) -> dict[str, float]:
    values = tensor.double()
    finite = values[torch.isfinite(values)]
    return {
        "mean": finite.mean().item(),
        "std": finite.std(unbiased=False).item(),
        "abs_max": finite.abs().max().item(),
        "nonfinite": float(values.numel() - finite.numel()),
    }


def _root_mean_square(gradient: Tensor | None) -> float:
    """Of what is read of a layer's gradient, what is not finite taken for zero."""
    assert gradient is not None
    read = gradient.reshape(-1)[:LAYER].double()
    return torch.where(read.isfinite(), read, 0.0).square().mean().sqrt().item()


def _job(every: int) -> tuple[list[StepStats], list[dict[str, Any]]]:
    """What rank 0's sink was told, and what is true here, step by step."""
    inner = network()
    here = torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if here else (0, 1)
    model: nn.Module = DistributedDataParallel(inner) if here else inner
    streams = _of_streams(inner)
    optimizer = torch.optim.SGD([{"params": own, "lr": RATE[name]} for name, own in streams.items()], momentum=0.9)
    sink = MemorySink()
    monitor = StreamMonitor(model, optimizer, streams=STREAMS, sinks=[sink], config=MonitorConfig(every=every))
    true, before = [], {name: _whole(own) for name, own in streams.items()}
    for step in range(1, BROKEN + 1):
        given = _inputs(rank, world, step)
        if step == TWICE:
            inner(*_inputs(rank, world, step + 100)[:-1])
        loss = loss_of(model, given)
        loss.backward()
        now = {name: _whole(own) for name, own in streams.items()}
        kernels = [inner.rgb[0].weight, inner.rgb[3].weight]
        true.append(
            {
                "loss": loss.item(),
                "weight": {name: own.norm().item() for name, own in now.items()},
                "moved": {name: (own - before[name]).norm().item() for name, own in now.items()},
                "share": {name: (own != before[name]).double().mean().item() for name, own in now.items()},
                "ends": [_root_mean_square(kernel.grad) for kernel in kernels],
                "inputs": [_figures_of(x) for x in given[:-1]],
            }
        )
        monitor.step(loss=loss.detach(), samples=len(given[-1]), epoch=step / 10)
        optimizer.step()
        before = now
        if step + 1 != UNCLEARED:
            optimizer.zero_grad()
    monitor.close()
    return [report.stats for report in sink.reports if report.stats is not None], true


@functools.cache
def jobs(world: int, every: int = 1) -> tuple[list[StepStats], list[list[dict[str, Any]]]]:
    """The steps as rank 0 saw them; and of each rank what is true, step by step."""
    found = [_job(every)] if world == 1 else run_ranks(world, _job, every)
    return found[0][0], [true for _, true in found]


JOBS = pytest.mark.parametrize(("world", "every"), [(1, 1), (2, 1), (3, 1), (2, 2)])


def close(value: Any) -> Any:
    return pytest.approx(value, rel=1e-5, abs=1e-7, nan_ok=True)


@JOBS
def test_samples_of_weights_say_how_they_move(world: int, every: int) -> None:
    steps, true = jobs(world, every)
    assert [step.step for step in steps] == list(range(1, BROKEN + 1, every))
    assert [step.epoch for step in steps] == [step.step / 10 for step in steps]
    for step in steps:
        at_rank_0 = true[0][step.step - 1]
        for name, stream in step.streams.items():
            assert stream.sample is not None
            assert stream.sample.weight == close(at_rank_0["weight"][name])
            first = step.step == 1
            update = at_rank_0["moved"][name] / at_rank_0["weight"][name]
            assert stream.sample.update == close(math.nan if first else update)
            assert stream.sample.moved == close(math.nan if first else at_rank_0["share"][name])
            for facts in step.rank_facts:
                assert isinstance(facts.detail, RankDetail)
                number = list(step.streams).index(name)
                assert facts.detail.moved[number] == close(math.nan if first else at_rank_0["moved"][name])
                assert facts.detail.base_lr[number] == RATE[name]


@JOBS
def test_samples_of_gradients_are_of_the_first_and_the_last_layer(world: int, every: int) -> None:
    steps, true = jobs(world, every)
    for step in steps:
        at_rank_0 = true[0][step.step - 1]
        samples = {name: stream.sample for name, stream in step.streams.items()}
        assert [samples["rgb"].first, samples["rgb"].last] == [close(end) for end in at_rank_0["ends"]]  # type: ignore[union-attr]
        for name in ("depth", "shared"):  # one layer each
            assert math.isnan(samples[name].first) and math.isnan(samples[name].last)  # type: ignore[union-attr]


@JOBS
def test_what_is_trained_and_left_standing_is_counted(world: int, every: int) -> None:
    steps, _ = jobs(world, every)
    counts = {"rgb": 4, "depth": 2, "shared": 2}
    for step in steps:
        for name, stream in step.streams.items():
            sample = stream.sample
            assert sample is not None
            assert (sample.trainable, sample.optimized) == (counts[name], counts[name])
            assert sample.uncleared == (world if UNCLEARED in range(step.step, step.step - every, -1) else 0)


@JOBS
def test_ranks_say_their_own_loss_and_inputs(world: int, every: int) -> None:
    steps, true = jobs(world, every)
    for step in steps:
        assert [facts.rank for facts in step.rank_facts] == list(range(world))
        for facts in step.rank_facts:
            detail, own = facts.detail, true[facts.rank][step.step - 1]
            assert detail is not None
            assert detail.loss == close(own["loss"])
            if step.step == TWICE:
                continue
            for number, expected in enumerate(own["inputs"]):
                seen = detail.inputs[number]
                assert {key: getattr(seen, key) for key in expected} == {k: close(v) for k, v in expected.items()}
                assert (seen.first_mean, seen.first_std) == (close(expected["mean"]), close(expected["std"]))
                assert seen.calls == 1
                assert seen.constant == (step.step == CONSTANT and facts.rank == 0 and number == 0)
            assert detail.inputs[2].calls == 0


@JOBS
def test_several_forwards_of_a_step_add_up(world: int, every: int) -> None:
    steps, _ = jobs(world, every)
    (twice,) = (step for step in steps if step.step == TWICE)
    for facts in twice.rank_facts:
        assert facts.detail is not None
        pairs = zip(_inputs(facts.rank, world, TWICE), _inputs(facts.rank, world, TWICE + 100), strict=True)
        for number, (last, first) in enumerate(list(pairs)[:-1]):
            both, seen = _figures_of(torch.cat([first, last])), facts.detail.inputs[number]
            assert {key: getattr(seen, key) for key in both} == {k: close(v) for k, v in both.items()}
            assert (seen.calls, seen.first_mean, seen.first_std) == (2, close(both["mean"]), close(both["std"]))


@pytest.mark.parametrize("world", [2, 3])
def test_equal_weights_and_batches_have_equal_numbers_and_others_have_not(world: int) -> None:
    steps, _ = jobs(world)
    seen = set()
    for step in steps:
        details = [facts.detail for facts in step.rank_facts]
        assert len({detail.weights for detail in details if detail is not None}) == 1
        batches = {detail.batch for detail in details if detail is not None}
        assert len(batches) == world
        seen |= batches
    assert len(seen) == BROKEN * world
    numbers = {facts.detail.weights for step in steps for facts in step.rank_facts if facts.detail is not None}
    assert len(numbers) == BROKEN


def test_forwards_that_are_transformed_or_traced_go_through_and_are_left_out(recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")  # it is said once all the same
    inner, sink = network(), MemorySink()
    monitor = StreamMonitor(inner, streams=STREAMS, sinks=[sink])
    rgb, depth, target = batch()

    def loss(weights: dict[str, Tensor], rgb: Tensor, depth: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(inner, weights, (rgb[None], depth[None]))
        return nn.functional.cross_entropy(logits, target[None])

    of_each = vmap(grad(loss), in_dims=(None, 0, 0, 0))(dict(inner.named_parameters()), rgb, depth, target)
    loss_of(inner, (rgb, depth, target)).backward()
    torch.export.export(inner, (rgb, depth), strict=False)
    torch.jit.trace(inner, (rgb, depth), check_trace=False)
    monitor.step(loss=1.0)
    monitor.close()
    for name, parameter in inner.named_parameters():
        torch.testing.assert_close(of_each[name].mean(0), parameter.grad)
    stats = sink.reports[0].stats
    assert stats is not None
    detail = stats.rank_facts[0].detail
    assert detail is not None
    for seen, expected in zip(detail.inputs, (_figures_of(rgb), _figures_of(depth)), strict=False):
        assert seen.calls == 1
        assert {key: getattr(seen, key) for key in expected} == {key: close(value) for key, value in expected.items()}
    (told,) = [str(one.message) for one in recwarn if one.category is UserWarning]
    assert "a forward's inputs could not be looked at (RuntimeError: " in told
    assert told.endswith("it is left out of what rules about inputs see, other forwards are not")


def test_samples_follow_weights_that_move_in_memory_are_frozen_or_come_to_the_optimizer_later() -> None:
    model, sink = network(), MemorySink()
    optimizer = torch.optim.SGD(model.rgb.parameters(), 0.1)
    monitor = StreamMonitor(model, optimizer, streams=STREAMS, sinks=[sink])
    true, before = [], _whole([*model.rgb.parameters()])
    for step in range(1, 7):
        trained = [parameter for parameter in model.rgb.parameters() if parameter.requires_grad]
        now = _whole(trained)
        true.append((now - before[: len(now)]).norm().item() / now.norm().item())
        before = now
        loss_of(model, batch(seed=step)).backward()
        monitor.step()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            model.rgb[0].weight.data = model.rgb[0].weight.data.clone()
        if step == 3:
            model.rgb[3].requires_grad_(False)
        if step == 4:
            optimizer.add_param_group({"params": [*model.depth.parameters()]})
    monitor.close()
    steps = [report.stats.streams for report in sink.reports if report.stats is not None]
    rgb, depth = ([streams[name].sample for streams in steps] for name in STREAMS)
    true[0] = true[3] = math.nan  # nothing was remembered, or of other weights
    assert [sample.update for sample in rgb] == [close(value) for value in true]
    assert [(sample.trainable, sample.optimized) for sample in rgb] == [(4, 4)] * 3 + [(2, 2)] * 3
    assert [(sample.trainable, sample.optimized) for sample in depth] == [(2, 0)] * 4 + [(2, 2)] * 2


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_that_several_passes_add_up_are_not_left_standing(sparse: bool) -> None:
    model = nn.ModuleDict({"words": nn.Embedding(9, 2, sparse=sparse), "head": nn.Linear(2, 2)})
    sink = MemorySink()
    monitor = StreamMonitor(model, streams={"words": "words"}, sinks=[sink])
    for step in range(1, 5):
        for _ in range(2):
            model["head"](model["words"](torch.arange(4))).sum().backward()
        monitor.step()
        if step != 3:
            model.zero_grad()
    monitor.close()
    steps = [report.stats.streams for report in sink.reports if report.stats is not None]
    words, head = ([streams[name].sample.uncleared for streams in steps] for name in ("words", "shared"))
    assert head == [0, 0, 0, 1]
    assert words == ([0] * 4 if sparse else head)  # sparse ones are not looked at


def _tensor_parallel() -> list[list[float]]:
    """Of each step and stream on how many ranks a gradient was left standing; in the last one it was."""
    mesh = init_device_mesh("cpu", (2,))
    model, sink = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}), MemorySink()
    parallelize_module(model["a"], mesh, ColwiseParallel(output_layouts=Replicate()))
    monitor = StreamMonitor(model, streams={"a": "a", "b": "b"}, sinks=[sink])
    for step in range(1, 4):
        for _ in range(2):
            (model["a"](torch.ones(2, 4)) + model["b"](torch.ones(2, 4))).sum().backward()
        monitor.step()
        if step != 2:
            model.zero_grad()
    monitor.close()
    steps = [report.stats.streams for report in sink.reports if report.stats is not None]
    return [[of.sample.uncleared for of in streams.values() if of.sample is not None] for streams in steps]


def test_gradients_of_tensor_parallel_streams_may_add_up_and_are_not_looked_at() -> None:
    assert run_ranks(2, _tensor_parallel)[0] == [[0, 0], [0, 0], [0, 2]]


@pytest.mark.parametrize("trained", [True, False])
def test_a_sample_is_small_and_holds_small_tensors_whole(trained: bool) -> None:
    shapes = [(100, 300), (7,), (300, 100), (64, 64)]
    parameters = [nn.Parameter(torch.ones(shape), requires_grad=trained) for shape in shapes]
    model = nn.ModuleDict({"a": nn.ParameterList(parameters)})
    sampled = Sampled(StreamSet.resolve(model, {"a": "a"}), [], torch.device("cpu"), every=1)
    sampled.look(0)
    ((_, _, _, compared, *_),), _ = sampled.begin(1)
    assert compared == ELEMENTS
    sums = torch.zeros(1, len(SUMS), dtype=torch.float64)
    sampled.write(torch.zeros(2, COLUMNS, dtype=torch.float64), sums, torch.zeros(1, 2, dtype=torch.float64))
    assert sums[0, 1] == ELEMENTS  # squares of ones


class Centred(nn.Module):
    """Takes the mean off its image, in place, before its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, times: Tensor, spectrum: Tensor, *, image: Tensor) -> Tensor:
        output: Tensor = self.layer(image.sub_(image.mean())) * times[:, None] * spectrum.abs()
        return output


def _seen_of_centred(*, training: bool = True, gradients: bool = True) -> tuple[Any, Tensor]:
    """What is seen of a first step with one forward; and the image that it was given."""
    model, sink = nn.ModuleDict({"a": Centred(), "b": nn.Linear(2, 2)}), MemorySink()
    monitor = StreamMonitor(model, streams={"a": "a", "b": "b"}, sinks=[sink])
    image = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) + 3
    model.train(training)
    with torch.set_grad_enabled(gradients):
        model["a"](torch.ones(6), torch.ones(6, 2, dtype=torch.complex64), image=image.clone())
    monitor.step()
    monitor.close()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    stats = sink.reports[0].stats
    assert stats is not None and stats.rank_facts[0].detail is not None
    return stats.rank_facts[0].detail.inputs[0], image


def test_the_first_batch_of_plain_numbers_is_seen_and_what_the_first_layer_makes_of_it() -> None:
    seen, image = _seen_of_centred()
    expected, centred = _figures_of(image), _figures_of(image - image.mean())
    assert {key: getattr(seen, key) for key in expected} == {key: close(value) for key, value in expected.items()}
    assert (seen.calls, seen.first_mean, seen.first_std) == (1, close(centred["mean"]), close(centred["std"]))


def test_of_integers_the_largest_and_their_number_are_seen_and_no_mean() -> None:
    model, sink = nn.ModuleDict({"words": nn.Embedding(50, 2), "b": nn.Linear(2, 2)}), MemorySink()
    monitor = StreamMonitor(model, streams={"words": "words", "b": "b"}, sinks=[sink])
    model["words"](torch.tensor([[3, 49, 7], [0, 1, 2]]))
    monitor.step()
    monitor.close()
    stats = sink.reports[0].stats
    assert stats is not None and stats.rank_facts[0].detail is not None
    seen = stats.rank_facts[0].detail.inputs[0]
    assert (seen.calls, seen.abs_max, seen.nonfinite, seen.constant) == (1, 49, 0, 0)
    assert math.isnan(seen.mean) and math.isnan(seen.std)


def test_of_wide_batches_a_bounded_number_of_features_is_looked_at() -> None:
    for features, looked_at in ((1024, 1024), (1025, 513), (2048, 1024), (2049, 683)):
        row = torch.zeros(sample.COLUMNS, dtype=torch.float64)
        sample.add_sample(row, torch.ones(2, features), compare=True)
        assert (row[sample.COUNT], row[sample.SUM]) == (2 * looked_at, 2 * looked_at)


@pytest.mark.parametrize(
    ("training", "gradients", "calls"), [(True, False, 1), (False, True, 1), (True, True, 1), (False, False, 0)]
)
def test_forwards_with_gradients_or_in_training_mode_count(training: bool, gradients: bool, calls: int) -> None:
    assert _seen_of_centred(training=training, gradients=gradients)[0].calls == calls


def test_facts_are_of_the_first_group_and_of_every_module() -> None:
    inner = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.Dropout()), "b": nn.BatchNorm1d(2)})
    model = nn.DataParallel(inner)
    first = {"params": [inner["a"][0].bias], "lr": 1.0, "weight_decay": 0.5}
    optimizer = torch.optim.SGD([first, {"params": [inner["a"][0].weight], "lr": 2.0}])
    facts = Facts(3, StreamSet.resolve(model, {"a": "a", "b": "b"}), model, [optimizer])
    said = facts.now(samples=7)
    assert (said.rank, said.lr, said.weight_decay) == (3, close((1.0, math.nan)), close((0.5, math.nan)))
    assert (said.training, said.samples, facts.share_in_eval()) == (1, 7, 0)
    optimizer.param_groups[0] |= {"initial_lr": 4.0, "lr": torch.empty((), device="meta")}
    inner["b"].eval()
    assert facts.base_rates() == close([4.0, math.nan])
    assert facts.now(samples=None).lr == close((math.nan, math.nan))  # a device would have to be waited for
    assert facts.share_in_eval() == 0.5
    inner.training = False
    assert facts.now(samples=None).training == 0
