#!/usr/bin/env bash
# Installs, checks style and types, and runs the tests. bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
# A CPU build of torch brings no Triton; with one, the CUDA kernel is tested in its interpreter.
python -c 'import sys, importlib.util as u; sys.exit(u.find_spec("triton") is None)' ||
  python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.7.1 ||
  echo "no Triton for this platform: the tests of its kernel are skipped"
# The frameworks of the adapters; 120 MB, of which little is ever imported, hence not compiled in advance.
python -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, ("lightning", "transformers", "accelerate"))))' ||
  python -m pip install --quiet --disable-pip-version-check --no-compile -c launch/constraints.txt \
    lightning transformers accelerate
# What builds the W&B view; all that it needs comes with wandb.
python -c 'import sys, importlib.util as u; sys.exit(u.find_spec("wandb_workspaces") is None)' ||
  python -m pip install --quiet --disable-pip-version-check --no-deps -c launch/constraints.txt wandb-workspaces
# What the TensorBoard sink writes with.
python -c 'import sys, importlib.util as u; sys.exit(u.find_spec("tensorboard") is None)' ||
  python -m pip install --quiet --disable-pip-version-check --no-compile -c launch/constraints.txt tensorboard
export OMP_NUM_THREADS=1 WANDB_MODE=offline
ruff check .
ruff format --check .
mypy
# The default suite in two processes, each with the files that it is handed; what is asked for by name in one, undisturbed.
if [ $# -eq 0 ]; then set -- -n 2 --dist loadfile; fi
exec python -m pytest "$@"
