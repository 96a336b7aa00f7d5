"""Cases on real processes: each group of ranks runs many, one after the other."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.ranks import run_ranks
from tests.zoo import beyond, controls, faults_data, faults_loop, faults_model, faults_optimizer, faults_ranks, legal
from tests.zoo.adapter import Adapter
from tests.zoo.cases import CASES, Case
from tests.zoo.scoring import Run, Verdict

MODULES = (faults_model, faults_optimizer, faults_data, faults_loop, faults_ranks, controls, legal, beyond)
"""Imported for the cases in them."""
CHUNK = 6
"""Cases of one group of processes."""
SECONDS = 90.0
"""Before a case is given up."""
KNOWN = {
    "streammon": "tests.zoo.adapter:StreamMonZoo",
    "guide": "tests.zoo.adapter:Guide",
    "gradsnitch": "tests.zoo.peers:GradSnitch",
    "traintools": "tests.zoo.peers:TrainTools",
    "trainpulse": "tests.zoo.peers:TrainPulse",
    "trainspotter": "tests.zoo.peers:TrainSpotter",
    "losslint": "tests.zoo.peers:LossLint",
}


class Watchers:
    """The adapters of one rank. One that raises is left out from then on; the training goes on."""

    def __init__(self, adapters: dict[str, Adapter]) -> None:
        self.adapters = adapters
        self.errors: dict[str, str] = {}

    def tell(self, method: str, *arguments: Any) -> None:
        for name in self.adapters:
            self.ask(name, method, *arguments)

    def ask(self, name: str, method: str, *arguments: Any) -> Any:
        """What an adapter answers; None once it has raised."""
        if name in self.errors:
            return None
        try:
            return getattr(self.adapters[name], method)(*arguments)
        except Exception:
            self.errors[name] = traceback.format_exc(limit=-6)
            return None


def adapter_class(spec: str) -> type[Adapter]:
    """`package.module:Class`, or the name of a known one."""
    module, _, name = KNOWN.get(spec, spec).partition(":")
    if not name:
        raise ValueError(f"a monitor is one of {', '.join(KNOWN)} or package.module:Class, got {spec!r}")
    found: type[Adapter] = getattr(importlib.import_module(module), name)
    return found


def missing(spec: str) -> str | None:
    """The package that a monitor needs and that is not installed."""
    package = adapter_class(spec).package
    return package if package is not None and importlib.util.find_spec(package) is None else None


def run_here(case_name: str, monitors: Sequence[str], offset: int = 0, **changes: Any) -> Run:
    """One case on this rank of a process group, watched; `changes` of its setup."""
    case = CASES[case_name]
    rank, world = dist.get_rank(), dist.get_world_size()
    setup = dataclasses.replace(case.setup, seed=case.setup.seed + offset, **changes)
    classes = {spec: adapter_class(spec) for spec in monitors}
    watchers = Watchers({spec: made() for spec, made in classes.items() if rank == 0 or not made.rank0_only})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = case.program(setup, rank, world)
        outcome = training.run(watchers)
        verdicts: dict[str, list[Verdict]] = {spec: watchers.ask(spec, "finish") or [] for spec in watchers.adapters}
    return Run(
        *(case_name, setup.seed, world, training.names, outcome.steps),
        *(outcome.loss, outcome.accuracy, outcome.seconds),
        verdicts,
        watchers.errors,
    )


def run_many(jobs: Sequence[tuple[str, int]], monitors: Sequence[str], changes: dict[str, Any]) -> list[Run]:
    """Several (case, offset) on this rank, one after the other."""
    return [run_here(name, monitors, offset, **changes) for name, offset in jobs]


def run_on(world: int, jobs: Sequence[tuple[str, int]], monitors: Sequence[str], **changes: Any) -> list[Run]:
    """The same on `world` new processes; rank 0's verdicts with every rank's errors."""
    ranks = run_ranks(world, run_many, list(jobs), list(monitors), changes, timeout=SECONDS * len(jobs))
    runs: list[Run] = ranks[0]
    for run, *others in zip(*ranks, strict=True):
        for other in others:
            run.errors = {**other.errors, **run.errors}
    return runs


def run_all(
    jobs: Sequence[tuple[str, int]], monitors: Sequence[str], *, world: int = 2, parallel: int = 1, **changes: Any
) -> Iterator[Run | tuple[str, str]]:
    """All jobs on `parallel` groups of processes; each run as it is done, or (case, what went wrong)."""
    chunks = [jobs[at : at + CHUNK] for at in range(0, len(jobs), CHUNK)]
    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(_or_apart, world, chunk, monitors, changes) for chunk in chunks]
        for future in as_completed(futures):
            yield from future.result()


def _or_apart(
    world: int, jobs: Sequence[tuple[str, int]], monitors: Sequence[str], changes: dict[str, Any]
) -> list[Run | tuple[str, str]]:
    """A group of cases; where one of them fails, each on its own, to know which."""
    try:
        return list(run_on(world, jobs, monitors, **changes))
    except AssertionError as error:
        if len(jobs) == 1:
            return [(jobs[0][0], str(error))]
        return [run for job in jobs for run in _or_apart(world, [job], monitors, changes)]


def save(runs: Sequence[Run], path: Path) -> None:
    """As JSON; what is not a number becomes null."""
    values = [dataclasses.asdict(run) for run in runs]
    for value in values:
        for key in ("loss", "accuracy"):
            value[key] = value[key] if math.isfinite(value[key]) else None
    path.write_text(json.dumps({"runs": values}, indent=1))


def load(paths: Sequence[Path]) -> list[Run]:
    """The runs of files that `save` wrote."""
    runs = []
    for path in paths:
        for value in json.loads(path.read_text())["runs"]:
            said = {name: [Verdict(**v) for v in verdicts] for name, verdicts in value.pop("verdicts").items()}
            numbers = {key: math.nan if value[key] is None else value[key] for key in ("loss", "accuracy")}
            runs.append(Run(**{**value, **numbers}, verdicts=said))
    return runs


def chosen(kinds: str, only: Sequence[str]) -> list[str]:
    """Names of cases: `only` those (a part of a name is enough), of a kind."""
    wanted: dict[str, Callable[[Case], bool]] = {
        "all": lambda case: not case.extra,
        "faults": lambda case: case.expect is not None and not case.extra,
        "controls": lambda case: case.expect is None and not case.extra,
        "extra": lambda case: case.extra,
        "any": lambda case: True,
    }
    names = [name for name in CASES if wanted[kinds](CASES[name]) and (not only or any(part in name for part in only))]
    if not names:
        raise ValueError(f"no case of kind {kinds!r} has a name with one of {', '.join(only)}")
    return names
