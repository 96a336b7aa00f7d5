"""Read a `.wandb` file, what an offline W&B run leaves on disk (format of wandb 0.31), without a subprocess.

A 7-byte header, then blocks of 32 KiB as in a LevelDB log; each record is a protobuf `Record`.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK = 32 * 1024
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class OfflineRun:
    """What one `.wandb` file holds, as Python values."""

    run_id: str
    name: str
    group: str
    tags: list[str]
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    axes: dict[str, str]
    """Metric name (or glob) -> the metric it is drawn over; empty where it is itself an axis."""
    alerts: list[dict[str, str]]
    exit_code: int | None


def read_run(path: Path) -> OfflineRun:
    """The run in `path`, a `.wandb` file or a folder that holds exactly one at any depth."""
    (file,) = path.rglob("*.wandb") if path.is_dir() else (path,)
    run_id, name, group, exit_code = "", "", "", None
    tags: list[str] = []
    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    axes: dict[str, str] = {}
    alerts: list[dict[str, str]] = []
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id, name, group = record.run.run_id, record.run.display_name, record.run.run_group
            tags = list(record.run.tags)
            config |= _items(record.run.config.update)
        elif kind == "config":
            config |= _items(record.config.update)
        elif kind == "history":
            history.append(_items(record.history.item))
        elif kind == "summary":
            summary |= _items(record.summary.update)
        elif kind == "metric":
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "alert":
            alert = record.alert
            alerts.append({"title": alert.title, "text": alert.text, "level": alert.level})
        elif kind == "exit":
            exit_code = record.exit.exit_code
    return OfflineRun(run_id, name, group, tags, config, history, summary, axes, alerts, exit_code)


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of a file, up to where it was torn if the run was killed."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    if data[:7] != struct.pack("<4sHB", b":W&B", 0xBEE1, data[6] if len(data) > 6 else 0):
        raise ValueError(f"{path} is no W&B file: it begins with {data[:7]!r}")
    position, body = 7, b""
    while position < len(data):
        left_in_block = _BLOCK - position % _BLOCK
        if left_in_block < 7:
            position += left_in_block
            continue
        if position + 7 > len(data):
            return
        checksum, length, part = struct.unpack("<IHB", data[position : position + 7])
        chunk = data[position + 7 : position + 7 + length]
        if len(chunk) < length:
            return
        if zlib.crc32(chunk, zlib.crc32(bytes([part]))) != checksum:
            raise ValueError(f"{path}: wrong checksum at byte {position}")
        position += 7 + length
        body = chunk if part in (_FULL, _FIRST) else body + chunk
        if part in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(body)
            yield record


def _items(items: Any) -> dict[str, Any]:
    """Keys (nested ones joined by dots) and values, nan and infinities as floats."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
