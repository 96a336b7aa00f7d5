"""`python -m tests.zoo run | score | table | list`: see --help of each."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run cases and score what the monitors said")
    run.add_argument("--monitors", default="streammon", help="names or package.module:Class, with commas")
    run.add_argument("--only", default="", help="parts of names of cases, with commas")
    run.add_argument("--kind", default="all", choices=("all", "faults", "controls", "extra", "any"))
    run.add_argument("--offset", default="0", help="seed offsets, with commas; thresholds are tuned on 0 only")
    run.add_argument("--world", type=int, default=2, help="ranks")
    run.add_argument("--views", default="", help="other data for every case: halves, edges, vectors or three")
    run.add_argument("--jobs", type=int, default=1, help="groups of processes at the same time")
    run.add_argument("--out", type=Path, help="a JSON file for score and table")
    run.add_argument("-v", "--verbose", action="store_true", help="every verdict of every run")
    for name, text in (
        ("score", "figures, and every run that went wrong"),
        ("table", "a line a monitor, and a part, markdown"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("files", nargs="+", type=Path)
    commands.add_parser("list", help="the cases and what is expected of each")
    options = parser.parse_args()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

    from tests.zoo import running, scoring
    from tests.zoo.cases import CASES

    if options.command == "list":
        print(scoring.listing(CASES))
        faults = sum(case.expect is not None for case in CASES.values())
        print(f"{faults} faults, {len(CASES) - faults} controls")
        return
    if options.command == "run":
        names = running.chosen(options.kind, [part for part in options.only.split(",") if part])
        jobs = [(name, int(offset)) for offset in options.offset.split(",") for name in names]
        changes = {"views": options.views} if options.views else {}
        runs, failed = [], []
        watched = []
        for monitor in options.monitors.split(","):
            package = running.missing(monitor)
            if package is None:
                watched.append(monitor)
            else:
                print(f"{monitor} is left out: pip install {package}")
        for result in running.run_all(jobs, watched, world=options.world, parallel=options.jobs, **changes):
            if isinstance(result, tuple):
                failed.append(result[0])
                print(f"{result[0]}: FAILED\n{result[1]}", flush=True)
                continue
            runs.append(result)
            print(
                f"{result.case:24s} {result.steps:4d} steps {result.seconds:5.1f} s  loss {result.loss:8.3g} "
                f"accuracy {result.accuracy:.2f}",
                flush=True,
            )
            if options.out:
                running.save(runs, options.out)
        for monitor in watched:
            print(f"\n{monitor}\n{scoring.detail(monitor, runs, everything=options.verbose)}")
        print("\n" + scoring.table(scoring.score(monitor, runs) for monitor in watched))
        raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)
    runs = running.load(options.files)
    if options.command == "score":
        for monitor in scoring.monitors(runs):
            print(f"{monitor}\n{scoring.detail(monitor, runs)}\n")
    print(scoring.table(scoring.score(monitor, runs) for monitor in scoring.monitors(runs)))
    for monitor in scoring.monitors(runs):
        print(f"\n{monitor}\n{scoring.by_part(monitor, runs)}")


if __name__ == "__main__":
    main()
