"""Sparse, tied, conditional and channels-last parameters under DDP: figures equal those of the gradients at hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon import StreamMonitor
from tests.layouts import Collectives
from tests.ranks import run_ranks


class Two(nn.Module):
    """Streams `a` and `b` by whatever modules, and a head."""

    def __init__(self, a: nn.Module, b: nn.Module, width: int) -> None:
        super().__init__()
        self.a, self.b, self.head = a, b, nn.Linear(width, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat([self.a(x).flatten(1), self.b(y).flatten(1)], dim=1))
        return logits


class Sometimes(nn.Module):
    """The second layer is used on rank 0 only."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.always(x)
        return self.sometimes(hidden) if dist.get_rank() == 0 else hidden


class Tied(nn.Module):
    """One weight used twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(torch.tanh(self.first(x)))
        return output


def _images(generator: torch.Generator) -> Tensor:
    images = torch.randn(6, 3, 5, 5, generator=generator)
    return images.contiguous(memory_format=torch.channels_last)


def _vectors(generator: torch.Generator) -> Tensor:
    return torch.randn(6, 4, generator=generator)


def _words(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 50, (6, 3), generator=generator)


def _sparse() -> nn.Module:
    return Two(nn.Embedding(50, 4, sparse=True), nn.Linear(4, 4), 16)


def _channels_last() -> nn.Module:
    convolution = nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Two(convolution, nn.Linear(4, 4), 58)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Tensor], dict[str, Any]]] = {
    "sparse embedding": (_sparse, _words, {}),
    "tied weights": (lambda: Two(Tied(), nn.Linear(4, 4), 8), _vectors, {}),
    "used on one rank": (lambda: Two(Sometimes(), nn.Linear(4, 4), 8), _vectors, {"find_unused_parameters": True}),
    "static graph": (lambda: Two(Tied(), nn.Linear(4, 4), 8), _vectors, {"static_graph": True}),
    "channels last": (_channels_last, _images, {}),
    "channels last, bucket views": (_channels_last, _images, {"gradient_as_bucket_view": True}),
}


def _measured() -> dict[str, list[tuple[dict[str, float], dict[str, float], int]]]:
    """Of each case, three steps: the figures, those by definition, and the collectives."""
    answers = {}
    for name, (build, inputs, options) in CASES.items():
        torch.manual_seed(0)
        model = DistributedDataParallel(build(), **options)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        monitor = StreamMonitor(model, optimizer, {"a": "a", "b": "b"})
        generator = torch.Generator().manual_seed(dist.get_rank())
        steps = []
        for _ in range(4):
            model.zero_grad()
            x, y = inputs(generator), _vectors(generator)
            nn.functional.cross_entropy(model(x, y), torch.arange(6) % 2).backward()
            with Collectives() as collectives:
                figures = monitor.step()
            optimizer.step()
            steps.append((figures.to_dict(), _by_definition(model), collectives.count))
        answers[name] = steps[1:]
    return answers


def _by_definition(model: nn.Module) -> dict[str, float]:
    found: dict[str, float] = {}
    for stream in ("a", "b"):
        module = getattr(model.module, stream)
        gradients = [p.grad.to_dense().double() for p in module.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        found[f"{stream}_grad_norm"] = flat.norm().item()
        found[f"{stream}_grad_mean"] = flat.mean().item()
        found[f"{stream}_grad_max"] = flat.abs().max().item()
        found[f"{stream}_grad_elements"] = len(flat)
        found[f"{stream}_params"] = len(gradients)
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
def test_figures_equal_those_of_the_gradients_at_hand_with_one_collective(world: int) -> None:
    for of_rank in run_ranks(world, _measured):
        assert set(of_rank) == set(CASES)
        for name, steps in of_rank.items():
            for figures, expected, collectives in steps:
                assert collectives == (1 if world > 1 else 0), name
                for key, value in expected.items():
                    scale = expected[key.replace("grad_mean", "grad_max")]
                    assert math.isclose(figures[key], value, rel_tol=1e-6, abs_tol=1e-6 * scale), (name, key)
