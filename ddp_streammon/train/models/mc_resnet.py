"""Multi-channel ResNets: one ResNet of its own weights per stream, fused before one linear head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ddp_streammon.train.models.multi_stream import MultiStreamModel, check_stream_names
from ddp_streammon.train.models.resnet import ResNetEncoder

DEFAULT_CHANNELS = {"stream1": 3, "stream2": 1}


def mc_resnet(
    depth: int,
    num_classes: int,
    fusion_type: str = "concat",
    streams: Mapping[str, int | Sequence[int]] | None = None,
    in_channels_stream1: int | None = None,
    in_channels_stream2: int | None = None,
    dropout_p: float = 0.0,
    modality_dropout: float | Mapping[str, float] = 0.0,
    stem: str = "imagenet",
    width: int = 64,
    device: torch.device | str | None = None,
) -> MultiStreamModel:
    """A ResNet encoder of `depth` per stream, for inputs [B, channels, H, W].

    `streams` maps any number of stream names to input channels, or to the shape of a sample
    (channels first); without it there are `stream1` (3 channels)
    and `stream2` (1), whose channels `in_channels_stream1` and `in_channels_stream2` change. `stem` and
    `width` as in `ResNetEncoder`, `dropout_p` and `modality_dropout` as in `MultiStreamModel`.
    """
    given = {"stream1": in_channels_stream1, "stream2": in_channels_stream2}
    chosen = {name: channels for name, channels in given.items() if channels is not None}
    if streams is not None and chosen:
        raise ValueError(
            "streams and in_channels_stream1/in_channels_stream2 exclude each other, got both: "
            f"put the channels into streams, got {dict(streams)}"
        )
    sizes = {**DEFAULT_CHANNELS, **chosen} if streams is None else dict(streams)
    channels = {name: size if isinstance(size, int) else size[0] for name, size in sizes.items()}
    check_stream_names(channels)
    encoders = {name: ResNetEncoder(depth, count, stem, width) for name, count in channels.items()}
    features = next(iter(encoders.values())).features
    model = MultiStreamModel(encoders, features, num_classes, fusion_type, dropout_p, modality_dropout)
    return model.to(device)


def mc_resnet18(num_classes: int, fusion_type: str = "concat", **options: Any) -> MultiStreamModel:
    """`mc_resnet` of depth 18, F = 512; options as there."""
    return mc_resnet(18, num_classes, fusion_type, **options)


def mc_resnet34(num_classes: int, fusion_type: str = "concat", **options: Any) -> MultiStreamModel:
    """`mc_resnet` of depth 34, F = 512; options as there."""
    return mc_resnet(34, num_classes, fusion_type, **options)


def mc_resnet50(num_classes: int, fusion_type: str = "concat", **options: Any) -> MultiStreamModel:
    """`mc_resnet` of depth 50, F = 2048; options as there."""
    return mc_resnet(50, num_classes, fusion_type, **options)


def mc_resnet101(num_classes: int, fusion_type: str = "concat", **options: Any) -> MultiStreamModel:
    """`mc_resnet` of depth 101, F = 2048; options as there."""
    return mc_resnet(101, num_classes, fusion_type, **options)


def mc_resnet152(num_classes: int, fusion_type: str = "concat", **options: Any) -> MultiStreamModel:
    """`mc_resnet` of depth 152, F = 2048; options as there."""
    return mc_resnet(152, num_classes, fusion_type, **options)
