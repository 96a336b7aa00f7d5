"""The guide's interface: its keys for any names and wrappings, its usage patterns, and its plotting code."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import ddp_streammon
from ddp_streammon import Figures, MonitorConfig, RuleSet
from ddp_streammon.train.models import MultiStreamModel, mc_resnet, mc_resnet18
from tests.ranks import run_ranks

StreamMonitor = functools.partial(ddp_streammon.StreamMonitor, config=MonitorConfig(rules=RuleSet.guide))
"""With the guide's rules, which are what these tests are about."""

SEED = ("stream1", "stream2")
OWN = ("rgb", "depth")
THREE = ("rgb", "depth", "audio")


def resnet(names: tuple[str, ...] = SEED) -> MultiStreamModel:
    torch.manual_seed(0)
    channels = {name: 3 if number == 0 else 1 for number, name in enumerate(names)}
    return mc_resnet(18, 4, "weighted", streams=channels, stem="small", width=2, dropout_p=0.1)


def images(count: int = 12, streams: int = 2, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(count, 3 if s == 0 else 1, 8, 8, generator=generator) for s in range(streams)]
    return TensorDataset(*inputs, torch.randint(4, (count,), generator=generator))


def seed_keys(names: tuple[str, ...]) -> dict[str, set[str]]:
    """The keys of each call, as the guide names them."""
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    two = len(names) == 2
    gradient = ("grad_norm", "grad_max", "params")
    return {
        "gradients": {f"{name}_{figure}" for name in (*names, "shared") for figure in gradient}
        | {f"{a}_to_{b}_ratio" for a, b in pairs},
        "weights": {f"{name}_{figure}" for name in names for figure in ("weight_norm", "weight_mean")}
        | {"weight_norm_ratio" if two else f"{a}_to_{b}_weight_norm_ratio" for a, b in pairs},
        "activations": {
            f"layer{layer}_{name}_{moment}" for layer in range(1, 5) for name in names for moment in ("mean", "std")
        },
        "overfitting": {
            f"{name}_{figure}"
            for name in names
            for figure in ("train_acc", "val_acc", "train_loss", "val_loss", "acc_gap", "loss_gap", "overfitting_score")
        }
        | {f"{a}_vs_{b}_overfit_ratio" for a, b in pairs}
        | {"full_model_loss_gap", "full_model_acc_gap"},
    }


def calls(net: nn.Module, streams: int) -> dict[str, Figures]:
    """Every call of the seed interface after one backward."""
    monitor = StreamMonitor(net)
    *inputs, target = images(streams=streams).tensors
    functional.cross_entropy(net(*inputs), target).backward()
    train, val = DataLoader(images(streams=streams), 5, shuffle=True), DataLoader(images(7, streams, 1), 5)
    return {
        "gradients": monitor.compute_stream_gradients(),
        "weights": monitor.compute_stream_weights(),
        "activations": monitor.compute_stream_activations(*inputs),
        "overfitting": monitor.compute_stream_overfitting_indicators(1.0, 1.5, 0.5, 0.25, train, val),
    }


def check(found: Mapping[str, Mapping[str, float]], names: tuple[str, ...]) -> None:
    for call, wanted in seed_keys(names).items():
        assert wanted <= set(found[call]), call
        assert all(math.isfinite(found[call][key]) for key in wanted if not key.endswith("overfit_ratio")), call
    gradients, overfitting = found["gradients"], found["overfitting"]
    a, b = names[:2]
    assert gradients[f"{a}_params"] == 60 and gradients["shared_params"] == 3  # 20 convolutions, 20 norms; head, fusion
    assert 0 < gradients[f"{a}_grad_max"] < gradients[f"{a}_grad_norm"]
    norms = [gradients[f"{name}_grad_norm"] for name in (a, b)]
    assert gradients[f"{a}_to_{b}_ratio"] == pytest.approx(norms[0] / norms[1])
    assert overfitting["full_model_loss_gap"] == 0.5 and overfitting["full_model_acc_gap"] == 0.25
    for name in names:
        gaps = [overfitting[f"{name}_train_acc"] - overfitting[f"{name}_val_acc"]]
        gaps.append(overfitting[f"{name}_val_loss"] - overfitting[f"{name}_train_loss"])
        assert [overfitting[f"{name}_acc_gap"], overfitting[f"{name}_loss_gap"]] == pytest.approx(gaps)
        assert overfitting[f"{name}_overfitting_score"] == pytest.approx(sum(gaps))


def found_in_process(names: tuple[str, ...], wrapping: str) -> dict[str, dict[str, float]]:
    net: Any = resnet(names)
    if wrapping == "DDP":
        net = DistributedDataParallel(net)
    if wrapping == "torch.compile":
        net = torch.compile(net, backend="eager")
    return {call: figures.to_dict() for call, figures in calls(net, len(names)).items()}


@pytest.mark.parametrize("wrapping", ["plain", pytest.param("torch.compile", marks=pytest.mark.slow)])
@pytest.mark.parametrize("names", [SEED, OWN, THREE])
def test_every_key_is_there(names: tuple[str, ...], wrapping: str) -> None:
    check(found_in_process(names, wrapping), names)


@pytest.mark.parametrize("names", [SEED, THREE])
def test_every_key_is_there_under_ddp_and_the_figures_are_those_of_one_process(names: tuple[str, ...]) -> None:
    first, second = run_ranks(2, found_in_process, names, "DDP")
    assert flat(first) == pytest.approx(flat(second), rel=0, abs=0, nan_ok=True)
    check(first, names)
    alone = found_in_process(names, "plain")
    for call in seed_keys(names):
        rel = 3e-3 if call == "activations" else 1e-5  # both ranks gave the same 12 samples: 12 / 11 or 24 / 23
        assert first[call] == pytest.approx(alone[call], rel=rel, abs=1e-7, nan_ok=True), call


def flat(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{call}/{key}": value for call, figures in found.items() for key, value in figures.items()}


def test_the_gradient_figures_are_the_seeds_formulas() -> None:
    net = resnet()
    found = calls(net, 2)
    for name in SEED:
        gradients = torch.cat([p.grad.flatten() for p in net.encoders[name].parameters()]).double()
        assert found["gradients"][f"{name}_grad_norm"] == pytest.approx(gradients.norm().item(), rel=1e-6)
        assert found["gradients"][f"{name}_grad_max"] == gradients.abs().max().item()
        weights = [p.detach().double() for key, p in net.encoders[name].named_parameters() if "weight" in key]
        norm = math.sqrt(sum(weight.square().sum().item() for weight in weights))
        assert found["weights"][f"{name}_weight_norm"] == pytest.approx(norm, rel=1e-6)
        mean = sum(weight.mean().item() for weight in weights) / len(weights)
        assert found["weights"][f"{name}_weight_mean"] == pytest.approx(mean, rel=1e-6)


# What the calls return ---------------------------------------------------------------------------------------------


def test_figures_are_mappings_that_wait_only_when_read() -> None:
    read: list[str] = []

    def under_way(name: str, values: dict[str, float]) -> Figures:
        return Figures(values, lambda: read.append(name) or values)

    a, b = under_way("a", {"x": 1.0, "y": 2.0}), under_way("b", {"y": 3.0})
    merged = a | b
    either = {"z": 0.0} | a | {"w": 4.0}
    assert list(merged) == ["x", "y"] and len(either) == 4 and "y" in a and "q" not in a
    assert "under way: x, y" in repr(a)
    with pytest.raises(KeyError, match="no figure 'strean1_grad_norm'; nearest: stream1_grad_norm, stream2_grad_norm"):
        under_way("c", {"stream1_grad_norm": 0.0, "stream2_grad_norm": 0.0})["strean1_grad_norm"]
    assert read == []
    assert {**a, **b} == merged.to_dict() == {"x": 1.0, "y": 3.0}
    assert dict(either) == {"z": 0.0, "x": 1.0, "y": 2.0, "w": 4.0}
    assert read == ["a", "b"] and isinstance(a, Mapping) and type(merged.to_dict()) is dict
    assert f"{a['x']:.2f}" == "1.00" and "2.0" in repr(a)


def gradients_read_on_rank_1_only() -> float | None:
    net = DistributedDataParallel(resnet())
    monitor = StreamMonitor(net)
    *inputs, target = images().tensors
    functional.cross_entropy(net(*inputs), target).backward()
    figures = monitor.compute_stream_gradients()
    norm = figures["stream1_grad_norm"] if dist.get_rank() == 1 else None
    dist.barrier()
    return norm


def test_reading_is_no_collective() -> None:
    nobody, norm = run_ranks(2, gradients_read_on_rank_1_only)
    assert nobody is None and norm == pytest.approx(calls(resnet(), 2)["gradients"]["stream1_grad_norm"], rel=1e-4)


# The guide's usage patterns ------------------------------------------------------------------------------------------


class Setup:
    """What the guide's snippets take for granted: model, optimizer, criterion, loaders and a monitor."""

    def __init__(self, **rates: float) -> None:
        torch.manual_seed(0)
        self.model = mc_resnet18(num_classes=4, fusion_type="weighted", stem="small", width=2)
        settings = {"learning_rate": 1e-4, "stream1_lr": 5e-4, "stream2_lr": 1e-4, **rates}
        self.model.compile("adamw", **settings, stream1_weight_decay=1e-3, stream2_weight_decay=3e-2)
        self.optimizer, self.criterion = self.model.optimizer, self.model.criterion
        self.train_loader = DataLoader(images(), 6, shuffle=True)
        self.val_loader = DataLoader(images(8, seed=1), 6)
        self.monitor = StreamMonitor(self.model)

    def backward(self, batch: tuple[Tensor, ...]) -> Tensor:
        s1, s2, targets = batch
        loss = self.criterion(self.model(s1, s2), targets)
        self.optimizer.zero_grad()
        loss.backward()
        return loss

    def train_epoch(self) -> tuple[float, float]:
        self.model.train()
        for batch in self.train_loader:
            loss = self.backward(batch)
            self.optimizer.step()
        return loss.item(), 0.25

    def overfitting(self) -> Figures:
        loaders = self.train_loader, self.val_loader
        return self.monitor.compute_stream_overfitting_indicators(1.0, 1.5, 0.5, 0.25, *loaders)


def test_pattern_1_monitor_every_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    setup = Setup()
    monitor = setup.monitor
    for epoch in range(2):
        train_loss, train_acc = setup.train_epoch()
        grad_stats = monitor.compute_stream_gradients()
        weight_stats = monitor.compute_stream_weights()
        overfit_stats = monitor.compute_stream_overfitting_indicators(
            train_loss, 1.4, train_acc, 0.25, setup.train_loader, setup.val_loader
        )
        all_metrics = {**grad_stats, **weight_stats, **overfit_stats}
        monitor.log_metrics(epoch, all_metrics)
        if epoch % 10 == 0:
            print(monitor.get_summary())
            for rec in monitor.get_recommendations():
                print(rec)
    out = capsys.readouterr().out
    assert "Stream Monitoring Summary" in out and "Gradient Norms (average):" in out and "Ratio (S1/S2)" in out
    assert any(mark in out for mark in ("⚠️", "✓"))
    assert monitor.history["epoch"] == [0, 1]
    for key in set().union(*seed_keys(SEED).values()) - seed_keys(SEED)["activations"]:
        assert len(monitor.history[key]) == 2, key
    assert monitor.history["stream1_grad_norm"][1] == grad_stats["stream1_grad_norm"]


def test_before_anything_is_logged_there_is_too_little_to_say() -> None:
    assert Setup().monitor.get_recommendations() == ["Insufficient data for recommendations"]


def test_pattern_2_monitor_specific_batches() -> None:
    setup = Setup()
    printed = []
    for batch_idx, batch in enumerate(setup.train_loader):
        setup.backward(batch)
        if batch_idx % 100 == 0:
            grad_stats = setup.monitor.compute_stream_gradients()
            s1, s2 = grad_stats["stream1_grad_norm"], grad_stats["stream2_grad_norm"]
            printed.append(f"Batch {batch_idx}: S1 grad={s1:.2f}, S2 grad={s2:.2f}")
        setup.optimizer.step()
    norms = [float(part.split("=")[1].rstrip(",")) for part in printed[0].split()[2:] if "=" in part]
    assert len(printed) == 1 and printed[0].startswith("Batch 0: S1 grad=") and min(norms) > 0


@pytest.mark.parametrize(("factor", "rates"), [(1e3, (2.5e-4, 1e-4)), (1e-3, (5e-4, 5e-5)), (None, (5e-4, 1e-4))])
def test_pattern_3_changes_the_rate_of_the_right_group(factor: float | None, rates: tuple[float, float]) -> None:
    setup = Setup()
    setup.backward(next(iter(setup.train_loader)))
    balance = setup.monitor.compute_stream_gradients()["stream1_to_stream2_ratio"]
    for parameter in setup.model.encoders["stream1"].parameters():
        parameter.grad *= (factor or 1.0) / balance
    ratio = setup.monitor.compute_stream_gradients()["stream1_to_stream2_ratio"]
    assert ratio == pytest.approx(factor or 1.0, rel=1e-5)
    if ratio > 3.0:
        for pg in setup.optimizer.param_groups:
            if "stream1" in str(pg):
                pg["lr"] *= 0.5
    elif ratio < 0.33:
        for pg in setup.optimizer.param_groups:
            if "stream2" in str(pg):
                pg["lr"] *= 0.5
    found = {group["stream"]: group["lr"] for group in setup.optimizer.param_groups}
    assert found == {"stream1": rates[0], "stream2": rates[1], "shared": 1e-4}


def test_the_full_training_loop(capsys: pytest.CaptureFixture[str]) -> None:
    setup = Setup()
    monitor, model = setup.monitor, setup.model
    before = [parameter.clone() for parameter in model.parameters()]
    for epoch in range(2):
        model.train()
        for batch_idx, batch in enumerate(setup.train_loader):
            setup.backward(batch)
            if batch_idx == 0:
                grad_stats = monitor.compute_stream_gradients()
                s1, s2 = grad_stats["stream1_grad_norm"], grad_stats["stream2_grad_norm"]
                print(f"Epoch {epoch}: S1={s1:.2f}, S2={s2:.2f}")
            setup.optimizer.step()
        model.eval()
        if epoch % 10 == 0:
            overfit_stats = setup.overfitting()
            print(f"Stream1 overfit: {overfit_stats['stream1_overfitting_score']:.2f}")
            print(f"Stream2 overfit: {overfit_stats['stream2_overfitting_score']:.2f}")
            monitor.log_metrics(epoch, {**grad_stats, **overfit_stats})
            recommendations = monitor.get_recommendations()
            if any("⚠️" in rec for rec in recommendations):
                print("\n⚠️  Recommendations:")
            for rec in recommendations:
                print(f"  {rec}")
        if epoch % 25 == 0:
            analysis = model.analyze_pathways(setup.val_loader)
            print(f"  Stream1: {analysis['accuracy']['color_contribution']:.1%}")
            print(f"  Stream2: {analysis['accuracy']['brightness_contribution']:.1%}")
        assert not model.training
    out = capsys.readouterr().out
    assert out.count("Epoch ") == 2 and out.count("overfit: ") == 2 and "Stream1: " in out
    assert analysis["samples_analyzed"] == 8
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_plotting_code(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    plt = pytest.importorskip("matplotlib.pyplot")
    setup = Setup()
    monitor = setup.monitor
    for epoch in range(3):
        setup.train_epoch()
        monitor.log_metrics(
            epoch, {**monitor.compute_stream_gradients(), **monitor.compute_stream_weights(), **setup.overfitting()}
        )
    plt.figure(figsize=(12, 4))
    for place, (figure, title) in enumerate(
        [("grad_norm", "Gradient Flow"), ("overfitting_score", "Overfitting Indicators"), ("weight_norm", "Weights")], 1
    ):
        plt.subplot(1, 3, place)
        for number in (1, 2):
            (line,) = plt.plot(monitor.history[f"stream{number}_{figure}"], label=f"Stream{number}")
            assert line.get_ydata().tolist() == monitor.history[f"stream{number}_{figure}"]
            assert len(line.get_ydata()) == 3
        plt.xlabel("Epoch")
        plt.legend()
        plt.title(title)
    plt.tight_layout()
    plt.savefig(tmp_path / "stream_monitoring.png")
    plt.close()
    assert (tmp_path / "stream_monitoring.png").stat().st_size > 10_000


def test_a_compiled_models_own_optimizer_gives_recommendations_their_action() -> None:
    net = resnet().compile("adamw", learning_rate=1e-3, stream1_lr=4e-4)
    monitor = StreamMonitor(net)
    assert "0.0004" in monitor.inventory()
    monitor.log_metrics(0, {"stream1_grad_norm": 4.0, "stream2_grad_norm": 1.0})
    (finding,) = (finding for finding in monitor.get_recommendations() if finding.rule == "S-GR")
    assert finding == "⚠️  Stream1 gradients 4.0x larger than Stream2 - consider reducing stream1_lr"
    assert finding.action is not None
    assert (finding.action.setting, finding.action.stream, finding.action.value) == ("lr", "stream1", 2e-4)
