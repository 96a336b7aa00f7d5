"""`monitor.evaluate`: every figure against a direct computation, what may be said, and the past that it goes by."""

from __future__ import annotations

import io
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from ddp_streammon import Items, StreamMonitor, classification, keys
from ddp_streammon.collective import Collective
from ddp_streammon.config import Severity
from ddp_streammon.evaluation import (
    Claim,
    Estimate,
    Evaluation,
    Labelled,
    Past,
    Probe,
    ProbeStats,
    Statement,
    affordable,
    exchanges,
    paired_bootstrap,
    probe_streams,
)
from ddp_streammon.evaluation.exchange import exchanged_mean, partners
from ddp_streammon.evaluation.intervals import bounds, difference, mean_sums, negated, ratio
from ddp_streammon.rules import evaluated

EXACT = {"rel": 1e-9, "abs": 1e-12}
WIDTHS = {"rgb": 3, "depth": 4, "audio": 2}
SIZE = 8


class Net(nn.Module):
    """An encoder of two layers for each stream, and a linear head; float64."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names = names
        for name in names:
            setattr(self, name, nn.Sequential(nn.Linear(WIDTHS[name], 4), nn.Tanh()))
        self.head = nn.Linear(4 * len(names), 3)
        self.double()

    def features(self, *inputs: Tensor) -> list[Tensor]:
        return [getattr(self, name)(x) for name, x in zip(self.names, inputs, strict=True)]

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat(self.features(*inputs), 1))
        return logits


def data(count: int, seed: int, *names: str) -> TensorDataset:
    """The class moves all streams' inputs, audio's by nothing."""
    chance = torch.Generator().manual_seed(seed)
    target = torch.randint(3, (count,), generator=chance)
    inputs = []
    for number, name in enumerate(names):
        shift = torch.nn.functional.one_hot((target + number) % 3, WIDTHS[name] + 3)[:, : WIDTHS[name]]
        noise = torch.randn(count, WIDTHS[name], generator=chance, dtype=torch.float64)
        inputs.append(noise if name == "audio" else noise + 2.0 * shift)
    return TensorDataset(*inputs, target)


def fitted(*names: str) -> Net:
    """A net that has learned a little."""
    net = Net(*names)
    *inputs, target = data(200, 7, *names).tensors
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(40):
        optimizer.zero_grad()
        functional.cross_entropy(net(*inputs), target).backward()
        optimizer.step()
    return net


def watched(net: Any, **options: Any) -> StreamMonitor:
    return StreamMonitor(net, streams={name: name for name in net.names}, **options)


def loader(items: TensorDataset, **options: Any) -> DataLoader[Any]:
    return DataLoader(items, SIZE, **options)


class Direct:
    """What each item of a set loses, in the order drawn, from the model's own inputs and features."""

    def __init__(self, net: Net, items: TensorDataset, means: Sequence[Tensor] = ()) -> None:
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))
        self.net, self.means = net, means
        *self.inputs, self.target = (tensor[order] for tensor in items.tensors)
        starts = range(0, len(items), SIZE)
        blocks = [partners(torch.ones(len(self.target[s : s + SIZE]), dtype=torch.bool)) + s for s in starts]
        self.partner = torch.cat(blocks)

    def exchanged(self, *streams: str) -> tuple[Tensor, Tensor]:
        """Loss and correctness with these streams' inputs exchanged."""
        given = [x[self.partner] if n in streams else x for n, x in zip(self.net.names, self.inputs, strict=True)]
        return self._scored(self.net(*given))

    def at_mean(self, *streams: str) -> tuple[Tensor, Tensor]:
        """Loss and correctness with these streams' features at their mean over training items."""
        own = self.net.features(*self.inputs)
        given = [
            mean.expand_as(x) if n in streams else x for n, x, mean in zip(self.net.names, own, self.means, strict=True)
        ]
        return self._scored(self.net.head(torch.cat(given, 1)))

    def _scored(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        loss = functional.cross_entropy(logits, self.target, reduction="none")
        return loss.detach(), (logits.argmax(1) == self.target).double()

    def mean(self, values: Tensor, **options: Any) -> Estimate:
        options = {"unit_range": False, **options}
        return exchanged_mean(values, torch.ones_like(values), self.partner, None, 0.95, **options)


def check(found: Evaluation, key: str, expected: Estimate) -> None:
    own = found.estimates[key]
    assert (own.value, own.low, own.high) == pytest.approx((expected.value, expected.low, expected.high), **EXACT), key
    assert (found[key], found[f"{key}_low"], found[f"{key}_high"]) == (own.value, *bounds(own))


# Figures ----------------------------------------------------------------------------------------------------------


def test_uses_are_what_exchanged_inputs_cost_by_item() -> None:
    net, val = fitted("rgb", "depth"), data(45, 1, "rgb", "depth")
    found = watched(net).evaluate(loader(val))
    direct = Direct(net, val)
    loss, right = direct.exchanged()
    for name in net.names:
        own, still = direct.exchanged(name)
        check(found, f"{name}_val_uses", direct.mean(own - loss))
        check(found, f"{name}_val_uses_acc", negated(direct.mean(still - right, unit_range=True)))
        uses = found.estimates[f"{name}_val_uses"]
        assert uses.items == 45 and uses.groups == 22  # 21 pairs and a ring of three
        assert found[f"{name}_val_uses_detectable"] == pytest.approx(uses.detectable(0.025))
        assert found[f"{name}_val_uses"] > found[f"{name}_val_uses_detectable"]
    assert found["full_val_loss"] == pytest.approx(float(loss.mean()), **EXACT)
    assert found["full_val_acc"] == pytest.approx(float(right.mean()), **EXACT)
    assert found.tried == 45 and found.replayed and found.seconds > 0 and found.notes == ()
    names = {f"{name}_val_uses{figure}" for name in net.names for figure in ("", "_acc")}
    assert set(found.estimates) == names | {"full_val_loss", "full_val_acc"}
    tails = {f"{key}_{tail}" for key in found.estimates for tail in ("low", "high")}
    assert set(found) == set(found.estimates) | tails | {f"{name}_val_uses_detectable" for name in net.names}


def features_of(net: Net, items: TensorDataset) -> Labelled:
    *inputs, target = items.tensors
    features = {name: x.detach().float() for name, x in zip(net.names, net.features(*inputs), strict=True)}
    return Labelled(features, target, net(*inputs).argmax(1))


def probed(net: Net, train: TensorDataset, val: TensorDataset) -> ProbeStats:
    probe = Probe(dict.fromkeys(net.names, 4), 3, limit=min(256, len(train) // 10))
    return probe_streams(probe, Collective(), features_of(net, train), features_of(net, val))


def test_with_training_items_everything_is_measured() -> None:
    net, val, train = fitted("rgb", "depth"), data(45, 1, "rgb", "depth"), data(160, 2, "rgb", "depth")
    found = watched(net).evaluate(loader(val), train=loader(train, shuffle=True))
    means = [x.mean(0).detach() for x in net.features(*train.tensors[:2])]
    direct, trained = Direct(net, val, means), Direct(net, train, means)
    loss, right = direct.exchanged()
    rgb, depth, both = (direct.exchanged(*names) for names in (("rgb",), ("depth",), ("rgb", "depth")))
    check(found, "rgb_to_depth_val_cover", direct.mean(both[0] + loss - rgb[0] - depth[0]))
    for name, own, other in (("rgb", rgb, depth), ("depth", depth, rgb)):
        # What it brings first and what it brings last, by half.
        check(found, f"{name}_val_shapley", direct.mean((both[0] - other[0]) / 2 + (own[0] - loss) / 2))
        share = (other[1] - both[1]) / 2 + (right - own[1]) / 2
        check(found, f"{name}_val_shapley_acc", direct.mean(share, unit_range=True))
    for place, name in enumerate(net.names):
        at_mean, still = direct.at_mean(name)
        assert found[f"{name}_val_ablated"] == pytest.approx(float((at_mean - loss).mean()), **EXACT)
        assert found[f"{name}_val_ablated_acc"] == pytest.approx(float((right - still).mean()), **EXACT)
        others = net.names[1 - place]
        alone, alone_trained = direct.at_mean(others), trained.at_mean(others)
        for split, (own_loss, own_right) in (("val", alone), ("train", alone_trained)):
            assert found[f"{name}_{split}_alone_loss"] == pytest.approx(float(own_loss.mean()), **EXACT)
            assert found[f"{name}_{split}_alone_acc"] == pytest.approx(float(own_right.mean()), **EXACT)
        gap = float(alone[0].mean() - alone_trained[0].mean())
        assert found[f"{name}_alone_loss_gap"] == pytest.approx(gap, **EXACT)
        assert found[f"{name}_alone_acc_gap"] == pytest.approx(
            float(alone_trained[1].mean() - alone[1].mean()), **EXACT
        )
    train_loss, train_right = trained.exchanged()
    assert found["full_train_loss"] == pytest.approx(float(train_loss.mean()), **EXACT)
    assert found["full_loss_gap"] == pytest.approx(float(loss.mean() - train_loss.mean()), **EXACT)
    assert found["full_acc_gap"] == pytest.approx(float(train_right.mean() - right.mean()), **EXACT)
    assert found["full_loss_gap_low"] < found["full_loss_gap"] < found["full_loss_gap_high"]
    stats = probed(net, train, val)
    expected = {"full_knows": stats.everything.advantage, "full_knows_score": stats.everything.score}
    expected |= {"full_head_gap": stats.head_gap}
    for name in net.names:
        expected |= {f"{name}_knows": stats.alone[name].advantage, f"{name}_knows_score": stats.alone[name].score}
        expected |= {f"{name}_complement": stats.complement[name]}
    for key, estimate in expected.items():
        own = found.estimates[key]
        assert (own.value, own.low, own.high) == pytest.approx((estimate.value, estimate.low, estimate.high), rel=1e-6)
    assert found["rgb_knows"] > 0.2 and not any(math.isnan(value) for value in found.values())


def test_three_streams_share_out_the_whole_and_cover_for_each_other_in_pairs() -> None:
    net, val, train = fitted("rgb", "depth", "audio"), data(60, 1, *WIDTHS), data(160, 2, *WIDTHS)
    found = watched(net).evaluate(loader(val), train=loader(train))
    direct = Direct(net, val, [x.mean(0).detach() for x in net.features(*train.tensors[:3])])
    (loss, right), nothing = direct.exchanged(), direct.exchanged(*net.names)
    shares = [found[f"{name}_val_shapley"] for name in net.names]
    assert math.fsum(shares) == pytest.approx(float((nothing[0] - loss).mean()), **EXACT)
    shares = [found[f"{name}_val_shapley_acc"] for name in net.names]
    assert math.fsum(shares) == pytest.approx(float((right - nothing[1]).mean()), **EXACT)
    for a, b in (("rgb", "depth"), ("rgb", "audio"), ("depth", "audio")):
        more = direct.exchanged(a, b)[0] + loss - direct.exchanged(a)[0] - direct.exchanged(b)[0]
        check(found, f"{a}_to_{b}_val_cover", direct.mean(more))
    first = direct.exchanged("depth", "audio")[0]  # rgb alone
    third = [direct.exchanged("depth")[0], direct.exchanged("audio")[0]]
    brings = (nothing[0] - first) / 3 + (direct.exchanged("rgb")[0] - loss) / 3
    brings += ((direct.exchanged("rgb", "depth")[0] - third[0]) + (direct.exchanged("rgb", "audio")[0] - third[1])) / 6
    check(found, "rgb_val_shapley", direct.mean(brings))
    alone, right_alone = direct.at_mean("depth", "audio")
    assert found["rgb_val_alone_loss"] == pytest.approx(float(alone.mean()), **EXACT)
    assert found["rgb_val_alone_acc"] == pytest.approx(float(right_alone.mean()), **EXACT)
    assert abs(found["audio_val_uses"]) < 0.2 < found["rgb_val_uses"]


def test_what_is_exchanged_together_is_as_much_as_few_streams_allow() -> None:
    counts = {2: [2, 1], 3: [3, 3, 1], 4: [4, 6], 5: [5]}
    for number, by_size in counts.items():
        names = [f"stream{place}" for place in range(number)]
        sizes = [len(variant) for variant in exchanges(names, full=True).values()]
        assert [sizes.count(size) for size in range(1, max(sizes) + 1)] == by_size
        assert len(exchanges(names, full=False)) == number


def test_a_split_of_ones_own_and_a_regression() -> None:
    """Losses that are not in nats, targets of two values, a figure that is no accuracy."""

    def score(net: nn.Module, batch: Any) -> Mapping[str, Any]:
        *inputs, target = batch
        output = net(*inputs)
        wanted = torch.stack([target.double(), -target.double(), 0 * target.double()], 1)
        error = output - wanted
        return {"loss": error.square().sum(1), "bias": error.mean(1), "target": wanted, "prediction": output}

    net = fitted("rgb", "depth")
    found = watched(net).evaluate(
        loader(data(45, 1, "rgb", "depth")), score, split="test", train=loader(data(160, 2, "rgb", "depth"))
    )
    assert {"rgb_test_uses", "rgb_test_uses_bias", "rgb_test_uses_low", "full_test_bias", "rgb_test_alone_loss"} <= set(
        found
    )
    assert not any(key.endswith("_acc") or "_val_" in key for key in found)
    assert "rgb_test_shapley" in found and "rgb_test_shapley_bias" not in found
    assert found["full_knows_score"] == found["full_knows"] > 0.3  # R^2, above the mean's 0
    assert found["full_head_gap"] > 0  # a ridge regression beats a classifier's logits
    assert not any(math.isnan(value) for value in found.values())


def test_the_evaluation_in_words() -> None:
    net = fitted("rgb", "depth")
    found = watched(net).evaluate(loader(data(45, 1, "rgb", "depth")), train=loader(data(160, 2, "rgb", "depth")))
    first, *_ = str(found).splitlines()
    number = r"-?\d+\.\d+"
    interval = rf"\[{number}, {number}\]"
    assert re.fullmatch(
        rf"rgb: exchanging its input costs {number} nats {interval}, and of accuracy {number} pp {interval}, "
        rf"its features know, beyond the majority class, {number} pp {interval}, "
        rf"and what the others do not, {number} pp {interval} \(95 % intervals, 45 items\)",
        first,
    )
    assert f"{found['rgb_val_uses']:.3f} nats [{found['rgb_val_uses_low']:.3f}" in first


def test_a_history_and_sinks_get_every_figure() -> None:
    monitor = watched(fitted("rgb", "depth"))
    found = monitor.evaluate(loader(data(45, 1, "rgb", "depth")))
    assert {key: monitor.history.latest(key) for key in found} == dict(found)


# What the streams are ---------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """rgb a module, depth a weight, audio an encoder that reads rgb's features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rgb, self.audio, self.head = nn.Linear(3, 3), nn.Linear(5, 3), nn.Linear(3, 3)
        self.depth = nn.Parameter(torch.randn(4, 3))
        self.double()

    def forward(self, rgb: Tensor, depth: Tensor, audio: Tensor) -> Tensor:
        x = self.rgb(rgb)
        logits: Tensor = self.head(x + depth @ self.depth + self.audio(torch.cat([audio, x], 1)))
        return logits


def test_streams_that_cannot_be_exchanged_in_their_features_say_so_and_can_in_the_batch() -> None:
    names = ("rgb", "depth", "audio")
    monitor = StreamMonitor(Odd(), streams={name: name for name in names})
    val = loader(data(40, 1, *names))
    found = monitor.evaluate(val)
    assert found.notes == (
        "depth: it has no module of its own, so its input is not exchanged; say where its input lies in the batch: "
        "swap={'depth': <its key or position>}",
        "audio: its encoder reads other streams' features, so exchanging its own would exchange theirs too; say where "
        "its input lies in the batch: swap={'audio': <its key or position>}",
    )
    assert not found.replayed
    assert {key for key in found if key.endswith("_uses")} == {"rgb_val_uses"}
    assert str(found).splitlines()[-2:] == [f"note: {note}" for note in found.notes]
    assert not re.search(r"^(depth|audio): .*intervals", str(found), re.MULTILINE)
    swapped = monitor.evaluate(val, swap={"depth": 1, "audio": 2})
    assert swapped.notes == ()
    assert {key for key in swapped if key.endswith("_uses")} == {f"{name}_val_uses" for name in names}
    assert swapped["rgb_val_uses"] == pytest.approx(found["rgb_val_uses"], **EXACT)
    trained = monitor.evaluate(val, train=loader(data(160, 2, *names)), swap={"depth": 1, "audio": 2})
    assert trained["depth_val_uses"] == pytest.approx(swapped["depth_val_uses"], **EXACT)
    assert math.isfinite(trained["rgb_knows"]) and "depth_knows" not in trained
    with pytest.raises(ValueError, match="swap: there is no '7' in the batch; it has 0, 1, 2, 3"):
        monitor.evaluate(val, swap={"depth": 7})
    with pytest.raises(KeyError, match="text"):
        monitor.evaluate(val, swap={"text": 0})


def scored(net: nn.Module, batch: Any, **more: Any) -> dict[str, Any]:
    return {**classification()(net, batch), **more}


class Scales(Net):
    """Scales its inputs before the encoders, in other memory."""

    def features(self, *inputs: Tensor) -> list[Tensor]:
        return super().features(*(x / 3 for x in inputs))


class ScalesInPlace(Net):
    """Scales its batch in place, and reads rgb past its encoder, too."""

    def features(self, *inputs: Tensor) -> list[Tensor]:
        return super().features(*(x.div_(3) for x in inputs))


class Itself(nn.Module):
    """An encoder that gives what it gets; the rest of the model writes into that."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x


class WritesIntoFeatures(Net):
    def features(self, *inputs: Tensor) -> list[Tensor]:
        rgb, depth = super().features(*inputs)
        return [rgb, depth.mul_(3)]


@pytest.mark.parametrize("kind", ["inputs", "features"])
def test_a_forward_that_writes_into_its_batch_is_given_a_copy_each_time(kind: str) -> None:
    val, train = data(45, 1, "rgb", "depth"), data(160, 2, "rgb", "depth")
    if kind == "inputs":
        net: Net = ScalesInPlace("rgb", "depth")
        other: Net = Scales("rgb", "depth")
    else:
        net, other = WritesIntoFeatures("rgb", "depth"), WritesIntoFeatures("rgb", "depth")
        net.depth, other.depth = Itself(), nn.Sequential(nn.Linear(4, 4, bias=False)).double()
        nn.init.eye_(other.depth[0].weight)
    other.load_state_dict(net.state_dict(), strict=False)
    before = [tensor.clone() for tensor in (*val.tensors, *train.tensors)]
    found, expected = (watched(of).evaluate(loader(val), train=loader(train)) for of in (net, other))
    assert found.replayed
    assert found.figures == pytest.approx(expected.figures, **EXACT, nan_ok=True)
    assert all(map(torch.equal, before, (*val.tensors, *train.tensors)))


def test_under_inference_mode_it_finds_the_same() -> None:
    val, train = data(45, 1, "rgb", "depth"), data(160, 2, "rgb", "depth")
    expected = watched(fitted("rgb", "depth")).evaluate(loader(val), train=loader(train))
    monitor = watched(fitted("rgb", "depth"))
    with torch.inference_mode():
        found = monitor.evaluate(loader(val), train=loader(train))
    assert found.figures == pytest.approx(expected.figures, **EXACT, nan_ok=True)


class Recurrent(Net):
    """The head reads the state of rgb's GRU, which has the items in its second dimension."""

    def features(self, *inputs: Tensor) -> list[Tensor]:
        _, state = self.rgb(inputs[0][:, None])
        return [state[-1], self.depth(inputs[1])]


class Packed(Recurrent):
    """Here it reads what comes out for packed sequences, which has no dimension of the items."""

    def features(self, *inputs: Tensor) -> list[Tensor]:
        items = len(inputs[0])
        twice = inputs[0][:, None].expand(-1, 2, -1)
        packed, _ = self.rgb(nn.utils.rnn.pack_padded_sequence(twice, torch.full((items,), 2), batch_first=True))
        return [packed.data[-items:], self.depth(inputs[1])]


@pytest.mark.parametrize("kind", [Recurrent, Packed])
def test_the_state_of_a_recurrent_encoder_is_exchanged_and_ablated_or_it_says_why_not(kind: type[Net]) -> None:
    torch.manual_seed(0)
    net = kind("rgb", "depth")
    net.rgb = nn.GRU(WIDTHS["rgb"], 4, num_layers=2, batch_first=True).double()
    val, train = data(45, 1, "rgb", "depth"), data(160, 2, "rgb", "depth")
    swap = {"rgb": 0} if kind is Packed else {}
    found = watched(net).evaluate(loader(val), train=loader(train), swap=swap)
    direct = Direct(net, val, [features.mean(0) for features in net.features(*train.tensors[:-1])])
    whole = direct.exchanged()[0]
    check(found, "rgb_val_uses", direct.mean(direct.exchanged("rgb")[0] - whole))
    if kind is Packed:
        assert found.notes[0].startswith(
            "rgb: its features have another shape in another batch, or no dimension of the"
        )
        assert "rgb_val_ablated" not in found
    else:
        assert found.replayed
        assert found["rgb_val_ablated"] == pytest.approx((direct.at_mean("rgb")[0] - whole).mean().item(), **EXACT)


class Ragged(Net):
    """rgb gives a loss of its own, then its features; depth one row a token, and another number of them by batch."""

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        _, x = self.rgb(rgb)
        logits: Tensor = self.head(torch.cat([x, self.depth(depth).mean(1)], 1))
        return logits


class WithLoss(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = super().forward(x)
        return features.square().mean(), features


class Tokens(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        count = 2 + int(x[0, 0] > 0)
        return super().forward(x)[:, None].expand(-1, count, -1).contiguous()


def test_features_without_a_shape_of_their_own_have_no_mean_to_be_ablated_by() -> None:
    net = Ragged("rgb", "depth")
    net.rgb, net.depth = WithLoss(3, 4).double(), Tokens(4, 4).double()
    val, train = data(45, 1, "rgb", "depth"), data(160, 2, "rgb", "depth")
    found = watched(net).evaluate(loader(val), train=loader(train))
    note = (
        "depth: its features have another shape in another batch, or no dimension of the items, so they have no mean "
        "to be ablated by"
    )
    assert found.notes == (note,)
    assert not any(key.startswith(("depth_val_ablated", "rgb_val_alone", "rgb_alone")) for key in found)
    assert found["depth_val_alone_loss"] != found["full_val_loss"]  # rgb at its mean
    direct = Direct(net, val)
    mean = net.rgb(train.tensors[0])[1].mean(0)
    features = net.depth(direct.inputs[1]).mean(1)
    loss = functional.cross_entropy(net.head(torch.cat([mean.expand(45, -1), features], 1)), direct.target)
    assert found["rgb_val_ablated"] == pytest.approx((loss - direct.exchanged()[0].mean()).item(), **EXACT)
    assert found["depth_knows_score"] > 0.3


class Places(Net):
    """rgb gives a map, depth a sequence; the head reads their means over places and tokens."""

    def features(self, *inputs: Tensor) -> list[Tensor]:
        maps, tokens = super().features(*inputs)
        return [maps.mean((2, 3)), tokens.mean(1)]


class Spread(nn.Linear):
    """Each feature at 2 x 3 places, or at 5 tokens, of unequal values."""

    def __init__(self, width: int, *shape: int) -> None:
        super().__init__(width, 4)
        self.shape = shape
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        features = super().forward(x)
        factors = torch.arange(1.0, 1 + math.prod(self.shape)).view(self.shape)
        each = features.reshape(len(x), 4, *(1 for _ in self.shape)) * factors
        return each if len(self.shape) == 2 else each.transpose(1, 2)


def test_of_maps_and_tokens_the_means_are_probed_and_each_place_is_ablated() -> None:
    net, val, train = Places("rgb", "depth"), data(45, 1, "rgb", "depth"), data(160, 2, "rgb", "depth")
    net.rgb, net.depth = Spread(3, 2, 3), Spread(4, 5)
    found = watched(net).evaluate(loader(val), train=loader(train))
    stats = probed(net, train, val)
    for name in net.names:
        assert found[f"{name}_knows_score"] == pytest.approx(stats.alone[name].score.value, rel=1e-6)
    direct = Direct(net, val, [x.mean(0).detach() for x in net.features(*train.tensors[:2])])
    change = direct.at_mean("rgb")[0] - direct.exchanged()[0]
    assert found["rgb_val_ablated"] == pytest.approx(float(change.mean()), **EXACT)


def test_a_feature_of_one_element_is_ablated_by_its_mean() -> None:
    rgb, wanted = (torch.linspace(low, 1, 45, dtype=torch.float64) for low in (-2, 0))
    rows = loader(TensorDataset(rgb[:, None], wanted))
    found = watched(Known("rgb")).evaluate(
        rows, lambda net, batch: {"loss": (net(batch[0])[0] - batch[1]).square()}, train=rows
    )
    rise = (rgb.mean() - wanted).square() - (rgb - wanted).square()
    assert found["rgb_val_ablated"] == pytest.approx(float(rise.mean()), **EXACT)


def test_figures_of_a_stream_are_of_the_items_that_have_it() -> None:
    net, val = fitted("rgb", "depth"), data(48, 1, "rgb", "depth")
    has = {"depth": torch.arange(48) % 4 != 0}
    marked = TensorDataset(*val.tensors, has["depth"])

    def score(net: nn.Module, batch: Any) -> Mapping[str, Any]:
        *given, present = batch
        return scored(net, given, present={"depth": present})

    found = watched(net).evaluate(loader(marked), score)
    direct = Direct(net, marked_out := TensorDataset(*val.tensors))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    present = has["depth"][order]
    direct.partner = torch.cat([partners(present[s : s + SIZE]) + s for s in range(0, 48, SIZE)])
    loss, _ = direct.exchanged()
    own, _ = direct.exchanged("depth")
    rows = present.nonzero().squeeze(1)
    met = torch.searchsorted(rows, direct.partner[rows])
    assert bool(present[direct.partner[rows]].all()) and bool((direct.partner[rows] != rows).all())
    expected = exchanged_mean((own - loss)[rows], torch.ones(36).double(), met, None, 0.95, unit_range=False)
    check(found, "depth_val_uses", expected)
    assert found.estimates["depth_val_uses"].items == 36
    assert found.estimates["rgb_val_uses"].items == 48
    assert found["depth_val_present"] == 0.75 and "rgb_val_present" not in found
    assert found["full_val_loss"] == pytest.approx(float(loss.mean()), **EXACT)
    assert len(marked_out) == 48


def test_a_share_of_items_is_seen_in_every_figure_where_streams_are_missing() -> None:
    """All figures that need training items too: only items that have all streams are probed."""
    net = fitted("rgb", "depth")

    def score(net: nn.Module, batch: Any) -> Mapping[str, Any]:
        return scored(net, batch, present={"depth": batch[0][:, 0] > -1})

    val, train = data(90, 1, "rgb", "depth"), data(300, 2, "rgb", "depth")
    found = watched(net).evaluate(loader(val), score, train=loader(train))
    with_all = [TensorDataset(*(t[items.tensors[0][:, 0] > -1] for t in items.tensors)) for items in (train, val)]
    stats = probed(net, *with_all)
    assert found["depth_knows_score"] == pytest.approx(stats.alone["depth"].score.value, rel=1e-6)
    assert found.estimates["depth_knows"].items == len(with_all[1]) < 90
    means = [x.mean(0).detach() for x in net.features(*with_all[0].tensors[:2])]
    direct = Direct(net, val, means)
    change = (direct.at_mean("depth")[0] - direct.exchanged()[0])[direct.inputs[0][:, 0] > -1]
    assert found["depth_val_ablated"] == pytest.approx(float(change.mean()), **EXACT)


# Groups, records --------------------------------------------------------------------------------------------------


def test_groups_of_64_bits_make_the_clusters() -> None:
    net, val = fitted("rgb", "depth"), data(48, 1, "rgb", "depth")
    ids = torch.tensor([2**62 + 1, 2**62, -(2**62), -5, 2**32, 2**32 - 1, 2**53 + 1, 2**53])[torch.arange(48) % 8]

    def score(net: nn.Module, batch: Any) -> Mapping[str, Any]:
        *given, group = batch
        return scored(net, given, group=group)

    found = watched(net).evaluate(loader(TensorDataset(*val.tensors, ids)), score)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    groups = ids[order]
    direct = Direct(net, val)
    blocks = [partners(torch.ones(SIZE, dtype=torch.bool), groups[s : s + SIZE]) + s for s in range(0, 48, SIZE)]
    direct.partner = torch.cat(blocks)
    change = direct.exchanged("rgb")[0] - direct.exchanged()[0]
    check(
        found,
        "rgb_val_uses",
        exchanged_mean(change, torch.ones(48).double(), direct.partner, groups, 0.95, unit_range=False),
    )
    assert found.estimates["full_val_loss"].groups == 8  # no two ids fall together


def test_accuracy_of_items_of_unequal_weight_is_no_share_of_a_number_of_items() -> None:
    net, val, train = fitted("rgb", "depth"), data(48, 1, "rgb", "depth"), data(160, 2, "rgb", "depth")
    tokens = torch.arange(160).double() % 4 + 1

    def score(net: nn.Module, batch: Any) -> Mapping[str, Any]:
        *given, weight = batch
        return scored(net, given, weight=weight)

    sets = [TensorDataset(*items.tensors, tokens[: len(items)]) for items in (val, train)]
    found = watched(net).evaluate(loader(sets[0]), score, train=loader(sets[1]))
    right = [(net(*items.tensors[:2]).argmax(1) == items.tensors[2]).double() for items in (val, train)]
    expected = [ratio(mean_sums(of, tokens[: len(of)]), unit_range=True, least=0.0) for of in right]
    check(found, "full_val_acc", expected[0])
    check(found, "full_acc_gap", difference(expected[1], expected[0]))


def test_a_batch_may_be_one_group() -> None:
    net, val = fitted("rgb", "depth"), data(48, 1, "rgb", "depth")
    found = watched(net).evaluate(loader(val), lambda net, batch: scored(net, batch, group="batch"))
    assert found.estimates["full_val_loss"].groups == found.estimates["rgb_val_uses"].groups == 6
    direct = Direct(net, val)
    change = direct.exchanged("rgb")[0] - direct.exchanged()[0]
    place = torch.arange(48) // SIZE
    check(
        found,
        "rgb_val_uses",
        exchanged_mean(change, torch.ones(48).double(), direct.partner, place, 0.95, unit_range=False),
    )


def recall(records: Sequence[tuple[int, int]]) -> float:
    """Of class 2: no mean of items."""
    of = [found for wanted, found in records if wanted == 2]
    return sum(found == 2 for found in of) / len(of) if of else math.nan


def test_a_figure_of_ones_own_gets_a_paired_bootstrap_over_those_who_met() -> None:
    def score(net: nn.Module, batch: Any) -> Mapping[str, Any]:
        given = classification()(net, batch)
        return {**given, "record": list(zip(batch[-1].tolist(), given["prediction"].tolist(), strict=True))}

    net, val = fitted("rgb", "depth"), data(44, 1, "rgb", "depth")
    found = watched(net).evaluate(loader(val), score, reduce={"recall": recall}, limit=40)
    direct = Direct(net, val)

    def records(*inputs: Tensor) -> list[tuple[int, int]]:
        return list(zip(direct.target.tolist(), net(*inputs).argmax(1).tolist(), strict=True))[:40]

    rgb, depth = direct.inputs
    labels = [min(row, int(partner)) for row, partner in enumerate(direct.partner.tolist())][:40]
    expected = paired_bootstrap(recall, records(rgb, depth), records(rgb[direct.partner], depth), labels)
    assert found.estimates["rgb_val_uses_recall"] == expected
    assert expected.groups == 20 and expected.low < expected.value < expected.high
    assert {"depth_val_uses_recall", "depth_val_uses_recall_low", "depth_val_uses_recall_high"} <= set(found)
    with pytest.raises(ValueError) as caught:
        watched(net).evaluate(loader(val), reduce={"recall": recall})
    assert str(caught.value) == (
        "reduce='recall' needs the items' records: let the score give 'record', one object an item"
    )


PER_ITEM = "score must give one loss per item"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"group": "clip"}, "group must be integers [items], or 'batch' for one group a batch, got 'clip'"),
        ({"group": torch.zeros(8)}, "group must be integers, got torch.float32"),
        ({"group": torch.zeros(7).long()}, "score must give one group per item, shape [8], got shape (7,)"),
        ({"group": [0] * 8}, "score must give one group per item, as a tensor, got a list"),
        (
            {"loss": torch.tensor(1.0)},
            f"{PER_ITEM}, shape [items], got shape (); of a loss function use reduction='none'",
        ),
        ({"loss": 1.0}, f"{PER_ITEM}, as a tensor, got a float"),
        ({"loss": np.ones(8)}, f"{PER_ITEM}, as a tensor, got a ndarray"),
        ({"f1": 0.5}, "score must give one f1 per item, as a tensor, got a float"),
        ({"f1": None}, "score must give one f1 per item, as a tensor, got None"),
        ({"weight": 2}, "score must give one weight per item, as a tensor, got a int"),
        ({"weight": -torch.ones(8)}, "weights must not be negative, and finite, got -1.0"),
        ({"weight": torch.full((8,), math.nan)}, "weights must not be negative, and finite, got nan"),
        ({"present": torch.ones(8)}, "present must be a mapping of streams to masks [items], got a Tensor"),
        ({"target": ["a"] * 8}, "target must be a tensor [items] or [items, outputs], got a list"),
        ({"target": torch.tensor(1)}, "score must give one target per item, 8 in all, got a number"),
        (
            {"prediction": torch.ones(8, 3)},
            "prediction must have the shape of target, (8,), got (8, 3); of logits give the class, logits.argmax(1)",
        ),
        ({"weight": torch.ones(8, 1)}, "score must give one weight per item, shape [8], got shape (8, 1)"),
        ({"present": {"rgb": torch.ones(3)}}, "score must give one present['rgb'] per item, shape [8], got shape (3,)"),
        ({"target": torch.ones(9)}, "score must give one target per item, 8 in all, got 9"),
        ({"record": ["a"]}, "score must give one record per item, 8 in all, got 1"),
    ],
)
def test_a_score_that_is_not_one_value_an_item_is_refused(more: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        watched(Net("rgb", "depth")).evaluate(
            loader(data(8, 1, "rgb", "depth")), lambda net, batch: scored(net, batch, **more)
        )
    assert str(caught.value) == message


def test_a_score_is_a_mapping_and_knows_its_streams() -> None:
    monitor, val = watched(Net("rgb", "depth")), loader(data(8, 1, "rgb", "depth"))
    with pytest.raises(ValueError, match=r"score must return a mapping, e\.g\. \{'loss': loss\}, got a Tensor"):
        monitor.evaluate(val, lambda net, batch: scored(net, batch)["loss"])  # type: ignore[arg-type,return-value]
    with pytest.raises(KeyError, match="no stream 'audio'; streams: rgb, depth"):
        monitor.evaluate(val, lambda net, batch: scored(net, batch, present={"audio": torch.ones(8)}))


# Budget -----------------------------------------------------------------------------------------------------------


def test_what_can_be_afforded() -> None:
    assert affordable(512, 10.0, 0.0) == 512  # nothing known yet
    assert affordable(None, 10.0, 0.0) is None
    assert affordable(512, 1.0, 0.01) == 100
    assert affordable(None, 1.0, 0.001) == 1000
    assert affordable(512, 1.0, 0.001) == 512
    assert affordable(512, 1.0, 1.0) == 64  # below nothing could be said
    assert affordable(32, 1.0, 1.0) == 32
    for seconds in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"seconds must be above 0 \(or None for no limit\), got {seconds}"):
            affordable(512, seconds, 0.1)


def test_from_the_second_evaluation_on_the_items_are_as_many_as_time_allows() -> None:
    def slow(net: nn.Module, batch: Any) -> Mapping[str, Any]:
        time.sleep(0.002 * len(batch[-1]))
        return scored(net, batch)

    monitor = watched(fitted("rgb", "depth"))
    val = loader(data(128, 1, "rgb", "depth"))
    assert monitor.evaluate(val, slow, seconds=0.01).tried == 128
    assert monitor.evaluate(val, slow, seconds=0.4).tried in range(64, 112, SIZE)  # 0.004 s an item, or more
    found = monitor.evaluate(val, slow, seconds=0.01)
    assert found.tried == 64 and found.estimates["full_val_loss"].items == 128
    with pytest.raises(ValueError, match=r"limit must be at least 1 \(or None for all\), got 0"):
        monitor.evaluate(val, limit=0)
    with pytest.raises(ValueError, match=r"seconds must be above 0 \(or None for no limit\), got 0"):
        monitor.evaluate(val, slow, seconds=0)
    assert monitor.evaluate(val, limit=10).tried == 16  # whole batches
    assert monitor.evaluate(val, limit=1).tried == 8
    assert monitor.evaluate(val, limit=None).tried == 128


# Claims, and the past ---------------------------------------------------------------------------------------------


def broken(net: Net, name: str) -> Net:
    """With a stream's encoder that has lost what it knew."""
    with torch.no_grad():
        for parameter in getattr(net, name).parameters():
            parameter.zero_()
    return net


def test_claims_are_made_at_evaluations_1_2_4_and_stand_until_the_next() -> None:
    names = ("rgb", "depth", "audio")
    net = fitted(*names)
    with torch.no_grad():
        net.head.weight[:, 8:] = 0  # audio is not used
    monitor = watched(net)
    val = loader(data(160, 1, *names))
    looks, standing = [], []
    for _ in range(5):
        found = monitor.evaluate(val)
        looks.append(found.look)
        standing.append([finding.rule for finding in monitor.get_recommendations() if finding.stream == "audio"])
        assert (found.look is None) == (not found.claims)
        if found.claims:
            assert [(claim.stream, claim.statement) for claim in found.claims] == [("audio", Statement.unused)]
    assert looks == [1, 2, None, 3, None]
    assert standing == [["UNUSED"]] * 5
    assert monitor.evaluate(val, split="test").look == 1  # a split has a past of its own
    (finding, *_) = monitor.get_recommendations()
    assert finding.stream == "audio" and finding.severity is Severity.warning
    assert str(finding) == f"⚠️  the model does not use audio: {USES}".replace("0.0004 [0.0002, 0.0006]", NOTHING)


@pytest.mark.parametrize("saved", [False, True])
def test_a_stream_that_knew_more_before_has_regressed_also_after_a_restart(saved: bool) -> None:
    net = fitted("rgb", "depth")
    val, train = loader(data(240, 1, "rgb", "depth")), loader(data(300, 2, "rgb", "depth"))
    monitor = watched(net)
    before = monitor.evaluate(val, train=train)
    assert Statement.regressed not in {claim.statement for claim in before.claims}
    if saved:
        file = io.BytesIO()
        torch.save(monitor.state_dict(), file)
        file.seek(0)
        monitor = watched(net)
        monitor.load_state_dict(torch.load(file, weights_only=True))
    broken(net, "rgb")
    after = monitor.evaluate(val, train=train)
    assert after.look == 2
    said = {claim.statement: claim for claim in after.claims if claim.stream == "rgb"}
    assert {Statement.regressed, Statement.knows_nothing} <= set(said)
    assert said[Statement.regressed].bounds["change"] < -0.02
    assert Statement.regressed not in {claim.statement for claim in after.claims if claim.stream == "depth"}
    assert after["rgb_knows"] == 0 < before["rgb_knows_low"]
    rules = {finding.rule: str(finding) for finding in monitor.get_recommendations()}
    lost = -100 * said[Statement.regressed].bounds["change"]
    assert rules["REGRESSED"].startswith("⚠️  rgb knows less than it did: a probe of its features explains at least ")
    assert f"explains at least {lost:.1f} % of the target's variance less than at its best" in rules["REGRESSED"]
    assert after.past.best["rgb"] == before.past.best["rgb"] and after.past.count == 2


def test_the_past_keeps_the_best_by_item() -> None:
    net = fitted("rgb", "depth")
    val, train = loader(data(60, 1, "rgb", "depth")), loader(data(160, 2, "rgb", "depth"))
    worse, good = broken(fitted("rgb", "depth"), "rgb"), net
    monitor = watched(net)
    good_past = monitor.evaluate(val, train=train).past
    net.load_state_dict(worse.state_dict())
    assert monitor.evaluate(val, train=train).past.best["rgb"] == good_past.best["rgb"]
    assert len(good_past.best["rgb"]) == 60
    stats = probed(fitted("rgb", "depth"), data(160, 2, "rgb", "depth"), data(60, 1, "rgb", "depth"))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert good_past.best["rgb"] == pytest.approx(stats.items.alone["rgb"][order].tolist(), rel=1e-5, abs=1e-9)
    assert Past(**asdict(good_past)) == good_past
    assert good_past.knew == {name: stats.alone[name].score.value for name in ("rgb", "depth")}
    assert good is net


class Known(nn.Module):
    """What goes in is what comes out of an encoder."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(1, 1, bias=False, dtype=torch.float64))
            nn.init.ones_(getattr(self, name).weight)
        self.names = names

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [getattr(self, name)(x).squeeze(1) for name, x in zip(self.names, inputs, strict=True)]


def planted(worth: float, more: float = 0.0, seed: int = 0) -> DataLoader[Any]:
    """400 items whose loss is 1 and `more`, and by `worth` higher with another item's input; each by 5 % of it."""
    spread = 1 + 0.05 * torch.randn(2, 400, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rgb = torch.arange(400.0, dtype=torch.float64)
    return DataLoader(TensorDataset(rgb[:, None], rgb, worth * spread[0], 1 + more * spread[1]), SIZE)


def of_planted(net: nn.Module, batch: Any) -> Mapping[str, Any]:
    rgb, own, worth, loss = batch
    (found,) = net(rgb)
    return {"loss": loss + worth * (found != own), "weight": own % 3 + 1}


def statements(found: Evaluation, stream: str) -> set[Statement]:
    return {claim.statement for claim in found.claims if claim.stream == stream}


@pytest.mark.parametrize(("worth", "memorised"), [(0.47, True), (0.5, False), (0.53, False)])
def test_a_stream_is_memorised_where_it_is_worth_less_than_half_on_held_out_items(
    worth: float, memorised: bool
) -> None:
    found = watched(Known("rgb")).evaluate(planted(worth), of_planted, train=planted(1.0, seed=1))
    assert found["rgb_train_uses"] == pytest.approx(1, abs=0.01)
    assert found["rgb_val_uses"] == pytest.approx(worth, abs=0.01)
    assert (Statement.memorised in statements(found, "rgb")) == memorised


def test_a_model_overfits_where_its_loss_rises_by_a_quarter_of_its_best_which_is_paid_for_as_the_best_of_many() -> None:
    monitor, train = watched(Known("rgb")), planted(1.0, 0.01)
    for _ in range(3):
        assert not statements(monitor.evaluate(planted(1.0, 0.1), of_planted, train=train), keys.FULL)
    best, now = (planted(1.0, more).dataset.tensors[3] for more in (0.1, 0.386))  # type: ignore[attr-defined]
    past = monitor._past["val"]
    found = monitor.evaluate(planted(1.0, 0.386), of_planted, train=train)
    (claim,) = (claim for claim in found.claims if claim.stream == keys.FULL)
    weight = torch.arange(400) % 3 + 1
    rise, margin = ratio(mean_sums(now - best, weight)), 0.25 * ratio(mean_sums(best, weight)).value
    assert claim.statement is Statement.overfitting and rise.value > margin
    assert claim.p == pytest.approx(3 * rise.p_above(margin), rel=1e-6)
    assert claim.bounds["rise"] == pytest.approx(rise.lower(claim.level / 3))
    monitor._past["val"] = past
    assert not statements(monitor.evaluate(planted(1.0, 0.36), of_planted, train=train), keys.FULL)


def test_the_best_loss_is_the_least_by_weight_and_items_without_weight_have_none() -> None:
    def score(net: nn.Module, batch: Any) -> Mapping[str, Any]:
        return {**of_planted(net, batch[:4]), "weight": batch[4]}

    weight = torch.tensor([1.0, 9.0, 0.0, 1.0]).double().repeat(4)
    losses = [
        torch.tensor(each).double().repeat(4) for each in ([1, 1, math.nan, 1], [1.8, 0.8, 5, 1.8], [0.5, 1.1, 0, 0.5])
    ]
    rgb, order = torch.arange(16.0).double(), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    monitor = watched(Known("rgb"))
    for loss, best in zip(losses, (0, 1, 1), strict=True):
        items = TensorDataset(rgb[:, None], rgb, torch.ones(16).double(), loss, weight)
        past = monitor.evaluate(loader(items), score).past
        assert past.best[keys.FULL] == torch.where(weight > 0, -losses[best], 0.0)[order].tolist()


@pytest.mark.parametrize(
    ("copied", "own", "said"),
    [(3.0, 0.0, {Statement.redundant}), (0.0, 0.25, set()), (0.0, 0.45, {Statement.complementary})],
)
def test_a_stream_adds_to_the_others_where_it_is_a_tenth_of_what_all_explain(
    copied: float, own: float, said: set[Statement]
) -> None:
    """depth holds rgb and something of its own, which is 0, 6 and 17 % of what both explain: the 6 are above 2 pp."""

    def items(count: int, seed: int) -> DataLoader[Any]:
        chance = torch.Generator().manual_seed(seed)
        rgb, other, noise = torch.randn(3, count, 1, generator=chance, dtype=torch.float64)
        return DataLoader(TensorDataset(rgb, copied * rgb + other, rgb + own * other + 0.5 * noise), 32)

    def score(net: nn.Module, batch: Any) -> Mapping[str, Any]:
        rgb, depth = net(*batch[:2])
        return {"loss": (rgb + depth - batch[2].squeeze(1)).square(), "target": batch[2]}

    found = watched(Known("rgb", "depth")).evaluate(items(2400, 0), score, train=items(1200, 1))
    assert found["full_knows_score"] == pytest.approx((1 + own**2) / (1.25 + own**2), abs=0.03)
    assert (found["depth_complement_low"] > 0.02) == (own > 0)
    assert statements(found, "depth") == said


def test_other_items_than_before_are_compared_with_nothing() -> None:
    monitor, train = watched(fitted("rgb", "depth")), loader(data(160, 2, "rgb", "depth"))
    monitor.evaluate(loader(data(60, 1, "rgb", "depth")), train=train)
    found = monitor.evaluate(loader(data(45, 1, "rgb", "depth")), train=train)
    assert not {claim.statement for claim in found.claims} & {Statement.regressed, Statement.overfitting}
    assert {name: len(items) for name, items in found.past.best.items()} == {"full": 45, "rgb": 45, "depth": 45}


# Findings ---------------------------------------------------------------------------------------------------------

NUMBERS = {
    "full_val_loss": (1.2, 0.1),
    "rgb_train_uses": (0.5, 0.1),
    "rgb_val_uses": (0.0004, 0.0002),
    "depth_val_uses": (0.5, 0.1),
    "rgb_knows": (0.25, 0.05),
    "rgb_complement": (0.031, 0.01),
}
NOTHING = "0.0000 [0.0000, 0.0000]"
USES = "exchanging its input with another item's costs 0.0004 [0.0002, 0.0006] of loss"


def evaluation(*claims: Claim, **numbers: tuple[float, float]) -> Evaluation:
    estimates = {
        key: Estimate(value, value - half, value + half, 400, 400) for key, (value, half) in (NUMBERS | numbers).items()
    }
    figures = {key: estimate.value for key, estimate in estimates.items()}
    return Evaluation(figures, estimates, 1, claims, (), ("rgb", "depth"), "val", 400, 0.1, True, Past(1))


def claim(statement: Statement, stream: str = "rgb", **limits: float) -> Claim:
    return Claim(stream, statement, 0.01, 0.001, limits)


@pytest.mark.parametrize(
    ("statements", "rule", "severity", "sentence"),
    [
        ([Statement.unused], "UNUSED", Severity.warning, f"⚠️  the model does not use rgb: {USES}"),
        (
            [Statement.unused, Statement.complementary],
            "IGNORED",
            Severity.warning,
            f"⚠️  the model does not use rgb: {USES}, although its features add 3.1 pp [2.1, 4.1] to what the others "
            "know: the head ignores it",
        ),
        (
            [Statement.redundant],
            "REDUNDANT",
            Severity.info,
            "rgb is redundant: its features know 25.0 pp [20.0, 30.0] beyond the majority class, but add 3.1 pp "
            "[2.1, 4.1] to what the others know; do nothing",
        ),
        (
            [Statement.knows_nothing],
            "NOTHING",
            Severity.warning,
            "⚠️  rgb knows nothing of the target: a probe of its features is 25.0 pp [20.0, 30.0] above the majority "
            "class; check that its samples belong to the labels, and that its input is not constant",
        ),
        (
            [Statement.regressed],
            "REGRESSED",
            Severity.warning,
            "⚠️  rgb knows less than it did: a probe of its features explains at least 4.0 % of the target's variance "
            "less than at its best, and is now 25.0 pp [20.0, 30.0] above the majority class",
        ),
        (
            [Statement.memorised],
            "MEMORISED",
            Severity.warning,
            "⚠️  the model has memorised rgb: exchanging its input with another item's costs 0.500 [0.400, 0.600] of "
            "loss on training items, but 0.0004 [0.0002, 0.0006] on held-out ones; regularise or augment that stream "
            "(untested on your data)",
        ),
        (
            [Statement.overfitting],
            "OVERFITTING",
            Severity.warning,
            "⚠️  the model overfits: the held-out loss is 1.200 [1.100, 1.300], at least 0.300 above its best, and "
            "above the training loss; stop at the best evaluation, or regularise (untested on your data)",
        ),
    ],
)
def test_a_claim_is_said_in_a_sentence(
    statements: list[Statement], rule: str, severity: Severity, sentence: str
) -> None:
    limits = {Statement.regressed: {"change": -0.04}, Statement.unused: {"uses": 0.0007}}
    limits[Statement.overfitting] = {"rise": 0.3, "gap": 0.2}
    stream = keys.FULL if rule == "OVERFITTING" else "rgb"
    claims = [claim(statement, stream, **limits.get(statement, {})) for statement in statements]
    (finding,) = evaluated.findings(evaluation(*claims), step=700)
    assert str(finding) == sentence
    whom = None if stream == keys.FULL else "rgb"
    assert (finding.rule, finding.severity, finding.stream, finding.step) == (rule, severity, whom, 700)
    assert finding.evidence == {**limits.get(statements[0], {}), "level": 0.01, "p": 0.001}


@pytest.mark.parametrize(("then", "severity"), [(None, "warning"), (0.8, "info"), (0.801, "warning")])
def test_a_model_that_grows_too_sure_and_is_right_as_often_is_not_called_worse(
    then: float | None, severity: str
) -> None:
    said = claim(Statement.overfitting, keys.FULL, rise=0.3, gap=0.2)
    found = evaluation(said, full_val_acc=(0.8, 0.02))
    (finding,) = evaluated.findings(replace(found, past=Past(1, accuracy=then)), 700)
    assert finding.severity.value == severity
    assert finding.startswith("⚠️") == (severity == "warning")
    assert finding.seen.startswith("the model overfits: " if severity == "warning" else "the model grows too sure: ")
    assert "the held-out loss is 1.200 [1.100, 1.300], at least 0.300 above its best" in finding


def test_the_accuracy_at_the_best_loss_is_remembered() -> None:
    val = loader(data(60, 1, "rgb"))
    monitor = watched(net := fitted("rgb"))
    good = monitor.evaluate(val)
    assert good.past.accuracy == good["full_val_acc"]
    broken(net, "rgb")
    worse = monitor.evaluate(val)
    assert worse.past.accuracy == good["full_val_acc"] > worse["full_val_acc"]


def test_an_encoder_that_knows_more_while_the_loss_is_worse_does_not_change_the_accuracy_at_the_best_loss() -> None:
    net, val, train = fitted("rgb", "depth"), loader(data(60, 1, "rgb", "depth")), loader(data(160, 2, "rgb", "depth"))
    learned = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    monitor = watched(broken(net, "rgb"))
    first = monitor.evaluate(val, train=train)
    net.load_state_dict(learned)
    net.head.weight.data.neg_()
    second = monitor.evaluate(val, train=train)
    assert second["full_val_loss"] > first["full_val_loss"] and second["rgb_knows"] > first["rgb_knows"]
    assert second.past.best["full"] == first.past.best["full"]
    assert second.past.best["rgb"] != first.past.best["rgb"]
    assert second.past.accuracy == first["full_val_acc"] != second["full_val_acc"]


def test_good_news_and_what_cannot_be_told_are_no_findings() -> None:
    for statement in (Statement.complementary, Statement.cannot_tell):
        assert evaluated.findings(evaluation(claim(statement)), 0) == []


@pytest.mark.parametrize("statement", [Statement.unused, Statement.redundant])
def test_a_stream_is_unused_or_redundant_only_where_the_model_has_learned(statement: Statement) -> None:
    """Where another stream's use is surely ten margins or more: a tenth of the loss of 1.2."""
    said = claim(statement, uses=0.0007)
    assert evaluated.findings(evaluation(said, depth_val_uses=(0.5, 0.39)), 0) == []
    assert evaluated.findings(evaluation(said, depth_val_uses=(0.01, 0.005)), 0) == []
    assert len(evaluated.findings(evaluation(said, depth_val_uses=(0.5, 0.37)), 0)) == 1


def test_where_no_other_streams_use_is_known_what_its_mean_costs_or_a_word_of_caution_stands_in() -> None:
    found = evaluation(claim(Statement.unused, uses=0.0007), depth_val_ablated=(0.5, 0.1))
    without = {key: value for key, value in found.estimates.items() if key != "depth_val_uses"}
    (finding,) = evaluated.findings(replace(found, estimates=without), 700)
    assert (finding.severity, str(finding)) == (Severity.warning, f"⚠️  the model does not use rgb: {USES}")
    del without["depth_val_ablated"]
    (finding,) = evaluated.findings(replace(found, estimates=without), 700)
    assert (finding.severity, str(finding)) == (
        Severity.info,
        f"the model does not use rgb: {USES}; what it uses else is not measured, so it may not have learned anything "
        "yet",
    )
    without["depth_val_ablated"] = Estimate(0.0, -0.1, 0.1, 400, 400)
    assert evaluated.findings(replace(found, estimates=without), 700) == []


def test_of_values_the_mean_stands_where_classes_have_a_majority() -> None:
    said = [claim(Statement.knows_nothing), claim(Statement.regressed, change=-0.04), claim(Statement.redundant)]
    for one in said:
        (finding,) = evaluated.findings(replace(evaluation(one), classes=False), 700)
        assert "25.0 % of the variance [20.0, 30.0]" in finding
        assert "the mean" in finding and "majority" not in finding


@pytest.mark.parametrize("more", [(), (Statement.complementary,)])
@pytest.mark.parametrize(("step", "severity"), [(0, "warning"), (1, "info"), (99, "info"), (100, "warning")])
def test_a_stream_that_is_not_used_at_the_begin_of_a_training_may_only_be_later(
    more: tuple[Statement, ...], step: int, severity: str
) -> None:
    claims = [claim(statement, uses=0.0007) for statement in (Statement.unused, *more)]
    (finding,) = evaluated.findings(evaluation(*claims), step)
    assert finding.severity.value == severity


def test_an_unusual_set_in_its_order_is_mixed() -> None:
    """Sorted by class there would be nothing to exchange within a batch."""
    net, val = fitted("rgb", "depth"), data(48, 1, "rgb", "depth")
    order = torch.argsort(val.tensors[-1], stable=True)
    by_class = TensorDataset(*(tensor[order] for tensor in val.tensors))
    uses = watched(net).evaluate(loader(by_class))["rgb_val_uses"]
    unmixed = watched(net).evaluate(Items(list(loader(by_class)), sharded=False))["rgb_val_uses"]
    assert uses > 2 * unmixed
    assert np.isfinite(uses)
