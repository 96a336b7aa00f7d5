#!/usr/bin/env bash
# One job on one host or on many. bash launch/torchrun.sh [overrides], on many once on each host.
#   NPROC          processes on this host: a number, gpu, cpu, or auto (GPUs, else CPU cores; the default)
#   NNODES         hosts (1)
#   NODE_RANK      number of this host, from 0 (Slurm's SLURM_NODEID, else 0)
#   HEAD, PORT     name or address of host 0, and a port that is free there (29500); with many hosts
#   LOCAL_ADDR     this host's address on the network of the job, where its host name is not that
#   STREAMMON_RUN  name of the run, and of its folder in outputs; with many hosts the same on all of them
#   MAX_RESTARTS   how often a job that loses a process is started again from its last checkpoint (0)
# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network card where there are several. The hosts share the folder:
# checkpoints are read by all of them. Records are written by rank 0, on the host whose name or address sorts first.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$here/launch/environment.sh"
nnodes=${NNODES:-1} node_rank=${NODE_RANK:-${SLURM_NODEID:-0}}
command=(torchrun --nproc-per-node="${NPROC:-auto}" --max-restarts="${MAX_RESTARTS:-0}")
if [ "$nnodes" = 1 ]; then
  export STREAMMON_RUN=${STREAMMON_RUN:-$(date +%Y%m%d-%H%M%S)}
  command+=(--standalone)
else
  : "${HEAD:?with NNODES=$nnodes say HEAD, the name or address of host 0}"
  : "${STREAMMON_RUN:?with NNODES=$nnodes say STREAMMON_RUN, the same name on every host}"
  # Who holds the store is said aloud: a host name need not be the one that others know it by.
  command+=(--nnodes="$nnodes" --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29500}" --rdzv-id="$STREAMMON_RUN")
  command+=(--rdzv-conf="is_host=$((node_rank == 0))" ${LOCAL_ADDR:+--local-addr="$LOCAL_ADDR"})
fi
export STREAMMON_RUN OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${command[@]}" -m ddp_streammon.train "$@"
