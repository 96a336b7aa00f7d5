"""Multi-stream classifiers: `mc_resnet*` for images, `multi_mlp` for vectors, `mixed` for both."""

from ddp_streammon.train.models.fusion import ConcatFusion, GatedFusion, WeightedFusion, make_fusion
from ddp_streammon.train.models.mc_resnet import (
    mc_resnet,
    mc_resnet18,
    mc_resnet34,
    mc_resnet50,
    mc_resnet101,
    mc_resnet152,
)
from ddp_streammon.train.models.mixed import mixed
from ddp_streammon.train.models.multi_mlp import MLPEncoder, multi_mlp
from ddp_streammon.train.models.multi_stream import MultiStreamModel
from ddp_streammon.train.models.resnet import ResNetEncoder

__all__ = [
    "ConcatFusion",
    "GatedFusion",
    "MLPEncoder",
    "MultiStreamModel",
    "ResNetEncoder",
    "WeightedFusion",
    "make_fusion",
    "mc_resnet",
    "mc_resnet18",
    "mc_resnet34",
    "mc_resnet50",
    "mc_resnet101",
    "mc_resnet152",
    "mixed",
    "multi_mlp",
]
