"""The configuration: what is valid, and what is said of the rest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import HydraException

from ddp_streammon.config import MonitorConfig, RuleSet, Severity
from ddp_streammon.train.__main__ import composed, conf_dir, data_and_model, explain, name_in_wandb
from ddp_streammon.train.config import ConfigError, EvaluationSection, load, monitor_config
from ddp_streammon.train.sections import WandbSection

EXPERIMENTS = sorted(path.stem for path in Path(conf_dir(), "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_every_shipped_key_is_known(experiment: str) -> None:
    config = load(composed([f"experiment={experiment}"]))
    assert set(config.optim.streams) == {*config.streams, "shared"}


def test_the_default_experiment_is_two_views_of_the_digits() -> None:
    config = load(composed([]))
    assert list(config.streams) == ["fou", "pix"]
    assert config.monitor.enabled
    assert config.sinks.wandb.mode == "offline"
    assert monitor_config(config) == MonitorConfig(rules=RuleSet.evidence, rule_severity=Severity.info)


def test_what_was_chosen_names_the_wandb_run_unless_the_user_does() -> None:
    choices = {"experiment": "mine", "data": "mfeat", "rules": None, "hydra/help": "default"}
    section = WandbSection()
    name_in_wandb(section, choices)
    assert (section.name, section.group, section.tags) == (None, "mine", ["data=mfeat"])
    section = load(composed(["sinks.wandb.name=a", "sinks.wandb.group=b", "sinks.wandb.tags=[c,d]"])).sinks.wandb
    name_in_wandb(section, choices)
    assert (section.name, section.group, section.tags) == ("a", "b", ["c", "d"])


def test_streams_are_addressed_by_the_users_names() -> None:
    config = load(composed(["optim.streams.fou.lr=5e-4", "streams.pix.patience=3", "optim.streams.shared.lr=1e-5"]))
    assert config.optim.streams["fou"].lr == 5e-4
    assert config.optim.streams["pix"].lr is None
    assert config.streams["pix"].patience == 3
    assert config.optim.streams["shared"].lr == 1e-5


def test_a_stream_is_added_on_the_command_line() -> None:
    config = load(composed(["+streams.zer={}", "+optim.streams.zer.lr=1e-4"]))
    assert list(config.streams) == ["fou", "pix", "zer"]
    assert config.optim.streams["zer"].lr == 1e-4


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("trainer.epochs=0", "trainer.epochs must be at least 1, got 0"),
        ("trainer.batch_size=0", "trainer.batch_size must be at least 1, got 0"),
        ("trainer.clip_norm=-1", "trainer.clip_norm must be positive"),
        ("trainer.resume=/no/such.pt", "there is no file '/no/such.pt'; give the path of a checkpoint.pt"),
        ("monitor.every=0", "monitor.every must be at least 1, got 0"),
        ("evaluation.max_batches=0", "evaluation.max_batches must be at least 1, got 0"),
        ("streams.only={}", "streams.only must name one of the streams fou, pix .or be null., got {}; nearest: fou"),
        (
            "streams.only=foo",
            "streams.only must name one of the streams fou, pix .* got 'foo'; nearest: fou",
        ),
        ("sinks.wandb.mode=onlin", "sinks.wandb.mode must be one of auto, disabled, offline, online, got 'onlin'"),
        ("sinks.wandb.log_every=0", "sinks.wandb.log_every must be at least 1, got 0"),
        ("monitor.delay=-1", "monitor.delay must be an integer of at least 0, got -1"),
        ("optim.lr=-1", "lr must be finite and not negative, got -1"),
        ("optim.betas=[0.9]", r"optim.betas must be two numbers in \[0, 1\), got \[0.9\]"),
        ("optim.floor=2", r"floor must be in \[0, 1\], got 2"),
        ("streams.fou.patience=0", "streams.fou: patience must be at least 1, got 0"),
        (
            "+streams.fou.lr=1",
            "streams.fou.lr: no such key; valid keys: patterns, frozen, auxiliary, patience, min_delta",
        ),
        ("optim.streams.fou.lr=x", "optim.streams.fou: Value 'x' of type 'str' could not be converted to Float"),
        ("+optim.streams.rgb.lr=1", "optim.streams.rgb: there is no such stream; streams: fou, pix, shared"),
        ("optim.streams.fou=3", "optim.streams.fou must be a mapping with lr, weight_decay, got 3"),
    ],
)
def test_a_wrong_value_is_one_sentence(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load(composed([override]))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"every_epochs": 0}, "evaluation.every_epochs must be at least 1, got 0"),
        ({"every_steps": 0}, "evaluation.every_steps must be at least 1, got 0"),
        ({"limit": 0}, "evaluation.limit must be at least 1, got 0"),
        ({"seconds": 0.0}, r"evaluation.seconds must be a positive number \(or null\), got 0.0"),
        ({"share": 1.5}, r"evaluation.share must be above 0 and at most 1 \(or null\), got 1.5"),
        (
            {"every_epochs": 2, "every_steps": 50},
            "evaluation.every_epochs=2 and evaluation.every_steps=50 exclude each other: say one of them",
        ),
        ({"seconds": 1.0, "share": 0.1}, "evaluation.seconds and evaluation.share are two budgets for the same"),
        ({"solo": {"fou": []}}, "evaluation.solo needs evaluation=full, got evaluation=fast"),
    ],
)
def test_what_an_evaluation_is_told_is_checked(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        EvaluationSection(**given)


def test_an_evaluation_comes_after_epochs_or_after_steps() -> None:
    default, rare, steps = EvaluationSection(), EvaluationSection(every_epochs=3), EvaluationSection(every_steps=50)
    assert [default.ends(1), rare.ends(2), rare.ends(3), steps.ends(1)] == [True, False, True, False]
    assert [default.due(50), steps.due(49), steps.due(100)] == [False, False, True]


@pytest.mark.parametrize(
    ("solo", "text"),
    [
        ("3", r"evaluation.solo must be a mapping of streams to runs, '\{fou: \[RUN_DIR, RUN_DIR\]\}', got 3"),
        ("{rgb: [a, b]}", "evaluation.solo.rgb: there is no such stream; streams: fou, pix"),
        ("{fou: [a]}", r"evaluation.solo.fou must be a list of at least two runs .*streams.only=fou .*; got \['a'\]"),
        ("{fou: [no, b]}", "evaluation.solo.fou: there is no file 'no'; give run directories or their checkpoint.pt"),
        (f"{{fou: [{__file__}, {__file__}]}}", "evaluation.solo.fou names a run twice: .*; give one of each seed"),
    ],
)
def test_references_are_at_least_two_runs_of_a_stream(solo: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load(composed(["evaluation=full", f"evaluation.solo={solo}"]))


def test_a_full_evaluation_needs_the_monitor() -> None:
    with pytest.raises(ConfigError, match="evaluation=full needs the monitor, got monitor.enabled=false: drop one"):
        load(composed(["evaluation=full", "monitor.enabled=false"]))


@pytest.mark.parametrize("experiment", ["mfeat_two", "mc_resnet"])
def test_one_stream_alone_reduces_streams_data_and_model(experiment: str) -> None:
    stream = {"mfeat_two": "pix", "mc_resnet": "edges"}[experiment]
    config = composed([f"experiment={experiment}", f"streams.only={stream}"])
    settings = load(config)
    assert list(settings.streams) == [stream]
    assert list(settings.optim.streams) == [stream, "shared"]
    data, model = data_and_model(config, settings)
    whole = composed([f"experiment={experiment}"])
    both, _ = data_and_model(whole, load(whole))
    x, target = data.validation[7]
    assert torch.equal(x, both.validation[7][1])
    assert torch.equal(target, both.validation[7][-1])
    assert data.streams == {stream: both.streams[stream]}
    assert model.stream_names == (stream,)


class Fixed(torch.nn.Module):
    """A model that is built for two streams, whatever it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.fou, self.pix = torch.nn.Linear(76, 10), torch.nn.Linear(240, 10)


def test_a_model_that_is_not_built_for_its_streams_has_no_part_of_one() -> None:
    config = composed(["streams.only=pix", "model=none", "+model._target_=tests.test_config.Fixed"])
    with pytest.raises(ConfigError, match=r"streams.only=pix needs a model that is built for the streams it is given"):
        data_and_model(config, load(config))


def test_a_learning_rate_for_a_frozen_stream_is_a_contradiction() -> None:
    with pytest.raises(ConfigError, match=r"optim.streams.fou has settings, but streams.fou.frozen says"):
        load(composed(["streams.fou.frozen=true", "optim.streams.fou.lr=0.1"]))


def test_a_configuration_without_streams_is_refused() -> None:
    with pytest.raises(ConfigError, match="streams is empty: name at least one"):
        load(composed(["~streams.fou", "~streams.pix", "data.streams=[fou]"]))


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("trainer.epoch=3", "trainer has epochs, batch_size, .*; nearest: epochs"),
        ("optim.streams.fuo.lr=1", "optim.streams has fou, pix, shared; nearest: fou"),
        ("monitor.evry=2", "nearest: every"),
        ("monitor.max_batches=2", "monitor has enabled, every, .*; nearest: "),
        ("sinks.wandb.mod=online", "sinks.wandb has enabled, mode, .*; nearest: mode"),
        ("trainr.epochs=2", "the configuration has data, model, streams, optim, .*; nearest: trainer"),
    ],
)
def test_an_unknown_key_is_refused_and_the_valid_ones_are_named(override: str, text: str) -> None:
    with pytest.raises(HydraException):
        composed([override])
    explanation = explain(["experiment=mfeat_two", override, "trainer.seed=1"])
    assert explanation.startswith(f"unknown key {override.split('=')[0]!r}: ")
    assert re.search(text, explanation)
    assert explanation.endswith(f"write +{override}") == (override.startswith("optim.streams."))


def test_known_keys_groups_and_additions_need_no_explanation() -> None:
    assert explain(["experiment=mfeat_six", "optim=sgd", "optim.lr=x", "+streams.a={}", "hydra.run.dir=x", "-m"]) == ""


def test_data_and_streams_that_do_not_fit_are_refused() -> None:
    config = composed(["data=synthetic"])
    with pytest.raises(ConfigError, match="the data have the streams stream1, stream2, the configuration fou, pix"):
        data_and_model(config, load(config))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["data.train=5000"], r"data \(ddp_streammon.train.data.mfeat\): ValueError: sizes must be"),
        (["model.fusion_type=sum"], "fusion_type must be one of concat, weighted, gated, got 'sum'"),
        (["data._target_=ddp_streammon.train.data.nothing"], "data .*nothing.*"),
        (["model._target_=collections.Counter"], "model._target_ must give an nn.Module, got Counter"),
        (["~model._target_"], "model._target_ is missing: give the dotted path of a function"),
        (
            ["streams.fou.patterns=[fuo]"],
            "streams: stream 'fou': pattern 'fuo' matches no parameter; nearest names: fou",
        ),
    ],
)
def test_what_a_target_raises_is_told_with_its_place(overrides: list[str], text: str) -> None:
    config = composed(overrides)
    with pytest.raises(ConfigError, match=text):
        data_and_model(config, load(config))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("every", 0, "monitor.every must be an integer of at least 1, got 0"),
        ("delay", -1, "monitor.delay must be an integer of at least 0, got -1"),
        ("delay", 1.5, "monitor.delay must be an integer of at least 0, got 1.5"),
        ("history_limit", 0, "monitor.history_limit must be an integer of at least 1, got 0"),
        ("rules", "best", "monitor.rules must be one of evidence, guide, off, got 'best'"),
        ("rule_severity", "loud", "monitor.rule_severity must be one of info, warning, error, got 'loud'"),
    ],
)
def test_the_monitors_own_configuration_is_checked(field: str, value: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MonitorConfig(**{field: value})  # type: ignore[arg-type]
