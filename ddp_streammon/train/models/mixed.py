"""Streams of different kinds: the shape of a sample decides which encoder it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ddp_streammon.train.models.multi_mlp import MLPEncoder
from ddp_streammon.train.models.multi_stream import MultiStreamModel, check_stream_names
from ddp_streammon.train.models.resnet import ResNetEncoder


def mixed(
    streams: Mapping[str, Sequence[int]],
    num_classes: int,
    hidden: Sequence[int] = (512,),
    depth: int = 18,
    stem: str = "small",
    width: int = 16,
    fusion_type: str = "concat",
    dropout_p: float = 0.0,
    modality_dropout: float | Mapping[str, float] = 0.0,
    device: torch.device | str | None = None,
) -> MultiStreamModel:
    """An MLP for each vector stream and a ResNet for each image stream; `streams` maps names to a sample's shape.

    The MLPs have the `hidden` widths and then the ResNet's number of features, so that all can be fused; `depth`,
    `stem` and `width` as in `ResNetEncoder`. Raises ValueError for a shape that is neither [features] nor
    [channels, H, W].
    """
    check_stream_names(streams)
    odd = {name: tuple(shape) for name, shape in streams.items() if len(shape) not in (1, 3)}
    if odd:
        raise ValueError(f"a sample must be a vector [features] or an image [channels, H, W], got {odd}")
    resnets = {name: ResNetEncoder(depth, shape[0], stem, width) for name, shape in streams.items() if len(shape) == 3}
    features = next(iter(resnets.values())).features if resnets else hidden[-1]
    encoders: dict[str, nn.Module] = {
        name: resnets[name] if name in resnets else MLPEncoder(shape[0], (*hidden, features))
        for name, shape in streams.items()
    }
    model = MultiStreamModel(encoders, features, num_classes, fusion_type, dropout_p, modality_dropout)
    return model.to(device)
