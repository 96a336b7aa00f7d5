"""The guide's rules: every sentence, every threshold, the four scenarios, and the defects of the original."""

from __future__ import annotations

import inspect
import json
import math
import random
from collections.abc import Mapping, Sequence

import pytest

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.history import History
from ddp_streammon.rules import guide, guide_gradients, guide_learning, guide_scenarios, guide_weights
from ddp_streammon.rules.finding import Action, Finding, StreamSettings
from ddp_streammon.rules.guide import recommend

TWO = ("stream1", "stream2")
KNOWN = {name: StreamSettings(lr=1e-4, weight_decay=2e-2) for name in (*TWO, "shared")}
HEALTHY = ["✓ All metrics look healthy"]
LATE = "⚠️  Metrics show issues late in training (epoch {}) - monitor more frequently, consider early stopping"


def history_of(columns: Mapping[str, float | Sequence[float]]) -> History:
    """One History: each key with one value, or with one a step from step 0."""
    history = History()
    for key, values in columns.items():
        for step, value in enumerate(values if isinstance(values, Sequence) else [values]):
            history.append(step, None, {key: value})
    return history


def advice(
    columns: Mapping[str, float | Sequence[float]],
    streams: Sequence[str] = TWO,
    settings: Mapping[str, StreamSettings] | None = None,
    severity: Severity = Severity.info,
) -> list[Finding]:
    return recommend(history_of(columns), streams, settings or {}, severity=severity)


def norms(first: float | Sequence[float], second: float | Sequence[float]) -> dict[str, float | Sequence[float]]:
    return {"stream1_grad_norm": first, "stream2_grad_norm": second}


def weights(first: float | Sequence[float], second: float | Sequence[float]) -> dict[str, float | Sequence[float]]:
    return {"stream1_weight_norm": first, "stream2_weight_norm": second}


def scores(first: float, second: float) -> dict[str, float | Sequence[float]]:
    return {"stream1_overfitting_score": first, "stream2_overfitting_score": second}


def up(value: float) -> float:
    return math.nextafter(value, math.inf)


def down(value: float) -> float:
    return math.nextafter(value, -math.inf)


def larger(a: int, b: int, factor: str) -> str:
    return f"⚠️  Stream{a} gradients {factor}x larger than Stream{b} - consider reducing stream{a}_lr"


def heavier(a: int, b: int, factor: str) -> str:
    return f"⚠️  Stream{a} weights {factor}x larger than Stream{b} - consider increasing stream{a}_weight_decay"


def overfits(stream: int, score: str) -> str:
    return f"⚠️  Stream{stream} overfitting (score: {score}) - increase stream{stream}_weight_decay or add dropout"


def more(stream: int) -> str:
    return f"⚠️  Stream{stream} overfitting significantly more - boost stream{stream} regularization"


def vanishes(stream: int, norm: str) -> str:
    return (
        f"⚠️  Stream{stream} gradients vanishing (norm {norm})"
        f" - increase stream{stream}_lr or reduce stream{stream}_weight_decay"
    )


def explodes(stream: int, norm: str) -> str:
    return f"⚠️  Stream{stream} gradients exploding (norm {norm}) - reduce stream{stream}_lr or clip gradients"


def nonfinite(stream: int, seen: str) -> str:
    return (
        f"⚠️  Stream{stream} gradients non-finite ({seen}) - check stream{stream} inputs and loss,"
        f" reduce stream{stream}_lr or clip gradients"
    )


def undefined(stream: int) -> str:
    return f"⚠️  Gradient ratio undefined: Stream{stream} has no gradient (norm 0)"


BOTH = "⚠️  Both streams overfitting - increase global dropout_p or add data augmentation"
STALLED = "⚠️  Stream1 learning stalled - consider increasing stream1_lr"
RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]

CASES = {
    "an epoch alone": ({"epoch": 0}, HEALTHY),
    "one stream's norm alone": ({"stream1_grad_norm": 2.0}, HEALTHY),
    "the guide's sample": (norms(14.51, 14.58), ["✓ Gradient ratio balanced (1.00)"]),
    "the guide's balanced sentence": (norms(1.15, 1.0), ["✓ Gradient ratio balanced (1.15)"]),
    "the guide's first sentence": (norms(4.2, 1.0), [larger(1, 2, "4.2")]),
    "the other way round": (norms(1.0, 3.8), [larger(2, 1, "3.8")]),
    "ratio at 3.0": (norms(3.0, 1.0), ["✓ Gradient ratio balanced (3.00)"]),
    "ratio above 3.0": (norms(up(3.0), 1.0), [larger(1, 2, "3.0")]),
    "ratio at 0.33": (norms(0.33, 1.0), ["✓ Gradient ratio balanced (0.33)"]),
    "ratio below 0.33": (norms(down(0.33), 1.0), [larger(2, 1, "3.0")]),
    "the last five entries": (norms([900.0] + [1.0] * 5, [1.0] * 6), ["✓ Gradient ratio balanced (1.00)"]),
    "means, not latest": (norms([1, 1, 1, 1, 16], [1] * 5), [larger(1, 2, "4.0")]),
    "different cadences": (norms([4.0] * 7, 1.0), [larger(1, 2, "4.0")]),
    "norm at 1e-7": (norms(1e-7, 1e-7), ["✓ Gradient ratio balanced (1.00)"]),
    "norm below 1e-7": (norms(down(1e-7), 2e-7), [vanishes(1, "1e-07")]),
    "one vanishes": (norms(1e-9, 1.0), [vanishes(1, "1e-09"), larger(2, 1, "1.0e+09")]),
    "the larger norm at 1e-7": (norms(1e-7, 1e-8), [vanishes(2, "1e-08"), larger(1, 2, "10.0")]),
    "the larger norm below 1e-7": (norms(down(1e-7), 1e-8), [vanishes(1, "1e-07"), vanishes(2, "1e-08")]),
    "a million times": (norms(1e2, 1e-4), [larger(1, 2, "1.0e+06")]),
    "a little less": (norms(99, 1e-4), [larger(1, 2, "990000.0")]),
    "norm at 1e3": (norms(1e3, 1e3), ["✓ Gradient ratio balanced (1.00)"]),
    "norm above 1e3": (norms(up(1e3), 1e3), [explodes(1, "1e+03"), "✓ Gradient ratio balanced (1.00)"]),
    "norms at the ends of float64": (
        norms(1e307, 5e-324),
        [vanishes(2, "4.9e-324"), explodes(1, "1e+307"), larger(1, 2, "1.8e+308")],
    ),
    "score at 0.5": (scores(0.5, 0.1), HEALTHY),
    "score above 0.5": (scores(up(0.5), 0.1), ["⚠️  Stream1 mild overfitting (score: 0.50)"]),
    "score at 1.0": (scores(1.0, 0.1), ["⚠️  Stream1 mild overfitting (score: 1.00)"]),
    "score above 1.0": (scores(up(1.0), 0.1), [overfits(1, "1.00"), more(1)]),
    "one score alone": ({"stream2_overfitting_score": 3.54}, [overfits(2, "3.54")]),
    "twice the other's score": (
        scores(1.2, 0.6),
        [overfits(1, "1.20"), "⚠️  Stream2 mild overfitting (score: 0.60)"],
    ),
    "just more than twice": (
        scores(up(1.2), 0.5999),
        [overfits(1, "1.20"), "⚠️  Stream2 mild overfitting (score: 0.60)", more(1)],
    ),
    "the guide's overfitting sample": (
        scores(1.77, 4.15),
        [overfits(1, "1.77"), overfits(2, "4.15"), more(2), BOTH],
    ),
    "both overfitting alike": (scores(1.77, 1.77), [overfits(1, "1.77"), overfits(2, "1.77"), BOTH]),
    "both at 1.0": (
        scores(1.0, up(1.0)),
        [overfits(2, "1.00"), "⚠️  Stream1 mild overfitting (score: 1.00)"],
    ),
    "the latest score counts": ({"stream1_overfitting_score": [3.0, 0.2]}, HEALTHY),
    "five accuracies": ({"stream1_train_acc": [0.5] * 5}, HEALTHY),
    "six accuracies": ({"stream1_train_acc": [0.5] * 6}, [STALLED]),
    "gain at 0.001": ({"stream1_train_acc": [0, 0, 0.001, 0.002, 0.003, 0.004]}, HEALTHY),
    "gain below 0.001": ({"stream1_train_acc": [0, 0, 0.001, 0.002, 0.003, down(0.004)]}, [STALLED]),
    "falling": ({"stream1_train_acc": RISING[::-1]}, [STALLED]),
    "rising": ({"stream1_train_acc": RISING}, HEALTHY),
    "accuracy below converged": ({"stream1_train_acc": [down(0.99)] * 6}, [STALLED]),
    "accuracy at converged": ({"stream1_train_acc": [0.99] * 6}, HEALTHY),
    "an accuracy that is nan": ({"stream1_train_acc": [0.5] * 4 + [math.nan, 0.5]}, HEALTHY),
    "the guide's weights": (weights(151.44, 114.16), HEALTHY),
    "weight ratio at 2.0": (weights(2.0, 1.0), HEALTHY),
    "weight ratio above 2.0": (weights(up(2.0), 1.0), [heavier(1, 2, "2.0")]),
    "weight ratio at 0.5": (weights(0.5, 1.0), HEALTHY),
    "weight ratio below 0.5": (weights(down(0.5), 1.0), [heavier(2, 1, "2.0")]),
    "a weight norm of 0": (weights(0.0, 1.0), ["⚠️  Weight ratio undefined: Stream1 has no weights (norm 0)"]),
    "a weight norm of nan": (
        weights(math.nan, 1.0),
        ["⚠️  Stream1 weights non-finite (norm nan) - restore a checkpoint and reduce stream1_lr"],
    ),
    "a weight norm of minus infinity": (
        weights(-math.inf, 1.0),
        ["⚠️  Stream1 weights non-finite (norm -inf) - restore a checkpoint and reduce stream1_lr"],
    ),
    "weights doubled": ({"stream1_weight_norm": [10, 12, 14, 16, 18, 20]}, HEALTHY),
    "weights more than doubled": (
        {"stream1_weight_norm": [10, 12, 14, 16, 18, 24]},
        [
            "⚠️  Stream1 weights diverging over time (2.4x in 5 entries), unstable training"
            " - increase stream1_weight_decay"
        ],
    ),
    "weights jumped once": ({"stream1_weight_norm": [10, 10, 10, 30, 30, 30]}, HEALTHY),
    "too early to diverge": ({"stream1_weight_norm": [10, 14, 18, 22, 30]}, HEALTHY),
    "weights stagnant": (
        weights([10.0, 10.1, 10.2, 10.3, 10.4], [10.0] * 5),
        ["⚠️  Stream2 weights stagnant (norm unchanged over 5 entries) - increase stream2_lr"],
    ),
    "all weights stand still": (weights([10.0] * 5, [10.0] * 5), HEALTHY),
    "weight norms of 0 that stay": (
        weights([0.0] * 5, [10.0, 10.1, 10.2, 10.3, 10.4]),
        ["⚠️  Weight ratio undefined: Stream1 has no weights (norm 0)"],
    ),
    "weights were infinite": (weights([10.0] * 5, [math.inf, 10.0, 10.0, 10.0, 10.0]), HEALTHY),
    "too early to stagnate": (weights([10.0, 10.1, 10.2, 10.3], [10.0] * 4), HEALTHY),
    "just below the bound of standing still": (
        weights([10.0, 10.1, 10.2, 10.3, 10.4], [10.0, 10.0, 10.0, 10.0, 10.00009]),
        ["⚠️  Stream2 weights stagnant (norm unchanged over 5 entries) - increase stream2_lr"],
    ),
    "just above the bound of standing still": (
        weights([10.0, 10.1, 10.2, 10.3, 10.4], [10.0, 10.0, 10.0, 10.0, 10.00011]),
        HEALTHY,
    ),
    "just below the bound of moving": (weights([10.0] * 4 + [10.0009], [10.0] * 5), HEALTHY),
    "issues at epoch 49": ({"epoch": 49, **norms(4.2, 1.0)}, [larger(1, 2, "4.2")]),
    "issues at epoch 50": ({"epoch": 50, **norms(4.2, 1.0)}, [larger(1, 2, "4.2"), LATE.format(50)]),
    "no issues at epoch 50": ({"epoch": 50, **norms(1.0, 1.0)}, ["✓ Gradient ratio balanced (1.00)"]),
}


@pytest.mark.parametrize(("columns", "expected"), CASES.values(), ids=CASES.keys())
def test_what_is_said(columns: dict[str, float | Sequence[float]], expected: list[str]) -> None:
    assert advice(columns) == expected


@pytest.mark.parametrize("columns", [{}, {"loss": 1.0}, {"stream3_grad_norm": 1.0}])
def test_nothing_logged(columns: dict[str, float]) -> None:
    (finding,) = advice(columns)
    assert finding == "Insufficient data for recommendations"
    assert (finding.rule, finding.step) == ("S-OK", None)


def test_the_order_is_the_seeds() -> None:
    columns = {**norms(4.2, 1.0), **scores(0.1, 3.54), "stream1_train_acc": [0.5] * 6}
    assert advice(columns) == [larger(1, 2, "4.2"), overfits(2, "3.54"), more(2), STALLED]


def test_names_are_the_users() -> None:
    columns = {"rgb_grad_norm": 4.2, "depthMap_grad_norm": 1.0}
    assert advice(columns, ("rgb", "depthMap")) == [
        "⚠️  Rgb gradients 4.2x larger than DepthMap - consider reducing rgb_lr"
    ]


# --- the guide's scenarios, each as one log entry with its numbers ---


def by_rule(findings: Sequence[Finding], rule: str) -> Finding:
    (found,) = [finding for finding in findings if finding.rule == rule]
    return found


def changed(finding: Finding) -> tuple[str, str, float, float]:
    """The action: what, of which stream, to what (rounded: products of floats), from what."""
    assert finding.action is not None
    return finding.action.setting, finding.action.stream, round(finding.action.value, 12), finding.action.old


SCENARIO1 = {**norms(0.15, 3.79), "stream1_train_acc": 0.10, "stream2_train_acc": 0.85}
SCENARIO2 = {**scores(0.85, 4.15), "stream2_train_acc": 0.95, "stream2_val_acc": 0.12}
SCENARIO3 = {**norms(2.15, 2.08), "stream1_train_acc": 0.11, "stream2_train_acc": 0.11}
SCENARIO4 = {**weights(245.3, 87.1), "stream1_contribution": 0.95, "stream2_contribution": 0.15}


def test_scenario_1_stream1_not_learning() -> None:
    findings = advice(SCENARIO1, settings=KNOWN)
    assert findings == [
        larger(2, 1, "25.3"),
        "⚠️  Stream1 gradients vanishing, not contributing to learning"
        " - increase stream1_lr (0.0001 -> 0.0005), reduce stream1_weight_decay (0.02 -> 0.001),"
        " check fusion weights, try a different fusion strategy",
    ]
    assert changed(by_rule(findings, "S-S1")) == ("lr", "stream1", 5e-4, 1e-4)


def test_scenario_2_stream2_overfitting() -> None:
    findings = advice(SCENARIO2, settings=KNOWN)
    assert findings == [
        overfits(2, "4.15"),
        "⚠️  Stream1 mild overfitting (score: 0.85)",
        more(2),
        "⚠️  Stream2 memorizing training data - increase stream2_weight_decay (0.02 -> 0.05),"
        " reduce stream2_lr (0.0001 -> 5e-05), add stream2 dropout, augment stream2 inputs",
    ]
    for rule in ("S-OF", "S-OR"):
        assert changed(by_rule(findings, rule)) == ("weight_decay", "stream2", 5e-2, 2e-2)
    assert changed(by_rule(findings, "S-S2")) == ("lr", "stream2", 5e-5, 1e-4)


def test_scenario_3_balanced_but_not_learning() -> None:
    findings = advice(SCENARIO3, settings=KNOWN)
    assert findings == [
        "✓ Gradient ratio balanced (1.03)",
        "⚠️  Gradients balanced but too small globally - increase learning_rate (0.0001 -> 0.0005),"
        " check loss function, normalize inputs, reduce weight_decay (0.02 -> 0.001)",
    ]
    finding = by_rule(findings, "S-NL")
    assert finding.stream == "shared"
    assert changed(finding) == ("lr", "full", 5e-4, 1e-4)


def test_scenario_4_one_stream_dominating() -> None:
    findings = advice(SCENARIO4, settings=KNOWN)
    assert findings == [
        heavier(1, 2, "2.8"),
        "⚠️  Stream1 weights growing much faster, dominating predictions"
        " - increase stream1_weight_decay (0.02 -> 0.05), increase stream2_lr (0.0001 -> 0.0005),"
        " use WeightedFusion, check fusion.stream2_weight",
    ]
    for rule in ("S-WR", "S-S4"):
        assert changed(by_rule(findings, rule)) == ("weight_decay", "stream1", 5e-2, 2e-2)


@pytest.mark.parametrize(
    ("columns", "rule", "fires"),
    [
        ({**SCENARIO1, "stream1_train_acc": 0.425}, "S-S1", False),
        ({**SCENARIO1, "stream1_train_acc": down(0.425)}, "S-S1", True),
        ({**SCENARIO1, **norms(1.0, 3.0)}, "S-S1", False),
        ({**SCENARIO1, "stream2_train_acc": math.nan}, "S-S1", False),
        ({**SCENARIO2, "stream2_val_acc": 0.475}, "S-S2", False),
        ({**SCENARIO2, "stream2_val_acc": down(0.475)}, "S-S2", True),
        ({**SCENARIO2, "stream2_overfitting_score": 1.0}, "S-S2", False),
        ({**SCENARIO3, "stream1_train_acc": 0.15}, "S-NL", False),
        ({**SCENARIO3, "stream1_train_acc": down(0.15)}, "S-NL", True),
        ({**SCENARIO3, **norms(4.0, 1.0)}, "S-NL", False),
        ({**norms(1.0, 1.0), "stream1_train_acc": 0.11}, "S-NL", False),
        ({**SCENARIO4, "stream2_contribution": 0.475}, "S-S4", False),
        ({**SCENARIO4, "stream2_contribution": down(0.475)}, "S-S4", True),
        ({**SCENARIO4, **weights(2.0, 1.0)}, "S-S4", False),
        ({**weights(245.3, 87.1), "stream1_val_acc": 0.6, "stream2_val_acc": 0.1}, "S-S4", True),
        ({**weights(87.1, 245.3), "stream1_val_acc": 0.6, "stream2_val_acc": 0.1}, "S-S4", False),
        ({**SCENARIO4, "stream2_contribution": math.nan}, "S-S4", False),
    ],
)
def test_the_bounds_of_the_scenarios(columns: dict[str, float], rule: str, fires: bool) -> None:
    assert (rule in [finding.rule for finding in advice(columns)]) is fires


# --- the defects of the original ---


def test_defect_1_stream2_all_zero_raised_zero_division_error() -> None:
    (finding,) = advice(norms(1.0, 0.0))
    assert finding == undefined(2)
    assert (finding.rule, finding.stream, finding.action) == ("S-GV", "stream2", None)


def test_defect_2_stream1_all_zero_was_infx_larger() -> None:
    assert advice(norms(0.0, 1.0)) == [undefined(1)]
    assert advice(norms(0.0, 0.0)) == [undefined(1), undefined(2)]


def test_defect_3_both_norms_tiny_was_balanced() -> None:
    assert advice(norms(1e-12, 1e-12)) == [vanishes(1, "1e-12"), vanishes(2, "1e-12")]
    assert advice(norms(1e-10, 1e-12)) == [vanishes(1, "1e-10"), vanishes(2, "1e-12")]


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_defect_4_a_nan_gradient_was_balanced(norm: float) -> None:
    assert advice(norms([1.0, norm], [1.0, 1.0])) == [nonfinite(1, f"norm {norm}")]


def test_defect_4_non_finite_elements_beside_a_finite_norm() -> None:
    (finding,) = advice({**norms([1.0, 1.0], [1.0, 1.0]), "stream2_grad_nonfinite": [0, 12, 3, 0]})
    assert finding == nonfinite(2, "12 elements")
    assert (finding.rule, finding.stream, finding.evidence) == ("S-NF", "stream2", {"elements": 12.0})
    assert advice({**norms(1.0, 1.0), "stream2_grad_nonfinite": 0}) == ["✓ Gradient ratio balanced (1.00)"]


def test_defect_4_is_over_once_it_has_left_the_window() -> None:
    assert advice(norms([math.nan] + [1.0] * 5, [1.0] * 6)) == ["✓ Gradient ratio balanced (1.00)"]


@pytest.mark.parametrize(("first", "second"), [(-0.2, -0.5), (0.003, 0.001), (0.4, 0.1), (-0.5, -0.2)])
def test_defect_5_small_scores_were_significantly_more(first: float, second: float) -> None:
    assert advice(scores(first, second)) == HEALTHY


@pytest.mark.parametrize("other", [0.0, -0.3])
def test_defect_6_the_ratio_of_a_score_of_zero_or_less_was_zero(other: float) -> None:
    findings = advice(scores(1.5, other))
    assert findings == [overfits(1, "1.50"), more(1)]
    assert all("ratio" not in finding.evidence for finding in findings)


def test_defect_7_a_train_accuracy_of_one_was_stalled() -> None:
    assert advice({"stream1_train_acc": [1.0] * 6, "stream2_train_acc": [1.0] * 6}) == HEALTHY


def test_defect_8_a_weight_ratio_of_100_was_healthy() -> None:
    assert advice(weights(100.0, 1.0)) == [heavier(1, 2, "100.0")]


# --- one stream, more than two ---

SIX = tuple(f"s{i}" for i in range(6))


def test_of_many_streams_the_largest_is_compared_with_the_smallest() -> None:
    columns = {f"{name}_grad_norm": norm for name, norm in zip(SIX, (1, 2, 0.5, 4, 1, 1), strict=True)}
    (finding,) = advice(columns, SIX)
    assert finding == "⚠️  S3 gradients 8.0x larger than S2 - consider reducing s3_lr"
    assert finding.evidence["ratio"] == 0.125  # s2 over s3, as in the key s2_to_s3_ratio


def test_of_many_streams_the_balanced_line_has_the_extreme_ratio() -> None:
    columns = {f"{name}_grad_norm": norm for name, norm in zip(SIX, (1, 2, 1, 1, 1, 1), strict=True)}
    assert advice(columns, SIX) == ["✓ Gradient ratio balanced (2.00)"]


def test_of_many_streams_a_missing_one_is_named_and_the_others_compared() -> None:
    columns = {"s0_grad_norm": 0.0, "s1_grad_norm": 8.0, "s2_grad_norm": 1.0}
    missing = "⚠️  Gradient ratio undefined: S0 has no gradient (norm 0)"
    assert advice(columns, SIX[:3]) == [
        missing,
        "⚠️  S1 gradients 8.0x larger than S2 - consider reducing s1_lr",
    ]
    assert advice({**columns, "s1_grad_norm": 1.0}, SIX[:3]) == [missing]


def test_of_many_streams_the_largest_score_is_compared_with_the_second() -> None:
    def said(*values: float) -> list[Finding]:
        columns = {f"{name}_overfitting_score": value for name, value in zip(SIX, values, strict=False)}
        return [finding for finding in advice(columns, SIX[:3]) if finding.rule in ("S-OR", "S-OB")]

    assert said(3.0, 1.1, 1.2) == [
        "⚠️  S0 overfitting significantly more - boost s0 regularization",
        "⚠️  All 3 streams overfitting - increase global dropout_p or add data augmentation",
    ]
    assert said(3.0, 0.1, 2.0) == []


def test_a_single_stream_has_no_ratio() -> None:
    assert advice({"a_grad_norm": 1.0}, ("a",)) == HEALTHY
    assert advice({"a_grad_norm": 0.0}, ("a",)) == ["⚠️  A has no gradient (norm 0)"]
    assert advice({"a_overfitting_score": 2.0, "a_weight_norm": 0.0}, ("a",)) == [
        "⚠️  A overfitting (score: 2.00) - increase a_weight_decay or add dropout"
    ]


# --- fields ---


def test_fields_of_a_finding() -> None:
    history = History()
    for step in (10, 20):
        history.append(step, 1.0, {"stream1_grad_norm": 8.0, "stream2_grad_norm": 2.0})
    history.append(30, 2.0, {"loss": 1.0})
    (finding,) = recommend(history, TWO, KNOWN, severity=Severity.warning)
    assert (finding.rule, finding.severity, finding.stream) == ("S-GR", Severity.warning, "stream1")
    assert (finding.step, finding.rank) == (20, None)
    assert finding.evidence == {
        "ratio": 4.0,
        "threshold": 3.0,
        "entries": 2,
        "stream1_grad_norm": 8.0,
        "stream2_grad_norm": 2.0,
    }
    assert finding.action == Action("lr", "stream1", value=5e-5, old=1e-4)


def test_step_and_entries_where_streams_were_logged_at_different_cadences() -> None:
    (finding,) = advice(norms([4.0] * 4, [1.0, 1.0]))
    assert (finding.step, finding.evidence["entries"]) == (3, 2)


@pytest.mark.parametrize(("first", "second", "threshold"), [(4.0, 1.0, 3.0), (1.0, 4.0, 0.33), (1.0, 1.0, 3.0)])
def test_the_threshold_is_the_end_of_the_band_that_is_nearer(first: float, second: float, threshold: float) -> None:
    (finding,) = advice(norms(first, second))
    assert finding.evidence["threshold"] == threshold


def test_severity_is_that_of_warnings_only() -> None:
    balanced, stalled = advice({**norms(1.0, 1.0), "stream1_train_acc": [0.5] * 6}, severity=Severity.error)
    assert (balanced.severity, stalled.severity) == (Severity.info, Severity.error)


@pytest.mark.parametrize(
    ("columns", "rule", "settings", "expected"),
    [
        (norms(1e-9, 1e-9), "S-GV", StreamSettings(lr=1e-3), ("lr", 5e-3)),
        (norms(5e3, 4e3), "S-GX", StreamSettings(lr=1e-3), ("lr", 5e-4)),
        ({"stream1_train_acc": [0.5] * 6}, "S-ST", StreamSettings(lr=1e-3), ("lr", 5e-3)),
        (weights([9.0] * 5, [9, 10, 11, 12, 13]), "S-WS", StreamSettings(lr=1e-3), ("lr", 5e-3)),
        (
            weights([1, 2, 3, 4, 5, 6], 6.0),
            "S-WD",
            StreamSettings(weight_decay=1e-2),
            ("weight_decay", 2.5e-2),
        ),
        (weights(3.0, 1.0), "S-WR", StreamSettings(weight_decay=0.0), ("weight_decay", 1e-4)),
        (weights(3.0, 1.0), "S-WR", StreamSettings(), None),
        (norms(4.0, 1.0), "S-GR", StreamSettings(lr=math.nan), None),
        (norms(4.0, 1.0), "S-GR", StreamSettings(lr=math.inf), None),
        (norms(4.0, 1.0), "S-GR", StreamSettings(lr=0.0), None),
    ],
)
def test_actions(
    columns: dict[str, float], rule: str, settings: StreamSettings, expected: tuple[str, float] | None
) -> None:
    findings = advice(columns, settings={"stream1": settings})
    (finding,) = [f for f in findings if (f.rule, f.stream) == (rule, "stream1")]
    if expected is None:
        assert finding.action is None
    else:
        assert changed(finding)[:3] == (expected[0], "stream1", expected[1])


def test_a_frozen_stream_is_neither_stalled_nor_stagnant() -> None:
    columns = {"stream1_train_acc": [0.5] * 6, **weights([9.0] * 5, [9, 10, 11, 12, 13])}
    assert advice(columns, settings={"stream1": StreamSettings(lr=0.0)}) == HEALTHY


def test_advice_without_known_settings_has_no_numbers() -> None:
    (finding,) = [finding for finding in advice(SCENARIO1) if finding.rule == "S-S1"]
    assert "increase stream1_lr, reduce stream1_weight_decay, check" in finding
    assert finding.action is None


# --- pure and total ---

ODD = (0.0, -0.0, 1.0, -1.0, 1e-12, 1e12, 5e-324, 1.7e308, -1.7e308, math.nan, math.inf, -math.inf)
FIGURES = (*keys.GRAD_FIGURES, *keys.WEIGHT_FIGURES, *keys.OVERFIT_FIGURES, keys.CONTRIBUTION)
ALL_RULES = {
    *("S-NF", "S-GV", "S-GX", "S-GR", "S-OF", "S-OM", "S-OR", "S-OB", "S-ST", "S-WR", "S-WD", "S-WS"),
    *("S-S1", "S-S2", "S-NL", "S-S4", "S-PH", "S-OK"),
}


def random_history(draw: random.Random, streams: Sequence[str]) -> History:
    """Any keys, any lengths; some histories of odd values, some of plausible ones, some that stand still."""
    history = History(limit=draw.choice((1, 5, 100)))
    odd = draw.choice((0.0, 0.1, 0.9))
    scale = draw.choice((1e-9, 1.0, 1e4))
    for stream in (*streams, "shared"):
        for figure in FIGURES:
            base = scale * draw.random()
            growth = draw.choice((1.0, 1.0, 1.3))
            for step in range(draw.choice((0, 1, 2, 5, 6, 12))):
                value = draw.choice(ODD) if draw.random() < odd else base * growth**step
                history.append(step, draw.choice((None, 1.0)), {keys.of_stream(stream, figure): value})
    if draw.random() < 0.5:
        history.append(0, None, {"epoch": draw.choice((0, 50, 99, math.nan))})
    return history


def random_settings(draw: random.Random, streams: Sequence[str]) -> dict[str, StreamSettings]:
    values = (*ODD, 1e-4, 2e-2)
    some = [stream for stream in (*streams, "shared") if draw.random() < 0.7]
    return {stream: StreamSettings(draw.choice(values), draw.choice(values)) for stream in some}


@pytest.mark.parametrize("count", [0, 1, 2, 3, 6])
def test_any_history_gives_findings_and_is_left_as_it_was(count: int) -> None:
    draw = random.Random(count)
    streams = SIX[:count]
    for _ in range(60):
        history, settings = random_history(draw, streams), random_settings(draw, streams)
        before = repr(history.state_dict())
        findings = recommend(history, streams, settings, severity=Severity.warning)
        assert repr(history.state_dict()) == before
        again = recommend(history, streams, settings, severity=Severity.warning)
        assert [repr(finding.to_dict()) for finding in findings] == [repr(f.to_dict()) for f in again]
        assert findings
        for finding in findings:
            json.dumps(finding.to_dict())
            assert finding.rule in ALL_RULES
            assert (finding.severity is Severity.warning) == finding.startswith("⚠️  ")
            assert finding.stream in (None, "shared", *streams)
            assert "infx" not in finding and "nanx" not in finding and "(nan)" not in finding
            if finding.action is not None:
                assert finding.action.stream in (*streams, "full")
                assert 0 < finding.action.value < math.inf and finding.action.value != finding.action.old
            if "balanced (" in finding:
                assert not any(math.isnan(value) for value in finding.evidence.values())


def test_every_rule_can_fire_and_is_in_the_table() -> None:
    draw = random.Random(0)
    fired = set()
    for _ in range(200):
        history = random_history(draw, TWO)
        fired |= {finding.rule for finding in recommend(history, TWO, KNOWN)}
    for scenario in (
        SCENARIO1,
        SCENARIO2,
        SCENARIO3,
        SCENARIO4,
        {"epoch": 1},
        weights([9.0] * 5, [9, 10, 11, 12, 13]),
    ):
        fired |= {finding.rule for finding in advice(scenario)}
    assert fired == ALL_RULES
    table = inspect.getdoc(guide) or ""
    assert {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| S-")} == ALL_RULES


@pytest.mark.parametrize("module", [guide_gradients, guide_learning, guide_weights, guide_scenarios])
def test_every_rule_of_a_module_is_asked(module: object) -> None:
    public = [
        function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__annotations__.get("return") == "list[Finding]" and function.__module__ == vars(module)["__name__"]
    ]
    assert set(public) - {guide_scenarios.late_training} == set(vars(module)["RULES"])
