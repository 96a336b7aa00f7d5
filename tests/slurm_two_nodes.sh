#!/usr/bin/env bash
# A Slurm of two nodes (n1, n2, one core each) on this machine's loopback: slurm_two_nodes.sh up|down FOLDER.
# Its commands find it by SLURM_CONF=FOLDER/slurm.conf. Needs root and Debian's slurm-wlm and munge; changes no file
# outside of FOLDER. Both nodes have this host's name, so that a job's HEAD has to be 127.0.0.1.
set -euo pipefail
what=$1 dir=$2 host=$(hostname -s)
case $what in
  up)
    mkdir -p "$dir/state" "$dir/spool"
    chmod 755 "$dir"
    (umask 077 && head -c 1024 /dev/urandom > "$dir/munge.key")
    cat > "$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17000
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
KillWait=10
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=1 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=1 RealMemory=4000 State=UNKNOWN
PartitionName=p Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF=$dir/slurm.conf
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
      --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
    slurmctld
    for node in n1 n2; do slurmd -N "$node"; done
    for _ in $(seq 60); do
      [ "$(sinfo -h -t idle -o %D 2> /dev/null)" = 2 ] && exit 0
      sleep 0.5
    done
    echo "the nodes did not come up: $(tail -n 3 "$dir"/*.log)" >&2
    exit 1 ;;
  down)
    for daemon in n1 n2 slurmctld munged; do
      if [ -f "$dir/$daemon.pid" ]; then kill "$(cat "$dir/$daemon.pid")" 2> /dev/null || true; fi
    done ;;
esac
