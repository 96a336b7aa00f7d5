"""Every rule's advice is taken from its finding to a configuration, and from there to what the training reads."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from ddp_streammon import keys
from ddp_streammon.config import Intent
from ddp_streammon.report import as_override
from ddp_streammon.rules import evidence
from ddp_streammon.rules.finding import Action, Finding, StreamSettings
from ddp_streammon.train.__main__ import composed, data_and_model
from ddp_streammon.train.config import load
from ddp_streammon.train.training import build
from tests import test_guide_rules as guide
from tests.steps import said
from tests.test_evidence_rules import PLANTED, by_step, every, of_fou

RATE, DECAY = 0.05, 1e-4
"""As `tests.steps` has them."""
STREAM = {"fou": "stream1", "pix": "stream2"}
"""What the rules' tests call a stream -> what this configuration does."""
SETTINGS = (keys.LEARNING_RATE, keys.WEIGHT_DECAY)
Read = Mapping[tuple[str, str], float]
"""(stream, setting) -> what the training has: of parameter groups, and of the trainer as `full`."""


@functools.cache
def read(*overrides: str) -> Read:
    """What a training reads that is built from the configuration with these overrides."""
    size = ("data=synthetic", "model=multi_mlp", "model.hidden=[2]", "data.train=20", "data.validation=20")
    apart = ("monitor.enabled=false", "evaluation=off", "trainer.resume=null")
    streams = ("streams=synthetic", "data.streams={stream1: [4], stream2: [3]}")
    base = (f"optim.lr={RATE}", f"optim.weight_decay={DECAY}", "trainer.clip_norm=1e-4")
    config = composed([*size, *apart, *streams, *base, *overrides])
    settings = load(config)
    training = build(settings, *data_and_model(config, settings), Path(), {}, torch.device("cpu"))
    groups = {(group["stream"], s): float(group[s]) for group in training.optimizer.param_groups for s in SETTINGS}
    assert training.config.trainer.clip_norm is not None
    return {**groups, (keys.FULL, "clip_norm"): training.config.trainer.clip_norm}


@functools.cache
def of_evidence() -> tuple[Finding, ...]:
    return tuple(_of_evidence())


def _of_evidence() -> Iterator[Finding]:
    for name in PLANTED:
        yield from by_step(name)[0].values()
    clipped = Intent(frozen=(), clip_norm=1e-4, classes=10, total_steps=2000)
    for streams in ({"fou": {"update": 1e-7}, "pix": {"update": 1e-7}}, {"fou": {"update": 1e-7}}):
        yield from said(every(samples=streams), intent=clipped).values()
    apart = {rank: {"base_lr": (RATE, RATE, RATE / 2)} for rank in (0, 1)}
    yield from said(every(samples={s: {"update": 1e-7} for s in ("fou", "pix")}, details=apart)).values()
    decays = {rank: {"weight_decay": (DECAY, DECAY, 1.0)} for rank in (0, 1)}
    yield from said(every(facts=decays)).values()
    halfway = {rank: {"lr": (RATE / 2,) * 3} for rank in (0, 1)}
    yield from said(every(samples=of_fou(update=0.4), facts=halfway)).values()


def of_guide() -> Iterator[Finding]:
    known = {name: StreamSettings(RATE, DECAY) for name in (*guide.TWO, keys.SHARED)}
    samples = [guide.SCENARIO1, guide.SCENARIO2, guide.SCENARIO3, guide.SCENARIO4]
    samples += [columns for columns, _ in guide.CASES.values()]
    for columns in samples:
        yield from guide.advice(columns, settings=known)


def actions() -> list[tuple[str, Action]]:
    """Each rule's, once."""
    found = [(finding.rule, finding.action) for finding in (*of_evidence(), *of_guide())]
    return list(dict.fromkeys((rule, action) for rule, action in found if action is not None))


def test_these_rules_have_something_to_set_and_no_others() -> None:
    assert {rule for rule, _ in actions()} == {
        *("RATE", "DECAY", "LR", "LRL", "LRH", "WGR", "WSH", "CLP"),
        *("S-GV", "S-GX", "S-GR", "S-OF", "S-OR", "S-ST", "S-WR", "S-WD", "S-WS", "S-S1", "S-S2", "S-NL"),
        "S-S4",
    }


def test_an_action_reaches_what_the_training_reads_and_nothing_else() -> None:
    for rule, action in actions():
        stream = STREAM.get(action.stream, action.stream)
        old = Action(action.setting, stream, action.old, math.nan)
        as_it_was = () if stream == keys.FULL else (as_override(old),)
        before = read(*as_it_was)
        after = read(*as_it_was, as_override(Action(action.setting, stream, action.value, action.old)))
        changed = {place: (before[place], value) for place, value in after.items() if value != before[place]}
        everywhere = [place for place in before if place[1] == action.setting]
        assert list(changed) == (everywhere if stream == keys.FULL else [(stream, action.setting)]), rule
        assert all(pair == pytest.approx((action.old, action.value), rel=1e-3) for pair in changed.values()), rule


def test_a_rate_is_changed_where_its_schedule_starts() -> None:
    halfway = {rank: {"lr": (RATE / 2,) * 3} for rank in (0, 1)}
    found = said(every(samples=of_fou(update=0.4), facts=halfway))["LRH", "fou", None]
    assert found.action == Action("lr", "fou", value=0.001, old=RATE)  # a step at 0.025 changes 0.4, and 0.01 is meant
    assert "at learning rate 0.025" in found.seen
    assert found.do.startswith("learning rate 0.05 -> 0.001")


def test_streams_that_differ_in_their_rates_are_not_given_one() -> None:
    rates = {rank: {"base_lr": (RATE, RATE / 2, RATE)} for rank in (0, 1)}
    found = said(every(samples={s: {"update": 1e-7} for s in ("fou", "pix")}, details=rates))["LRL", None, None]
    assert found.action is None
    assert found.do.startswith("learning rate x 1e+04 (")


OVERRIDE = re.compile(r"(?<![\w.])((?:streams|optim|trainer|model|data|evaluation|rules)\.[\w.]+=[\w.-]+)")


def test_overrides_in_the_text_of_advice_change_the_configuration() -> None:
    texts = {found.do for found in of_evidence()}
    overrides = {match.replace("fou", "stream1") for text in texts for match in OVERRIDE.findall(text)}
    assert overrides == {"streams.stream1.frozen=true"}
    base = ["data=synthetic", "streams=synthetic"]
    assert not load(composed(base)).streams["stream1"].frozen
    assert load(composed([*base, *overrides])).streams["stream1"].frozen


def test_every_rule_of_the_catalogue_was_asked() -> None:
    found = {finding.rule for finding in of_evidence()}
    assert {rule.id for rule in evidence.RULES} - found == {"SYNC", "OUTLIER", "BF16"}  # of real ranks, without actions
