#!/usr/bin/env bash
# One dpo-jax command on every GPU of some SLURM nodes, one process a GPU. See docs/slurm.md.
#
# Called at a prompt it submits itself; called by SLURM, as the job, it starts the processes, and queues itself again
# while the run is unfinished: after the time limit, a preemption, or the loss of a node.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: slurm.sh [OPTIONS] -- COMMAND ... --out DIR

  --nodes N            nodes (default 1)
  --gpus N             GPUs of a node (default 8)
  --time LIMIT         time limit of one job, as SLURM writes it (default 24:00:00)
  --partition NAME     not given: the cluster's default
  --account NAME       not given: your default
  --dry_run            print the commands, run none

DIR must lie on a file system that all nodes share.

example:
  slurm.sh --nodes 2 -- dpo configs/zephyr_ddpo.py --model /shared/sft --data /shared/pairs.jsonl --out /shared/run
TEXT
}

fail() {
  printf 'slurm.sh: error: %s\n' "$1" >&2
  exit 2
}

nodes=1 gpus=8 time=24:00:00 partition='' account='' dry=false
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --dry_run) dry=true && shift && continue ;;
    --) shift && break ;;
  esac
  [ $# -ge 2 ] || fail "$1 wants a value, or is not an option (slurm.sh --help)"
  case $1 in
    --nodes) nodes=$2 ;;
    --gpus) gpus=$2 ;;
    --time) time=$2 ;;
    --partition) partition=$2 ;;
    --account) account=$2 ;;
    *) fail "unknown option $1 (slurm.sh --help)" ;;
  esac
  shift 2
done
[ $# -gt 0 ] || fail "give the command of dpo-jax after -- (slurm.sh --help)"

out='' before=''
for word in "$@"; do
  [ "$before" != --out ] || out=$word
  case $word in --out=*) out=${word#--out=} ;; esac
  before=$word
done
[ -n "$out" ] || fail "the command has no --out DIR"

do_it() {
  if $dry; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

submit=(sbatch --job-name=dpo_jax --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus"
  --time="$time" --signal=TERM@300 --requeue --open-mode=append --output=dpo_jax-%j.log)
[ -z "$partition" ] || submit+=(--partition="$partition")
[ -z "$account" ] || submit+=(--account="$account")
start=(srun --kill-on-bad-exit=0 dpo-jax "$@" --distributed.auto)

if $dry || [ -z "${SLURM_JOB_ID:-}" ]; then
  do_it "${submit[@]}" "$0" -- "$@"
  if $dry; then do_it "${start[@]}"; fi
  exit
fi

code=0
"${start[@]}" || code=$?
if [ -f "$out/run.json" ] && grep -q '"finished": true' "$out/run.json"; then exit "$code"; fi
# 143 (130): stopped by a signal, all saved; 75: a process was lost; others beyond 128: killed. Anything else is an error
# to mend.
if [ "$code" -eq 75 ] || [ "$code" -gt 128 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
