"""What a case is: a training program, its settings, and what a monitor should say of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

FAMILIES = (
    *("nonfinite", "exploding", "vanishing", "dead", "frozen", "lr_high", "lr_low", "lr_schedule", "stalled"),
    *("diverging", "imbalance", "overfitting", "input", "labels", "config", "init", "desync", "rank_outlier"),
    *("shard", "sampler", "straggler"),
)
"""Kinds of trouble, in which the verdicts of all monitors are told."""
FIRST, SECOND, BOTH = (0,), (1,), (0, 1)
"""Streams by their place; () is the whole model. BOTH: either of the two is right."""
CULPRIT = 1
"""The rank on which what concerns a single rank is planted."""


@dataclass(frozen=True)
class Setup:
    """Settings of a training. A tuple holds a value for each stream; its last one counts for all further streams."""

    views: str = "halves"
    encoder: str = "mlp"
    activation: tuple[str, ...] = ("relu",)
    depth: tuple[int, ...] = (2,)
    width: tuple[int, ...] = (64,)
    dropout: float = 0.0
    fusion: str = "concat"
    optimizer: str = "sgd"
    lr: float = 0.05
    """Of fusion and head, and of a stream times its `lr_scale`."""
    lr_scale: tuple[float, ...] = (1.0,)
    weight_decay: tuple[float, ...] = (1e-4,)
    momentum: float = 0.9
    batch: int = 64
    """Items of a step over all ranks."""
    epochs: int = 12
    items: int = 1200
    """Training items."""
    schedule: str = "constant"
    clip: float | None = None
    accumulate: int = 1
    autocast: str | None = None
    """bf16, or fp16 with a GradScaler."""
    label_smoothing: float = 0.0
    frozen: tuple[int, ...] = ()
    """Streams that are declared frozen."""
    seed: int = 0


@dataclass(frozen=True)
class Expect:
    """The ground truth: `families` name the fault, those of `accept` its direct symptoms or an equal diagnosis."""

    families: tuple[str, ...]
    accept: tuple[str, ...] = ()
    stream: tuple[int, ...] = ()
    rank: int | None = None
    onset: int = 0
    """The first step that is faulty: a verdict before it is a false alarm."""
    exact: bool = False
    """Whether no threshold is needed to tell: to be named within five steps of its onset."""

    def __post_init__(self) -> None:
        unknown = {*self.families, *self.accept} - set(FAMILIES)
        if unknown:
            raise ValueError(f"families must be some of {', '.join(FAMILIES)}, got {', '.join(sorted(unknown))}")


@dataclass(frozen=True)
class Case:
    name: str
    program: type
    """A `training.Training`."""
    setup: Setup = field(default_factory=Setup)
    expect: Expect | None = None
    """None: the training is healthy, and nothing should be said."""
    legal: bool = False
    """A control that is unusual, rather than a variation of an ordinary training."""
    extra: bool = False
    """Not counted with the others: a fault or a set-up that rules were not written for."""


CASES: dict[str, Case] = {}
Program = TypeVar("Program", bound=type)


def fault(
    name: str,
    *families: str,
    accept: Sequence[str] = (),
    stream: tuple[int, ...] = (),
    rank: int | None = None,
    onset: int = 0,
    exact: bool = False,
    extra: bool = False,
    **setup: Any,
) -> Callable[[Program], Program]:
    """Enter a program into the zoo as a planted fault."""
    expect = Expect(families, tuple(accept), stream, rank, onset, exact)

    def enter(program: Program) -> Program:
        _enter(Case(name, program, Setup(**setup), expect, extra=extra))
        return program

    return enter


def control(name: str, *, legal: bool = False, extra: bool = False, **setup: Any) -> Callable[[Program], Program]:
    """Enter a program into the zoo as a healthy one."""

    def enter(program: Program) -> Program:
        _enter(Case(name, program, Setup(**setup), legal=legal, extra=extra))
        return program

    return enter


def _enter(case: Case) -> None:
    if case.name in CASES:
        raise ValueError(f"there are two cases called {case.name!r}")
    CASES[case.name] = case
