#!/usr/bin/env bash
# Installs, checks style and types, and runs the tests. bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
export OMP_NUM_THREADS=1 WANDB_MODE=offline
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
