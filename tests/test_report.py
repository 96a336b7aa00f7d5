"""report.py: the guide's summary, overrides, and which findings are news."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ddp_streammon import keys
from ddp_streammon.history import History
from ddp_streammon.report import Told, as_override, display_name, gist, in_words, summary_text, to_set
from ddp_streammon.rules.finding import Action, Finding

LINE = "=" * 70


def history_of(**series: list[float]) -> History:
    """A history with an epoch for each value, and the given series beside it."""
    history = History()
    for key, values in ({keys.EPOCH: [0.0]} | series).items():
        for step, value in enumerate(values):
            history.append(step, float(step), {key: value})
    return history


def test_the_summary_is_the_guides_table() -> None:
    history = history_of(
        stream1_grad_norm=[1.0, 2.0],
        stream2_grad_norm=[0.5, 0.7],
        stream1_weight_norm=[9.0, 12.0],
        stream2_weight_norm=[4.0, 4.0],
        stream1_overfitting_score=[0.1, 0.9],
        stream2_overfitting_score=[0.1, 0.3],
    )
    assert summary_text(history, ("stream1", "stream2")).splitlines() == [
        LINE,
        "Stream Monitoring Summary",
        LINE,
        "",
        "Gradient Norms (average):",
        "  Stream1: 1.5000",
        "  Stream2: 0.6000",
        "  Ratio (S1/S2): 2.50",
        "",
        "Weight Norms (latest):",
        "  Stream1: 12.0000",
        "  Stream2: 4.0000",
        "  Ratio (S1/S2): 3.00",
        "",
        "Overfitting Indicators (latest):",
        "  Stream1 score: 0.9000",
        "  Stream2 score: 0.3000",
        "  ⚠️  Stream1 overfitting more than Stream2",
        LINE,
    ]


def test_nothing_logged_is_said() -> None:
    assert summary_text(History(), ("stream1", "stream2")) == "No monitoring data available"


def test_steps_alone_are_monitoring_data() -> None:
    stepped = History()
    stepped.append(1, None, {"rgb_grad_norm": 3.0, "depth_grad_norm": 1.5})
    assert "  Rgb: 3.0000\n  Depth: 1.5000\n  Ratio (S1/S2): 2.00" in summary_text(stepped, ("rgb", "depth"))


def test_three_streams_have_every_pair_by_name() -> None:
    history = history_of(rgb_grad_norm=[2.0], depth_grad_norm=[1.0], audio_grad_norm=[4.0])
    lines = summary_text(history, ("rgb", "depth", "audio")).splitlines()
    ratios = [line.strip() for line in lines if "Ratio" in line]
    assert ratios == ["Ratio (Rgb/Depth): 2.00", "Ratio (Rgb/Audio): 0.50", "Ratio (Depth/Audio): 0.25"]


@pytest.mark.parametrize("denominator", [0.0, math.nan])
def test_a_ratio_over_nothing_is_undefined(denominator: float) -> None:
    """The original raised ZeroDivisionError here, or printed `infx`."""
    history = history_of(stream1_grad_norm=[1.0], stream2_grad_norm=[denominator])
    text = summary_text(history, ("stream1", "stream2"))
    assert "  Ratio (S1/S2): undefined" in text
    assert "nan" not in text and "inf" not in text


def test_one_nan_step_does_not_hide_the_average() -> None:
    history = history_of(stream1_grad_norm=[1.0, math.nan, 3.0], stream2_grad_norm=[math.inf])
    text = summary_text(history, ("stream1", "stream2"))
    assert "  Stream1: 2.0000" in text and "  Stream2: undefined" in text


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (0.9, 0.3, "⚠️  Stream1 overfitting more than Stream2"),
        (0.3, 0.9, "⚠️  Stream2 overfitting more than Stream1"),
        (0.9, -0.3, "⚠️  Stream1 overfitting more than Stream2"),
        (0.9, 0.8, "✓ Balanced overfitting"),
        (-0.2, -0.5, "✓ Balanced overfitting"),
        (0.003, 0.001, "✓ Balanced overfitting"),
        (0.5, 0.1, "✓ Balanced overfitting"),
        (math.nan, 0.9, "Comparison: undefined"),
    ],
)
def test_scores_are_compared_only_where_the_larger_says_something(first: float, second: float, verdict: str) -> None:
    history = history_of(stream1_overfitting_score=[first], stream2_overfitting_score=[second])
    assert summary_text(history, ("stream1", "stream2")).splitlines()[-2] == f"  {verdict}"


def test_one_stream_is_compared_with_nobody() -> None:
    text = summary_text(history_of(rgb_overfitting_score=[0.9], rgb_grad_norm=[1.0]), ("rgb",))
    assert "Ratio" not in text and "overfitting more" not in text and "Balanced" not in text


def test_actions_as_overrides_and_in_words() -> None:
    decay = Action(setting="weight_decay", stream="depth", value=0.05, old=0.02)
    assert as_override(decay) == "optim.streams.depth.weight_decay=0.05"
    assert in_words(decay) == "parameter group 'depth': weight_decay 0.02 -> 0.05"
    shared = Action(setting="lr", stream="shared", value=1 / 30000, old=math.nan)
    assert as_override(shared) == "optim.streams.shared.lr=3.333e-05"
    assert in_words(shared) == "parameter group 'shared': lr -> 3.333e-05"
    whole = Action(setting="lr", stream="full", value=0.5, old=1.0)
    assert as_override(whole) == "optim.lr=0.5"
    assert in_words(whole) == "all parameter groups: lr 1 -> 0.5"


def test_what_to_set_is_said_as_the_loop_says_it_else_in_words() -> None:
    action = Action("lr", "rgb", 0.1, 0.2)
    assert to_set(None) == "" and to_set(action) == in_words(action)
    finding = Finding("too fast", rule="R", stream="rgb", action=action).worded(as_override)
    assert to_set(finding.action) == "optim.streams.rgb.lr=0.1"
    assert finding.action == action and finding.worded(in_words).action == action
    plain = Finding("nothing to set", rule="R")
    assert plain.worded(as_override) is plain


def test_display_names_keep_the_users_spelling() -> None:
    assert [display_name(name) for name in ("stream1", "depthMap", "")] == ["Stream1", "DepthMap", ""]


def test_a_finding_with_other_numbers_is_the_same_one() -> None:
    def ratio(sentence: str, **fields: Any) -> Finding:
        return Finding(sentence, rule="ratio", **fields)

    assert gist(ratio("Stream1 gradients 4.2x larger")) == gist(ratio("Stream1 gradients 11x larger"))
    assert gist(ratio("Stream1 gradients 4.2x larger")) != gist(ratio("Stream2 gradients 4.2x larger"))
    assert gist(ratio("balanced (1.15)")) != gist(ratio("balanced (nan)"))
    assert gist(ratio("balanced", rank=0)) != gist(ratio("balanced", rank=1))


def test_a_finding_is_news_once_and_again_after_it_cleared() -> None:
    told, finding = Told(), Finding("score 1.5", rule="overfit")
    assert told.news("epoch", [finding]) == [finding]
    assert told.news("epoch", [Finding("score 1.6", rule="overfit")]) == []
    assert told.news("step", []) == [] and told.news("step", [finding]) == []
    assert told.news("epoch", []) == []
    assert told.news("step", [finding]) == [finding]
