"""Records of runs that never were, as the JSONL sink writes them: of any length, with every figure of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

STREAMS = ("rgb", "depth", "<b>audio</b>")
EVIL = '</script><script>window.hacked = 1</script><img src="x" onerror="window.hacked = 1">'
RANKS = 4


def finding(rule: str, severity: str, **fields: Any) -> dict[str, Any]:
    """A finding with what all of them have."""
    common = {"stream": None, "rank": None, "step": None, "evidence": {}, "action": None}
    return {"finding": f"⚠️  {rule} & {EVIL}", "rule": rule, "severity": severity, **common, **fields}


OUTLIER = finding("OUTLIER", "warning", stream="depth", rank=2, evidence={"factor": 4.5, "rank 2": "NaN"})
ADVICE = finding(
    "S-GR",
    "info",
    stream="rgb",
    action={"setting": "lr", "stream": "rgb", "value": 5e-4, "old": 1e-3, "how": "optim.streams.rgb.lr=0.0005"},
    likely="too high a rate",
    do="lower it",
    confirm="look at the ratio",
)


def run_record(streams: Sequence[str] = STREAMS, **config: Any) -> dict[str, Any]:
    """The first record, of a run of the application."""
    config = {"optim": {}, "monitor": {"rules": "guide"}, "world_size": RANKS, "secret": EVIL, **config}
    described = {"streams": list(streams), "config": config, "inventory": f"rgb {EVIL}", "name": f"run {EVIL}"}
    return {"type": "run", "step": None, "epoch": None, "time": 1e9, "values": {}, "findings": [], **described}


def step_record(step: int, values: Mapping[str, Any], findings: Sequence[Any] = ()) -> dict[str, Any]:
    """One monitored step, in the epoch that its number says, of 100 steps."""
    at = {"step": step, "epoch": float(step // 100), "time": 1e9 + 0.01 * step, "monitor_seconds": 2e-4}
    return {"type": "step", **at, "values": dict(values), "findings": list(findings)}


def epoch_record(step: int, values: Mapping[str, Any], findings: Sequence[Any] = ()) -> dict[str, Any]:
    return {**step_record(step, values, findings), "type": "epoch"}


def outcome_record(exit_code: int = 0) -> dict[str, Any]:
    return {"type": "outcome", "step": None, "epoch": None, "time": 2e9, "text": f"end {EVIL}", "exit_code": exit_code}


def wave(step: int, phase: float) -> float:
    """Falls from 2 to 1 and swings by a tenth."""
    return (1 + math.exp(-step / 300)) * (1 + 0.1 * math.sin(step / 7 + phase))


def step_values(step: int, streams: Sequence[str] = STREAMS) -> dict[str, Any]:
    """The figures of a step; rank 2's depth gradient stands out from step 400 on, one is nan."""
    values: dict[str, Any] = {"loss": wave(step, 0.0), "aux": wave(step, 1.0)}
    for number, stream in enumerate((*streams, "shared")):
        norm = wave(step, number) / (number + 1)
        values |= {f"{stream}_grad_norm": norm, f"{stream}_grad_share": 1 / (1 + len(streams)), f"{stream}_params": 6}
        values[f"{stream}_update_ratio"] = 1e-3 * norm
        for rank in range(RANKS):
            far = 4.5 if (stream, rank) == ("depth", 2) and step > 400 else 1.0
            values[f"{stream}_local_grad_norm_rank{rank}"] = far * norm * (1 + 0.05 * math.sin(step + rank))
    if step == 250:
        values["depth_local_grad_norm_rank1"] = values["rgb_grad_norm"] = "NaN"
    return values


def epoch_values(step: int, streams: Sequence[str] = STREAMS) -> dict[str, Any]:
    """The figures of an evaluation, most with an interval."""
    values: dict[str, Any] = {}

    def with_interval(key: str, value: float, half: float) -> None:
        values.update({key: value, f"{key}_low": value - half, f"{key}_high": value + half})

    with_interval("full_val_loss", wave(step, 0.5), 0.1)
    with_interval("full_loss_gap", 0.1 * step / 1000, 0.05)
    with_interval("full_head_gap", 0.02, 0.03)
    values |= {"full_train_loss": wave(step, 0.2), "full_val_acc": 0.9, "full_train_acc": 0.95}
    for number, stream in enumerate(streams):
        size = 0.4 / (number + 1)
        for figure in ("val_uses", "val_uses_acc", "knows", "complement", "alone_loss_gap", "val_shapley"):
            with_interval(f"{stream}_{figure}", size * (1 - math.exp(-step / 300)), 0.1 * size)
        values |= {f"{stream}_val_uses_detectable": 0.05, f"{stream}_val_ablated": 0.9 * size, f"{stream}_lr": 1e-3}
        values |= {f"{stream}_val_acc": 0.8, f"{stream}_train_acc": 0.9, f"{stream}_weight_norm": 30.0 + number}
        with_interval(f"{stream}_noise_scale", 1.2 * (step + 20.0 * number), step)
        values |= {f"{stream}_val_loss": 0.5, f"{stream}_train_loss": 0.4, f"{stream}_loss_gap": 0.1}
    with_interval(f"{streams[0]}_to_{streams[1]}_val_cover", 0.1, 0.05)
    return values


def whole_run(steps: int = 1000, every: int = 100) -> Iterator[dict[str, Any]]:
    """A run with an outlier rank, advice, a restart, and a clean end."""
    yield run_record()
    for step in range(1, steps + 1):
        if step == 601:
            yield {**run_record(), "attempt": 1}
        yield step_record(step, step_values(step), [OUTLIER] if 450 <= step < 900 else [])
        if step % every == 0:
            advice = [ADVICE] if step >= 300 else []
            yield epoch_record(step, epoch_values(step), [*advice, *([OUTLIER] if 450 <= step < 900 else [])])
    yield outcome_record()


def write_records(path: Path, records: Iterator[dict[str, Any]] | Sequence[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
    return path
