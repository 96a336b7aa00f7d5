#!/usr/bin/env bash
# One torchrun a job, one after the other: every combination of the values that are separated by commas.
#   bash launch/sweep.sh optim.lr=1e-3,3e-4 trainer.seed=0,1 experiment=mfeat_six     four jobs
# Lists in brackets are one value. STREAMMON_SWEEP (else the time) names the folder in outputs; a sweep that is started
# again under its name goes on where it was. The variables of launch/torchrun.sh apply. Exits 1 if a job fails, after all.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
sweep=${STREAMMON_SWEEP:-sweep-$(date +%Y%m%d-%H%M%S)}
failed=()

# sweep_over NAME DONE... -- LEFT...: the job of the overrides DONE for each value of those LEFT
sweep_over() {
  local name=$1 fixed=() choices choice override
  shift
  while [ "$1" != -- ]; do fixed+=("$1") && shift; done
  shift
  if [ $# = 0 ]; then
    echo "== $sweep/${name:-all}: ${fixed[*]}"
    STREAMMON_RUN=$sweep/${name:-all} bash "$here/launch/torchrun.sh" "${fixed[@]}" || failed+=("${name:-all}")
    return
  fi
  override=$1 && shift
  if [[ $override == *=*,* && $override != *=[\[\{\"\']* ]]; then
    IFS=, read -ra choices <<< "${override#*=}"
    for choice in "${choices[@]}"; do
      choice=${override%%=*}=$choice
      sweep_over "${name:+$name,}${choice//\//_}" "${fixed[@]}" "$choice" -- "$@"
    done
  else
    sweep_over "$name" "${fixed[@]}" "$override" -- "$@"
  fi
}

sweep_over "" -- "$@"
echo "== the runs are in outputs/$sweep"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
