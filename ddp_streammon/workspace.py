"""`python -m ddp_streammon.workspace ENTITY/PROJECT`: a saved view and a report of a W&B project.

W&B's own automatic workspace has a panel for each stream of a figure; here all streams of a figure are lines of one
panel, an estimate together with its interval. Numbers of the user's own are in the automatic workspace only, but for
losses and accuracies. Needs `pip install "ddp-streammon[workspace]"` and a W&B login; training never needs it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddp_streammon import keys
from ddp_streammon.sinks.wandb import EPOCH_SECTIONS, ESTIMATES, FINDINGS, STEP_AXIS

NAME = "Streams"
EVALUATED = "The last evaluation's estimates"
_REMEDY = 'pip install "ddp-streammon[workspace]"'
_TITLES = {
    "": "Gradients, weights and rates",
    "overfit": "Overfitting",
    "probe": "What the head uses, what the features know",
    "rank": "Ranks: each one's own gradient norm",
    "ratio": "Two streams",
    "train": "Training",
}
_LOGARITHMIC = (keys.GRAD_NORM, keys.UPDATE_RATIO)


@dataclass(frozen=True)
class Picture:
    """One panel: a line for each key that `pattern` matches, of each run that is shown."""

    title: str
    pattern: str
    axis: str
    is_logarithmic: bool = False


def pictures() -> dict[str, list[Picture]]:
    """The panels by the title of their section: one for each figure that W&B has, whatever the streams are called."""
    ranks = [keys.wandb_rank_key(which, "") for which in keys.RANK_FIGURES]
    places = [*keys.WANDB_FIGURES.values(), *keys.WANDB_FIGURES_OF_FULL.values(), *(key[:-1] for key in ranks)]
    found: dict[str, list[Picture]] = {title: [] for title in _TITLES.values()}
    for place in places:
        bounds = [which for which in (keys.LOW, keys.HIGH) if keys.bound(place, which) in places]
        if place.removesuffix(f"_{keys.LOW}").removesuffix(f"_{keys.HIGH}") != place:
            continue
        section, _, figure = place.rpartition("/")
        axis = keys.EPOCH if section in EPOCH_SECTIONS else STEP_AXIS
        interval = f"(_({'|'.join(bounds)}))?" if bounds else ""
        pattern = f"^{re.escape(place)}{interval}/[^/]+$"
        found[_TITLES[section]].append(Picture(figure, pattern, axis, figure in _LOGARITHMIC))
    found[_TITLES["ratio"]].append(Picture("of the first stream to the second", "^ratio/[^/]+$", STEP_AXIS))
    of_loop = (("losses", "^train/[^/]*loss[^/]*$"), ("accuracies", "^train/[^/]*acc[^/]*$"))
    found[_TITLES["train"]] += [Picture(title, pattern, STEP_AXIS) for title, pattern in of_loop]
    return found


def workspace(entity: str, project: str) -> Any:
    """The view, a `wandb_workspaces.workspaces.Workspace`; nothing is sent. ImportError without the package."""
    ws, _ = _packages()
    sections = [
        ws.Section(name=title, panels=[_plot(picture) for picture in panels], is_open=True)
        for title, panels in pictures().items()
    ]
    sections.append(ws.Section(name=EVALUATED, panels=[_table(ESTIMATES)], is_open=True))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[ws.Section(name="Findings", panels=[_table()], is_open=True, pinned=True), *sections],
        settings=ws.WorkspaceSettings(x_axis=STEP_AXIS),
        runset_settings=ws.RunsetSettings(pinned_columns=[f"summary:{keys.VERDICT}"]),
    )


def report(entity: str, project: str) -> Any:
    """The report, a `wandb_workspaces.reports.v2.Report` of all runs of the project; nothing is sent."""
    _, wr = _packages()
    column = f"summary:{keys.VERDICT}"

    def grid(panels: list[Any]) -> Any:
        runs = wr.Runset(entity=entity, project=project, name="Runs", pinned_columns=[column])
        return wr.PanelGrid(runsets=[runs], panels=panels)

    words = f"Each run's verdict is in the column {keys.VERDICT} of the table of runs; the findings behind it:"
    blocks = [wr.H1("Findings"), wr.P(words), grid([_table()])]
    for title, panels in pictures().items():
        blocks += [wr.H1(title), grid([_plot(picture) for picture in panels])]
    blocks += [wr.H1(EVALUATED), grid([_table(ESTIMATES)])]
    return wr.Report(entity=entity, project=project, title=NAME, width="fluid", blocks=blocks)


def _plot(picture: Picture) -> Any:
    _, wr = _packages()
    return wr.LinePlot(
        title=picture.title, x=picture.axis, metric_regex=picture.pattern, log_y=picture.is_logarithmic or None
    )


def _table(name: str = FINDINGS) -> Any:
    _, wr = _packages()
    return wr.WeavePanelSummaryTable(table_name=name)


def _packages() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ImportError(f"a saved view needs the package wandb-workspaces: {_REMEDY}") from error
    return ws, wr


def main(arguments: Sequence[str] | None = None) -> None:
    """Save both and print where they are. SystemExit with one sentence where that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m ddp_streammon.workspace", description=__doc__)
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="an existing W&B project that you may write to")
    target = parser.parse_args(arguments).project
    entity, _, project = target.partition("/")
    if not entity or not project or "/" in project:
        raise SystemExit(f"expected ENTITY/PROJECT, the end of the project's address in W&B, got {target!r}")
    try:
        view, text = workspace(entity, project), report(entity, project)
    except ImportError as error:
        raise SystemExit(str(error)) from None
    try:
        print(f"workspace  {view.save().url}")
        print(f"report     {text.save().url}")
    except Exception as error:
        raise SystemExit(
            f"W&B did not save them ({type(error).__name__}: {error}): check `wandb login`, WANDB_BASE_URL, and that "
            f"the project {target} exists and is yours to write to"
        ) from error


if __name__ == "__main__":
    main()
