"""The reference: every key of a run and every rule is in it, with what it says and where its numbers come from."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest

from ddp_streammon import keys
from ddp_streammon.reference import METRICS, main, metric_lines, metric_of, rule_lines, thresholds
from ddp_streammon.rules import evaluated, evidence, guide
from ddp_streammon.rules.engine import Rule, adjusted
from ddp_streammon.sinks import read_jsonl

STREAMS = ("fou", "pix")
OWN = {"loss", "samples", "correct", "epoch", "train_loss", "train_acc", "val_loss", "val_acc"}
README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_every_key_of_a_full_run_is_in_the_reference(main_job: tuple[Path, str]) -> None:
    found = {key for record in read_jsonl(main_job[0] / "metrics.jsonl") for key in record.get("values", {})}
    assert len(found) > 200
    unknown = {key for key in found if metric_of(key, STREAMS) is None}
    assert unknown == OWN
    printed = "\n".join(metric_lines())
    for key in found - OWN:
        metric = metric_of(key, STREAMS)
        assert metric is not None and f"\n{metric.pattern}" in printed
        assert metric.formula and metric.unit and metric.source


@pytest.mark.parametrize(
    ("key", "pattern"),
    [
        ("stream10_grad_norm", "X_grad_norm"),
        ("shared_grad_norm", "X_grad_norm"),
        ("stream1_local_grad_norm_rank12", "X_local_grad_norm_rankR"),
        ("stream1_to_stream10_ratio", "X_to_Y_ratio"),
        ("stream1_to_stream10_weight_norm_ratio", "X_to_Y_weight_norm_ratio"),
        ("stream1_without_val_acc", "X_without_SPLIT_acc"),
        ("stream1_laziness_low", "X_laziness"),
        ("full_ensemble_gap", "X_ensemble_gap"),
        ("stream1_val_present", "X_SPLIT_present"),
        ("stream1_present", "X_present"),
        ("step_skipped", "step_skipped"),
        ("full_test_acc", "X_SPLIT_acc"),
        ("layer1_stream1_mean", "STAGE_mean"),
        ("stream1_grad_mean", "X_grad_mean"),
        ("full_model_acc_gap", "full_model_acc_gap"),
        ("stream1_grad_power", "X_grad_power"),
    ],
)
def test_a_key_stands_for_its_pattern(key: str, pattern: str) -> None:
    metric = metric_of(key, ("stream1", "stream10"))
    assert metric is not None and metric.pattern == pattern


@pytest.mark.parametrize("key", ["map", "other_grad_norm", "stream1_grad_norm_low", "stream1_grad_norms"])
def test_a_number_of_the_users_own_stands_for_none(key: str) -> None:
    assert metric_of(key, ("stream1",)) is None


def test_every_figure_of_keys_is_in_the_reference() -> None:
    patterns = " ".join(metric.pattern for metric in METRICS)
    figures = (*keys.GRAD_FIGURES, *keys.WEIGHT_FIGURES, *keys.UPDATE_FIGURES, *keys.OVERFIT_FIGURES, keys.LAZINESS)
    for figure in figures:
        assert any(metric_of(f"rgb_{figure}", ("rgb",)) is metric for metric in METRICS), figure
    assert len({metric.pattern for metric in METRICS}) == len(METRICS) and "X_SPLIT_uses" in patterns


@pytest.mark.parametrize("rule", evidence.RULES, ids=lambda rule: rule.id)
def test_a_rule_says_what_it_says_requires_and_how_it_is_overridden(rule: Rule) -> None:
    text = " ".join(" ".join(rule_lines([rule.id])).split())
    assert text.startswith(f"{rule.id} {rule.kind.value}, {rule.severity.value}")
    assert f'mute=("{rule.id}",)' in text and f"rules.mute=[{rule.id}]" in text
    assert all(name in text for name in rule.requires)
    patience = {item.name for item in fields(Rule)}
    notes = thresholds(type(rule))
    for item in fields(rule):
        assert f"{item.name}={getattr(rule, item.name):g}" in text
        assert item.name in patience or f"={getattr(rule, item.name):g}: {notes[item.name]}" in text
    (override,) = re.findall(r'thresholds=\{"(.*?)": (.*?)\}', text)
    (changed,) = (of for of in adjusted(evidence.RULES, (), {override[0]: float(override[1])}) if of.id == rule.id)
    assert changed == rule, "the override shown is the default"


def test_a_threshold_without_a_source_would_be_seen() -> None:
    @dataclass(frozen=True)
    class Unexplained(Rule):
        """X: nothing."""

        id: ClassVar[str] = "X"
        most: float = 1.0

    assert "most" not in thresholds(Unexplained)
    assert "hold" in thresholds(Unexplained)


def test_no_source_is_a_file_that_is_not_here() -> None:
    root = Path(evidence.__file__).parent
    for path in root.glob("*.py"):
        for name in re.findall(r"[\w/]+\.(?:md|py)\b", path.read_text()):
            assert any((folder / name).is_file() for folder in (root, root.parent.parent)), (path.name, name)


def test_all_rules_and_nothing_else_is_printed_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules"]) == 0
    printed = capsys.readouterr().out
    heads = re.findall(r"^([A-Z0-9]+)  \w+, \w+", printed, re.M)
    assert heads == [*(rule.id for rule in evidence.RULES), *evaluated.SAYS]
    assert set(re.findall(r"S-\w\w", guide.__doc__ or "")) <= set(re.findall(r"S-\w\w", printed))
    assert "with rules=guide and rules=off of these alone: NF, DET, DEAD, LR, " in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_names_choose_and_an_unknown_one_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "grad_share"]) == 0
    printed = capsys.readouterr().out
    assert "X_grad_share  [0 to 1]" in printed and "X_grad_norm  [" not in printed
    assert main(["rules", "NOPE"]) == 1
    assert capsys.readouterr().out == "nothing in rules has the name NOPE\n"


def test_the_readmes_excerpt_is_what_is_printed() -> None:
    blocks = re.findall(r"```text\n\$ python -m ddp_streammon\.reference (.*?)\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    for command, shown in blocks:
        part, *names = command.split()
        lines = "\n".join({"metrics": metric_lines, "rules": rule_lines}[part](names)).strip().splitlines()
        assert shown.rstrip().splitlines() == lines
