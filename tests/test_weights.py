"""weights.py: figures of the weights against a plain twin, and against the formulas of the seed's original."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_streammon import MonitorConfig, RuleSet, StreamMonitor
from ddp_streammon.train.models import mc_resnet18
from tests.networks import STREAMS, batch, loss_of, network
from tests.ranks import run_ranks


def trained(seed: int = 5) -> nn.Module:
    """Weights that are no longer those of the start: gammas are not all ones."""
    model = network(norm=True)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def twin(model: nn.Module) -> dict[str, float]:
    """By definition, in float64."""
    figures = {}
    for stream in STREAMS:
        named = [(n, p.detach().double()) for n, p in model.named_parameters() if n.startswith(f"{stream}.")]
        weights = [tensor for name, tensor in named if name.endswith("weight")]
        matrices = torch.cat([tensor.flatten() for tensor in weights if tensor.dim() > 1])
        figures |= {
            f"{stream}_weight_norm": torch.cat([tensor.flatten() for tensor in weights]).norm().item(),
            f"{stream}_weight_mean": math.fsum(tensor.mean().item() for tensor in weights) / len(weights),
            f"{stream}_weight_element_mean": matrices.mean().item(),
        }
    return figures | {"weight_norm_ratio": figures["rgb_weight_norm"] / figures["depth_weight_norm"]}


def _figures() -> list[dict[str, float]]:
    wrapped = DistributedDataParallel(trained())
    return [StreamMonitor(m, None, STREAMS).compute_stream_weights().to_dict() for m in (wrapped, trained())]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_figures_equal_the_twin_and_are_bit_equal_on_all_ranks(world: int) -> None:
    answers = run_ranks(world, _figures)
    for figures in answers[0]:
        assert figures == pytest.approx(twin(trained()), rel=1e-7)
    assert all(repr(answer) == repr(answers[0]) for answer in answers)


def _not_finite() -> list[float]:
    model = trained()
    with torch.no_grad():
        model.rgb[3].weight[-1, -1] = math.nan  # type: ignore[index,operator]
    guide = MonitorConfig(rules=RuleSet.guide)
    monitor = StreamMonitor(DistributedDataParallel(model), None, STREAMS, config=guide)
    figures = monitor.compute_stream_weights()
    monitor.log_metrics(0, figures)
    assert any(finding.rule == "S-NF" and finding.stream == "rgb" for finding in monitor.get_recommendations())
    return [figures[f"{stream}_{figure}"] for stream in STREAMS for figure in ("weight_norm", "weight_mean")]


def test_a_weight_that_is_not_finite_makes_its_streams_figures_nan() -> None:
    expected = [math.nan, math.nan, twin(trained())["depth_weight_norm"], twin(trained())["depth_weight_mean"]]
    assert run_ranks(2, _not_finite) == [pytest.approx(expected, rel=1e-12, nan_ok=True)] * 2


def test_streams_without_weights_are_nan_and_three_streams_have_named_ratios() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.ParameterList([torch.ones(3)])})
    figures = StreamMonitor(model).compute_stream_weights()
    assert math.isnan(figures["c_weight_norm"])
    assert math.isnan(figures["c_weight_mean"])
    assert math.isnan(figures["b_to_c_weight_norm_ratio"])
    expected = model["a"].weight.norm().item() / model["b"].weight.norm().item()
    assert figures["a_to_b_weight_norm_ratio"] == pytest.approx(expected, rel=1e-6)
    pairs = ("a_to_b", "a_to_c", "b_to_c")
    assert [key for key in figures if "ratio" in key] == [f"{pair}_weight_norm_ratio" for pair in pairs]


def test_models_without_weights_and_weights_without_elements_have_no_figures() -> None:
    gates = nn.ModuleDict({name: nn.ParameterList([torch.ones(3)]) for name in "ab"})
    assert all(map(math.isnan, StreamMonitor(gates).compute_stream_weights().values()))
    model = nn.ModuleDict({"weights": nn.Linear(2, 2), "empty": nn.ParameterDict({"weight": torch.zeros(0, 3)})})
    figures = StreamMonitor(model, streams={"weights": "weights", "empty": "empty"}).compute_stream_weights()
    assert math.isnan(figures["empty_weight_norm"])
    assert figures["weights_weight_norm"] == pytest.approx(model["weights"].weight.norm().item())  # not of the bias


# The seed's original ----------------------------------------------------------------------------------------------


def seed_gradients(model: nn.Module, streams: tuple[str, ...]) -> dict[str, float]:
    figures = {}
    for stream in streams:
        grads = [p.grad for n, p in model.named_parameters() if stream in n.split(".") and p.grad is not None]
        figures[f"{stream}_grad_norm"] = sum(grad.norm().item() ** 2 for grad in grads) ** 0.5
        figures[f"{stream}_grad_max"] = max(grad.abs().max().item() for grad in grads)
        figures[f"{stream}_params"] = len(grads)
    a, b = (figures[f"{stream}_grad_norm"] for stream in streams)
    return figures | {f"{streams[0]}_to_{streams[1]}_ratio": a / b}


def seed_weights(model: nn.Module, streams: tuple[str, ...]) -> dict[str, float]:
    figures = {}
    for stream in streams:
        named = model.named_parameters()
        weights: list[Tensor] = [p.data for n, p in named if stream in n.split(".") and "weight" in n]
        figures[f"{stream}_weight_norm"] = sum(weight.norm().item() ** 2 for weight in weights) ** 0.5
        figures[f"{stream}_weight_mean"] = sum(weight.mean().item() for weight in weights) / len(weights)
    a, b = (figures[f"{stream}_weight_norm"] for stream in streams)
    return figures | {"weight_norm_ratio": a / b}


def seed_case(which: str) -> tuple[nn.Module, tuple[str, ...]]:
    if which == "small":
        model = trained()
        loss_of(model, batch()).backward()
        return model, ("rgb", "depth")
    torch.manual_seed(0)
    resnet = mc_resnet18(5, width=16, stem="small")
    resnet(torch.randn(4, 3, 16, 16), torch.randn(4, 1, 16, 16)).square().sum().backward()
    return resnet, ("stream1", "stream2")


@pytest.mark.parametrize("which", ["small", "mc_resnet18"])
def test_the_originals_gradient_and_weight_figures_are_reproduced(which: str) -> None:
    model, streams = seed_case(which)
    monitor = StreamMonitor(model, None, {name: name for name in streams})
    ours: dict[str, Any] = (monitor.compute_stream_gradients() | monitor.compute_stream_weights()).to_dict()
    original = seed_gradients(model, streams) | seed_weights(model, streams)
    assert {key: ours[key] for key in original} == pytest.approx(original, rel=2e-5)
