"""Fifteen trainings that are right and unusual: each breaks a rule that takes the base training for the only one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from ddp_streammon.train.models import MultiStreamModel
from tests.zoo.cases import FIRST, control
from tests.zoo.data import Data, load
from tests.zoo.models import FEATURES, Checkpointed, LowRank, pretrain
from tests.zoo.training import HEAD, Groups, Training

Batch = tuple[list[Any], Tensor]
MEASURES = 6
"""The values that a regression predicts."""


class Pretrained(Training):
    """The first stream's encoder was trained before, on its own."""

    def network(self) -> MultiStreamModel:
        model = super().network()
        pretrain(model.encoders[self.names[0]], self.data.train, 0)
        return model


@control("l_frozen_tower", legal=True, frozen=FIRST, encoder="conv_bn")
class FrozenTower(Pretrained):
    """A pretrained tower with BatchNorm is frozen and stays in eval mode; declared."""

    def network(self) -> MultiStreamModel:
        model = super().network()
        model.encoders[self.names[0]].requires_grad_(False)
        return model

    def set_mode(self) -> None:
        self.ddp.train()
        self.encoder_of(0).eval()


@control("l_lora", legal=True, optimizer="adamw", lr=3e-3)
class LoRA(Pretrained):
    """A pretrained tower learns through low-rank updates that start at zero."""

    def network(self) -> MultiStreamModel:
        model = super().network()
        tower = model.encoders[self.names[0]]
        assert isinstance(tower, nn.Sequential)
        for place, layer in enumerate(tower):
            if isinstance(layer, nn.Linear):
                tower[place] = LowRank(layer)
        return model


@control("l_projector", legal=True, optimizer="adamw", lr=2e-3)
class NewProjector(Pretrained):
    """A pretrained tower at a hundredth of the learning rate, and a new projector behind it in the same stream."""

    def network(self) -> MultiStreamModel:
        model = super().network()
        tower = model.encoders[self.names[0]]
        model.encoders[self.names[0]] = nn.Sequential(tower, nn.Linear(FEATURES, FEATURES), nn.ReLU())
        return model

    def groups(self) -> Groups:
        (first, *others) = super().groups()
        tower = {**first, "params": list(self.encoder_of(0)[0].parameters()), "lr": 0.01 * first["lr"]}
        return [tower, {**first, "params": list(self.encoder_of(0)[1].parameters())}, *others]


class SkipsAbsent(nn.Module):
    """An encoder that is not called where there is nothing to encode: its features are zero then."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        if bool((x == 0).all()):
            return x.new_zeros(len(x), FEATURES)
        features: Tensor = self.module(x)
        return features


def absent(step: int, rank: int = 0) -> bool:
    """Whether a batch lacks the first stream: one in two, at random."""
    return bool(torch.rand(1, generator=torch.Generator().manual_seed(7919 * rank + step)) < 0.5)


@control("l_text_only", legal=True)
class TextOnly(Training):
    """Every other batch, the same on all ranks, is without the first stream, whose encoder is left out then."""

    find_unused = True

    def encoder(self, place: int) -> nn.Module:
        return SkipsAbsent(super().encoder(place)) if place == 0 else super().encoder(place)

    def batch(self, inputs: list[Any], target: Tensor) -> Batch:
        return ([torch.zeros_like(inputs[0]), *inputs[1:]] if absent(self.step) else inputs), target


@control("l_dummy_image", legal=True)
class DummyImage(Training):
    """Ranks whose batch is without the first stream feed it a dummy, so that all ranks run the same graph."""

    def batch(self, inputs: list[Any], target: Tensor) -> Batch:
        missing = absent(self.step, self.rank)
        return ([torch.zeros_like(inputs[0]), *inputs[1:]] if missing else inputs), target


class Embeddings(MultiStreamModel):
    """The streams' features side by side, [B, S x F], normalised: no head."""

    def head(self, *features: Tensor) -> Tensor:
        return torch.cat([functional.normalize(feature, dim=1) for feature in features], dim=1)


@control("l_clip_loss", legal=True, views="edges", optimizer="adamw", lr=1e-3)
class ClipLoss(Training):
    """Two streams are told to agree item by item; there are no classes and there is no head."""

    task = "contrastive"

    def network(self) -> MultiStreamModel:
        encoders = {name: self.encoder(place) for place, name in enumerate(self.data.streams)}
        model = Embeddings(encoders, FEATURES, 1)
        del model.fc
        model.fc = nn.Identity()  # type: ignore[assignment]
        return model

    def loss(self, outputs: Any, target: Tensor) -> Tensor:
        return self.per_item(outputs).mean()

    def per_item(self, outputs: Tensor) -> Tensor:
        first, second, *_ = outputs.split(FEATURES, dim=1)
        similarity = first @ second.T / 0.1
        pairs = torch.arange(len(first))
        losses = [functional.cross_entropy(s, pairs, reduction="none") for s in (similarity, similarity.T)]
        return (losses[0] + losses[1]) / 2

    def score(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        return {"loss": self.per_item(model(*batch[:-1]))}


@control("l_two_backwards", legal=True)
class TwoBackwards(Training):
    """Two losses of two forwards are propagated one after the other; the optimizer uses their sum."""

    def backward(self, inputs: list[Any], target: Tensor) -> float:
        first = super().backward(inputs, target)
        noisy = [x + 0.1 * torch.randn_like(x) for x in inputs]
        return (first + super().backward(noisy, target)) / 2


@control("l_two_optimizers", legal=True)
class TwoOptimizers(Training):
    """SGD trains the streams, AdamW the head."""

    def make_optimizers(self, groups: Groups) -> tuple[Optimizer, ...]:
        streams = [group for group in groups if group["name"] != HEAD]
        head = [{**group, "lr": 1e-3} for group in groups if group["name"] == HEAD]
        return torch.optim.SGD(streams, momentum=self.setup.momentum), torch.optim.AdamW(head)

    def declared(self) -> dict[str, Any]:
        declared = super().declared()
        return {**declared, "lr": {**declared["lr"], HEAD: 1e-3}}


@control("l_token_weighted", legal=True)
class TokenWeighted(Training):
    """Ranks have batches of any size, and the loss weighs every item of a step alike."""

    def batch(self, inputs: list[Any], target: Tensor) -> Batch:
        generator = torch.Generator().manual_seed(7919 * self.rank + self.step)
        count = int(torch.randint(max(len(target) // 4, 1), len(target) + 1, (1,), generator=generator))
        self.items = torch.tensor(float(count))
        return [x[:count] for x in inputs], target[:count]

    def loss(self, outputs: Any, target: Tensor) -> Tensor:
        everywhere = self.items.clone()
        dist.all_reduce(everywhere)
        return functional.cross_entropy(outputs, target, reduction="sum") * self.world / everywhere


class Regression(Training):
    """The streams predict six standardised measures of the numeral's shape."""

    task = "regression"

    def read(self) -> Data:
        return load(self.setup.views, self.setup.items, self.setup.seed, regression=True)

    def outputs(self) -> int:
        return MEASURES

    def loss(self, outputs: Any, target: Tensor) -> Tensor:
        return self.per_item(outputs, target).mean()

    def per_item(self, outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs - target).square().mean(1)

    def score(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        return {"loss": self.per_item(model(*batch[:-1]), batch[-1])}


control("l_regression", legal=True, lr=0.03)(Regression)


@control("l_negative_likelihood", legal=True, optimizer="adam", lr=5e-4)
class NegativeLikelihood(Regression):
    """A Gaussian's mean and variance are predicted: the loss falls below zero."""

    def outputs(self) -> int:
        return 2 * MEASURES

    def per_item(self, outputs: Tensor, target: Tensor) -> Tensor:
        mean, log_variance = outputs.chunk(2, dim=1)
        log_variance = log_variance.clamp(min=-3)
        return (0.5 * (log_variance + (mean - target).square() * (-log_variance).exp())).mean(1)


@control("l_unfreezing", legal=True)
class Unfreezing(Pretrained):
    """The second stream learns from a sixth of the run on, the first from a third on; head and fusion at once."""

    def rate(self, group: Mapping[str, Any]) -> float:
        begins = {self.names[0]: 1 / 3, self.names[1]: 1 / 6}.get(group["name"], 0.0)
        return float(self.step >= begins * self.total)


@control("l_checkpointing", legal=True, encoder="conv")
class ActivationCheckpointing(Training):
    """Encoders run twice: their activations are computed again in the backward pass."""

    def encoder(self, place: int) -> nn.Module:
        return Checkpointed(super().encoder(place))


control("l_fp16_skips", legal=True, autocast="fp16")(Training)
control("l_warm_restarts", legal=True, schedule="warm_restarts", lr=0.08)(Training)
