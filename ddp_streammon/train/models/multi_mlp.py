"""Multi-stream MLPs, for streams that are feature vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ddp_streammon.train.models.multi_stream import MultiStreamModel, check_stream_names


class MLPEncoder(nn.Module):
    """Linear-(BatchNorm1d)-ReLU per entry of `hidden`; [B, ...] is flattened to [B, in_features] first.

    With `norm`, a training batch needs at least two samples (BatchNorm1d).
    """

    def __init__(self, in_features: int, hidden: Sequence[int], norm: bool = True) -> None:
        super().__init__()
        if in_features < 1:
            raise ValueError(f"in_features must be at least 1, got {in_features}")
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden must hold at least one width, all at least 1, got {tuple(hidden)}")
        layers: list[nn.Module] = []
        for inputs, outputs in zip((in_features, *hidden), hidden, strict=False):
            layers.append(nn.Linear(inputs, outputs, bias=not norm))
            if norm:
                layers.append(nn.BatchNorm1d(outputs))
            layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] of in_features elements a sample -> [B, hidden[-1]]."""
        features: Tensor = self.layers(x.flatten(1))
        return features


def multi_mlp(
    streams: Mapping[str, int | Sequence[int]],
    num_classes: int,
    hidden: Sequence[int] = (512, 256),
    fusion_type: str = "concat",
    dropout_p: float = 0.0,
    modality_dropout: float | Mapping[str, float] = 0.0,
    norm: bool = True,
    device: torch.device | str | None = None,
) -> MultiStreamModel:
    """An MLP encoder per stream; `streams` maps names to numbers of input features, or to the shape of a sample."""
    check_stream_names(streams)
    encoders = {name: MLPEncoder(_features(size), hidden, norm) for name, size in streams.items()}
    model = MultiStreamModel(encoders, hidden[-1], num_classes, fusion_type, dropout_p, modality_dropout)
    return model.to(device)


def _features(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else math.prod(size)
