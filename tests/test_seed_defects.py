"""The 22 defects of the original StreamMonitor, each confirmed by running it: one test each.

`old_...` is what the original computed there, where that is a line or two.
"""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import ddp_streammon
from ddp_streammon import MonitorConfig, RuleSet, Severity, StreamSet
from ddp_streammon.train.early_stopping import Criteria, StreamEarlyStopping
from ddp_streammon.train.models import MultiStreamModel, multi_mlp
from tests.ranks import run_ranks

WARN = "⚠️  "
StreamMonitor = functools.partial(ddp_streammon.StreamMonitor, config=MonitorConfig(rules=RuleSet.guide))
"""With the guide's rules, which are what these tests are about."""


def model(streams: tuple[str, ...] = ("stream1", "stream2"), fusion: str = "concat", seed: int = 0) -> MultiStreamModel:
    torch.manual_seed(seed)
    widths = {name: 3 + number for number, name in enumerate(streams)}
    made = multi_mlp(widths, 4, hidden=(6, 5), fusion_type=fusion, dropout_p=0.2)
    for parameter in made.fusion.parameters():
        nn.init.normal_(parameter)
    return made


def data(count: int = 20, streams: int = 2) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(count, 3 + s, generator=generator) for s in range(streams)]
    return TensorDataset(*inputs, torch.randint(4, (count,), generator=generator))


def backward(net: nn.Module, items: TensorDataset | None = None) -> torch.Tensor:
    *inputs, target = (items or data()).tensors
    loss = functional.cross_entropy(net(*inputs), target)
    loss.backward()
    return loss


def scale_gradients(net: MultiStreamModel, stream: str, factor: float) -> None:
    for parameter in net.encoders[stream].parameters():
        parameter.grad *= factor


def recommend(logged: Mapping[str, float], times: int = 1) -> list[str]:
    """What the guide's rules say after `logged` was logged so many times."""
    monitor = StreamMonitor(model())
    for epoch in range(times):
        monitor.log_metrics(epoch, logged)
    return monitor.get_recommendations()


def old_ratio_text(norm1: float, norm2: float) -> str:
    ratio = norm1 / norm2
    if ratio > 3.0:
        return f"{WARN}Stream1 gradients {ratio:.1f}x larger than Stream2 - consider reducing stream1_lr"
    if ratio < 0.33:
        return f"{WARN}Stream2 gradients {1 / ratio:.1f}x larger than Stream1 - consider reducing stream2_lr"
    return f"✓ Gradient ratio balanced ({ratio:.2f})"


def test_defect_01_gradients_of_stream2_all_zero() -> None:
    with pytest.raises(ZeroDivisionError):
        old_ratio_text(1.0, 0.0)
    net = model()
    monitor = StreamMonitor(net)
    backward(net)
    scale_gradients(net, "stream2", 0.0)
    stats = monitor.compute_stream_gradients()
    assert stats["stream2_grad_norm"] == 0 < stats["stream1_grad_norm"]
    assert math.isnan(stats["stream1_to_stream2_ratio"])
    monitor.log_metrics(0, stats)
    assert f"{WARN}Gradient ratio undefined: Stream2 has no gradient (norm 0)" in monitor.get_recommendations()
    for _ in range(5):
        monitor.step()
    monitor.flush()
    exact = monitor.get_recommendations()[0]
    assert (exact.rule, exact.stream, exact.step) == ("DEAD", "stream2", 5)
    assert exact.startswith(f"{WARN}stream2: every gradient is exactly zero for 4 steps")


def test_defect_01_stream2_frozen() -> None:
    net = model()
    net.encoders["stream2"].requires_grad_(False)
    monitor = StreamMonitor(net)
    backward(net)
    stats = monitor.compute_stream_gradients()
    assert math.isnan(stats["stream1_to_stream2_ratio"]) and stats["stream2_params"] == 0
    monitor.log_metrics(0, stats)
    said = monitor.get_recommendations()
    assert any("Stream2 has no gradient" in text for text in said) and not any("non-finite" in text for text in said)


def test_defect_02_gradients_of_stream1_all_zero() -> None:
    old_ratio = math.inf  # its guard against the division gave this
    assert "infx larger" in f"{old_ratio:.1f}x larger"
    texts = recommend({"stream1_grad_norm": 0.0, "stream2_grad_norm": 1.0})
    assert texts == [f"{WARN}Gradient ratio undefined: Stream1 has no gradient (norm 0)"]


def test_defect_03_both_norms_vanish() -> None:
    assert old_ratio_text(1e-12, 1e-12) == "✓ Gradient ratio balanced (1.00)"
    net = model()
    monitor = StreamMonitor(net)
    backward(net)
    for stream in net.stream_names:
        scale_gradients(net, stream, 1e-12)
    stats = monitor.compute_stream_gradients()
    monitor.log_metrics(0, stats)
    assert 0 < stats["stream1_grad_norm"] < 1e-11  # its squares are below float32's smallest number
    vanishing = [rec for rec in monitor.get_recommendations() if "gradients vanishing" in rec]
    assert [rec.stream for rec in vanishing] == ["stream1", "stream2"]
    assert not any("balanced" in rec for rec in monitor.get_recommendations())


def nan_on_rank_1() -> tuple[list[tuple[str, str | None, int | None, str]], list[str]]:
    net = DistributedDataParallel(model())
    monitor = StreamMonitor(net)
    items = data()
    if dist.get_rank() == 1:
        items.tensors[1][0, 0] = math.nan
    monitor.step(loss=backward(net, items).detach())
    monitor.flush()
    monitor.log_metrics(0, monitor.compute_stream_gradients())
    found = monitor.get_recommendations()
    assert all(rec.severity is Severity.error for rec in found if rec.rule == "NF")
    return [(rec.rule, rec.stream, rec.rank, str(rec)) for rec in found], list(found)


def test_defect_04_a_nan_gradient() -> None:
    assert old_ratio_text(math.nan, 1.0) == "✓ Gradient ratio balanced (nan)"
    first, second = run_ranks(2, nan_on_rank_1)
    assert first == second
    (exact,) = [(stream, rank, text) for rule, stream, rank, text in first[0] if rule == "NF"]
    assert exact == (None, 1, f"{WARN}gradients of stream1, stream2, shared: not finite, on rank 1 at step 1")
    assert any(text.startswith(f"{WARN}Stream2 gradients non-finite") for text in first[1])
    assert not any("balanced" in text for text in first[1])


@pytest.mark.parametrize(("one", "two"), [(-0.2, -0.5), (0.003, 0.001)])
def test_defect_05_scores_near_or_below_zero(one: float, two: float) -> None:
    assert one > 2 * two  # the original's whole rule
    texts = recommend({"stream1_overfitting_score": one, "stream2_overfitting_score": two})
    assert texts == ["✓ All metrics look healthy"]
    loud = recommend({"stream1_overfitting_score": 1.5, "stream2_overfitting_score": 0.1})
    assert f"{WARN}Stream1 overfitting significantly more - boost stream1 regularization" in loud


def test_defect_06_the_ratio_of_scores_that_are_not_positive() -> None:
    net = model()
    items = DataLoader(data(), 8)
    stats = StreamMonitor(net).compute_stream_overfitting_indicators(0.0, 0.0, 0.0, 0.0, items, items)
    assert stats["stream1_overfitting_score"] == stats["stream2_overfitting_score"] == 0.0
    assert math.isnan(stats["stream1_vs_stream2_overfit_ratio"])


def test_defect_07_a_train_accuracy_of_one() -> None:
    old_stalled = sum([0.0] * 4) / 4 < 0.001
    assert old_stalled
    assert recommend({"stream1_train_acc": 1.0, "stream2_train_acc": 0.995}, 6) == ["✓ All metrics look healthy"]
    stalled = recommend({"stream1_train_acc": 0.6, "stream2_train_acc": 1.0}, 6)
    assert stalled == [f"{WARN}Stream1 learning stalled - consider increasing stream1_lr"]


def test_defect_08_a_weight_ratio_of_100() -> None:
    net = model()
    with torch.no_grad():
        for name, parameter in net.encoders["stream1"].named_parameters():
            if "weight" in name:
                parameter.mul_(100)
    monitor = StreamMonitor(net)
    stats = monitor.compute_stream_weights()
    assert stats["weight_norm_ratio"] > 50
    monitor.log_metrics(0, stats)
    factor = f"{stats['weight_norm_ratio']:.1f}"
    text = f"{WARN}Stream1 weights {factor}x larger than Stream2 - consider increasing stream1_weight_decay"
    assert monitor.get_recommendations() == [text]


def test_defect_09_the_model_keeps_its_modes_also_after_an_exception() -> None:
    net = model().train()
    net.encoders["stream2"].eval()
    modes = {name: module.training for name, module in net.named_modules()}
    monitor = StreamMonitor(net)
    items = DataLoader(data(), 8)
    wrong = DataLoader(TensorDataset(torch.zeros(4, 9), torch.zeros(4, 4), torch.zeros(4).long()), 4)
    monitor.compute_stream_overfitting_indicators(0, 0, 0, 0, items, items)
    monitor.compute_stream_activations(*data().tensors[:2])
    net.analyze_pathways(items)
    for probe in (
        lambda: monitor.compute_stream_overfitting_indicators(0, 0, 0, 0, items, wrong),
        lambda: monitor.compute_stream_activations(*wrong.dataset.tensors[:2]),
        lambda: net.analyze_pathways(wrong),
    ):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            probe()
        assert {name: module.training for name, module in net.named_modules()} == modes


def train(monitored: bool, workers: int = 0) -> dict[str, Any]:
    """Two epochs with a shuffled loader, dropout and BatchNorm; weights, buffers and random states at the end."""
    torch.manual_seed(5)
    random.seed(5)
    net: nn.Module = model(fusion="gated", seed=5)
    if dist.is_initialized():
        net = DistributedDataParallel(net)
        torch.manual_seed(5 + dist.get_rank())
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    loader = DataLoader(data(), 6, shuffle=True, num_workers=workers)
    monitor = StreamMonitor(net, optimizer) if monitored else None
    for epoch in range(2):
        for *inputs, target in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(*inputs), target)
            loss.backward()
            if monitor is not None:
                monitor.step(loss=loss.detach(), samples=len(target))
                monitor.compute_stream_activations(*inputs)
            optimizer.step()
        if monitor is not None:
            stats = monitor.compute_stream_overfitting_indicators(0.0, 0.0, 0.0, 0.0, loader, loader)
            monitor.log_metrics(epoch, stats | monitor.compute_stream_weights())
            monitor.evaluate(loader, max_batches=2)
            monitor.get_recommendations()
    state = copy.deepcopy(dict(net.state_dict()))
    return state | {"rng": torch.get_rng_state(), "python": torch.tensor(random.getstate()[1])}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def train_twice() -> bool:
    return same(train(True), train(False))


def test_defect_10_training_with_and_without_the_monitor_is_bit_identical() -> None:
    assert same(train(True), train(False))
    assert same(train(True, workers=1), train(False, workers=1))


@pytest.mark.parametrize("world", [2, 3])
def test_defect_10_under_ddp(world: int) -> None:
    assert run_ranks(world, train_twice) == [True] * world


def test_defect_11_no_parameter_matches_or_gradients_are_zeroed_already() -> None:
    net = model(("stream1", "stream2"))
    text = r"stream 'a': pattern 'steam1' matches no parameter; nearest names: stream1, stream2"
    with pytest.raises(ValueError, match=text):
        StreamMonitor(net, streams={"a": "steam1", "b": "stream2"})
    monitor = StreamMonitor(net)
    with pytest.warns(UserWarning, match=r"no gradients: .*after backward\(\) and before zero_grad"):
        stats = monitor.compute_stream_gradients()
    assert math.isnan(stats["stream1_grad_norm"]) and stats["stream1_params"] == 0


def test_defect_12_stream10_is_not_stream1() -> None:
    names = ("stream1", "stream10")
    net = model(names)
    assert sum("stream1" in name for name, _ in net.named_parameters()) == 12  # the original's test: both streams
    assert [len(StreamSet.resolve(net)[name].parameters) for name in names] == [6, 6]
    backward(net)
    scale_gradients(net, "stream10", 1000.0)
    stats = StreamMonitor(net).compute_stream_gradients()
    own = [p.grad.square().sum() for p in net.encoders["stream1"].parameters()]
    assert stats["stream1_grad_norm"] == pytest.approx(torch.stack(own).sum().sqrt().item(), rel=1e-6)
    assert stats["stream1_to_stream10_ratio"] < 0.1


def wrapped_gradients() -> dict[str, float]:
    net = DistributedDataParallel(model().eval())
    with pytest.raises(AttributeError):
        _ = net.encoders  # the original asked for attributes that a wrapper does not have
    backward(net)
    return StreamMonitor(net).compute_stream_gradients().to_dict()


def test_defect_13_wrapped_models() -> None:
    plain = model().eval()
    backward(plain)
    expected = StreamMonitor(plain).compute_stream_gradients().to_dict()
    compiled = torch.compile(model().eval(), backend="eager")
    backward(compiled)
    assert StreamMonitor(compiled).compute_stream_gradients().to_dict() == pytest.approx(expected, rel=1e-6)
    for found in run_ranks(2, wrapped_gradients):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_defect_14_a_loss_scale() -> None:
    net = model().eval()
    backward(net)
    expected = StreamMonitor(net).compute_stream_gradients().to_dict()
    net.zero_grad()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    monitor = StreamMonitor(net, optimizer)
    *inputs, target = data().tensors
    scaler.scale(functional.cross_entropy(net(*inputs), target)).backward()
    raw = math.sqrt(sum(p.grad.square().sum().item() for p in net.encoders["stream1"].parameters()))
    assert raw == pytest.approx(65536 * expected["stream1_grad_norm"], rel=1e-5)
    assert monitor.compute_stream_gradients(scaler).to_dict() == pytest.approx(expected, rel=1e-5)
    scaler.unscale_(optimizer)
    assert monitor.compute_stream_gradients(scaler).to_dict() == pytest.approx(expected, rel=1e-5)


def test_defect_15_metrics_at_different_cadences_have_their_steps() -> None:
    net = model()
    monitor = StreamMonitor(net)
    for epoch in range(4):
        backward(net)
        monitor.step()
        sometimes = {"stream1_overfitting_score": 1.0} if epoch % 3 == 0 else {}
        monitor.log_metrics(epoch, {"stream1_grad_norm": 0.1 * epoch} | sometimes)
    scores = monitor.history.series("stream1_overfitting_score")
    assert [(entry.step, entry.epoch) for entry in scores] == [(1, 0), (4, 3)]
    logged = [entry for entry in monitor.history.series("stream1_grad_norm") if entry.epoch == 2]
    assert {entry.step for entry in logged} <= {3, 4} and len(logged) >= 1


def test_defect_16_a_last_batch_of_one_sample() -> None:
    net = model().eval()
    items = data(9)
    *inputs, target = items.tensors
    with torch.no_grad():
        each = functional.cross_entropy(net(*inputs), target, reduction="none")
    old_loss = (each[:8].mean() + each[8:].mean()).item() / 2
    found = StreamMonitor(net).evaluate(DataLoader(items, 8))["full_val_loss"]
    assert found == pytest.approx(each.mean().item(), rel=1e-6)
    assert abs(found - old_loss) > 0.01


def test_defect_17_monitor_and_analyze_pathways_agree_under_weighted_fusion() -> None:
    net = model(fusion="weighted").eval()
    *inputs, target = data().tensors
    with torch.no_grad():
        net.fusion.logits.copy_(torch.tensor([2.0, -2.0]))
        net.fc.weight.mul_(5)
        features = net.encode(*inputs)
        unfused = torch.cat([features[0], torch.zeros_like(features[1])], 1)
        old_loss = functional.cross_entropy(net.fc(unfused), target).item()
    items = DataLoader(data(), 8)
    analysis = net.analyze_pathways(items)
    stats = StreamMonitor(net).compute_stream_overfitting_indicators(0, 0, 0, 0, items, items)
    for stream in net.stream_names:
        assert analysis["loss"][f"{stream}_only"] == stats[f"{stream}_val_loss"]
        assert analysis["accuracy"][f"{stream}_only"] == stats[f"{stream}_val_acc"]
    assert abs(analysis["loss"]["stream1_only"] - old_loss) > 0.01


def test_defect_18_the_mean_of_means_and_the_mean_of_elements_have_their_own_keys() -> None:
    net = model()
    stats = StreamMonitor(net).compute_stream_weights()
    weights = [p.detach().double() for name, p in net.encoders["stream1"].named_parameters() if name.endswith("weight")]
    matrices = torch.cat([weight.flatten() for weight in weights if weight.dim() > 1])
    assert stats["stream1_weight_mean"] == pytest.approx(sum(w.mean().item() for w in weights) / len(weights), rel=1e-6)
    assert 0.4 < stats["stream1_weight_mean"] < 0.6  # two of four tensors are BatchNorm's gammas, all ones
    assert stats["stream1_weight_element_mean"] == pytest.approx(matrices.mean().item(), rel=1e-6)
    assert abs(stats["stream1_weight_element_mean"]) < 0.1


def test_defect_19_stream_early_stopping_restores_parameters_and_buffers() -> None:
    net = model().compile("sgd", 0.1)
    stopping = StreamEarlyStopping(net, net.optimizer, {"stream1": Criteria(1)})
    stopping.update({"stream1": 0.9}, 0)
    best = copy.deepcopy(net.encoders["stream1"].state_dict())
    backward(net)
    net.optimizer.step()
    moved = {name for name, value in net.encoders["stream1"].state_dict().items() if not torch.equal(value, best[name])}
    assert {name.rsplit(".", 1)[-1] for name in moved} >= {"weight", "running_mean", "running_var"}
    assert stopping.update({"stream1": 0.5}, 1) == ["stream1"]
    assert len(best) == 12 and same(net.encoders["stream1"].state_dict(), best)


def test_defect_20_with_three_streams_alone_and_without_have_different_names() -> None:
    net = model(("stream1", "stream2", "stream3"))
    items = DataLoader(data(streams=3), 8)
    stats = StreamMonitor(net).compute_stream_overfitting_indicators(0, 0, 0, 0, items, items)
    net.eval()
    *inputs, target = data(streams=3).tensors
    with torch.no_grad():
        features = net.encode(*inputs)
        for number, stream in enumerate(net.stream_names):
            alone = [f if i == number else torch.zeros_like(f) for i, f in enumerate(features)]
            without = [f if i != number else torch.zeros_like(f) for i, f in enumerate(features)]
            losses = [functional.cross_entropy(net.head(*kept), target).item() for kept in (alone, without)]
            found = [stats[f"{stream}_val_loss"], stats[f"{stream}_without_val_loss"]]
            assert found == pytest.approx(losses, rel=1e-5)


def test_defect_21_groups_carry_their_stream() -> None:
    net = model()
    old_groups = torch.optim.AdamW([{"params": encoder.parameters()} for encoder in net.encoders.values()]).param_groups
    assert not any("stream1" in str(group) for group in old_groups)
    net.compile(stream1_lr=5e-4, stream2_lr=1e-4, learning_rate=1e-3)
    for group in net.optimizer.param_groups:
        if "stream1" in str(group):
            group["lr"] *= 0.5
    rates = {group["stream"]: group["lr"] for group in net.optimizer.param_groups}
    assert rates == {"stream1": 2.5e-4, "stream2": 1e-4, "shared": 1e-3}


@pytest.mark.parametrize(("train_count", "val_count", "name"), [(0, 8, "train_loader"), (8, 0, "val_loader")])
def test_defect_22_an_empty_loader_is_named(train_count: int, val_count: int, name: str) -> None:
    loaders = [DataLoader(data(count), 8) for count in (train_count, val_count)]
    monitor = StreamMonitor(model())
    with pytest.raises(ValueError, match=f"^{name} is empty: there is no item to evaluate"):
        monitor.compute_stream_overfitting_indicators(0, 0, 0, 0, *loaders)
    with pytest.raises(ValueError, match="^train_loader_no_aug is empty"):
        monitor.compute_stream_overfitting_indicators(
            0, 0, 0, 0, loaders[0], loaders[0], train_loader_no_aug=DataLoader(data(0), 8)
        )
