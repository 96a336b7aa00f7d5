"""clip_grad_norm_: torch's norms and gradients, without reading the gradients or crossing ranks again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from ddp_streammon import MonitorConfig, StreamMonitor
from tests.layouts import Collectives
from tests.networks import STREAMS, batch, loss_of, network, part
from tests.ranks import run_ranks

LIMIT = 0.1
"""Below the norm of every stream's gradient of `network()`."""
BFLOAT16 = 2.0**-7
"""Two roundings of 2^-8: of the coefficient, and of what it scales."""


def backward(model: nn.Module, seed: int = 1) -> None:
    model.zero_grad()
    loss_of(model, part(batch(seed=seed), dist.get_rank(), dist.get_world_size())).backward()


def twin_of(parameters: Iterable[nn.Parameter], *, wide: bool = False) -> list[nn.Parameter]:
    """Copies of the parameters that have gradients, with copies of those; in float64 if `wide`."""
    copies = []
    for parameter in parameters:
        if parameter.grad is not None:
            dtype = torch.float64 if wide else parameter.dtype
            copies.append(nn.Parameter(parameter.detach().to(dtype)))
            copies[-1].grad = parameter.grad.to(dtype, copy=True)
    return copies


def error(value: Tensor, expected: Tensor) -> float:
    """The largest relative error of an element; inf where one is zero or not finite and the other is not the same."""
    usual = expected.isfinite() & (expected != 0)
    if not torch.allclose(value[~usual], expected[~usual].to(value.dtype), rtol=0, atol=0, equal_nan=True):
        return math.inf
    errors = (value[usual] - expected[usual]).abs() / expected[usual].abs()
    return errors.double().max().item() if len(errors) else 0.0


def errors(parameters: Iterable[nn.Parameter], expected: Iterable[nn.Parameter]) -> float:
    """The same over all gradients."""
    with_gradient = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return max(error(g, e.grad) for g, e in zip(with_gradient, expected, strict=True) if e.grad is not None)


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


# Torch's figures --------------------------------------------------------------------------------------------------


def put(*values: float) -> Callable[[nn.Module], None]:
    """Put values into the first gradient of `rgb`."""

    def change(model: Any) -> None:
        for place, value in enumerate(values):
            model.module.rgb[0].weight.grad[place] = value

    return change


def drop_depth(model: Any) -> None:
    for parameter in model.module.depth.parameters():
        parameter.grad = None


def zero(model: nn.Module) -> None:
    for gradient in gradients(model):
        gradient.zero_()


CASES: dict[str, tuple[torch.dtype, float, Callable[[nn.Module], None]]] = {
    "below the limit": (torch.float32, 1e3, put()),
    "above the limit": (torch.float32, LIMIT, put()),
    "no limit": (torch.float32, math.inf, put()),
    "inf": (torch.float32, LIMIT, put(math.inf)),
    "-inf": (torch.float32, LIMIT, put(-math.inf)),
    "nan": (torch.float32, LIMIT, put(math.nan)),
    "inf and nan": (torch.float32, LIMIT, put(math.inf, math.nan)),
    "a stream without gradients": (torch.float32, LIMIT, drop_depth),
    "zero": (torch.float32, LIMIT, zero),
    "float64": (torch.float64, LIMIT, put()),
    "bfloat16": (torch.bfloat16, LIMIT, put()),
}


def _clipped(case: str, *, proved: bool, per_stream: bool) -> tuple[list[float], float]:
    """The errors of the norms and of the gradients."""
    dtype, limit, change = CASES[case]
    model = DistributedDataParallel(network().to(dtype))
    monitor = StreamMonitor(model, None, STREAMS, config=MonitorConfig(delay=0))
    if proved:  # from the second step on each rank reads its share only
        backward(model)
        monitor.step()
    backward(model)
    change(model)
    monitor.step()
    parts = [[item.parameter for item in stream.parameters] for stream in monitor.streams.streams]
    if not per_stream:
        parts = [[parameter for held in parts for parameter in held]]
    # torch rounds every norm to bfloat16, so what it does to the same numbers in float64 is the measure
    twins = [twin_of(held, wide=dtype == torch.bfloat16) for held in parts]
    expected = [clip_grad_norm_(twin, limit) for twin in twins]
    norms = monitor.clip_grad_norm_(limit, per_stream=per_stream)
    assert norms.dtype == torch.float64
    assert norms.shape == ((len(parts),) if per_stream else ())
    assert monitor.streams.names == ("rgb", "depth", "shared")
    of_norms = [error(a, b) for a, b in zip(norms.reshape(-1), (e.reshape(()) for e in expected), strict=True)]
    of_gradients = max(errors(held, twin) for held, twin in zip(parts, twins, strict=True) if twin)
    return of_norms, of_gradients


def _all_cases() -> dict[tuple[str, bool, bool], tuple[list[float], float]]:
    ways = [(case, proved, per_stream) for case in CASES for proved in (False, True) for per_stream in (False, True)]
    return {way: _clipped(way[0], proved=way[1], per_stream=way[2]) for way in ways}


@functools.cache
def clipped(world: int) -> list[dict[tuple[str, bool, bool], tuple[list[float], float]]]:
    return run_ranks(world, _all_cases)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [1, 2])
def test_norms_and_gradients_are_torchs(world: int, case: str) -> None:
    for of_rank in clipped(world):
        for (name, _, _), (of_norms, of_gradients) in of_rank.items():
            if name == case:
                assert max(of_norms) < 1e-6
                assert of_gradients < (BFLOAT16 if case == "bfloat16" else 1e-6)


class Words(nn.Module):
    """A stream that is an embedding, sparse or dense, and another."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 4, sparse=sparse)
        self.mix = nn.Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        output: Tensor = self.mix(self.words(words).mean(dim=1))
        return output


def _sparse(*, per_stream: bool) -> tuple[float, float]:
    """The errors of norms and gradients against a dense twin, clipped by torch."""
    words = torch.tensor([[1, 1, 2], [7, 1, 49], [3, 3, 3], [4, 1, 0]])[dist.get_rank() :: dist.get_world_size()]
    models = [DistributedDataParallel(Words(sparse=sparse)) for sparse in (True, False)]
    for model in models:
        model(words).square().mean().backward()
    model, dense = (wrapped.module for wrapped in models)
    monitor = StreamMonitor(models[0], None, {"words": "words", "mix": "mix"}, config=MonitorConfig(delay=0))
    assert model.words.weight.grad.is_sparse
    with pytest.raises(NotImplementedError, match="Could not run .* Sparse"):
        clip_grad_norm_(model.parameters(), LIMIT)
    monitor.step()
    norms = monitor.clip_grad_norm_(LIMIT, per_stream=per_stream)
    parts = [dense.words.parameters(), dense.mix.parameters()] if per_stream else [dense.parameters()]
    expected = torch.stack([clip_grad_norm_(held, LIMIT) for held in parts])
    clipped = [parameter.grad.to_dense() for parameter in model.parameters()]
    worst = max(error(a, b) for a, b in zip(clipped, gradients(dense), strict=True))
    return error(norms.reshape(-1), expected), worst


class Waves(nn.Module):
    """Complex parameters beside real ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.waves = nn.Parameter(torch.randn(8, 4, dtype=torch.complex64))
        self.mix = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.mix((self.waves @ x.to(torch.complex64).T).abs().T)
        return output


def _takes_complex() -> bool:
    """Whether gloo sends complex numbers, or DDP, which broadcasts its parameters, takes none (before PyTorch 2.9)."""
    try:
        dist.broadcast(torch.zeros(1, dtype=torch.complex64), src=0)
    except RuntimeError:
        return False
    return True


def _complex(value: complex | None) -> tuple[float, float]:
    """The errors of norms and gradients, `value` put into one of them."""
    model = DistributedDataParallel(Waves())
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))[dist.get_rank() :: dist.get_world_size()]
    monitor = StreamMonitor(model, None, {"waves": "waves", "mix": "mix"})
    model(x).square().mean().backward()
    if value is not None:
        model.module.waves.grad[0, 0] = value
    twin = twin_of(model.parameters())
    expected = clip_grad_norm_(twin, LIMIT)
    monitor.step()
    norm = monitor.clip_grad_norm_(LIMIT)
    parts = [
        (torch.view_as_real(p.grad), torch.view_as_real(t.grad)) if p.is_complex() else (p.grad, t.grad)
        for p, t in zip(model.parameters(), twin, strict=True)
    ]
    return error(norm, expected), max(error(a, b) for a, b in parts)


def test_a_lazily_conjugated_gradient_is_clipped() -> None:
    model = nn.ParameterDict({"waves": torch.randn(4, dtype=torch.complex64)})
    monitor = StreamMonitor(model, None, {"waves": "waves"})
    (model["waves"].conj() * torch.arange(4)).sum().real.backward()
    assert model["waves"].grad.is_conj()
    twin = twin_of([model["waves"]])
    expected = clip_grad_norm_(twin, LIMIT)
    assert monitor.clip_grad_norm_(LIMIT).item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(model["waves"].grad, twin[0].grad, rtol=1e-6, atol=0)


# When it measures -------------------------------------------------------------------------------------------------


def _collectives() -> list[int]:
    """Of each of six clips, where every third call of `step` is measured; then of a second clip in a measured step."""
    model = DistributedDataParallel(network())
    monitor = StreamMonitor(model, None, STREAMS, config=MonitorConfig(every=3))
    counts = []
    for step in range(7):
        backward(model, seed=step)
        monitor.step()
        with Collectives() as mode:
            monitor.clip_grad_norm_(LIMIT)
        counts.append(mode.count)
    with Collectives() as mode:
        monitor.clip_grad_norm_(LIMIT)
    return [*counts, mode.count]


def _again() -> list[float]:
    """Two clips in one step: the second's norm is what the first left."""
    model = DistributedDataParallel(network())
    monitor = StreamMonitor(model, None, STREAMS)
    backward(model)
    monitor.step()
    return [monitor.clip_grad_norm_(limit).item() for limit in (LIMIT, LIMIT / 2, 1.0)]


def _before_step() -> list[tuple[float, float]]:
    """(norm, torch's) where clip is called before `monitor.step`: the sums of the step before are spent."""
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    monitor = StreamMonitor(model, optimizer, STREAMS)
    norms = []
    for step in range(3):
        backward(model, seed=step)
        expected = clip_grad_norm_(twin_of(model.parameters()), math.inf).item()
        norms.append((monitor.clip_grad_norm_(1e9).item(), expected))
        monitor.step()
        optimizer.step()
    return norms


def _joined() -> list[tuple[float, float, int]]:
    """Uneven inputs, where clip sees what is left of the ranks: errors of norm and gradients, collectives."""
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    monitor = StreamMonitor(model, optimizer, STREAMS)
    answers = []
    with Join([model, monitor]):
        for step in range(4 if dist.get_rank() == 0 else 2):
            backward(model, seed=step)
            monitor.step()
            twin = twin_of(model.parameters())
            expected = clip_grad_norm_(twin, LIMIT)
            with Collectives() as mode:
                norm = monitor.clip_grad_norm_(LIMIT)
            answers.append((error(norm, expected), errors(model.parameters(), twin), mode.count))
            optimizer.step()
    return answers


def _trained(clip: str, every: int, per_stream: bool) -> list[Tensor]:
    """The weights after 20 steps."""
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    monitor = StreamMonitor(model, optimizer, STREAMS, config=MonitorConfig(every=every))
    for step in range(20):
        backward(model, seed=step)
        if clip == "ours":
            monitor.step()
            monitor.clip_grad_norm_(LIMIT, per_stream=per_stream)
        elif per_stream:
            for stream in monitor.streams.streams:
                clip_grad_norm_([item.parameter for item in stream.parameters], LIMIT)
        else:
            clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def _scaled() -> tuple[str, float, float]:
    """The refusal under a GradScaler that has not unscaled; errors of norm and gradients once it has."""
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    monitor = StreamMonitor(model, optimizer, STREAMS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    tensors = part(batch(), dist.get_rank(), dist.get_world_size())
    scaler.scale(loss_of(model, tensors)).backward()
    monitor.step(scaler=scaler)
    before = [gradient.clone() for gradient in gradients(model)]
    with pytest.raises(ValueError) as refusal:
        monitor.clip_grad_norm_(LIMIT, scaler=scaler)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(model), strict=True))
    scaler.unscale_(optimizer)
    twin = twin_of(model.parameters())
    expected = clip_grad_norm_(twin, LIMIT)
    norm = monitor.clip_grad_norm_(LIMIT, scaler=scaler)
    return str(refusal.value), error(norm, expected), errors(model.parameters(), twin)


TRAININGS = [(every, per_stream) for every in (1, 3) for per_stream in (False, True)]


def _others() -> dict[str, Any]:
    return {
        "sparse": [_sparse(per_stream=per_stream) for per_stream in (False, True)],
        "complex": [
            _complex(value) for value in (None, complex(math.inf, 1), complex(1, math.nan)) if _takes_complex()
        ],
        "collectives": _collectives(),
        "again": _again(),
        "before": _before_step(),
        "joined": _joined(),
        "trained": [[_trained(clip, *how) for clip in ("ours", "torch's")] for how in TRAININGS],
        "scaled": _scaled(),
    }


@functools.cache
def others() -> list[dict[str, Any]]:
    return run_ranks(2, _others)


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_sparse_and_complex_gradients_are_clipped_like_dense_ones(kind: str) -> None:
    if not others()[0][kind]:
        pytest.skip("the gloo of this PyTorch sends no complex numbers")
    for of_rank in others():
        for of_norms, of_gradients in of_rank[kind]:
            assert of_norms < 1e-6
            assert of_gradients < 1e-6


def test_a_clip_crosses_ranks_only_where_the_step_was_not_measured_or_was_clipped_before() -> None:
    for of_rank in others():
        assert of_rank["collectives"] == [0, 1, 1, 0, 1, 1, 0, 1]


def test_a_second_clip_sees_what_the_first_left() -> None:
    for of_rank in others():
        first, second, third = of_rank["again"]
        assert first > 2 * LIMIT
        assert second == pytest.approx(LIMIT, rel=1e-4)  # torch's 1e-6 beside the norm
        assert third == pytest.approx(LIMIT / 2, rel=1e-4)


def test_sums_of_gradients_that_the_optimizer_has_used_are_not_used_again() -> None:
    for of_rank in others():
        assert len({expected for _, expected in of_rank["before"]}) == 3
        for norm, expected in of_rank["before"]:
            assert norm == pytest.approx(expected, rel=1e-6)


def test_uneven_inputs_are_clipped_like_torchs_without_a_collective() -> None:
    answers = others()
    assert [len(of_rank["joined"]) for of_rank in answers] == [4, 2]
    for of_norm, of_gradients, collectives in (entry for of_rank in answers for entry in of_rank["joined"]):
        assert max(of_norm, of_gradients) < 1e-6
        assert collectives == 0


@pytest.mark.parametrize("number", range(len(TRAININGS)), ids=lambda number: str(TRAININGS[number]))
def test_twenty_steps_of_training_end_at_torchs_weights(number: int) -> None:
    start = list(network().parameters())
    for of_rank in others():
        ours, torchs = of_rank["trained"][number]
        for own, expected, before in zip(ours, torchs, start, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)
            assert (own - before).abs().max() > 1e-3


def test_gradients_that_carry_the_loss_scale_are_refused_and_left_alone() -> None:
    for of_rank in others():
        refusal, of_norm, of_gradients = of_rank["scaled"]
        assert refusal == ("the gradients still carry the loss scale: call scaler.unscale_(optimizer) before clipping")
        assert max(of_norm, of_gradients) < 1e-6


@pytest.mark.parametrize("limit", [0, -1.0, math.nan])
def test_a_limit_that_is_not_positive_is_refused(limit: float) -> None:
    monitor = StreamMonitor(network(), None, STREAMS)
    with pytest.raises(ValueError, match=f"max_norm must be positive, got {limit}"):
        monitor.clip_grad_norm_(limit)


def test_a_model_without_gradients_has_the_norm_zero() -> None:
    monitor = StreamMonitor(network(), None, STREAMS)
    assert monitor.clip_grad_norm_(LIMIT).item() == clip_grad_norm_(monitor.model.parameters(), LIMIT).item() == 0
    assert monitor.clip_grad_norm_(LIMIT, per_stream=True).tolist() == [0, 0, 0]
