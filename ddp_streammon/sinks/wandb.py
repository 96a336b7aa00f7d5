"""The run in Weights & Biases: one run for the job, kept on disk first, and never in training's way."""

from __future__ import annotations

import contextlib
import logging
import math
import netrc
import os
import secrets
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ddp_streammon import keys
from ddp_streammon.config import Severity
from ddp_streammon.report import Outcome, Report, RunInfo, to_set
from ddp_streammon.rules.finding import Finding
from ddp_streammon.sinks.jsonl import reported
from ddp_streammon.sinks.ledger import COLUMNS, Ledger, Pace

MODES = ("auto", "disabled", "offline", "online")
STEP_AXIS = "trainer/step"
"""Our own x axis. W&B's `_step` counts log calls and ignores rows that go back: `step=` is never passed."""
_STEP_SECTIONS = (*(place for place in keys.WANDB_FIGURES.values() if "/" not in place), "rank")
EPOCH_SECTIONS = ("overfit", "probe", "health")
"""What is drawn over epochs; all else over steps."""
FINDINGS, ESTIMATES = "findings", "estimates"
"""The keys of the tables."""
_ESTIMATE = ("figure", "value", "low", "high", "step", "epoch")
"""The columns of the estimates."""
_NOT_SHOWN = frozenset({keys.EPOCH, keys.STOP, "step"})
_ALERT_LEVELS = {Severity.warning: "WARN", Severity.error: "ERROR"}
_TITLE_LENGTH = 60
"""W&B wants less than 64 characters."""
_VERDICT_LENGTH = 300
TABLE_SECONDS = 120.0
"""The tables are written so often at most while the run is on: each is an artifact of its own, and takes 0.4 s in which
rows wait that a kill would lose."""
_INIT_SECONDS = 20
"""How long a server may keep rank 0 (and, at the next collective, everybody) waiting."""
_EXTRA_SETTINGS = {"finish_timeout": 15, "x_transaction_log_flush_interval": 1, "x_file_stream_transmit_interval": 2}
"""Seconds. Rows are on disk a second after they are logged and on a server two (W&B sends every 15 seconds, and what a
killed attempt had not sent nobody sends again); finish gives up before its guard does."""

_REMEDY = "pip install wandb, or leave the sink out"

_log = logging.getLogger("ddp_streammon")


class WandbSink:
    """Logs into the active W&B run, or else into one of its own.

    An active run is its owner's: it is never finished, its config entries are never overwritten and it sends
    alerts only if `alerts=True`. Rows are logged without `step=`; an owner who passes `step=` himself sees
    W&B drop his rows once ours have moved its counter, and wants `join_rows=True` (ours then join the rows
    that he commits) or, as W&B advises, an axis of his own by `define_metric`.

    W&B shows at most 20 figures a stream (`keys.wandb_key`), the JSONL record has all; beside them the verdict in one
    line (`health/verdict`); a table `findings` and one of the last evaluation's `estimates` with their 95 % intervals,
    written anew when there is news, at most every `TABLE_SECONDS`, and with the last rows; and alerts at `Pace`, with
    the override in the text.

    A run of our own resumes by its id: keep `run_id` in the checkpoint and pass it back. A server that cannot
    be reached is one warning and an offline run, which `wandb sync` uploads later.
    """

    def __init__(
        self,
        mode: str = "offline",
        project: str = "ddp_streammon",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: tuple[str, ...] = (),
        run_id: str | None = None,
        dir: str | Path | None = None,
        log_every: int = 1,
        alerts: bool | None = None,
        join_rows: bool = False,
        record: str | Path | None = None,
        on_stop: Callable[[], None] | None = None,
    ) -> None:
        """ImportError without wandb, ValueError for a bad mode or `log_every`, OSError for a bad folder.

        `mode`: `disabled` does nothing, in an active run neither; `auto` is `WANDB_MODE`, else online where
        an API key is found, else offline. `log_every`: log every n-th step report (epoch reports always).
        `record`: the JSONL file of the same run, before its own sink is opened: rows, findings and alerts of the steps
        that it holds were shown by the attempts before this one, and are not shown again.
        `on_stop` is called, in a thread of W&B's, within 15 s after somebody has pressed "Stop run" in W&B's page of a
        run of our own; None: W&B interrupts this process (KeyboardInterrupt), and no other rank.
        `alerts`: None means from a run of our own only. `name`: else the monitor's. `dir`: else `WANDB_DIR`, else
        the run directory.
        """
        if mode not in MODES:
            raise ValueError(f"wandb mode must be one of {', '.join(MODES)}, got {mode!r}")
        if log_every < 1:
            raise ValueError(f"wandb log_every must be at least 1 (every step report), got {log_every}")
        self._mode = _auto_mode() if mode == "auto" else mode
        self._wandb: Any = None if self._mode == "disabled" else _import_wandb()
        self._name = name
        self._place = {"project": project, "entity": entity, "group": group, "tags": list(tags)}
        self._dir = None if dir is None else _usable_folder(Path(dir))
        self._log_every = log_every
        self._alerts = alerts
        self._commit = False if join_rows else None
        self._on_stop = on_stop
        self.run_id = run_id or secrets.token_hex(4)
        """W&B's id of the run, for the checkpoint; that of the active run after `open`."""
        self.location = ""
        """After `open`: the run's page, or its folder where there is none. Empty in mode disabled."""
        self._run: Any = None
        self._owned = False
        self._streams: tuple[str, ...] = ()
        self._step_reports = 0
        self._defined: set[str] = set()
        self._shown: dict[str, str | None] = {}
        self._ledger = Ledger()
        self._pace = Pace()
        self._shown_until: dict[str, int] = {}
        if record is not None:
            self._remember(Path(record))
        self._estimates: list[list[Any]] = []
        """Of the last evaluation, those that are in no table yet."""
        self._tabled = self._ledger.changes, time.monotonic()
        """How many changes the last table of findings held, and when tables were written."""

    def open(self, run: RunInfo) -> None:
        """Take the active run or make one; declare the axes."""
        if self._mode == "disabled":
            return
        self._streams = run.streams
        config = {"streams": list(run.streams), **run.config}
        active = self._wandb.run
        self._owned = active is None
        if active is None:
            self._run = self._started(run, config)
            self._run.config.update(config, allow_val_change=True)
        else:
            self._run = active
            self.run_id = active.id
            active.config.setdefaults(config)
        self.location = "" if self._run.disabled else str(self._run.url or Path(self._run.dir).parent)
        for axis in (STEP_AXIS, keys.EPOCH):
            self._run.define_metric(axis)
        for axis, sections in ((STEP_AXIS, _STEP_SECTIONS), (keys.EPOCH, EPOCH_SECTIONS)):
            for section in sections:
                self._run.define_metric(f"{section}/*", step_metric=axis)

    @property
    def is_online(self) -> bool:
        """Whether a run of our own is to be on a server."""
        return self._mode == "online"

    @property
    def in_callers_thread(self) -> bool:
        """An active run is logged into where its owner logs: rows that he has begun are not committed by another."""
        return self._run is not None and not self._owned

    def write(self, report: Report) -> None:
        """Log the values (step reports thinned by `log_every`) and send the alerts."""
        if self._run is not None:
            with self._or_let_go():
                self._write(report)

    def _write(self, report: Report) -> None:
        is_due = report.kind == "epoch" or self._step_reports % self._log_every == 0
        self._step_reports += report.kind == "step"
        if report.step <= self._shown_until.get(report.kind, 0):
            return
        news = self._ledger.take(report.kind, report.step, report.findings)
        if is_due:
            self._log_values(report)
        self._alert(news)
        self._estimates = _estimates(report) or self._estimates
        if time.monotonic() - self._tabled[1] >= TABLE_SECONDS:
            self._log_tables()

    def close(self, outcome: Outcome) -> None:
        """Write the table of findings and the summary; finish the run if it is ours."""
        if self._run is None:
            return
        with self._or_let_go():
            try:
                self._conclude(outcome)
            finally:
                run, self._run = self._run, None
                if self._owned:
                    run.finish(exit_code=outcome.exit_code)

    @contextlib.contextmanager
    def _or_let_go(self) -> Iterator[None]:
        """Where W&B's service is gone, a run of our own is left at once: at exit W&B would print a traceback."""
        try:
            yield
        except ConnectionError:
            if self._owned:
                self._run = None
                with contextlib.suppress(Exception):
                    self._wandb.teardown()
            raise

    def _remember(self, record: Path) -> None:
        """Take over what earlier attempts have shown and alerted of."""
        for told in reported(record):
            self._shown_until[told.kind] = max(self._shown_until.get(told.kind, 0), told.step)
            if told.kind == "outcome":
                news = self._ledger.rest(told.findings)
            else:
                news = self._ledger.take("step" if told.kind == "step" else "epoch", told.step, told.findings)
            for finding in news:
                self._pace.allows(finding, told.time)

    def _started(self, run: RunInfo, config: Mapping[str, Any]) -> Any:
        """A run of our own; offline where the server does not answer."""
        folder = self._dir or os.environ.get("WANDB_DIR")
        ask = self._on_stop
        # A function of its own: W&B copies its settings deeply, and a method's owner may hold a lock.
        settings = _settings(self._wandb, {} if ask is None else {"stop_fn": lambda: ask()})
        arguments = {
            **self._place,
            "id": self.run_id,
            "name": self._name or run.name,
            "dir": None if folder is None else str(_usable_folder(Path(folder))),
            "config": dict(config),
            "resume": "allow",
        }
        try:
            return self._wandb.init(mode=self._mode, settings=settings, **arguments)
        except Exception as error:
            if self._mode != "online":
                raise
            _log.warning(
                "W&B could not start an online run (%s: %s): this run is kept offline, upload it later with "
                "`wandb sync`; check WANDB_BASE_URL, `wandb login` and the network",
                type(error).__name__,
                error,
            )
        self._wandb.teardown()  # the service holds on to the id of the run that failed
        return self._wandb.init(mode="offline", settings=settings, **arguments)

    def _log_values(self, report: Report) -> None:
        row: dict[str, Any] = {**self._chosen(report.values)}
        axis = STEP_AXIS if report.kind == "step" else keys.EPOCH
        for key in row.keys() - self._defined:
            if key.split("/")[0] not in (*_STEP_SECTIONS, *EPOCH_SECTIONS):
                self._run.define_metric(key, step_metric=axis)
            self._defined.add(key)
        row[STEP_AXIS] = report.step
        if report.epoch is not None:
            row[keys.EPOCH] = report.epoch
        if report.kind == "epoch":
            row[keys.VERDICT] = self._verdict()
        self._run.log(row, commit=self._commit)

    def _chosen(self, values: Mapping[str, float]) -> dict[str, float]:
        """The values that W&B is to show, under its keys."""
        for key in values.keys() - self._shown.keys():
            self._shown[key] = None if key in _NOT_SHOWN else keys.wandb_key(key, self._streams)
        shown = {name: float(values[key]) for key in values if (name := self._shown[key]) is not None}
        return {**shown, **over_ranks(values, self._streams)}

    def _verdict(self, exit_code: int = 0) -> str:
        return textwrap.shorten(self._ledger.verdict(exit_code), _VERDICT_LENGTH, placeholder="...")

    def _alert(self, news: list[Finding]) -> None:
        """Alert of the findings that are loud enough, as often as `Pace` allows."""
        if not (self._owned if self._alerts is None else self._alerts):
            return
        for finding in news:
            level = _ALERT_LEVELS.get(finding.severity)
            if level is not None and self._pace.allows(finding, time.time()):
                self._run.alert(
                    title=textwrap.shorten(finding, _TITLE_LENGTH, placeholder="..."),
                    text=f"{finding.told()}\n{to_set(finding.action)}".rstrip(),
                    level=level,
                )

    def _conclude(self, outcome: Outcome) -> None:
        self._alert(self._ledger.rest(outcome.findings))
        summary = {**self._chosen(outcome.summary), keys.VERDICT: self._verdict(outcome.exit_code)}
        self._run.summary.update(summary)
        self._log_tables(last=True)

    def _log_tables(self, *, last: bool = False) -> None:
        """The findings so far, where there is news or it is the last time, and the estimates since the last table."""
        found = self._ledger.rows() if last or self._ledger.changes != self._tabled[0] else []
        for key, columns, rows in ((FINDINGS, COLUMNS, found), (ESTIMATES, _ESTIMATE, self._estimates)):
            if rows:
                table = self._wandb.Table(columns=list(columns), data=rows, allow_mixed_types=True)
                self._run.log({key: table}, commit=self._commit)
        self._estimates = []
        self._tabled = self._ledger.changes, time.monotonic()


def _estimates(report: Report) -> list[list[Any]]:
    """Rows of the figures that have an interval."""
    bounds = {key: [keys.bound(key, which) for which in (keys.LOW, keys.HIGH)] for key in report.values}
    return [
        [key, *(float(report.values[of]) for of in (key, *pair)), report.step, report.epoch]
        for key, pair in bounds.items()
        if report.values.keys() >= {*pair} and not math.isnan(report.values[key])
    ]


def over_ranks(values: Mapping[str, float], streams: tuple[str, ...]) -> dict[str, float]:
    """Of each stream's local gradient norms the least, the greatest and whose that is, under W&B's keys.

    Empty where the ranks were not measured. nan is left out, and nothing is said of a stream with nothing else.
    """
    of_ranks: dict[str, dict[int, float]] = {}
    for key, value in values.items():
        found = keys.rank_of(key)
        if found is not None and not math.isnan(value):
            of_ranks.setdefault(keys.parse(found[0], streams).stream or "", {})[found[1]] = value
    chosen = {}
    for stream, norms in of_ranks.items():
        loudest = max(norms, key=lambda rank: (norms[rank], -rank))
        for which, value in zip(keys.RANK_FIGURES, (min(norms.values()), norms[loudest], loudest), strict=True):
            chosen[keys.wandb_rank_key(which, stream)] = float(value)
    return chosen


def active_wandb_run() -> Any | None:
    """The W&B run that the user has started in this process, or None. Imports nothing."""
    return getattr(sys.modules.get("wandb"), "run", None)


def _import_wandb() -> Any:
    """The package. A folder `./wandb` of offline runs, which Python would import for it, is not taken."""
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f"the W&B sink needs the package wandb: {_REMEDY}") from error
    if not hasattr(wandb, "init"):
        found = ", ".join(wandb.__path__)
        raise ImportError(f"the W&B sink needs the package wandb, found only the folder {found}: {_REMEDY}")
    return wandb


def _auto_mode() -> str:
    """`WANDB_MODE`, else online where an API key is found in the environment or in ~/.netrc, else offline."""
    mode = os.environ.get("WANDB_MODE", "")
    if mode:
        valid = [name for name in MODES if name != "auto"]
        if mode not in valid:
            raise ValueError(f"WANDB_MODE must be one of {', '.join(valid)} for mode=auto, got {mode!r}")
        return mode
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    return "online" if known or os.environ.get("WANDB_API_KEY") else "offline"


def _usable_folder(folder: Path) -> Path:
    """The folder, made if missing. W&B would silently write to a temporary one in its place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission")
    except OSError as error:
        raise OSError(
            f"W&B cannot write to the folder {str(folder)!r} ({error.strerror or error}): "
            "give one that you may write to as dir=... or in WANDB_DIR"
        ) from error
    return folder


def _settings(wandb: Any, more: Mapping[str, Any]) -> Any:
    """Bounded waits, rows on disk within a second, the job's standard output left alone, and what is `more`."""
    settings = wandb.Settings(init_timeout=_INIT_SECONDS, console="off", quiet=True)
    for name, value in {**_EXTRA_SETTINGS, **more}.items():
        try:
            setattr(settings, name, value)
        except (AttributeError, TypeError, ValueError):
            _log.debug("this version of wandb has no setting %s", name)
    return settings
