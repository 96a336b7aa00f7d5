"""A ResNet encoder: image in, pooled features out.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385. As usual
today, a bottleneck block strides in its 3x3 convolution, and downsampling shortcuts are a strided 1x1
convolution with norm.
"""

from __future__ import annotations

from torch import Tensor, nn

STEMS = ("imagenet", "small")


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias (a norm follows) that keeps the size at stride 1; odd kernels."""
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class _Residual(nn.Module):
    """relu(body(x) + shortcut(x)); `body` ends in a norm."""

    def __init__(self, body: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = body
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        out: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return out


class BasicBlock(_Residual):
    """Two 3x3 convolutions; ResNet-18 and -34."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int = 1) -> None:
        body = nn.Sequential(
            _conv(inputs, planes, 3, stride), nn.BatchNorm2d(planes), nn.ReLU(),
            _conv(planes, planes, 3), nn.BatchNorm2d(planes),
        )  # fmt: skip
        super().__init__(body, inputs, planes, stride)


class Bottleneck(_Residual):
    """1x1, 3x3 (strided), 1x1 to four times the width; ResNet-50, -101 and -152."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int = 1) -> None:
        outputs = planes * self.expansion
        body = nn.Sequential(
            _conv(inputs, planes, 1), nn.BatchNorm2d(planes), nn.ReLU(),
            _conv(planes, planes, 3, stride), nn.BatchNorm2d(planes), nn.ReLU(),
            _conv(planes, outputs, 1), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        super().__init__(body, inputs, outputs, stride)


Block = type[BasicBlock] | type[Bottleneck]

DEPTHS: dict[int, tuple[Block, tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
"""Depth -> block and number of blocks in layer1 to layer4."""


class ResNetEncoder(nn.Module):
    """conv1, bn1, layer1 to layer4, global average pooling; no head.

    `depth` one of 18, 34, 50, 101, 152. `stem="imagenet"` is a 7x7 convolution of stride 2 and a max pooling
    (inputs of 64 pixels and more), `stem="small"` a 3x3 convolution of stride 1 without pooling (inputs down
    to 8 pixels). `width` is the number of channels of layer1 (64 in the paper). `features` = 8 x width x
    expansion is the output's width.
    """

    def __init__(self, depth: int, in_channels: int, stem: str = "imagenet", width: int = 64) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, DEPTHS))}, got {depth!r}")
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
        if in_channels < 1 or width < 1:
            raise ValueError(f"in_channels and width must be at least 1, got {in_channels} and {width}")
        block, blocks = DEPTHS[depth]
        large = stem == "imagenet"
        self.conv1 = _conv(in_channels, width, 7, 2) if large else _conv(in_channels, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        self.layer1 = _stage(block, width, width, blocks[0], stride=1)
        self.layer2 = _stage(block, width * block.expansion, 2 * width, blocks[1], stride=2)
        self.layer3 = _stage(block, 2 * width * block.expansion, 4 * width, blocks[2], stride=2)
        self.layer4 = _stage(block, 4 * width * block.expansion, 8 * width, blocks[3], stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.features = 8 * width * block.expansion
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, features]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        pooled: Tensor = self.pool(x)
        return pooled.flatten(1)


def _stage(block: Block, inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` blocks to planes x expansion channels, the first of them at `stride`."""
    outputs = planes * block.expansion
    return nn.Sequential(block(inputs, planes, stride), *(block(outputs, planes) for _ in range(blocks - 1)))
