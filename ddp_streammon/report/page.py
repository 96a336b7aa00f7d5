"""One HTML file of a run that needs nothing else: no network, no library, a script and a style of its own."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from ddp_streammon import keys
from ddp_streammon.report import to_set
from ddp_streammon.report.panels import colour, drawing, last_value
from ddp_streammon.report.story import Story, Told, floats
from ddp_streammon.report.verdict import plain, verdict
from ddp_streammon.rules.finding import Action

REPORT = "report.html"
"""Its name in a run directory."""
MOST_ROWS = 100
_SIGNS = {"ok": "✓", "info": "i", "warning": "!", "error": "✕"}
_TABLE = (
    ("gradient norm", keys.GRAD_NORM),
    ("share", keys.GRAD_SHARE),
    ("update ratio", keys.UPDATE_RATIO),
    ("weight norm", keys.WEIGHT_NORM),
    ("learning rate", keys.LEARNING_RATE),
    ("val. accuracy", keys.VAL_ACC),
    ("val. loss", keys.VAL_LOSS),
    ("loss it is worth", f"val_{keys.USES}"),
    ("probe knows", keys.KNOWS),
    ("only it knows", keys.COMPLEMENT),
)


def write(story: Story, path: Path) -> None:
    """Write the report, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(page(story), encoding="utf-8")
    os.replace(partial, path)


def page(story: Story) -> str:
    """The whole file."""
    style, script = (files(__package__).joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    name = str(story.runs[-1].get("name") or "run") if story.runs else "run"
    body = "\n".join(
        (
            _header(story, name),
            _findings(story),
            _streams(story),
            '<section id="pictures"><h2>Pictures</h2>'
            '<p class="hint">Touch a picture, or hover, for its values; every picture shows the same step. '
            '<span class="key error">▼</span> <span class="key warning">▼</span> <span class="key info">▼</span> '
            "a finding begins (error, warning, note); dotted: a restart.</p>"
            '<noscript><p class="hint">The pictures need JavaScript; all of it is in this file.</p></noscript>'
            '<div id="panels"></div></section>',
            _details(story),
        )
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(name)} · ddp_streammon</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="data">{_json(drawing(story))}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _json(value: Any) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _header(story: Story, name: str) -> str:
    said = verdict(story)
    world = _ranks(story)
    begun = story.runs[0].get("time") if story.runs else None
    facts = [
        f"{len(story.streams)} streams" if story.streams else "",
        f"{world} rank{'s' if world != 1 else ''}" if world else "",
        f"{story.last_step:,} steps",
        f"{story.epochs.last[1]:g} epochs" if story.epochs.last else "",
        _date(begun),
        _span(story.last_time - begun) if isinstance(begun, (int, float)) else "",
        f"started {len(story.runs)} times" if len(story.runs) > 1 else "",
    ]
    return (
        f"<header><h1>{escape(name)}</h1>"
        f'<p class="facts">{escape(" · ".join(fact for fact in facts if fact))}</p>'
        f'<div id="verdict" class="{said.level}" role="status"><span class="sign">{_SIGNS[said.level]}</span>'
        f"<div><p><strong>{escape(said.headline[:1].upper() + said.headline[1:])}</strong></p>"
        f"<p>{escape(said.detail)}</p></div></div></header>"
    )


def _ranks(story: Story) -> Any:
    """How many ranks ran: as the application says it, or as the monitor was set up."""
    config: Any = story.runs[-1].get("config") if story.runs else None
    if not isinstance(config, Mapping):
        return None
    setup = config.get("setup")
    return config.get("world_size") or (setup.get("world") if isinstance(setup, Mapping) else None)


def _date(time: Any) -> str:
    if not isinstance(time, (int, float)) or not math.isfinite(time):
        return ""
    return datetime.fromtimestamp(time, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _span(seconds: float) -> str:
    """A duration in the two largest units that it needs."""
    if not seconds >= 0:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _findings(story: Story) -> str:
    told = story.by_urgency()
    if not told:
        return '<section id="findings"><h2>Findings</h2><p class="hint">None.</p></section>'
    rows = "\n".join(_row(finding, story) for finding in told[:MOST_ROWS])
    more = f'<p class="hint">And {len(told) - MOST_ROWS} more in the record.</p>' if len(told) > MOST_ROWS else ""
    heads = ("since", "until", "rule", "severity", "stream", "rank", "what", "evidence", "override")
    return (
        '<section id="findings"><h2>Findings</h2><div class="scroll"><table><thead><tr>'
        + "".join(f'<th scope="col">{head}</th>' for head in heads)
        + f"</tr></thead><tbody>\n{rows}\n</tbody></table></div>{more}</section>"
    )


def _row(told: Told, story: Story) -> str:
    found = told.latest
    stream = found.get("stream")
    swatch = f'<i class="swatch" data-c="{colour(stream, story.streams)}"></i>' if stream else ""
    advice = "".join(
        f'<p class="advice"><b>{head}</b> {escape(str(found[name]))}</p>'
        for head, name in (
            ("Likely", "likely"),
            ("Do", "do"),
            ("Confirm", "confirm"),
            ("Explained by", "explained_by"),
        )
        if found.get(name)
    )
    evidence = "".join(
        f"<span><b>{escape(key)}</b>&nbsp;=&nbsp;{_number(value)}</span> "
        for key, value in floats(found.get("evidence")).items()
    )
    until = "stands" if told.stands else f"{told.spans[-1][1]:,}"
    again = f"<br><small>{len(told.spans)} times</small>" if len(told.spans) > 1 else ""
    cells = (
        ("since", f"{told.since:,}{again}"),
        ("until", until),
        ("rule", f"<b>{escape(str(found.get('rule')))}</b>"),
        ("severity", f'<span class="tag {told.severity}">{_SIGNS[told.severity]} {told.severity}</span>'),
        ("stream", swatch + escape("" if stream is None else str(stream))),
        ("rank", escape("" if found.get("rank") is None else str(found["rank"]))),
        ("what", f"<p>{escape(plain(found['finding']))}</p>{advice}"),
        ("evidence", evidence),
        ("override", _code(override(found))),
    )
    return (
        f'<tr class="{told.severity}">' + "".join(f'<td data-h="{head}">{cell}</td>' for head, cell in cells) + "</tr>"
    )


def _code(text: str) -> str:
    """Source text that may break after its dots and equal signs."""
    breakable = re.sub(r"([a-z_][.]|=)", r"\1<wbr>", escape(text))
    return f"<code>{breakable}</code>" if text else ""


def override(found: Mapping[str, Any]) -> str:
    """What the finding's action sets, in the run's own words. Empty if it is no action."""
    action: Any = found.get("action")
    try:
        numbers = {name: floats(action)[name] for name in ("value", "old")}
        how = str(action.get("how", ""))
        return to_set(Action(setting=str(action["setting"]), stream=str(action["stream"]), **numbers, how=how))
    except (AttributeError, KeyError, TypeError):
        return ""


def _number(value: float) -> str:
    return f"{value:.4g}"


def _streams(story: Story) -> str:
    """The last figures of every stream: the pictures' legend, too."""
    names = [*story.streams, keys.SHARED, keys.FULL]
    columns = [
        (head, figure) for head, figure in _TABLE if any(keys.of_stream(name, figure) in story.curves for name in names)
    ]
    rows = []
    for name in names:
        values = [last_value(story, keys.of_stream(name, figure)) for _, figure in columns]
        if not all(math.isnan(value) for value in values) or name in story.streams:
            cells = "".join(
                f'<td data-h="{head}">{_with_interval(story, keys.of_stream(name, figure))}</td>'
                for head, figure in columns
            )
            swatch = f'<i class="swatch" data-c="{colour(name, story.streams)}"></i>'
            shown = "whole model" if name == keys.FULL else name
            rows.append(f'<tr><th scope="row">{swatch}{escape(shown)}</th>{cells}</tr>')
    if not rows or not columns:
        return ""
    heads = "".join(f'<th scope="col">{head}</th>' for head, _ in columns)
    return (
        '<section id="streams"><h2>Streams, last figures</h2><div class="scroll"><table><thead><tr>'
        f'<th scope="col">stream</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></section>'
    )


def _with_interval(story: Story, key: str) -> str:
    if key not in story.curves:
        return ""
    low, high = (last_value(story, keys.bound(key, which)) for which in (keys.LOW, keys.HIGH))
    interval = "" if math.isnan(low) or math.isnan(high) else f" <small>[{_number(low)}, {_number(high)}]</small>"
    value = last_value(story, key)
    return "–" if math.isnan(value) else _number(value) + interval


def _details(story: Story) -> str:
    run: Mapping[str, Any] = story.runs[-1] if story.runs else {}
    parts: Sequence[tuple[str, Any]] = (
        ("Streams and parameters", run.get("inventory")),
        ("Summary", (story.outcome or {}).get("text")),
        (
            "Configuration",
            json.dumps(run["config"], indent=1, ensure_ascii=False, default=str) if run.get("config") else "",
        ),
    )
    told = "".join(
        f"<details><summary>{title}</summary><pre>{escape(str(text))}</pre></details>" for title, text in parts if text
    )
    return (
        f'<section id="details">{told}</section>'
        "<footer>Written by <code>ddp_streammon.report</code> from the record of the run alone. "
        "Curves keep the extremes of every stretch of steps.</footer>"
    )
