#!/usr/bin/env bash
# One dpo-jax command on every host of TPU slices of a GKE cluster, through XPK. See docs/gke_xpk.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: gke_xpk.sh ACTION --cluster CLUSTER --zone ZONE [OPTIONS] [-- COMMAND ...]

actions:
  create    make the cluster with its slices
  run       start `dpo-jax COMMAND ... --distributed.auto` on every host, in an image made of this repository
  stop      delete the workload: its pods get SIGTERM, the run saves and ends
  delete    delete the cluster

options:
  --cluster CLUSTER    name of the cluster
  --zone ZONE          such as us-west4-a
  --project PROJECT    not given: gcloud's own
  --tpu TYPE           for create and run: such as v5litepod-16 (default), v5p-128
  --slices N           for create and run: number of slices (default 1)
  --workload NAME      for run and stop: name of the workload (default dpo)
  --restarts N         for run: how often it is started again when a host is lost (default 10)
  --dry_run            print the commands, run none

example:
  gke_xpk.sh run --cluster tpus --zone us-west4-a -- dpo configs/zephyr_ddpo.py --model /mnt/shared/sft \
    --data /mnt/shared/pairs.jsonl --out /mnt/shared/runs/first
TEXT
}

fail() {
  printf 'gke_xpk.sh: error: %s\n' "$1" >&2
  exit 2
}

action=${1:-}
case $action in
  create | run | stop | delete) shift ;;
  -h | --help) usage && exit 0 ;;
  *) usage >&2 && exit 2 ;;
esac

cluster='' zone='' project='' tpu='' slices='' workload='' restarts='' dry=false
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry=true && shift && continue ;;
    --) shift && break ;;
  esac
  [ $# -ge 2 ] || fail "$1 wants a value, or is not an option (gke_xpk.sh --help)"
  case $1 in
    --cluster) cluster=$2 ;;
    --zone) zone=$2 ;;
    --project) project=$2 ;;
    --tpu) tpu=$2 ;;
    --slices) slices=$2 ;;
    --workload) workload=$2 ;;
    --restarts) restarts=$2 ;;
    *) fail "unknown option $1 (gke_xpk.sh --help)" ;;
  esac
  shift 2
done
[ -n "$cluster" ] || fail "--cluster is missing"
[ -n "$zone" ] || fail "--zone is missing"
for number in "$slices" "$restarts"; do
  [[ $number =~ ^[0-9]*$ ]] || fail "$number: give a number"
done
case $action in
  create | run) ;;
  *) [ -z "$tpu$slices" ] || fail "--tpu and --slices belong to create and run" ;;
esac
[ "$action" = run ] || [ -z "$restarts" ] || fail "--restarts belongs to run"
case $action in
  run | stop) ;;
  *) [ -z "$workload" ] || fail "--workload belongs to run and stop" ;;
esac
if [ "$action" = run ]; then [ $# -gt 0 ] || fail "give the command of dpo-jax after --"; else
  [ $# -eq 0 ] || fail "only run takes a command"
fi

where=(--cluster="$cluster" --zone="$zone")
[ -z "$project" ] || where+=(--project="$project")
what=(--tpu-type="${tpu:-v5litepod-16}" --num-slices="${slices:-1}")

do_it() {
  if $dry; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
case $action in
  create) do_it xpk cluster create "${where[@]}" "${what[@]}" ;;
  run)
    # exec: the signal that Kubernetes sends before it takes a pod away reaches dpo-jax itself.
    command="pip install -q '.[tpu]' && exec$(printf ' %q' dpo-jax "$@" --distributed.auto)"
    do_it xpk workload create "${where[@]}" "${what[@]}" --workload="${workload:-dpo}" \
      --base-docker-image=python:3.12 --script-dir="$root" --max-restarts="${restarts:-10}" --command="$command"
    ;;
  stop) do_it xpk workload delete "${where[@]}" --workload="${workload:-dpo}" ;;
  delete) do_it xpk cluster delete "${where[@]}" ;;
esac
