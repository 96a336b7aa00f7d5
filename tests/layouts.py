"""Models laid out over four ranks in every way, and the figures that a monitor must give: `python -m tests.layouts`.

The command runs the matrix of layout, precision and accumulation on gloo and prints, for each, the largest relative
error of a figure against one process that sees the whole batch, and the collectives of a monitored step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from ddp_streammon import MonitorConfig, RuleSet, StreamMonitor
from tests.ranks import run_ranks

WORLD = 4
STREAMS = {"rgb": "rgb", "depth": "depth", "audio": "audio"}
PRECISIONS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class Block(nn.Module):
    """[B, T, 16] -> [B, T, 16]: a norm, and two layers that tensor parallelism cuts by columns and by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(torch.tanh(self.up(self.norm(x))))
        return output


class Three(nn.Module):
    """Three streams and a head. `audio` is so small that most ranks hold none of its rows when it is sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.depth = Block(), Block()
        self.audio = nn.Linear(16, 1)
        self.head = nn.Linear(33, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.rgb(x).mean(1), self.depth(x * x).mean(1), self.audio(x.abs()).mean(1)]
        logits: Tensor = self.head(torch.cat(features, dim=1))
        return logits


def network(dtype: torch.dtype) -> Three:
    torch.manual_seed(0)
    return Three().to(dtype)


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 4, 16, generator=generator).to(dtype)
    return x, torch.randint(3, (16,), generator=generator)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).float() if x.dtype == torch.bfloat16 else model(x), y)


def _mesh(*sizes: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


_COLUMNS_AND_ROWS = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def _tensor_parallel(model: Three, mesh: DeviceMesh) -> Three:
    for block in (model.rgb, model.depth):
        parallelize_module(block, mesh, _COLUMNS_AND_ROWS)
    return model


def _sequence_parallel(model: Three, mesh: DeviceMesh) -> Three:
    inside = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    cut = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))
    whole = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
    for plan in (inside, cut, whole):
        parallelize_module(model.rgb, mesh, plan)
    return model


def _mixed(model: Three) -> Three:
    """One stream sharded, another replicated, the third synchronised by nobody."""
    fully_shard(model.rgb, mesh=_mesh(WORLD))
    model.depth = DistributedDataParallel(model.depth)  # type: ignore[assignment]
    model.head = DistributedDataParallel(model.head)  # type: ignore[assignment]
    return model


def _fsdp2_of_tensor_parallel(model: Three, parallel: Callable[[Three, DeviceMesh], Three]) -> nn.Module:
    mesh = _mesh(2, 2, names=("dp", "tp"))
    return fully_shard(parallel(model, mesh["tp"]), mesh=mesh["dp"])


def _ddp_of_tensor_parallel(model: Three) -> nn.Module:
    mesh = _mesh(2, 2, names=("dp", "tp"))
    return DistributedDataParallel(_tensor_parallel(model, mesh["tp"]), device_mesh=mesh["dp"])


def _fsdp2_by_module(model: Three) -> nn.Module:
    for module in (model.rgb, model.depth):
        fully_shard(module, mesh=_mesh(WORLD))
    return fully_shard(model, mesh=_mesh(WORLD))


LAYOUTS: dict[str, Callable[[Three], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "ddp bucket views": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
    "nobody synchronises": lambda model: model,
    "fsdp2": lambda model: fully_shard(model, mesh=_mesh(WORLD)),
    "fsdp2 by module": _fsdp2_by_module,
    "hsdp": lambda model: fully_shard(model, mesh=_mesh(2, 2, names=("replicate", "shard"))),
    "tensor parallel": lambda model: _tensor_parallel(model, _mesh(WORLD, names=("tp",))),
    "sequence parallel": lambda model: _sequence_parallel(model, _mesh(WORLD, names=("tp",))),
    "ddp x tensor parallel": _ddp_of_tensor_parallel,
    "fsdp2 x tensor parallel": lambda model: _fsdp2_of_tensor_parallel(model, _tensor_parallel),
    "fsdp2 x sequence parallel": lambda model: _fsdp2_of_tensor_parallel(model, _sequence_parallel),
    "mixed by stream": _mixed,
}


class Collectives(TorchDispatchMode):
    """Counts calls of c10d."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _unsynchronised(model: nn.Module) -> Any:
    """No gradient crosses ranks: the micro-batches before the last."""
    wrapped = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    with contextlib.ExitStack() as stack:
        for module in wrapped:
            stack.enter_context(module.no_sync())
        for shard in sharded:
            shard.set_requires_gradient_sync(False, recurse=False)
        yield
        for shard in sharded:
            shard.set_requires_gradient_sync(True, recurse=False)


def _backward(model: nn.Module, x: Tensor, y: Tensor, *, accumulate: bool) -> float:
    """The gradients of the mean loss over this rank's items; the loss."""
    if not accumulate:
        loss = loss_of(model, x, y)
        loss.backward()
        return loss.item()
    half = len(x) // 2
    with _unsynchronised(model):
        first = loss_of(model, x[:half], y[:half]) / 2
        first.backward()
    second = loss_of(model, x[half:], y[half:]) / 2
    second.backward()
    return (first + second).item()


def _sharded(parameter: nn.Parameter) -> DTensor | None:
    """The gradient of a parameter that is laid out over a mesh."""
    gradient = parameter.grad
    if gradient is not None and (info := getattr(parameter, "_st_info", None)) is not None:
        # DDP over tensor parallel trains local tensors
        gradient = DTensor.from_local(gradient, info.mesh, info.placements, shape=info.shape, stride=info.stride)
    return gradient if isinstance(gradient, DTensor) else None


def _of_ranks(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Every rank's values of tensors that each rank holds in full, in float64; of equal ones one. In one collective."""
    if not tensors:
        return []
    flat = torch.cat([tensor.double().flatten() for tensor in tensors])
    every = [torch.empty_like(flat) for _ in range(WORLD)]
    dist.all_gather(every, flat)
    parts = [values.split([tensor.numel() for tensor in tensors]) for values in every]
    return [
        one[:1] if all(torch.equal(part, one[0]) for part in one) else list(one) for one in zip(*parts, strict=True)
    ]


def _reference(streams: dict[str, list[list[Tensor]]]) -> dict[str, float]:
    """The figures by definition. `streams`: each stream's gradients, one tensor or one of each rank."""
    figures, squares = {}, {}
    for name, tensors in streams.items():
        of_ranks = [[every[rank % len(every)] for every in tensors if every] for rank in range(WORLD)]
        flat = [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in of_ranks if tensors]
        squares[name] = sum(values.square().sum().item() for values in flat) / WORLD
        figures[f"{name}_grad_norm"] = math.sqrt(squares[name])
        figures[f"{name}_grad_mean"] = sum(values.mean().item() for values in flat) / WORLD
        figures[f"{name}_grad_max"] = max(values.abs().max().item() for values in flat)
        figures[f"{name}_grad_elements"] = float(len(flat[0]))
        figures[f"{name}_params"] = float(len(of_ranks[0]))
        figures[f"{name}_grad_nonfinite"] = 0.0
    for name, square in squares.items():
        figures[f"{name}_grad_share"] = square / sum(squares.values())
    return figures


def stream_of(name: str) -> str:
    """The stream that a parameter belongs to, wrappers in its name or not."""
    top = name.removeprefix("module.").split(".")[0]
    return top if top in STREAMS else "shared"


def gradients(parameters: dict[str, nn.Parameter]) -> dict[str, list[list[Tensor]]]:
    """Each stream's gradients as wholes."""
    sharded = {
        name: gradient for name, parameter in parameters.items() if (gradient := _sharded(parameter)) is not None
    }
    held = {name: p.grad for name, p in parameters.items() if p.grad is not None and name not in sharded}
    wholes = dict(zip(held, _of_ranks(list(held.values())), strict=True))
    wholes |= {name: [gradient.double().full_tensor()] for name, gradient in sharded.items()}
    found: dict[str, list[list[Tensor]]] = {}
    for name in parameters:
        found.setdefault(stream_of(name), []).append(wholes.get(name, []))
    return found


def twin(dtype: torch.dtype) -> dict[str, float]:
    """The figures of one process that sees the whole batch."""
    model = network(dtype)
    loss_of(model, *batch(dtype)).backward()
    streams: dict[str, list[list[Tensor]]] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        streams.setdefault(stream_of(name), []).append([parameter.grad.double()])
    return _reference(streams)


def measure(layout: str, precision: str, accumulate: bool) -> dict[str, Any]:
    """On one of four ranks: the figures, those by definition from the gathered gradients, and the collectives."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    dtype = PRECISIONS[precision]
    model = LAYOUTS[layout](network(dtype))
    parameters = dict(model.named_parameters())  # DDP over tensor parallel hides them after the first forward
    monitor = StreamMonitor(model, streams=STREAMS, config=MonitorConfig(rules=RuleSet.off))
    topology = monitor._collective.topology
    x, y = (tensor[topology.data_rank :: topology.data_size] for tensor in batch(dtype))
    counts, answers = [], []
    definitions = []
    for step in range(4):  # the first two are read in full, then replicas are known to be equal
        for parameter in parameters.values():
            parameter.grad = None
        loss = _backward(model, x, y, accumulate=accumulate)
        with Collectives() as collectives:
            figures = monitor.step(loss=loss, samples=len(x))
        counts.append(collectives.count)
        answers.append(figures.to_dict())
        if step in (0, 3):
            definitions.append(_reference(gradients(parameters)))
    expected = definitions[-1]
    norms = monitor.clip_grad_norm_(0.5 * math.hypot(*(expected[f"{s}_grad_norm"] for s in (*STREAMS, "shared"))))
    clipped = _reference(gradients(parameters))
    return {
        "first": answers[0],
        "last": answers[-1],
        "first expected": definitions[0],
        "expected": expected,
        "clipped": clipped,
        "norm": norms.item(),
        "collectives": counts[1:],
        "loss": (answers[-1]["loss"], answers[-1]["samples"]),
        "replicas": [f.stream or "all" for f in monitor.get_recommendations() if f.rule == "SYNC"],
        "read": sum(piece.stop - piece.start for share in monitor._meter.shares for piece in share.pieces),
    }


def error(figures: dict[str, float], expected: dict[str, float]) -> float:
    """The largest error of a figure, relative to the figure (a mean: to the largest element)."""
    worst = 0.0
    for key, value in expected.items():
        scale = expected[key.replace("grad_mean", "grad_max")]
        worst = max(worst, abs(figures[key] - value) / abs(scale or 1.0))
    return worst


def main() -> None:
    print(f"{WORLD} ranks, gloo; largest relative error of a figure, and collectives of a monitored step")
    print(f"{'layout':28}{'precision':12}{'accumulate':12}{'by definition':>14}{'one process':>14}{'collectives':>12}")
    for layout in LAYOUTS:
        for precision, dtype in PRECISIONS.items():
            single = twin(dtype)
            for accumulate in (False, True):
                answer = run_ranks(WORLD, measure, layout, precision, accumulate)[0]
                own = error(answer["last"], answer["expected"])
                synchronised = layout not in ("nobody synchronises", "mixed by stream")
                other = f"{error(answer['last'], single):14.1e}" if synchronised else f"{'-':>14}"
                count = "/".join(map(str, sorted(set(answer["collectives"]))))
                print(f"{layout:28}{precision:12}{accumulate!s:12}{own:14.1e}{other}{count:>12}", flush=True)


if __name__ == "__main__":
    main()
