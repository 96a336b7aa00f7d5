#!/usr/bin/env bash
# Trains a two-stream network on real data with 2 monitored processes and says where to look.
# bash launch/demo.sh [overrides], e.g. bash launch/demo.sh experiment=mfeat_six sinks.wandb.mode=online
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} STREAMMON_RUN=${STREAMMON_RUN:-$(date +%Y%m%d-%H%M%S)}
exec torchrun --standalone --nproc-per-node=2 -m ddp_streammon.train "$@"
