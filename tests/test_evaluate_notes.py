"""What an evaluation says besides its figures: notes on odd items, sentences, and statements that it holds back."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from ddp_streammon import StreamMonitor, classification, keys
from ddp_streammon.evaluation import Estimate, Evaluation, Statement, Table
from ddp_streammon.evaluation.evidence import of_use
from ddp_streammon.streams import StreamSpec
from tests.ranks import run_ranks


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Two(nn.Module):
    """rgb [B, 6] and depth [B, 5] -> [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rgb, self.depth, self.head = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(16, 4)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat([self.rgb(rgb).tanh(), self.depth(depth).tanh()], 1))
        return logits


def items(count: int, seed: int = 0) -> TensorDataset:
    target = torch.randint(4, (count,), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(normal(count, 6, seed=seed), normal(count, 5, seed=seed + 1), target)


def evaluated(more: Any = None, size: int = 32, count: int = 96) -> Evaluation:
    """Of a classifier with training items, whose score gives also what `more` makes of a batch."""

    def score(model: nn.Module, batch: Any) -> Mapping[str, Any]:
        given = dict(classification()(model, batch))
        return {**given, **(more(batch, given) if more else {})}

    monitor = StreamMonitor(Two(), streams={"rgb": "rgb", "depth": "depth"})
    return monitor.evaluate(DataLoader(items(count), size), score, train=DataLoader(items(192, 5), 32))


# Odd items --------------------------------------------------------------------------------------------------------


def one_is_nan(batch: Any, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"loss": given["loss"].masked_fill(batch[0][:, 0] > 2, math.nan)}


def test_losses_that_are_not_finite_are_counted() -> None:
    found = evaluated(one_is_nan)
    count = int((items(96).tensors[0][:, 0] > 2).sum())
    assert count > 0
    assert f"the loss of {count} of 96 items is not finite, so no mean over them is" in found.notes
    assert math.isnan(found["full_val_loss"]) and math.isnan(found["rgb_val_uses"])
    assert {claim.statement for claim in found.claims if claim.stream == "rgb"} <= {
        Statement.cannot_tell,
        Statement.knows_nothing,
    }


def test_items_that_all_weigh_nothing_say_so() -> None:
    found = evaluated(lambda batch, given: {"weight": torch.zeros(len(batch[0]))})
    assert "every item has weight 0, so nothing is measured" in found.notes
    assert math.isnan(found["full_val_loss"])


def test_batches_in_which_no_item_has_all_streams_are_probed_of_nothing() -> None:
    """The first batch has depth in none of its items."""

    def present(batch: Any, given: Mapping[str, Tensor]) -> Mapping[str, Any]:
        first = bool((batch[2] == first_of_all[: len(batch[2])]).all())
        return {"present": {"depth": torch.full((len(batch[0]),), not first)}}

    order = torch.randperm(192, generator=torch.Generator().manual_seed(0))
    first_of_all = items(192, 5).tensors[2][order][:32]
    found = evaluated(present)
    assert math.isfinite(found["depth_knows"]) and math.isfinite(found["depth_val_ablated"])


def test_of_items_of_one_class_nothing_is_known_beyond_it() -> None:
    found = evaluated(lambda batch, given: {"target": torch.zeros_like(batch[2]), "prediction": None})
    assert found.notes == () and found["rgb_knows"] == 0 and found["rgb_knows_score"] == 1


def test_more_classes_than_a_probe_has_room_for_are_a_note() -> None:
    found = evaluated(lambda batch, given: {"target": batch[2] + 10**7})
    (note,) = found.notes
    assert note.startswith("no probe: a probe of 16 columns for 10000004 outputs takes 1221 MiB, more than 64")
    assert math.isfinite(found["rgb_val_uses"])


def test_a_limit_that_leaves_too_few_groups_for_a_claim_says_so() -> None:
    def score(model: nn.Module, batch: Any) -> Mapping[str, Any]:
        return {**classification()(model, batch), "group": "batch"}

    monitor = StreamMonitor(Two(), streams={"rgb": "rgb", "depth": "depth"})
    found = monitor.evaluate(DataLoader(items(160), 8), score, limit=150)
    assert found.notes == ("19 of 20 groups were tried, and claims need 20: raise limit, or seconds",)
    for count, limit in ((160, None), (152, 100)):
        assert monitor.evaluate(DataLoader(items(count), 8), score, limit=limit).notes == ()


def test_streams_that_share_their_encoder_are_probed_of_nothing() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Linear(6, 8), nn.Linear(16, 4)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.cat([self.encoder(left), self.encoder(right)], 1))
            return logits

    rows = DataLoader(TensorDataset(normal(96, 6), normal(96, 6, seed=1), items(96).tensors[2]), 16)
    monitor = StreamMonitor(Siamese(), streams={side: StreamSpec(inputs=(side,)) for side in ("left", "right")})
    found = monitor.evaluate(rows, train=rows, swap={"left": 0, "right": 1})
    assert found.notes == ("no probe: no stream has modules of its own",)
    assert math.isfinite(found["left_val_uses"]) and math.isfinite(found["left_to_right_val_cover"])


def test_of_a_criterion_that_gives_the_batchs_mean_the_batches_are_what_is_independent() -> None:
    def of(criterion: Any) -> Evaluation:
        monitor = StreamMonitor(Two(), streams={"rgb": "rgb", "depth": "depth"})
        return monitor.evaluate(DataLoader(items(640), 16), classification(criterion))

    mean, each = of(lambda logits, target: functional.cross_entropy(logits, target)), of(functional.cross_entropy)
    for key in ("full_val_loss", "rgb_val_uses"):
        one, other = mean.estimates[key], each.estimates[key]
        assert one.value == pytest.approx(other.value, rel=1e-5)
        assert other.groups > 6 * (one.groups - 1)
        assert (one.high - one.low) > 0.6 * (other.high - other.low)  # it was a quarter of it
    assert mean.estimates["rgb_val_uses"].groups == 32
    assert dict(each) == dict(of(None))
    own = evaluated(lambda batch, given: {"loss": given["loss"].mean().expand(len(batch[0]))})
    assert own.notes == (
        "all items of a batch have the same loss, so that intervals are too narrow if it is the batch's mean: give "
        "each item's (reduction='none'), or group='batch'",
    )
    grouped = evaluated(lambda batch, given: {"loss": given["loss"].mean().expand(len(batch[0])), "group": "batch"})
    assert not any("same loss" in note for note in grouped.notes)
    assert evaluated(lambda batch, given: {"loss": torch.ones(len(batch[0]))}).notes == ()
    smooth = functools.partial(functional.cross_entropy, label_smoothing=0.1)
    assert of(smooth)["full_val_loss"] == pytest.approx(
        of(torch.nn.CrossEntropyLoss(label_smoothing=0.1))["full_val_loss"]
    )


# What is exchanged along --------------------------------------------------------------------------------------------


class Captioner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vision, self.words, self.out = nn.Linear(6, 8), nn.Embedding(9, 8), nn.Linear(8, 9)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        hidden = torch.cumsum(torch.cat([self.vision(pixels).unsqueeze(1), self.words(ids)], 1), 1)
        logits: Tensor = self.out(hidden[:, :-1])
        return logits


def captions(target: str, *, full: bool = False) -> Evaluation:
    """Of a captioning model whose score reads the words that are to come from the part `target` of the batch."""

    def score(model: nn.Module, batch: Any) -> Mapping[str, Any]:
        wanted = batch[target]
        logits = model(batch["pixels"], batch["ids"]).transpose(1, 2)
        loss = functional.cross_entropy(logits, wanted, ignore_index=0, reduction="none").sum(1)
        tokens = (wanted != 0).sum(1)
        return {"loss": loss / tokens, "weight": tokens}

    ids = torch.randint(1, 9, (96, 5), generator=torch.Generator().manual_seed(0))
    ids[::3, 3:] = 0
    rows = [{"pixels": p, "ids": i, "labels": i.clone()} for p, i in zip(normal(96, 6), ids, strict=True)]
    monitor = StreamMonitor(Captioner(), streams={"image": "vision", "words": ["words", "out"]})
    loader = DataLoader(rows, 16)  # type: ignore[arg-type]
    return monitor.evaluate(loader, score, train=loader if full else None, swap={"image": "pixels", "words": "ids"})


def captions_of_both() -> list[tuple[str, ...]]:
    return [captions(target).notes for target in ("ids", "labels")]


def test_a_target_that_is_exchanged_along_is_said() -> None:
    expected = (
        "words: exchanging its input changes the items' weights or targets too, so what it costs is not of the same "
        "targets; let the score read them from a part of the batch that is not exchanged ('labels' of their own)"
    )
    assert captions_of_both() == [(expected,), ()]
    with_pairs = captions("ids", full=True).notes
    assert expected in with_pairs and not any(note.startswith("image: ") for note in with_pairs)
    assert run_ranks(2, captions_of_both) == [[(expected,), ()]] * 2


# Contrastive: each tower is nothing without the other ---------------------------------------------------------------


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            self.image.weight.copy_(torch.eye(8))
            self.text.weight.copy_(torch.eye(8))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return 9 * functional.normalize(self.image(image), dim=1) @ functional.normalize(self.text(text), dim=1).T


def test_a_tower_that_knows_no_more_of_a_label_than_the_other_is_not_called_redundant() -> None:
    def score(model: nn.Module, batch: Any) -> Mapping[str, Any]:
        similarity, pairs = model(*batch[:2]), torch.arange(len(batch[0]))
        loss = functional.cross_entropy(similarity, pairs, reduction="none")
        return {"loss": loss, "group": "batch", "target": batch[2]}

    def pairs(count: int, seed: int) -> DataLoader[Any]:
        centres, chance = 2 * normal(4, 8, seed=9), torch.Generator().manual_seed(seed)
        target = torch.randint(4, (count,), generator=chance)
        seen = centres[target] + torch.randn(count, 8, generator=chance)
        return DataLoader(TensorDataset(seen, seen + 0.3 * torch.randn(count, 8, generator=chance), target), 16)

    monitor = StreamMonitor(Towers(), streams={"image": "image", "text": "text"})
    found = monitor.evaluate(pairs(512, 1), score, train=pairs(512, 2))
    assert found["image_knows_low"] > 0.3 and found["image_complement_high"] < 0.05
    assert found["image_val_uses_low"] > 0.5 and found["image_to_text_val_cover_high"] < 0
    assert not {claim.statement for claim in found.claims} & {Statement.redundant, Statement.unused}
    assert found.notes == (
        "exchanging every stream only changes the items' places: the loss compares the streams with each other (or "
        "reads its target from what is exchanged), so Shapley values are 0 and no pair covers for itself",
    )
    assert found["image_val_shapley"] == pytest.approx(0, abs=1e-4)
    first, *_ = str(found).splitlines()
    assert first.startswith(f"image: exchanging its input costs {found['image_val_uses']:.3f} of loss [")


# Sentences ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_told_says_why() -> None:
    text = str(evaluated(lambda batch, given: {"group": "batch"}, size=8))
    assert "rgb: cannot tell (uses: 12 independent groups are fewer than 20; knows: 12 independent" in text
    text = str(evaluated(lambda batch, given: {"target": None, "prediction": None}))
    assert re.search(r"cannot tell \(uses is seen from 0\.\d+ beyond its margin on; memory is seen from", text)


def test_values_are_known_beyond_the_mean() -> None:
    def values(batch: Any, given: Mapping[str, Tensor]) -> Mapping[str, Any]:
        return {"target": batch[0][:, :2], "prediction": None}

    found = evaluated(values)
    low, high = (100 * found[f"rgb_knows_{end}"] for end in ("low", "high"))
    expected = f"beyond the mean, {100 * found['rgb_knows']:.1f} % of the variance [{low:.1f}, {high:.1f}]"
    assert not found.classes and expected in str(found)


@pytest.mark.parametrize(("of_a_and_c", "needing"), [((-0.5, -0.3), {"a"}), ((-0.5, 0.1), set()), ((0.1, 0.3), set())])
def test_a_stream_needs_the_others_where_each_of_them_surely_loses_its_worth_with_it(
    of_a_and_c: tuple[float, float], needing: set[str]
) -> None:
    names, ones = ("a", "b", "c"), torch.ones(4, dtype=torch.float64)
    limits = {("a", "b"): (-0.6, -0.2), ("a", "c"): of_a_and_c, ("b", "c"): (0.1, 0.3)}
    estimates = {keys.cover(*pair, "val"): Estimate(sum(ends) / 2, *ends, 100, 100) for pair, ends in limits.items()}
    estimates |= {f"{name}_val_uses": Estimate(0.5, 0.4, 0.6, 100, 100) for name in names}
    table = Table(ones, {(keys.FULL, "loss"): ones}, ones.bool())
    found = {name: of_use(table, estimates, name, "val", names) for name in names}
    assert {name for name, own in found.items() if Statement.redundant in own.denied} == needing
    assert {own.uses.margin for own in found.values() if own.uses is not None} == {0.01}


# What is held back --------------------------------------------------------------------------------------------------


def test_a_stream_whose_probe_is_right_as_often_as_at_its_best_has_not_regressed() -> None:
    """Features that say the same less evenly: of the variance less is explained, and all items are told apart."""

    def spread(count: int, seed: int) -> DataLoader[Any]:
        chance = torch.Generator().manual_seed(seed)
        target = torch.randint(2, (count,), generator=chance)
        rgb = normal(count, 6, seed=seed) * 0.1 + (2 * target[:, None] - 1)
        return DataLoader(TensorDataset(rgb, normal(count, 5, seed=seed + 1), target), 32)

    class Powers(nn.Module):
        power = 1

        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 8)
            self.one.weight.data = torch.eye(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return (2 * self.one(x)).pow(self.power)

    model = Two()
    model.rgb = Powers()  # type: ignore[assignment]
    monitor = StreamMonitor(model, streams={"rgb": "rgb", "depth": "depth"})
    val, train = spread(320, 1), spread(640, 2)
    before = monitor.evaluate(val, train=train)
    model.rgb.power = 9  # type: ignore[assignment]
    assert before["rgb_knows_score"] == 1
    for knew, said in (({"rgb": 1.0}, False), ({}, True)):  # what was known is what makes the difference
        monitor._past["val"] = replace(before.past, knew=knew)
        after = monitor.evaluate(val, train=train)
        assert after["rgb_knows_score"] == 1
        assert (Statement.regressed in {claim.statement for claim in after.claims}) == said
