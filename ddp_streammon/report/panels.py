"""The story's pictures as plain values, which the page's script draws."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ddp_streammon import keys
from ddp_streammon.report.curves import Curve
from ddp_streammon.report.pictures import PICTURES, USER_NUMBERS, WHISKERS, Line, Picture, is_own
from ddp_streammon.report.story import BUSY_SECONDS, MOST_RANKS, Story, Told

COLOURS = 8
"""Colours for streams in page.css; with more streams they come again, with other marks."""
MARKS, ROWS = 300, 16
_SLOW, _APART = "SLOW", "OUTLIER"


def drawing(story: Story) -> dict[str, Any]:
    """What page.js is given. Only pictures that have something to show."""
    streams = story.streams
    curves = (_lines(picture, story) for picture in PICTURES)
    heats = _heats(story)
    marked = [heat for heat in heats if any(row["rules"] for row in heat["rows"])]
    others = [heat for heat in heats if heat not in marked]
    panels = [_timeline(story), *marked, *_whiskers(story), *curves, *others, _pace(story)]
    own = [key for key in story.curves if key != "loss" and is_own(key, streams) and keys.rank_of(key) is None]
    mine = [
        _lines(
            Picture(
                key,
                "",
                "A number of your own, as you passed it: averaged over samples, or added up, over all ranks.",
                (Line(key, "", "none"),),
            ),
            story,
        )
        for key in own[:USER_NUMBERS]
    ]
    return {
        "last": story.last_step,
        "epochs": _points(story.epochs),
        "starts": [step for step in story.starts if step],
        "marks": _marks(story),
        "panels": [panel for panel in (*panels, *mine) if panel],
    }


def colour(stream: str | None, streams: Sequence[str]) -> str:
    """The name of its colour in page.css."""
    if stream in streams:
        return f"s{streams.index(stream) % COLOURS}"
    return "shared" if stream == keys.SHARED else "full"


def _points(curve: Curve) -> dict[str, Any]:
    """Steps as differences, values to five digits."""
    points = curve.points()
    return {"x": _differences(step for step, _ in points), "y": [_short(value) for _, value in points]}


def _differences(steps: Iterable[int]) -> list[int]:
    found = list(steps)
    return [b - a for a, b in itertools.pairwise([0, *found])]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _keys_of(line: Line, story: Story) -> list[tuple[str, str | None, str]]:
    """(key, stream, name to show) of every curve that the line stands for."""
    streams = story.streams
    if line.of == "none":
        found: list[tuple[str, str | None, str]] = [(line.figure, None, "")]
    elif line.of == "full":
        of_model = keys.of_stream(keys.FULL, line.figure)
        found = [(of_model if of_model in story.curves else line.figure, keys.FULL, "whole model")]
    elif line.of == "pairs":
        found = [(keys.cover(a, b, line.figure), a, f"{a} and {b}") for a, b in keys.pairs(streams)]
    else:
        found = [(keys.of_stream(name, line.figure), name, name) for name in (*streams, keys.SHARED)]
    return [entry for entry in found if entry[0] in story.curves]


def _lines(picture: Picture, story: Story) -> dict[str, Any] | None:
    lines = [
        {
            "name": ", ".join(part for part in (name, line.label) if part) or picture.title,
            "c": keys.SHARED if line.of == "none" and len(picture.lines) > 1 else colour(stream, story.streams),
            "mark": story.streams.index(stream) if stream in story.streams else -1,
            "dash": line.dashed,
            **_drawn(key, story.curves, picture.open_ended),
        }
        for line in picture.lines
        for key, stream, name in _keys_of(line, story)
        if not picture.open_ended or story.curves[key].points()
    ]
    if not lines:
        return None
    return {
        "kind": "lines",
        "title": picture.title,
        "unit": picture.unit,
        "note": picture.note,
        "log": picture.log,
        "zero": picture.zero,
        "lines": lines,
    }


def _drawn(key: str, curves: Mapping[str, Curve], open_ended: bool) -> dict[str, Any]:
    curve = curves[key]
    drawn: dict[str, Any] = _points(curve)
    if (strange := curve.strange()) and not open_ended:
        drawn["bad"] = _differences(strange)
    low, high = (curves.get(keys.bound(key, which)) for which in (keys.LOW, keys.HIGH))
    if low is not None and high is not None and low.points() and high.points():
        drawn |= {"low": _points(low), "high": _points(high)}
    return drawn


def last_value(story: Story, key: str) -> float:
    """The last value of a figure; nan where there is none."""
    curve = story.curves.get(key)
    return math.nan if curve is None or curve.last is None else curve.last[1]


def _whiskers(story: Story) -> list[dict[str, Any]]:
    found = []
    for part in WHISKERS:
        rows = [
            {
                "name": name,
                "label": line.label,
                "c": colour(stream, story.streams),
                "value": _short(last_value(story, key)),
                **{
                    which: _short(value)
                    for which in (keys.LOW, keys.HIGH, keys.DETECTABLE)
                    if math.isfinite(value := last_value(story, keys.bound(key, which)))
                },
            }
            for line in part.lines
            for key, stream, name in _keys_of(line, story)
            if math.isfinite(last_value(story, key))
        ]
        rows.sort(key=lambda row: [*story.streams, "whole model", row["name"]].index(row["name"]))
        if rows:
            common = {"title": part.title, "unit": part.unit, "note": part.note, "zero": True}
            found.append({"kind": "whiskers", "rows": rows, **common})
    return found


def _heats(story: Story) -> list[dict[str, Any]]:
    """One map a figure of ranks: each rank against the median of all, in every stretch of steps."""
    found = []
    for name, of_ranks in story.ranks.items():
        parts = keys.parse(name, story.streams)
        if len(of_ranks) < 2:
            continue
        width = max(curve.width for curve in of_ranks.values())
        means = {rank: curve.means(width) for rank, curve in sorted(of_ranks.items())}
        strange = {rank: {step // width for step in of_ranks[rank].strange()} for rank in means}
        first, *_, end = [0, *sorted({place for of in (*means.values(), *strange.values()) for place in of})]
        cells: dict[int, list[int | str | None]] = {rank: [] for rank in means}
        for place in range(first, end + 1):
            known = [of[place] for of in means.values() if of.get(place, 0.0) > 0]
            usual = statistics.median(known) if known else math.nan
            for rank, row in cells.items():
                row.append("x" if place in strange[rank] else _times(means[rank].get(place), usual))
        found.append(
            {
                "kind": "heat",
                "title": "Busy time of each rank"
                if name == BUSY_SECONDS
                else f"Gradient of each rank, before the average: {parts.stream}",
                "unit": "times the median rank",
                "note": "One row a rank, its colour the rank against the median rank in that stretch of steps. A row "
                "that stands out all along is a rank with other data, or a slow one; what stands out for a moment is "
                "noise. Outlined: what a finding says of the rank."
                + (f" Beyond the first {MOST_RANKS}, ranks that a finding names." if max(means) >= MOST_RANKS else ""),
                "width": width,
                "rows": [
                    {"rank": rank, "cells": row, "rules": _rules_of(story, name, parts.stream, rank)}
                    for rank, row in cells.items()
                ],
            }
        )
    return found


def _times(value: float | None, usual: float) -> int | None:
    """100 log2(value / usual), at most a factor of 16; None where there is nothing to compare."""
    if value is None or not usual > 0:
        return None
    return round(100 * max(-4.0, min(4.0, math.log2(value / usual)))) if value > 0 else -400


def _rules_of(story: Story, figure: str, stream: str | None, rank: int) -> list[str]:
    """The alarms that name this rank, and this stream or none; of times those about time, of gradients all others,
    and what says that they lie apart also where it is a consequence."""

    def speaks(found: Mapping[str, Any]) -> bool:
        rule, of = found.get("rule"), found.get("stream")
        if found.get("rank") != rank or (rule == _SLOW) != (figure == BUSY_SECONDS):
            return False
        return rule == _SLOW or of == stream or (of is None and (rule != _APART or stream == keys.SHARED))

    told = (one for one in story.findings.values() if one.is_alarm or one.latest.get("rule") == _APART)
    return sorted({str(one.latest.get("rule")) for one in told if speaks(one.latest)})


def _pace(story: Story) -> dict[str, Any] | None:
    points, cost = _points(story.step_times), _points(story.monitor_times)
    if not points["x"]:
        return None
    return {
        "kind": "lines",
        "title": "Step time",
        "unit": "seconds",
        "note": "Between the records of two steps, over the steps between them, without evaluations; and of it what "
        "the monitor takes on rank 0's host. A level that rises is a loader or a machine that slows down; single peaks "
        "are checkpoints. Where the monitor's line is near the other, say monitor.every=10. Logarithmic.",
        "log": True,
        "zero": False,
        "lines": [
            {"name": "a step", "c": "full", "mark": -1, "dash": False, **points},
            *([{"name": "of it the monitor", "c": keys.SHARED, "mark": -1, "dash": True, **cost}] if cost["x"] else []),
        ],
    }


def _timeline(story: Story) -> dict[str, Any] | None:
    """When each finding stood, a row for each of the most urgent ones."""
    rows = [{"name": _short_name(told), "level": told.severity, "spans": told.spans} for told in story.by_urgency()]
    if not rows:
        return None
    note = (
        "A bar from the first step at which it stood to the last; what is told once an epoch stands in between. The "
        "first bar to begin is where to look first. Several short bars: it came and went."
    )
    return {"kind": "spans", "title": "When findings stood", "unit": "", "note": note, "rows": rows[:ROWS]}


def _short_name(told: Told) -> str:
    return " ".join(str(part) for part in (told.latest.get("rule"), told.latest.get("stream")) if part)


def _marks(story: Story) -> list[dict[str, Any]]:
    """When findings began to stand, the loudest first."""
    marks = [
        {"x": first, "level": told.severity, "text": _short_name(told)}
        for told in story.by_urgency()
        for first, _ in told.spans
    ]
    return marks[:MARKS]
