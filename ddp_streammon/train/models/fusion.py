"""Fusions: S feature tensors [B, F] in, one tensor [B, S x F] out.

All three are concatenations of scaled streams and differ in where the scale comes from: none, one learned
figure a stream, or one figure a stream and sample. Scales are S x softmax, so equal weights give scale 1 and
a fresh weighted or gated fusion computes what the concatenation does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FUSION_TYPES = ("concat", "weighted", "gated")
GATE_WIDTH = 128
"""Upper bound of the gate's hidden width; wide encoders (F = 2048) would otherwise get a gate of millions of
weights."""


class ConcatFusion(nn.Module):
    """Features side by side, in the order given."""

    def forward(self, *features: Tensor) -> Tensor:
        """features: S tensors [B, F]; returns [B, S x F]."""
        return torch.cat(features, dim=1)


class WeightedFusion(nn.Module):
    """One learned scale a stream: S x softmax(logits), `logits` [S] starting at zero (scale 1)."""

    def __init__(self, num_streams: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_streams))

    def scales(self) -> Tensor:
        """[S], positive, mean 1."""
        return self.logits.numel() * torch.softmax(self.logits, dim=0)

    def forward(self, *features: Tensor) -> Tensor:
        """features: S tensors [B, F]; returns [B, S x F]."""
        return torch.cat([f * s for f, s in zip(features, self.scales(), strict=True)], dim=1)


class GatedFusion(nn.Module):
    """One scale a stream and sample: S x softmax over streams of an MLP on the concatenated features.

    The MLP's last layer starts at zero, so every scale starts at 1.
    """

    def __init__(self, num_streams: int, features: int) -> None:
        super().__init__()
        hidden = min(features, GATE_WIDTH)
        last = nn.Linear(hidden, num_streams)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.gate = nn.Sequential(nn.Linear(num_streams * features, hidden), nn.ReLU(), last)

    def scales(self, *features: Tensor) -> Tensor:
        """features: S tensors [B, F]; returns [B, S], positive, mean 1 over the streams of a sample."""
        return len(features) * torch.softmax(self.gate(torch.cat(features, dim=1)), dim=1)

    def forward(self, *features: Tensor) -> Tensor:
        """features: S tensors [B, F]; returns [B, S x F]."""
        scales = self.scales(*features)
        return torch.cat([f * scales[:, i : i + 1] for i, f in enumerate(features)], dim=1)


def make_fusion(fusion_type: str, num_streams: int, features: int) -> nn.Module:
    """The fusion of that name for `num_streams` streams of `features` features each.

    Raises ValueError for an unknown name or a size below 1.
    """
    if num_streams < 1 or features < 1:
        raise ValueError(f"num_streams and features must be at least 1, got {num_streams} and {features}")
    if fusion_type == "concat":
        return ConcatFusion()
    if fusion_type == "weighted":
        return WeightedFusion(num_streams)
    if fusion_type == "gated":
        return GatedFusion(num_streams, features)
    raise ValueError(f"fusion_type must be one of {', '.join(FUSION_TYPES)}, got {fusion_type!r}")
