"""Mean and standard deviation of what a model's stages give, per stream, over all ranks' samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddp_streammon import keys
from ddp_streammon.collective import Collective
from ddp_streammon.evaluation.ablate import on_device
from ddp_streammon.evaluation.harmless import undisturbed
from ddp_streammon.evaluation.scores import to_device
from ddp_streammon.evaluation.together import Stranded, describe, pace_of, raise_together
from ddp_streammon.packet import Field, Layout
from ddp_streammon.stats import ratio
from ddp_streammon.streams import StreamSet, unwrap, walk


def activation_moments(streams: StreamSet, collective: Collective, inputs: tuple[Any, ...]) -> Mapping[str, float]:
    """Run one forward on `inputs` and measure the stages' outputs.

    A stage is a direct child of a stream's root (`layer1` of `encoders.rgb`), or a top-level module named
    `layer...` whose output is a tuple with one tensor for each stream. The standard deviation is the unbiased one.

    An exception on any rank is raised on every rank.

    Shape: each rank's own inputs; figures are over all of them. Ranks that hold parts of one model give the same inputs
    and count as one; an output that they leave cut counts its elements 1 / (such ranks) times, which the standard
    deviation shows in its n - 1 alone. Comm: one broadcast of the buffers, one
    all_gather_object (names and errors) and one all_reduce(SUM), none in a single process. Sync: blocks.
    """
    sums: dict[tuple[str, str | None], Tensor] = {}
    modules = dict(walk(streams.model))
    handles = []

    def add(stage: str, stream: str | None, tensor: Tensor) -> None:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        wide = whole.detach().double()
        cells = torch.stack([wide.sum(), wide.square().sum(), torch.full_like(wide.sum(), wide.numel())])
        sums[stage, stream] = sums[stage, stream] + cells if (stage, stream) in sums else cells

    def watch(module: nn.Module, stage: str, stream: str | None) -> None:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                add(stage, stream, output)
            elif isinstance(output, tuple) and stream is None and len(output) == len(streams.user_names):
                for name, part in zip(streams.user_names, output, strict=True):
                    add(stage, name, part)

        handles.append(unwrap(module).register_forward_hook(hook))

    for name in streams.user_names:
        for root in streams[name].roots:
            path = tuple(root.split(".")) if root else ()
            children = unwrap(modules[path])._modules.items()
            for stage, module in list(children) or [(path[-1] if path else "model", modules[path])]:
                if module is not None:
                    watch(module, stage, name)
    roots = {root.split(".")[0] for name in streams.user_names for root in streams[name].roots}
    for child, module in streams.model.named_children():
        if "layer" in child and child not in roots:
            watch(module, child, None)
    device = to_device(streams.model)
    failure: Exception | None = None
    error = None
    pace = pace_of(streams.model, collective)
    with pace.following():
        try:
            with undisturbed(streams.model, collective):
                pace.attempt(lambda given: streams.model(*on_device(given, device)), inputs)
        except Stranded:
            raise
        except Exception as raised:  # raised on every rank below, so that none waits for this one
            failure, error = raised, describe(raised)
        finally:
            for handle in handles:
                handle.remove()
        place = collective.topology.data_rank
        everyone = collective.gather((error, tuple(sums), place))
    raise_together([error for error, *_ in everyone], failure)
    part = 1.0 / sum(other == place for *_, other in everyone)  # ranks that hold parts of one model count as one
    stages = tuple(dict.fromkeys(stage for _, found, _ in everyone for stage in found))
    if not stages:
        raise ValueError("no stage gave a tensor: the streams' modules have no children that the forward calls")
    layout = Layout((Field("sums", (len(stages), 3)),))
    nothing = torch.zeros(3, dtype=torch.float64, device=device)
    cells = part * torch.stack([sums.get(stage, nothing).to(device) for stage in stages])
    packet = layout.pack({"sums": cells}, collective.topology.rank, device)
    total = layout.unpack(collective.all_reduce(packet.to(collective.device_for(device))).wait())["sums"]
    figures: dict[str, float] = {}
    for (stage, stream), (value, square, count) in zip(stages, total, strict=True):
        mean = ratio(value, count)
        spread = max(square - count * mean * mean, 0.0)
        figures[keys.activation(stage, stream, "mean")] = mean
        figures[keys.activation(stage, stream, "std")] = math.sqrt(spread / (count - 1)) if count > 1 else math.nan
    return figures
