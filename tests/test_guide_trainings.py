"""The guide's Scenarios 1 to 4 happen in real trainings, and `rules=guide` tells each by its diagnosis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ddp_streammon import MonitorConfig, StreamMonitor
from ddp_streammon.rules.finding import Finding
from ddp_streammon.train.data.mfeat import mfeat
from ddp_streammon.train.models import multi_mlp

ITEMS, NOISE_ITEMS = 600, 150


def data(*, noise: bool) -> tuple[TensorDataset, TensorDataset]:
    """Fourier coefficients as stream1, Karhunen-Loeve ones as stream2; `noise`: in its place, of few items."""
    source = mfeat(("fou", "kar"), train=NOISE_ITEMS if noise else ITEMS, validation=400)
    parts = []
    generator = torch.Generator().manual_seed(0)
    for part in (source.train, source.validation):
        assert isinstance(part, TensorDataset)
        first, second, target = part.tensors
        parts.append(TensorDataset(first, torch.randn(second.shape, generator=generator) if noise else second, target))
    return parts[0], parts[1]


def train(*, epochs: int, noise: bool = False, **settings: float) -> list[Finding]:
    """The guide's own loop: what is recommended after the last epoch."""
    torch.manual_seed(0)
    train_set, val_set = data(noise=noise)
    sizes = {f"stream{number}": x.shape[1] for number, x in enumerate(train_set.tensors[:2], 1)}
    model = multi_mlp(sizes, 10, hidden=(64, 64), norm=False)
    model.compile("sgd", **settings)
    monitor = StreamMonitor(model, config=MonitorConfig(rules="guide"))  # type: ignore[arg-type]
    loader, val_loader = DataLoader(train_set, 50, shuffle=True), DataLoader(val_set, 200)
    for epoch in range(epochs):
        gradients: Any = {}
        for *inputs, target in loader:
            loss: Tensor = model.criterion(model(*inputs), target)
            assert model.optimizer is not None
            model.optimizer.zero_grad()
            loss.backward()
            gradients = monitor.compute_stream_gradients()
            model.optimizer.step()
        overfitting = monitor.compute_stream_overfitting_indicators(None, None, None, None, loader, val_loader)
        monitor.log_metrics(epoch, {**gradients, **monitor.compute_stream_weights(), **overfitting})
    return monitor.get_recommendations()


SCENARIOS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "1, stream1 not learning": (
        "S-S1",
        "stream1",
        "⚠️  Stream1 gradients vanishing, not contributing to learning"
        " - increase stream1_lr (0.05 -> 0.25), reduce stream1_weight_decay (0.3 -> 0.015),",
        {"learning_rate": 0.05, "stream1_weight_decay": 0.3, "epochs": 6},
    ),
    "2, stream2 overfitting": (
        "S-S2",
        "stream2",
        "⚠️  Stream2 memorizing training data"
        " - increase stream2_weight_decay (0.0001 -> 0.00025), reduce stream2_lr (0.1 -> 0.05), add stream2 dropout",
        {"learning_rate": 0.1, "weight_decay": 1e-4, "stream1_lr": 1e-3, "epochs": 40, "noise": True},
    ),
    "3, balanced but not learning": (
        "S-NL",
        "shared",
        "⚠️  Gradients balanced but too small globally - increase learning_rate (1e-06 -> 5e-06), check loss function",
        {"learning_rate": 1e-6, "epochs": 3},
    ),
    "4, one stream dominating": (
        "S-S4",
        "stream1",
        "⚠️  Stream1 weights growing much faster, dominating predictions"
        " - increase stream1_weight_decay (0 -> 0.0001), increase stream2_lr (5e-05 -> 0.00025), use WeightedFusion",
        {"learning_rate": 0.05, "stream1_lr": 0.5, "stream2_lr": 5e-5, "epochs": 8},
    ),
}

RULES = {rule for rule, *_ in SCENARIOS.values()}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_of_the_guide_is_told_from_a_real_training(name: str) -> None:
    rule, stream, sentence, settings = SCENARIOS[name]
    told = [finding for finding in train(**settings) if finding.rule == rule]
    assert [finding.stream for finding in told] == [stream]
    assert told[0].startswith(sentence)


def test_no_scenario_is_told_from_a_healthy_training() -> None:
    findings = train(learning_rate=0.05, epochs=6)
    assert {finding.rule for finding in findings}.isdisjoint(RULES)
