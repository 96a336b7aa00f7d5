"""Keys: made, taken apart, grouped, and the nearest named."""

from __future__ import annotations

import pytest

from ddp_streammon import keys
from ddp_streammon.keys import Parts

TEN = ("stream1", "stream10", "stream2")
NESTED = ("vision", "vision_lora", "a", "a_b", "c")


def test_the_seeds_keys() -> None:
    assert keys.of_stream("stream1", keys.GRAD_NORM) == "stream1_grad_norm"
    assert keys.of_stream("shared", keys.GRAD_NORM) == "shared_grad_norm"
    assert keys.of_stream("stream1", keys.GRAD_TENSORS) == "stream1_params"
    assert keys.grad_ratio("stream1", "stream2") == "stream1_to_stream2_ratio"
    assert keys.overfit_ratio("stream1", "stream2") == "stream1_vs_stream2_overfit_ratio"
    assert keys.weight_ratio("stream1", "stream2", ("stream1", "stream2")) == "weight_norm_ratio"
    assert keys.weight_ratio("stream1", "stream2", TEN) == "stream1_to_stream2_weight_norm_ratio"
    assert keys.activation("layer1", "stream1", "mean") == "layer1_stream1_mean"
    assert keys.activation("layer1", None, "std") == "layer1_std"


@pytest.mark.parametrize(
    ("streams", "expected"),
    [
        ((), []),
        (("a",), []),
        (("a", "b"), [("a", "b")]),
        (("b", "a", "shared"), [("b", "a")]),
        (("shared", "a", "b", "c"), [("a", "b"), ("a", "c"), ("b", "c")]),
    ],
)
def test_pairs(streams: tuple[str, ...], expected: list[tuple[str, str]]) -> None:
    assert keys.pairs(streams) == expected


@pytest.mark.parametrize(
    ("key", "streams", "expected"),
    [
        ("stream1_grad_norm", TEN, Parts("grad_norm", "stream1")),
        ("stream10_grad_norm", TEN, Parts("grad_norm", "stream10")),
        ("stream10_grad_norm", ("stream1",), Parts("stream10_grad_norm", None)),
        ("stream1_without_val_acc", TEN, Parts("without_val_acc", "stream1")),
        ("shared_grad_norm", TEN, Parts("grad_norm", "shared")),
        ("full_val_acc", TEN, Parts("val_acc", "full")),
        ("full_model_loss_gap", TEN, Parts("full_model_loss_gap", None)),
        ("stream1_to_stream10_ratio", TEN, Parts("stream1_to_stream10_ratio", None)),
        ("stream10_vs_stream2_overfit_ratio", TEN, Parts("stream10_vs_stream2_overfit_ratio", None)),
        ("weight_norm_ratio", TEN, Parts("weight_norm_ratio", None)),
        ("stream1_to_stream2_weight_norm_ratio", TEN, Parts("stream1_to_stream2_weight_norm_ratio", None)),
        ("loss", TEN, Parts("loss", None)),
        ("stream1", TEN, Parts("stream1", None)),
        ("vision_grad_norm", NESTED, Parts("grad_norm", "vision")),
        ("vision_lora_grad_norm", NESTED, Parts("grad_norm", "vision_lora")),
        ("vision_lora_to_c_ratio", NESTED, Parts("vision_lora_to_c_ratio", None)),
        ("a_b_to_c_ratio", NESTED, Parts("a_b_to_c_ratio", None)),
        ("a_to_a_b_ratio", NESTED, Parts("a_to_a_b_ratio", None)),
        ("a_b_vs_c_overfit_ratio", NESTED, Parts("a_b_vs_c_overfit_ratio", None)),
        ("a_b_grad_norm", NESTED, Parts("grad_norm", "a_b")),
    ],
)
def test_parse(key: str, streams: tuple[str, ...], expected: Parts) -> None:
    assert keys.parse(key, streams) == expected
    assert keys.parse(key, reversed(streams)) == expected


@pytest.mark.parametrize("stream", (*TEN, *NESTED, "shared"))
@pytest.mark.parametrize("figure", (*keys.GRAD_FIGURES, *keys.WEIGHT_FIGURES, *keys.OVERFIT_FIGURES))
def test_parse_undoes_of_stream(stream: str, figure: str) -> None:
    assert keys.parse(keys.of_stream(stream, figure), (*TEN, *NESTED)) == Parts(figure, stream)


@pytest.mark.parametrize("streams", [TEN, NESTED])
def test_no_ratio_is_taken_for_a_figure_of_one_stream(streams: tuple[str, ...]) -> None:
    for a, b in keys.pairs(streams):
        for key in (keys.grad_ratio(a, b), keys.weight_ratio(a, b, streams), keys.overfit_ratio(a, b)):
            assert keys.parse(key, streams).stream is None


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("stream1_grad_norm", "grad_norm/stream1"),
        ("stream10_grad_norm", "grad_norm/stream10"),
        ("shared_grad_norm", "grad_norm/shared"),
        ("full_val_acc", "val_acc/full"),
        ("stream1_to_stream10_ratio", "ratio/stream1_to_stream10_ratio"),
        ("stream1_vs_stream2_overfit_ratio", "ratio/stream1_vs_stream2_overfit_ratio"),
        ("weight_norm_ratio", "ratio/weight_norm_ratio"),
        ("full_model_loss_gap", "train/full_model_loss_gap"),
        ("loss", "train/loss"),
        ("val/loss", "val/loss"),
        ("stream1_val_uses", "val_uses/stream1"),
        ("stream10_val_uses_acc_low", "val_uses_acc/stream10_low"),
        ("full_head_gap_high", "head_gap/full_high"),
        ("stream1_val_uses_detectable", "val_uses/stream1_detectable"),
        ("stream1_to_stream2_val_cover", "cover/stream1_to_stream2_val_cover"),
        ("stream1_to_stream2_val_cover_low", "cover/stream1_to_stream2_val_cover_low"),
    ],
)
def test_grouped(key: str, expected: str) -> None:
    assert keys.grouped(key, TEN) == expected


def test_grouped_keys_are_as_distinct_as_the_keys() -> None:
    made = [keys.of_stream(stream, figure) for stream in TEN for figure in keys.GRAD_FIGURES]
    made += [keys.grad_ratio(a, b) for a, b in keys.pairs(TEN)]
    assert len({keys.grouped(key, TEN) for key in made}) == len(made)


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("a_grad_norm", "grad_norm/a"),
        ("a_b_grad_norm", "grad_norm/a_b"),
        ("shared_weight_norm", "weight_norm/shared"),
        ("a_val_acc", "overfit/val_acc/a"),
        ("full_test_acc", "overfit/test_acc/full"),
        ("a_val_uses", "probe/uses/a"),
        ("a_val_uses_low", "probe/uses_low/a"),
        ("a_knows", "probe/knows/a"),
        ("loss", "train/loss"),
        ("val/loss", "val/loss"),
        ("a_contrast", "contrast/a"),
        ("a_contrast_low", "contrast_low/a"),
        ("compression_ratio", "train/compression_ratio"),
        ("full_model_loss_gap", "train/full_model_loss_gap"),
        ("a_grad_mean", None),
        ("a_test_acc", None),
        ("a_local_grad_norm_rank3", None),
        ("a_val_uses_detectable", None),
        ("a_val_uses_acc", None),
        ("a_val_uses_acc_low", None),
        ("a_without_val_acc", None),
        ("a_train_alone_loss", None),
        ("full_val_acc_low", None),
        ("a_b_grad_power", None),
        ("a_val_present", None),
        ("a_to_a_b_ratio", None),
        ("a_to_c_val_cover", None),
    ],
)
def test_what_wandb_shows(key: str, shown: str | None) -> None:
    assert keys.wandb_key(key, NESTED) == shown


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("a_to_b_ratio", "ratio/a_to_b_ratio"),
        ("weight_norm_ratio", "ratio/weight_norm_ratio"),
        ("a_vs_b_overfit_ratio", "ratio/a_vs_b_overfit_ratio"),
        ("a_to_b_val_cover", "ratio/a_to_b_val_cover"),
        ("a_to_b_val_cover_low", None),
    ],
)
def test_wandb_shows_figures_of_two_streams_where_there_are_two(key: str, shown: str | None) -> None:
    assert keys.wandb_key(key, ("a", "b")) == shown


def test_wandb_shows_at_most_20_figures_a_stream_however_streams_are_named() -> None:
    names = ("rgb", "rgb_low", "uses", "grad_norm")
    made = [keys.of_stream(name, figure) for name in names for figure in keys.WANDB_FIGURES]
    shown = [keys.wandb_key(key, names) for key in made]
    shown += [keys.wandb_rank_key(which, name) for name in names for which in keys.RANK_FIGURES]
    assert len(set(shown)) == len(shown) == 20 * len(names)


def test_nearest() -> None:
    assert keys.nearest("stream1_gradnorm", ["loss", "stream1_grad_norm"])[0] == "stream1_grad_norm"
    assert keys.nearest("zzz", ["rgb", "depth", "audio", "text"]) == ["rgb", "depth", "audio"]
    assert keys.nearest("rgb", []) == []
    assert len(keys.nearest("s", ["s1", "s2", "s3", "s4"], count=2)) == 2
