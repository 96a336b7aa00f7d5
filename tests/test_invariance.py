"""Two ways to write down one function: what compares streams must not tell them apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ddp_streammon import StreamMonitor
from ddp_streammon.evaluation import Evaluation

TRAIN, HELD_OUT = 300, 200
SAME = {"rel": 1e-5, "abs": 1e-5}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rgb = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8))
        self.depth = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 8))
        self.head = nn.Linear(16, 4)
        self.double()

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat([self.rgb(rgb), self.depth(depth)], 1))
        return logits


def rescaled(model: Net) -> None:
    """rgb's features times 5, and what the head does with them by 5."""
    with torch.no_grad():
        last = model.rgb[-1]
        last.weight.mul_(5)
        last.bias.mul_(5)
        model.head.weight[:, :8].div_(5)


def shifted(model: Net) -> None:
    """rgb's features moved, which the head's bias takes back."""
    moved = torch.linspace(-2, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        model.rgb[-1].bias.add_(moved)
        model.head.bias.sub_(model.head.weight[:, :8] @ moved)


Change = Callable[[Net], None]


def data() -> tuple[TensorDataset, TensorDataset]:
    chance = torch.Generator().manual_seed(0)
    target = torch.randint(4, (TRAIN + HELD_OUT,), generator=chance)
    inputs = []
    for digit, width in ((target % 2, 6), (target, 5)):
        centres = torch.randn(4, width, generator=chance, dtype=torch.float64)
        inputs.append(centres[digit] + torch.randn(len(target), width, generator=chance, dtype=torch.float64))
    train, held_out = (TensorDataset(*(x[s] for x in (*inputs, target))) for s in (slice(TRAIN), slice(TRAIN, None)))
    return train, held_out


def trained() -> Net:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return model


def loss_of(model: Net) -> Tensor:
    *inputs, target = data()[0].tensors
    return cross_entropy(model(*inputs), target)


def both(change: Change) -> tuple[Net, Net]:
    """A trained model, and the same function written down otherwise."""
    model = trained()
    other = copy.deepcopy(model)
    change(other)
    *inputs, _ = data()[1].tensors
    assert torch.allclose(model(*inputs), other(*inputs), atol=1e-10)
    return model, other


def watched(model: Net) -> StreamMonitor:
    return StreamMonitor(model, streams={"rgb": "rgb", "depth": "depth"})


def loaders() -> tuple[DataLoader[Tensor], DataLoader[Tensor]]:
    train, held_out = data()
    return DataLoader(train, 50), DataLoader(held_out, 50)


def evaluated(model: Net) -> tuple[Evaluation, list[str]]:
    train, held_out = loaders()
    monitor = watched(model)
    found = monitor.evaluate(held_out, train=train)
    return found, [f"{finding.rule}/{finding.stream}" for finding in monitor.get_recommendations()]


def of_seed(model: Net) -> Mapping[str, float]:
    train, held_out = loaders()
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    monitor = watched(model)
    return {
        **monitor.compute_stream_gradients(),
        **monitor.compute_stream_weights(),
        **monitor.compute_stream_overfitting_indicators(None, None, None, None, train, held_out),
    }


@pytest.mark.parametrize("change", [rescaled, shifted])
def test_no_figure_and_no_verdict_of_an_evaluation_changes(change: Change) -> None:
    (found, said), (other, said_of_other) = map(evaluated, both(change))
    for part in ("uses", "uses_acc", "ablated", "ablated_acc", "shapley", "shapley_acc"):
        assert found[f"rgb_val_{part}"] != 0
    assert {"rgb_knows", "rgb_complement", "full_head_gap", "rgb_alone_loss_gap", "rgb_to_depth_val_cover"} <= set(
        found
    )
    assert dict(other) == pytest.approx(dict(found), **SAME, nan_ok=True)
    assert [(c.stream, c.statement) for c in other.claims] == [(c.stream, c.statement) for c in found.claims]
    assert found.claims
    assert said_of_other == said


@pytest.mark.parametrize(
    ("change", "changing"),
    [
        (rescaled, ("rgb_to_depth_ratio", "weight_norm_ratio", "rgb_grad_norm", "rgb_weight_norm")),
        (shifted, ("depth_val_loss", "depth_train_loss", "depth_loss_gap", "depth_overfitting_score")),
    ],
)
def test_the_guides_figures_change_and_so_compare_no_streams(change: Change, changing: tuple[str, ...]) -> None:
    """As their documentation says: norms depend on scales, features of zero on where zero is."""
    found, other = map(of_seed, both(change))
    for key in changing:
        assert abs(other[key] / found[key] - 1) > 0.01, key
    for key in ("full_val_loss", "full_val_acc", "full_loss_gap"):
        assert other[key] == pytest.approx(found[key], **SAME)


def test_gradient_power_does_not_depend_on_scales() -> None:
    def power(model: Net) -> float:
        model.zero_grad()
        loss_of(model).backward()  # type: ignore[no-untyped-call]
        return watched(model).compute_gradient_power()["rgb_grad_power"]

    model, other = both(rescaled)
    assert power(other) == pytest.approx(power(model), **SAME)
