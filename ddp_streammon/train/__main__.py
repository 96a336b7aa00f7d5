"""`torchrun --nproc-per-node=2 -m ddp_streammon.train [preflight] [overrides]`: the application's command line."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ddp_streammon import keys
from ddp_streammon.report import to_set
from ddp_streammon.streams import StreamSet
from ddp_streammon.train import checkpoint
from ddp_streammon.train.config import ONLY, AppConfig, ConfigError, check_ranks, load, reduced
from ddp_streammon.train.data import StreamData
from ddp_streammon.train.loop import Result, run
from ddp_streammon.train.sections import WandbSection
from ddp_streammon.train.training import seed_all, stream_specs
from ddp_streammon.version import __version__

VERSION_BASE = "1.3"
OPEN = ("streams", "optim.streams", "data", "model", "rules.thresholds")
"""Mappings that take keys of the user's."""


def conf_dir() -> str:
    """The configuration folder: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"conf/config.yaml is neither in {package} nor beside it: reinstall ddp-streammon")


_entered = False


@hydra.main(version_base=VERSION_BASE, config_path=conf_dir(), config_name="config")
def _application(config: DictConfig) -> None:
    global _entered
    _entered = True
    try:
        _refuse_multirun()
        settings = load(config)
        check_ranks(settings, int(os.environ.get("WORLD_SIZE", "1")))
        seed_all(settings.trainer.seed)
        data, model = data_and_model(config, settings)
        solo = solo_models(config, settings, data)
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        name_in_wandb(settings.sinks.wandb, HydraConfig.get().runtime.choices)
        plain = OmegaConf.to_container(reduced(config), resolve=True)
        assert isinstance(plain, dict)
        result = run(settings, data, model, run_dir, {str(key): value for key, value in plain.items()}, solo)
    except ConfigError as error:
        raise SystemExit(f"configuration error: {error}") from None
    if _rank() == 0:
        print(where_to_look(result, run_dir), flush=True)


PREFLIGHT = ("preflight", "trainer.preflight=50")
"""What the command line's first word stands for."""


def main() -> None:
    """Run the application; a command line that Hydra refuses is explained with the valid keys."""
    if sys.argv[1:] == ["--version"]:
        print(__version__)
        return
    if sys.argv[1:2] == [PREFLIGHT[0]]:
        sys.argv[1] = PREFLIGHT[1]
    try:
        _application()
    except SystemExit as stop:
        if stop.code not in (None, 0) and not _entered and _rank() == 0:
            explanation = explain(sys.argv[1:])
            if explanation:
                print(explanation, file=sys.stderr)
        raise


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _refuse_multirun() -> None:
    if HydraConfig.get().mode == RunMode.MULTIRUN and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "--multirun cannot run under torchrun: every rank would run the whole sweep, and process groups cannot be "
            "made anew for each job. Start one torchrun a job instead, in a checkout with "
            "bash launch/sweep.sh optim.lr=1e-3,3e-4, elsewhere in a loop: "
            "for lr in 1e-3 3e-4; do torchrun --nproc-per-node=2 -m ddp_streammon.train optim.lr=$lr; done"
        )


_TAGGED = ("data", "model", "streams", "optim", "rules", "parallel")


def name_in_wandb(section: WandbSection, choices: Mapping[str, Any]) -> None:
    """The experiment as the run's group and what else was chosen as its tags, where the user gives none."""
    section.group = section.group or choices.get("experiment")
    section.tags = section.tags or [f"{group}={choices[group]}" for group in _TAGGED if choices.get(group)]


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration that these overrides give, without running anything."""
    with initialize_config_dir(config_dir=conf_dir(), version_base=VERSION_BASE):
        return compose("config", list(overrides))


def explain(arguments: list[str]) -> str:
    """Which keys of the command line do not exist, and what is valid in their place; empty if all do."""
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    groups = [item for item in overrides if re.match(r"[\w/]+=", item) and "." not in item.split("=", 1)[0]]
    try:
        config = composed(groups)
    except (HydraException, OmegaConfBaseException):
        config = composed([])
    lines = []
    for override in overrides:
        path = override.split("=", 1)[0]
        if path == "hydra" or path.startswith(("+", "~", "hydra.")) or (Path(conf_dir()) / path).is_dir():
            continue  # Hydra itself lists the choices of a group
        node: Any = config
        walked: list[str] = []
        for part in path.split("."):
            if not isinstance(node, DictConfig):
                break
            if part not in node:
                names = [str(name) for name in node]
                near = keys.nearest(part, names)
                where = ".".join(walked) or "the configuration"
                lines.append(f"unknown key {path!r}: {where} has {', '.join(names)}; nearest: {', '.join(near)}.")
                if where in OPEN:
                    lines[-1] += f" To add one of your own write +{override}"
                break
            node = node._get_node(part)
            walked.append(part)
    return "\n".join(lines)


def data_and_model(config: DictConfig, settings: AppConfig) -> tuple[StreamData, nn.Module]:
    """The data set and the model that the configuration names by `_target_`.

    A model's function is given `streams` (name -> shape of a sample) and `num_classes` if it takes them. With
    `streams.only` both are of that stream alone.
    """
    only = config.streams.get(ONLY)
    config = reduced(config)
    data = _instantiated("data", config.data, {})
    if not isinstance(data, StreamData):
        raise ConfigError(f"data._target_ must give a StreamData (ddp_streammon.train.data), got {type(data).__name__}")
    if only in data.streams and len(data.streams) > 1:
        data = data.only(only)
    if set(data.streams) != set(settings.streams):
        raise ConfigError(
            f"the data have the streams {', '.join(data.streams)}, the configuration {', '.join(settings.streams)}; "
            "choose the group that fits, e.g. streams=mfeat_six"
        )
    model = _model(config, data)
    if only is not None:
        _check_reducible(config, f"streams.only={only}")
    try:
        StreamSet.resolve(model, stream_specs(settings.streams))
    except ValueError as error:
        raise ConfigError(f"streams: {error}") from error
    return data, model


def solo_models(config: DictConfig, settings: AppConfig, data: StreamData) -> dict[str, list[nn.Module]]:
    """By stream the models of it alone that `evaluation.solo` names, with their weights, on the CPU."""
    config = reduced(config)
    found: dict[str, list[nn.Module]] = {}
    for name, files in settings.evaluation.solo.items():
        key = f"evaluation.solo.{name}"
        _check_reducible(config, key)
        for file in files:
            model = _model(config, data.only(name))
            model.load_state_dict(checkpoint.load(file, model, key)["model"])
            found.setdefault(name, []).append(model)
    return found


def _model(config: DictConfig, data: StreamData) -> nn.Module:
    model = _instantiated("model", config.model, {"streams": data.streams, "num_classes": data.num_classes})
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model._target_ must give an nn.Module, got {type(model).__name__}")
    return model


def _check_reducible(config: DictConfig, key: str) -> None:
    """ConfigError unless the model is built for the streams that it is given."""
    target = config.model.get("_target_")
    if target and ("streams" not in _parameters(target) or "streams" in config.model):
        raise ConfigError(
            f"{key} needs a model that is built for the streams it is given: let {target} take `streams` (name -> "
            "shape of a sample), and do not set model.streams"
        )


def _instantiated(group: str, node: DictConfig, offered: Mapping[str, Any]) -> Any:
    target = node.get("_target_")
    if not target:
        raise ConfigError(f"{group}._target_ is missing: give the dotted path of a function, or choose {group}=NAME")
    try:
        given = {name: value for name, value in offered.items() if name in _parameters(target) and name not in node}
        return instantiate(node, **given)
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's function raises is told with the place that names it
        cause = error.__cause__ or error
        raise ConfigError(f"{group} ({target}): {type(cause).__name__}: {cause}") from error


def _parameters(target: str) -> set[str]:
    found: Callable[..., Any] = get_object(target)
    return set(inspect.signature(found).parameters)


_SHOWN = ("full_train_acc", "full_val_acc", "full_val_loss", "full_test_acc")


def where_to_look(result: Result, run_dir: Path) -> str:
    """The last lines of a run: its figures, what stands, and its records."""
    if result.preflight is not None:
        return f"\n{result.preflight}"
    figures = ", ".join(f"{key} {result.figures[key]:.4f}" for key in _SHOWN if key in result.figures)
    lines = ["", f"Done: {figures}"]
    if result.stopped is not None:
        lines[1] = f"Stopped after step {result.stopped}, as asked for in W&B; started again in its folder it goes on"
    if result.findings:
        lines.append("Recommendations:")
        for finding in result.findings:
            action = f"  [{to_set(finding.action)}]" if finding.action else ""
            lines.append(f"  {finding.told()}{action}")
    lines.append("Where to look:")
    records = {"run directory": str(run_dir), **result.records}
    lines += [f"  {name:<13}  {place}" for name, place in records.items()]
    offline = result.records.get("W&B run", "")
    if Path(offline).name.startswith("offline-run"):
        lines.append(f"  {'to upload it':<13}  wandb sync {offline}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
