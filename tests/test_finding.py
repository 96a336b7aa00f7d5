"""A finding is its sentence, and keeps its fields wherever it goes."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from ddp_streammon.config import Severity
from ddp_streammon.rules.finding import Action, Finding, StreamSettings

SENTENCE = "⚠️  Stream1 gradients 4.2x larger than Stream2 - consider reducing stream1_lr"
FIELDS: dict[str, Any] = {
    "rule": "S-GR",
    "severity": Severity.warning,
    "stream": "stream1",
    "rank": 3,
    "step": 8412,
    "evidence": {"ratio": 4.2, "threshold": 3.0},
    "action": Action("lr", "stream1", value=5e-5, old=1e-4),
}


def full() -> Finding:
    return Finding(SENTENCE, **FIELDS)


def fields_of(finding: Finding) -> dict[str, Any]:
    return {name: getattr(finding, name) for name in FIELDS}


def test_it_is_its_sentence() -> None:
    finding = full()
    assert isinstance(finding, str)
    assert finding == SENTENCE
    assert "⚠️" in finding
    assert f"{finding}" == "".join([finding]) == str(finding) == SENTENCE
    assert {SENTENCE: 1}[finding] == 1
    assert type(str(finding)) is str


def test_fields() -> None:
    assert fields_of(full()) == FIELDS


def test_defaults() -> None:
    finding = Finding("said", rule="S-OK")
    assert fields_of(finding) == {
        "rule": "S-OK",
        "severity": Severity.info,
        "stream": None,
        "rank": None,
        "step": None,
        "evidence": {},
        "action": None,
    }


def test_a_rule_is_needed_and_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="rule"):
        Finding("said")
    with pytest.raises(TypeError, match="ruel"):
        Finding("said", ruel="S-OK")


def test_fields_cannot_be_set() -> None:
    with pytest.raises(FrozenInstanceError):
        full().fields.rule = "S-OK"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        full().rule = "S-OK"  # type: ignore[misc]


COPIES: list[Callable[[Finding], Finding]] = [
    copy.copy,
    copy.deepcopy,
    *[
        lambda finding, protocol=protocol: pickle.loads(pickle.dumps(finding, protocol))
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    ],
]


@pytest.mark.parametrize("duplicate", COPIES)
def test_copies_keep_everything(duplicate: Callable[[Finding], Finding]) -> None:
    for finding in (full(), Finding("said", rule="S-OK")):
        other = duplicate(finding)
        assert type(other) is Finding
        assert other == finding
        assert fields_of(other) == fields_of(finding)


def test_to_dict_is_plain() -> None:
    expected = {
        "finding": SENTENCE,
        "rule": "S-GR",
        "severity": "warning",
        "stream": "stream1",
        "rank": 3,
        "step": 8412,
        "evidence": {"ratio": 4.2, "threshold": 3.0},
        "action": {"setting": "lr", "stream": "stream1", "value": 5e-5, "old": 1e-4, "how": ""},
        "since": 8412,
        "seen": full().seen,
        "likely": "",
        "do": "",
        "confirm": "",
        "explained_by": None,
    }
    assert full().to_dict() == expected
    assert json.loads(json.dumps(full().to_dict())) == expected
    assert type(full().to_dict()["finding"]) is str
    assert json.loads(json.dumps([full()])) == [SENTENCE]


def test_unknown_settings_are_nan() -> None:
    settings = StreamSettings()
    assert settings.lr != settings.lr
    assert settings.weight_decay != settings.weight_decay
