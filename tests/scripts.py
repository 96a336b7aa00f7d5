"""The scripts of launch/ inside a test: in an environment that stands for this interpreter, so nothing is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.test_app import ROOT, inherited

TORCHRUN = f'exec {sys.executable} -m torch.distributed.run "$@"'
STAMP = 'cat "$0/pyproject.toml" "$0/launch/constraints.txt" "$0/launch/environment.sh" | sha256sum'


def environment(
    folder: Path, *, torchrun: str = f'exec {sys.executable} -m torch.distributed.run "$@"'
) -> dict[str, str]:
    """Variables that make launch/environment.sh find all installed, in `folder`; `torchrun` is a line of bash."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name, line in (("python", f'exec {sys.executable} "$@"'), ("torchrun", torchrun)):
        (programs / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (programs / name).chmod(0o755)
    wanted = subprocess.run(["bash", "-c", STAMP, str(ROOT)], capture_output=True, text=True, check=True).stdout.strip()
    (folder / ".ddp_streammon").write_text(f"{ROOT} {wanted}\n")
    return {**inherited(), "VIRTUAL_ENV": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def script(name: str, *arguments: str, folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run launch/NAME in `folder`, and wait for it."""
    return subprocess.run(
        ["bash", str(ROOT / "launch" / name), *arguments],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
