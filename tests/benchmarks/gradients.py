"""Two-stream networks of the usual sizes, and their gradients as the methods under comparison see them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddp_streammon import StreamSet
from ddp_streammon.shards import Piece, Share
from ddp_streammon.train.models.resnet import ResNetEncoder

STREAMS = ("rgb", "depth")
PIXELS = {"small": 8, "resnet": 224, "vit": 224}
"""The models, and the height and width of their images."""
CLASSES = 10


class VisionTransformer(nn.Module):
    """ViT-B/16: 12 layers of width 768 with 12 heads. Dosovitskiy et al., https://arxiv.org/abs/2010.11929.

    The mean over patches stands for the class token.
    """

    def __init__(self, pixels: int, features: int = 768, layers: int = 12, heads: int = 12, patch: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, features, patch, stride=patch)
        self.position = nn.Parameter(torch.zeros((pixels // patch) ** 2, features))
        layer = nn.TransformerEncoderLayer(
            features, heads, 4 * features, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(features), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, features]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        out: Tensor = self.blocks(tokens).mean(dim=1)
        return out


class TwoStreams(nn.Module):
    """An encoder for each stream, and a linear head, which is `shared`."""

    def __init__(self, name: str, pixels: int) -> None:
        super().__init__()
        self.rgb, self.depth = _encoder(name, pixels), _encoder(name, pixels)
        features = {"small": 64, "resnet": 512, "vit": 768}[name]
        self.head = nn.Linear(2 * features, CLASSES)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        """Two images [B, 3, H, W] -> logits [B, CLASSES]."""
        logits: Tensor = self.head(torch.cat([self.rgb(rgb), self.depth(depth)], dim=1))
        return logits


def _encoder(name: str, pixels: int) -> nn.Module:
    if name == "resnet":
        return ResNetEncoder(18, 3)
    if name == "vit":
        return VisionTransformer(pixels)
    hidden = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * pixels**2, 64), nn.ReLU(), *hidden)


def two_streams(name: str, device: torch.device, pixels: int | None = None) -> TwoStreams:
    """A model of `PIXELS`, made on `device` from the same seed everywhere."""
    torch.manual_seed(0)
    with device:
        return TwoStreams(name, PIXELS[name] if pixels is None else pixels)


def resolved(model: nn.Module) -> StreamSet:
    """The streams rgb, depth and shared."""
    return StreamSet.resolve(model, {name: name for name in STREAMS})


@dataclass(frozen=True)
class Gradients:
    """A model with a gradient on every parameter, and its streams."""

    model: nn.Module
    streams: StreamSet

    @classmethod
    def random(cls, name: str, device: torch.device) -> Gradients:
        """Normal random numbers in float32, a tensor of its own for each parameter."""
        model = two_streams(name, device)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        return cls(model, resolved(model))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def by_stream(self) -> list[list[nn.Parameter]]:
        return [[item.parameter for item in stream.parameters] for stream in self.streams.streams]


def whole(streams: StreamSet) -> tuple[Share, ...]:
    """Every parameter read in full, as a single process does."""
    held = [(number, item.parameter) for number, stream in enumerate(streams.streams) for item in stream.parameters]
    return (Share(tuple(Piece(number, p, 0, p.numel(), whole=True) for number, p in held), 1.0),)


def size(model: nn.Module) -> str:
    """How many tensors, parameters and megabytes of gradients the model has."""
    parameters = list(model.parameters())
    elements = sum(parameter.numel() for parameter in parameters)
    return f"{len(parameters)} tensors, {elements / 1e6:.4g} M parameters, {gradient_bytes(model) / 1e6:.4g} MB"


def gradient_bytes(model: nn.Module) -> int:
    """The bytes of one gradient of the model, in the parameters' dtype."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
