"""How others watch gradients: short code of our own that makes the calls of PyTorch that they make.

Each takes the gradients of one process and gives the L2 norm of them all, or of each stream. None reads weights or
optimizer state, which composer and OLMo can watch too, at more cost; numbers are read where theirs are read.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.benchmarks.gradients import Gradients


def clip(gradients: Gradients) -> Tensor:
    """PyTorch's own clipping, at a limit that no gradient reaches; it writes every gradient all the same."""
    return torch.nn.utils.clip_grad_norm_(gradients.parameters, math.inf)


def foreach(gradients: Gradients) -> Tensor:
    """The L2 norm of each stream, nothing read."""
    return torch.stack([_norm(_grads(stream), 2.0) for stream in gradients.by_stream])


def foreach_and_max(gradients: Gradients) -> tuple[Tensor, Tensor]:
    """The L2 and the inf norm of each stream, nothing read."""
    grads = [_grads(stream) for stream in gradients.by_stream]
    return torch.stack([_norm(g, 2.0) for g in grads]), torch.stack([_norm(g, math.inf) for g in grads])


def item_loop(gradients: Gradients) -> float:
    """A norm for each tensor, read at once."""
    return math.sqrt(sum(grad.norm().item() ** 2 for grad in _grads(gradients.parameters)))


def lightning(gradients: Gradients) -> float:
    """pytorch_lightning.utilities.grad_norm: a norm for each tensor, their total from a list; all read by a logger."""
    named = gradients.model.named_parameters()
    norms = {f"grad_2.0_norm/{name}": p.grad.norm(2.0) for name, p in named if p.grad is not None}
    norms["grad_2.0_norm_total"] = torch.tensor(list(norms.values())).norm(2.0)
    return {name: float(value) for name, value in norms.items()}["grad_2.0_norm_total"]


def lightning_itself(gradients: Gradients) -> float:
    """The installed Lightning's function, each value read."""
    from lightning.pytorch.utilities import grad_norm  # type: ignore[import-not-found, unused-ignore]

    return {name: float(value) for name, value in grad_norm(gradients.model, 2.0).items()}["grad_2.0_norm_total"]


def composer(gradients: Gradients) -> float:
    """composer's OptimizerMonitor at batch end: norms, their squares added up in a loop, every value read."""
    named = gradients.model.named_parameters()
    norms = {f"l2_norm/grad/{name}": torch.linalg.vector_norm(p.grad) for name, p in named if p.grad is not None}
    squares: Any = sum(norm**2 for norm in norms.values())
    norms["l2_norm/grad/global"] = squares**0.5
    logged: dict[str, float] = {name: value.item() for name, value in norms.items()}
    return logged["l2_norm/grad/global"]


def olmo(gradients: Gradients) -> float:
    """OLMo's clip_grads_and_collect_metrics on a logging step: least and largest |x|, mean and norm of each tensor."""
    figures: dict[str, Tensor] = {}
    norms = []
    for name, p in gradients.model.named_parameters():
        assert p.grad is not None
        sizes = p.grad.abs()
        number = torch.tensor([p.grad.numel()], device=p.grad.device, dtype=torch.float32)
        norms.append(torch.linalg.vector_norm(p.grad, 2.0, dtype=torch.float32).unsqueeze(0))
        figures[f"grad/{name}.min"] = sizes.min()
        figures[f"grad/{name}.max"] = sizes.max()
        figures[f"grad/{name}.avg"] = p.grad.sum().unsqueeze(0) / number
        figures[f"grad/{name}.norm"] = norms[-1]
    figures["total_grad_norm"] = (torch.cat(norms) ** 2.0).sum() ** 0.5
    return {name: value.item() for name, value in figures.items()}["total_grad_norm"]


def adaptdl(gradients: Gradients) -> tuple[list[float], list[float]]:
    """AdaptDL's GradientNoiseScale: local squares tensor by tensor and one all_reduce, then scaled copies and theirs.

    The squared norms of each stream (its optimizer groups), local and after the average.
    """
    streams = gradients.by_stream
    device = gradients.parameters[0].device
    local = torch.zeros(len(streams), dtype=torch.float64, device=device)
    for number, stream in enumerate(streams):
        for grad in _grads(stream):
            local[number] += grad.pow(2).sum(dtype=torch.float64)
    work = dist.all_reduce(local, async_op=True) if dist.is_initialized() else None
    if work is not None:
        work.wait()
    copies = [[grad.float() / 1.0 / 1 for grad in _grads(stream)] for stream in streams]
    squares = [sum(copy.pow(2).sum(dtype=torch.float64) for copy in group) for group in copies]
    return local.cpu().tolist(), [torch.as_tensor(square).item() for square in squares]


def methods(gradients: Gradients) -> dict[str, Callable[[], Any]]:
    """Everything above by name, ready to be called."""
    named: dict[str, Callable[[Gradients], Any]] = {
        "clip_grad_norm_": clip,
        "foreach L2 per stream": foreach,
        "foreach L2 + inf per stream": foreach_and_max,
        ".item() loop": item_loop,
        "Lightning-style": lightning,
        "AdaptDL-style": adaptdl,
        "composer-style": composer,
        "OLMo-style": olmo,
    }
    if importlib.util.find_spec("lightning") is not None:
        named["Lightning's own grad_norm"] = lightning_itself
    return {name: partial(function, gradients) for name, function in named.items()}


def _grads(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _norm(tensors: list[Tensor], order: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, order)), order)
    return norm
