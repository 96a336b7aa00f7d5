"""Gradient power of the streams: a figure of gradients that does not depend on how a function's layers are scaled."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ddp_streammon import keys
from ddp_streammon.collective import Collective
from ddp_streammon.moments import SQ_SUM, TENSORS, reader
from ddp_streammon.packet import Field, Layout
from ddp_streammon.shards import Share, local
from ddp_streammon.stats import Figures
from ddp_streammon.streams import StreamSet


def gradient_power(
    streams: StreamSet,
    shares: Sequence[Share],
    collective: Collective,
    gradient: Callable[[nn.Parameter], Tensor | None],
    inverse_scale: float | Tensor,
    *,
    undefined: Collection[str] = (),
) -> Figures:
    """`X_grad_power`: the sum over a stream's tensors of |g| |w|, L2 norms of a tensor's gradient and of its values.

    Multiply a layer by c and divide the next one by c: the function is the same, the first layer's gradient norm is 1/c
    of what it was and its weight norm c times; their product stays. So the figures of two streams may be compared where
    raw norms may not: the ratio of two streams' gradient norms went from 1.08 to 0.69 under such a change (measured on
    HTAD in this project). What does change it: a shift of a bias that the next layer takes back, and for `shared` the
    scale of one stream's block of its first layer. By the Cauchy-Schwarz inequality it bounds the change of the loss to
    first order when every tensor is changed by a given share of its norm.

    `gradient` gives this rank's part of a parameter's gradient, `inverse_scale` is 1 / the loss scale. nan: no tensor
    of the stream has a gradient, or one in `undefined` (still to be summed over ranks) is the stream's.
    Cost: one read of weights and gradients. Comm: one all_reduce(SUM) of [P, 3], P tensors. Sync: none until read.
    """
    tensors = [(stream.name, item) for stream in streams.streams for item in stream.parameters]
    index = {id(item.parameter): place for place, (_, item) in enumerate(tensors)}
    device = next(streams.model.parameters()).device
    by_tensor = [
        Share(tuple(replace(piece, stream=index[id(piece.parameter)]) for piece in share.pieces), share.weight)
        for share in shares
    ]
    read = reader(by_tensor, len(tensors), device)
    gradients, weights = read(gradient), read(lambda parameter: local(parameter.detach()))
    cells = torch.stack([gradients[:, SQ_SUM] * inverse_scale**2, weights[:, SQ_SUM], gradients[:, TENSORS]], 1)
    layout = Layout((Field("squares", (len(tensors), 3)),))
    packet = layout.pack({"squares": cells}, collective.topology.rank, device)
    reduction = collective.all_reduce(packet.to(collective.device_for(device)))

    def resolve() -> Mapping[str, float]:
        sums: dict[str, list[float]] = {name: [] for name in streams.names}
        rows = layout.unpack(reduction.wait())["squares"]
        for (name, item), (of_gradient, of_weight, count) in zip(tensors, rows, strict=True):
            if item.name in undefined:
                sums[name].append(math.nan)
            elif count:
                sums[name].append(math.sqrt(of_gradient) * math.sqrt(of_weight))
        return {
            keys.of_stream(name, keys.GRAD_POWER): math.fsum(own) if own else math.nan for name, own in sums.items()
        }

    return Figures([keys.of_stream(name, keys.GRAD_POWER) for name in streams.names], resolve)
