"""The application's configuration: Hydra composes it, the schema's dataclasses check it, nobody else sees OmegaConf."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from ddp_streammon import keys
from ddp_streammon.config import Intent, MonitorConfig, RuleSet
from ddp_streammon.rules import evidence
from ddp_streammon.rules.engine import Rule, adjusted
from ddp_streammon.train.sections import (
    AUTO,
    AppConfig,
    Device,
    Effort,
    EvaluationSection,
    Layout,
    ParallelSection,
    Precision,
    StreamOptimSection,
    StreamSection,
    TrainerSection,
)

__all__ = [
    "AUTO",
    "CHECKPOINT",
    "AppConfig",
    "ConfigError",
    "Device",
    "Effort",
    "EvaluationSection",
    "Layout",
    "ParallelSection",
    "Precision",
    "StreamSection",
    "TrainerSection",
    "check_ranks",
    "intent_of",
    "load",
    "monitor_config",
    "reduced",
]
CHECKPOINT = "checkpoint.pt"
"""Its name in a run directory."""
ONLY = "only"
"""Under `streams`, where all other keys are streams: the one that is trained alone."""


class ConfigError(ValueError):
    """The configuration is wrong; the text says where, what is valid, and what to do."""


def monitor_config(config: AppConfig, intent: Intent | None = None) -> MonitorConfig:
    """What the core's monitor is told. Errors: ConfigError for a rule of the user's that cannot be made."""
    return MonitorConfig(
        intent=intent or Intent(),
        mute=tuple(config.rules.mute),
        thresholds=dict(config.rules.thresholds),
        extra_rules=tuple(_rule(entry) for entry in config.rules.extra),
        every=config.monitor.every,
        delay=config.monitor.delay,
        audit_every=config.monitor.audit_every,
        update_every=config.monitor.update_every,
        local_gradients=config.monitor.local_gradients,
        history_limit=config.monitor.history_limit,
        rules=config.rules.name,
        rule_severity=config.rules.severity,
    )


def reduced(config: DictConfig) -> DictConfig:
    """The configuration without `streams.only`, and with that stream alone where it names one.

    Errors: ConfigError for a stream that there is not.
    """
    if ONLY not in config.streams:
        return config
    result = copy.deepcopy(config)
    with flag_override(result, "struct", False):
        only = result.streams.pop(ONLY)
        names = [str(name) for name in result.streams]
        if only is not None and only not in names:
            raise ConfigError(
                f"streams.only must name one of the streams {', '.join(names)} (or be null), got {only!r}; "
                f"nearest: {', '.join(keys.nearest(str(only), names, count=1))}"
            )
        for name in names if only is not None else ():
            if name != only:
                result.streams.pop(name)
                result.optim.streams.pop(name, None)
    return result


def intent_of(config: AppConfig, classes: int | None, total_steps: int | None) -> Intent:
    """What the configuration declares, for the rules. `classes` and `total_steps` as far as they are known."""
    names = [name for name, section in config.streams.items() if not section.frozen]
    own = config.optim.streams

    def of_streams(setting: str, base: float) -> dict[str, float]:
        values = {name: getattr(own.get(name), setting, None) for name in names}
        return {name: base if value is None else value for name, value in values.items()}

    return Intent(
        frozen=tuple(name for name, section in config.streams.items() if section.frozen),
        auxiliary=tuple(name for name, section in config.streams.items() if section.auxiliary),
        accumulate=config.trainer.accumulate,
        clip_norm=config.trainer.clip_norm,
        total_steps=total_steps,
        lr=of_streams("lr", config.optim.lr),
        weight_decay=of_streams("weight_decay", config.optim.weight_decay),
        classes=classes,
        schedule=config.optim.scheduler.value,
    )


def _rule(entry: Any) -> Rule:
    """A rule of the user's from its `_target_`."""
    try:
        rule = instantiate(entry)
    except Exception as error:  # whatever the user's class raises is told with the place that names it
        raise ConfigError(f"rules.extra ({entry}): {type(error).__name__}: {error}") from error
    if not isinstance(rule, Rule):
        raise ConfigError(
            f"rules.extra: {entry} gives a {type(rule).__name__}; make it a subclass of ddp_streammon.rules.engine.Rule"
        )
    return rule


def load(config: DictConfig) -> AppConfig:
    """The composed configuration as checked dataclasses. Errors: ConfigError, one sentence each."""
    config = reduced(config)
    try:
        streams = _entries("streams", config.streams, StreamSection)
        stream_optims = _entries("optim.streams", config.optim.streams, StreamOptimSection)
        loaded = OmegaConf.to_object(config)
        assert isinstance(loaded, AppConfig)
    except OmegaConfBaseException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not streams:
        raise ConfigError("streams is empty: name at least one, e.g. streams=mfeat_two or '+streams.rgb={}'")
    strangers = [name for name in stream_optims if name not in (*streams, keys.SHARED)]
    if strangers:
        raise ConfigError(
            f"optim.streams.{strangers[0]}: there is no such stream; streams: {', '.join(streams)}, {keys.SHARED}"
        )
    for name, section in streams.items():
        if section.frozen and stream_optims.get(name, StreamOptimSection()) != StreamOptimSection():
            raise ConfigError(
                f"optim.streams.{name} has settings, but streams.{name}.frozen says that it is not trained: "
                "drop one of them"
            )
    if loaded.trainer.precision is Precision.fp16 and loaded.parallel.name is not Layout.ddp:
        raise ConfigError(
            f"trainer.precision=fp16 needs a GradScaler, which works with parallel=ddp only, got "
            f"parallel={loaded.parallel.name.value}; say trainer.precision=bf16, or parallel=ddp"
        )
    if loaded.evaluation.name is Effort.full and not loaded.monitor.enabled:
        raise ConfigError(
            "evaluation=full needs the monitor, got monitor.enabled=false: drop one of them, or say evaluation=off"
        )
    loaded.evaluation.solo = _solo(loaded.evaluation.solo, streams)
    loaded.streams = streams
    loaded.optim.streams = stream_optims
    try:
        monitor = monitor_config(loaded)
        if monitor.rules is RuleSet.evidence:
            adjusted((*evidence.RULES, *monitor.extra_rules), monitor.mute, monitor.thresholds)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return loaded


def check_ranks(config: AppConfig, world_size: int) -> None:
    """ConfigError unless so many ranks can share the model as the configuration says."""
    try:
        config.parallel.check(world_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _solo(given: Any, streams: Mapping[str, Any]) -> dict[str, list[Path]]:
    """By stream the checkpoints that `evaluation.solo` names."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"evaluation.solo must be a mapping of streams to runs, '{{{next(iter(streams))}: [RUN_DIR, RUN_DIR]}}', "
            f"got {given!r}"
        )
    return {str(name): _runs(str(name), runs, streams) for name, runs in given.items()}


def _runs(name: str, given: Any, streams: Mapping[str, Any]) -> list[Path]:
    key = f"evaluation.solo.{name}"
    if name not in streams:
        raise ConfigError(f"{key}: there is no such stream; streams: {', '.join(streams)}")
    if not isinstance(given, list) or len(given) < 2:
        raise ConfigError(
            f"{key} must be a list of at least two runs (trained with streams.only={name} and different trainer.seed), "
            f"since seeds differ by as much as models do; got {given!r}"
        )
    files = [Path(str(run)) / CHECKPOINT if Path(str(run)).is_dir() else Path(str(run)) for run in given]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{key}: there is no file {str(file)!r}; give run directories or their {CHECKPOINT}")
    if len({file.resolve() for file in files}) < len(files):
        raise ConfigError(f"{key} names a run twice: {', '.join(map(str, files))}; give one of each seed")
    return files


Section = TypeVar("Section")


def _entries(path: str, node: Mapping[str, Any] | None, section: type[Section]) -> dict[str, Section]:
    """An open mapping's entries, each checked against `section`."""
    result: dict[str, Section] = {}
    for name, entry in (node or {}).items():
        given = {} if entry is None else entry
        valid = [item.name for item in fields(section)]  # type: ignore[arg-type]
        if not isinstance(given, Mapping):
            raise ConfigError(f"{path}.{name} must be a mapping with {', '.join(valid)}, got {given!r}")
        for key in given:
            if key not in valid:
                raise ConfigError(f"{path}.{name}.{key}: no such key; valid keys: {', '.join(valid)}")
        try:
            merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(section), given))
        except (OmegaConfBaseException, ValueError) as error:
            first = str(error).splitlines()[0]
            raise ConfigError(f"{path}.{name}: {first}; valid keys: {', '.join(valid)}") from error
        assert isinstance(merged, section)
        result[str(name)] = merged
    return result
