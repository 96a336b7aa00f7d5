"""`python -m ddp_streammon.reference metrics [KEY ...]` and `... rules [ID ...]`: what every key and every rule means.

Printed from this table and from the rules' own classes, so that it cannot say anything else than they do.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from ddp_streammon import keys
from ddp_streammon.rules import evaluated, evidence, guide
from ddp_streammon.rules.engine import Rule

WIDTH = 118
_SPLITS = ("train", "val", "test")
_STREAM, _OTHER, _SPLIT, _RANK, _STAGE = "X", "Y", "SPLIT", "R", "STAGE"


@dataclass(frozen=True)
class Metric:
    """A key of the record, W&B and `monitor.history`, by its pattern.

    X and Y are streams (`shared`, `full` among them), SPLIT is train, val or test, R a rank, STAGE a stage of a model.
    """

    pattern: str
    formula: str
    unit: str
    source: str
    """Where the number is taken from, and whose formula it is."""
    interval: bool = False
    """Whether it has a 95 % interval in `..._low` and `..._high` (and `..._detectable`, where that can be told)."""

    def regex(self, streams: Iterable[str]) -> re.Pattern[str]:
        """The keys that it stands for, in a model of these streams."""
        names = "|".join(re.escape(name) for name in (*streams, keys.SHARED, keys.FULL))
        stands_for = {
            _STREAM: f"(?:{names})",
            _OTHER: f"(?:{names})",
            _SPLIT: f"(?:{'|'.join(_SPLITS)})",
            _STAGE: r"\w+",
            f"rank{_RANK}": r"rank\d+",
        }
        body = "_".join(stands_for.get(part, re.escape(part)) for part in self.pattern.split("_"))
        bounds = "|".join((keys.LOW, keys.HIGH, keys.DETECTABLE))
        return re.compile(body + (f"(?:_(?:{bounds}))?" if self.interval else ""))


def _x(figure: str) -> str:
    return keys.of_stream(_STREAM, figure)


def _split(figure: str) -> str:
    return _x(f"{_SPLIT}_{figure}")


_GRADIENT = "the gradient after the ranks' average, unscaled, before clipping; finite elements"
_SEED = "the StreamMonitor guide"
_SWAP = "`monitor.evaluate`; permutation importance (Breiman 2001), items in pairs"
_PROBE = "`monitor.evaluate(train=...)`; closed-form ridge on frozen, standardised, projected features"
_ALONE = "the model's own head, with the features of the other streams at zero (the guide's)"
_MEAN = "`monitor.evaluate(train=...)`; features replaced by their mean over training items"
_EVALUATED = "`monitor.evaluate`; Wilson's interval (1927) of an accuracy"

METRICS: tuple[Metric, ...] = (
    Metric(_x(keys.GRAD_NORM), "sqrt(sum g^2)", "loss / weight", _GRADIENT),
    Metric(_x(keys.GRAD_MEAN), "mean of g", "loss / weight", _GRADIENT),
    Metric(_x(keys.GRAD_MAX), "max |g|", "loss / weight", _GRADIENT),
    Metric(_x(keys.GRAD_SHARE), "X_grad_norm^2 / the sum of it over all streams and shared", "0 to 1", _GRADIENT),
    Metric(_x(keys.GRAD_NONFINITE), "elements of g that are nan or infinite", "count", _GRADIENT),
    Metric(_x(keys.GRAD_ELEMENTS), "elements that have a gradient", "count", _GRADIENT),
    Metric(_x(keys.GRAD_TENSORS), "tensors that have a gradient", "count", _GRADIENT),
    Metric(_x(keys.GRAD_POWER), "sum over tensors of |g| |w|, L2 norms", "loss", "`monitor.compute_gradient_power()`"),
    Metric(keys.SKIPPED, "1 where the GradScaler skips the step", "0 or 1", "the GradScaler, where there is one"),
    Metric(
        keys.STOP, "ranks that are asked to end the job", "ranks", 'the application: "Stop run" of an online W&B run'
    ),
    Metric(
        keys.grad_ratio(_STREAM, _OTHER),
        "X_grad_norm / Y_grad_norm; nan where it means nothing (of features in `analyze_pathways`)",
        "1",
        f"{_SEED}; no property of the function",
    ),
    Metric(
        keys.of_rank(_STREAM, keys.LOCAL_NORM, 0).replace("0", _RANK),
        "sqrt(sum g^2) of rank R's own gradient, before the average; 16 ranks at most",
        "loss / weight",
        "`local_gradients=True`, under DDP",
    ),
    Metric(
        _x(keys.NOISE_SCALE),
        "tr(Sigma) / |G|^2 over the last 500 steps, at evaluations, where it is determined (McCandlish et al. 2018)",
        "samples",
        "`local_gradients=True` on 8 ranks and more",
        True,
    ),
    Metric(_x(keys.UPDATE_NORM), "|w after - w before| of an optimizer step", "weight", "`update_every=N`"),
    Metric(_x(keys.UPDATE_RATIO), "X_update_norm / |w before|", "1", "`update_every=N`"),
    Metric(_x(keys.WEIGHT_NORM), "sqrt(sum w^2) of tensors whose name holds `weight`", "weight", _SEED),
    Metric(_x(keys.WEIGHT_MEAN), "mean over these tensors of each tensor's mean", "weight", _SEED),
    Metric(_x(keys.WEIGHT_ELEMENT_MEAN), "mean over the elements of matrices and kernels", "weight", "this project"),
    Metric(keys.WEIGHT_NORM_RATIO, "X_weight_norm / Y_weight_norm of two streams", "1", _SEED),
    Metric(keys.weight_ratio(_STREAM, _OTHER, ("", "", "")), "the same of more than two streams", "1", _SEED),
    Metric(_x(keys.LEARNING_RATE), "of X's parameter group", "1", "the optimizer"),
    Metric(_x(keys.WEIGHT_DECAY), "of X's parameter group", "1", "the optimizer"),
    Metric(_x(keys.PRESENT), "share of the step's samples that have X", "0 to 1", "`step(present={...})`"),
    Metric(
        _x(f"{_SPLIT}_acc"), "share of right predictions: of X alone, `full` of the whole model", "0 to 1", _ALONE, True
    ),
    Metric(
        _x(f"{_SPLIT}_loss"), "mean loss over all items, by weight: of X alone, `full` of all", "loss", _ALONE, True
    ),
    Metric(_x(keys.ACC_GAP), "train - val accuracy (Newcombe 1998; Zou and Donner 2008)", "0 to 1", _ALONE, True),
    Metric(_x(keys.LOSS_GAP), "val - train loss", "loss", _ALONE, True),
    Metric(_x(keys.OVERFITTING_SCORE), "X_acc_gap + X_loss_gap", "mixed: adds loss to accuracies", _SEED),
    Metric(keys.overfit_ratio(_STREAM, _OTHER), "X_overfitting_score / Y's; nan unless both are positive", "1", _SEED),
    Metric(_x(f"{keys.WITHOUT}{_SPLIT}_acc"), "accuracy with X's features at zero, all others kept", "0 to 1", _ALONE),
    Metric(_x(f"{keys.WITHOUT}{_SPLIT}_loss"), "the loss of that", "loss", _ALONE),
    Metric(keys.FULL_MODEL_LOSS_GAP, "val_loss - train_loss that you pass", "loss", _SEED),
    Metric(keys.FULL_MODEL_ACC_GAP, "train_acc - val_acc that you pass", "0 to 1", _SEED),
    Metric(_split(keys.USES), "mean of (loss with another item's input for X) - (loss), by item", "loss", _SWAP, True),
    Metric(_split(f"{keys.USES}_acc"), "the fall of accuracy by that", "0 to 1", _SWAP, True),
    Metric(_split(keys.PRESENT), "share of the items that have X, where the score says so", "0 to 1", _EVALUATED),
    Metric(_split(keys.ABLATED), "mean of (loss with X's features at their mean) - (loss)", "loss", _MEAN, True),
    Metric(_split(f"{keys.ABLATED}_acc"), "the fall of accuracy by that", "0 to 1", _MEAN, True),
    Metric(_x(f"{_SPLIT}_{keys.ALONE}_acc"), "accuracy with all other features at their mean", "0 to 1", _MEAN, True),
    Metric(_x(f"{_SPLIT}_{keys.ALONE}_loss"), "loss with all other features at their mean", "loss", _MEAN, True),
    Metric(_x(f"{keys.ALONE}_{keys.ACC_GAP}"), "train - val of X_SPLIT_alone_acc", "0 to 1", _MEAN, True),
    Metric(_x(f"{keys.ALONE}_{keys.LOSS_GAP}"), "val - train of X_SPLIT_alone_loss", "loss", _MEAN, True),
    Metric(
        keys.cover(_STREAM, _OTHER, _SPLIT),
        "loss that exchanging both costs beyond the one and the other; up to 4 streams",
        "loss",
        _SWAP,
        True,
    ),
    Metric(
        _split(keys.SHAPLEY),
        "exact Shapley value of X, a coalition being the streams that are not exchanged; up to 3 streams",
        "loss",
        "`monitor.evaluate(train=...)`; Shapley 1953",
        True,
    ),
    Metric(_split(f"{keys.SHAPLEY}_acc"), "the same of the accuracy", "0 to 1", "Shapley 1953", True),
    Metric(_x(keys.KNOWS_SCORE), "held-out accuracy (or R^2) of a ridge probe of X's features", "0 to 1", _PROBE, True),
    Metric(_x(keys.KNOWS), "X_knows_score less that of the majority class (or the mean)", "0 to 1", _PROBE, True),
    Metric(_x(keys.COMPLEMENT), "probe of all streams less that of all but X, paired", "0 to 1", _PROBE, True),
    Metric(_x(keys.HEAD_GAP), "probe of all streams less the model, paired (`full`)", "0 to 1", _PROBE, True),
    Metric(
        _x(keys.LAZINESS),
        "probe of models trained on X alone less that of X's encoder here; Student's t over seeds",
        "0 to 1",
        "`evaluation.solo`",
        True,
    ),
    Metric(
        _x(keys.ENSEMBLE_GAP),
        "accuracy of the averaged log-probabilities of models of one stream each less the model's (`full`)",
        "0 to 1",
        "`evaluation.solo`; Newcombe 1998",
        True,
    ),
    Metric(f"{_STAGE}_mean", "mean of a stage's output, of X in `STAGE_X_mean`", "activation", _SEED),
    Metric(f"{_STAGE}_std", "standard deviation over its elements", "activation", _SEED),
)
"""Every key that is not the user's own. The first that fits a key is the one that it stands for."""
_OWN = {
    "loss": "the loss given to `monitor.step`, a mean over ranks by samples",
    "samples": "the samples of the step, a sum over ranks",
    keys.EPOCH: "the epoch of the record",
    f"{keys.TRAIN_LOSS}, {keys.VAL_ACC}, ...": "the whole model's, as they are passed to `log_metrics`",
}
"""Names that mean something among the numbers that the user passes."""


def metric_of(key: str, streams: Iterable[str]) -> Metric | None:
    """What a key means in a model of these streams; None for a number of the user's own."""
    names = tuple(streams)
    return next((metric for metric in METRICS if metric.regex(names).fullmatch(key)), None)


def metric_lines(wanted: Sequence[str] = ()) -> Iterator[str]:
    """The table of metrics; of those alone whose pattern holds one of `wanted`."""
    yield "X, Y: streams, `shared`, or `full` (the whole model); SPLIT: train, val, test."
    yield "(+) has a 95 % interval in ..._low and ..._high. Every figure is over all ranks, equal on each of them."
    for metric in METRICS:
        if not wanted or any(word in metric.pattern for word in wanted):
            mark = " (+)" if metric.interval else ""
            yield f"\n{metric.pattern}{mark}  [{metric.unit}]"
            yield from _wrapped(f"{metric.formula}. From {metric.source}. {_in_wandb(metric.pattern)}.")
    if not wanted:
        yield "\nyour own: what is given to `monitor.step` and `log_metrics`, by your names"
        yield from (f"    {name}: {what}" for name, what in _OWN.items())


def _in_wandb(pattern: str) -> str:
    """Where W&B shows it, of the streams X and Y and the validation items."""
    if pattern.endswith("_rankR"):
        stream = pattern.partition("_")[0]
        return "In W&B: " + ", ".join(keys.wandb_rank_key(which, stream) for which in keys.RANK_FIGURES)
    key = pattern.replace("SPLIT", "val")
    streams = ("X", "Y", "Z") if pattern == keys.weight_ratio("X", "Y", ("X", "Y", "Z")) else ("X", "Y")
    names = (key,) if "Y" in key else (key, key.replace("X_", "full_", 1))
    shown = [keys.wandb_key(name, streams) for name in names]
    return next((f"In W&B: {name}" for name in shown if name), "In the JSONL record only")


def rule_lines(wanted: Sequence[str] = ()) -> Iterator[str]:
    """What rules say, require and can be told; of those alone whose id is in `wanted`."""
    for rule in evidence.RULES:
        if not wanted or rule.id in wanted:
            yield from _told(rule)
    for name, (severity, what) in evaluated.SAYS.items():
        if not wanted or name in wanted:
            yield f"\n{name}  evaluated, {severity.value}; requires monitor.evaluate(train=...), at looks 1, 2, 4, ..."
            yield from _wrapped(what)
            yield from _wrapped("No threshold to set: margins and levels are those of ddp_streammon.evaluation.claims.")
    if not wanted:
        yield f"\nwith rules=guide and rules=off of these alone: {', '.join(evidence.PLAIN)}"
        yield "\nwith rules=guide (severity info, or rule_severity) also:"
        yield from (f"    {line}" for line in _table(guide.__doc__ or ""))


def _table(text: str) -> Iterator[str]:
    """The rows of a docstring's table."""
    return (line for line in text.splitlines() if line.startswith("|"))


def _told(rule: Rule) -> Iterator[str]:
    requires = f"; requires {', '.join(rule.requires)}" if rule.requires else ""
    yield f"\n{rule.id}  {rule.kind.value}, {rule.severity.value}{requires}"
    said = " ".join((inspect.cleandoc(type(rule).__doc__ or "")).split())
    what = said.removeprefix(f"{rule.id}: ")
    yield from _wrapped(what[:1].upper() + what[1:])
    notes = thresholds(type(rule))
    patience = {item.name for item in fields(Rule)}
    for item in fields(rule):
        if item.name not in patience:
            yield from _wrapped(f"{item.name}={getattr(rule, item.name):g}: {notes[item.name]}", indent=8)
    of_engine = ", ".join(f"{name.name}={getattr(rule, name.name):g}" for name in fields(Rule))
    first = next((item.name for item in fields(rule) if item.name not in patience), "hold")
    value = f"{getattr(rule, first):g}"
    yield from _wrapped(f"patience: {of_engine}", indent=8)
    yield from _wrapped(
        f'override: thresholds={{"{rule.id}.{first}": {value}}}, mute=("{rule.id}",); '
        f"+rules.thresholds.{rule.id}.{first}={value}, rules.mute=[{rule.id}]",
        indent=8,
    )


def thresholds(rule: type[Rule]) -> Mapping[str, str]:
    """The docstring of each threshold of a rule's class and of the classes that it is made from."""
    found: dict[str, str] = {}
    for kind in rule.__mro__:
        if not issubclass(kind, Rule):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(body, ast.ClassDef)
        for item, after in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(after, ast.Expr):
                text = ast.literal_eval(after.value)
                found.setdefault(item.target.id, " ".join(str(text).split()))
    return found


def _wrapped(text: str, indent: int = 4) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent=margin, subsequent_indent=margin + "  ")


_PARTS: Mapping[str, Callable[[Sequence[str]], Iterator[str]]] = {"metrics": metric_lines, "rules": rule_lines}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status, 1 where nothing has such a name."""
    parser = argparse.ArgumentParser(prog="python -m ddp_streammon.reference", description=__doc__)
    parser.add_argument("part", choices=sorted(_PARTS))
    parser.add_argument("name", nargs="*", help="keys (or parts of them), or ids of rules; all of them by default")
    given = parser.parse_args(arguments)
    lines = list(_PARTS[given.part](given.name))
    named = any(line and not line.startswith(("X, Y", "(+)")) for line in lines)
    print("\n".join(lines).strip() if named else f"nothing in {given.part} has the name {', '.join(given.name)}")
    return 0 if named else 1


if __name__ == "__main__":
    sys.exit(main())
