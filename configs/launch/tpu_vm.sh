#!/usr/bin/env bash
# One dpo-jax command on every host of one or several Cloud TPU slices. See docs/tpu_vm.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tpu_vm.sh ACTION --name NAME --zone ZONE [OPTIONS] [-- COMMAND ...]

actions:
  create    request the slices (a queued resource); ask for them again with the same command after a preemption
  status    say whether they are there
  install   put this repository and its requirements on every host; with --nfs also the shared folder
  run       start `dpo-jax COMMAND ... --distributed.auto` on every host and follow the log of process 0
  follow    follow that log again
  stop      SIGTERM to the run on every host: it saves and ends
  delete    give the slices back

options:
  --name NAME          of the queued resource
  --zone ZONE          such as us-west4-a
  --project PROJECT    not given: gcloud's own
  --accelerator TYPE   for create: such as v5litepod-16 (default), v5p-128, v6e-16
  --runtime VERSION    for create: such as v2-alpha-tpuv5-lite (default), v2-alpha-tpuv5, v2-alpha-tpuv6e
  --slices N           for create: number of slices (default 1)
  --spot               for create: cheaper, may be taken away
  --nfs HOST:/PATH     for install: an NFS share (Filestore) to mount as /mnt/shared on every host; --out must lie there
  --dry_run            print the commands, run none

example:
  tpu_vm.sh run --name dpo --zone us-west4-a -- dpo configs/zephyr_ddpo.py --model /mnt/shared/sft \
    --data /mnt/shared/pairs.jsonl --out /mnt/shared/runs/first
TEXT
}

fail() {
  printf 'tpu_vm.sh: error: %s\n' "$1" >&2
  exit 2
}

action=${1:-}
case $action in
  create | status | install | run | follow | stop | delete) shift ;;
  -h | --help) usage && exit 0 ;;
  *) usage >&2 && exit 2 ;;
esac

name='' zone='' project='' accelerator='' runtime='' slices='' spot=false nfs='' dry=false
while [ $# -gt 0 ]; do
  case $1 in
    --spot) spot=true && shift && continue ;;
    --dry_run) dry=true && shift && continue ;;
    --) shift && break ;;
  esac
  [ $# -ge 2 ] || fail "$1 wants a value, or is not an option (tpu_vm.sh --help)"
  case $1 in
    --name) name=$2 ;;
    --zone) zone=$2 ;;
    --project) project=$2 ;;
    --accelerator) accelerator=$2 ;;
    --runtime) runtime=$2 ;;
    --slices) slices=$2 ;;
    --nfs) nfs=$2 ;;
    *) fail "unknown option $1 (tpu_vm.sh --help)" ;;
  esac
  shift 2
done
[ -n "$name" ] || fail "--name is missing"
[ -n "$zone" ] || fail "--zone is missing"
[[ ${slices:-1} =~ ^[1-9][0-9]*$ ]] || fail "--slices $slices: give a number of slices"
if [ "$action" != create ] && { [ -n "$accelerator$runtime$slices" ] || $spot; }; then
  fail "--accelerator, --runtime, --slices and --spot belong to create"
fi
[ "$action" = install ] || [ -z "$nfs" ] || fail "--nfs belongs to install"
if [ "$action" = run ]; then [ $# -gt 0 ] || fail "give the command of dpo-jax after --"; else
  [ $# -eq 0 ] || fail "only run takes a command"
fi

where=(--zone="$zone")
[ -z "$project" ] || where+=(--project="$project")

do_it() {
  if $dry; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_all() { # one shell command on every host of every slice
  do_it gcloud alpha compute tpus queued-resources ssh "$name" "${where[@]}" --node=all --worker=all --command="$1"
}

on_first() {
  do_it gcloud alpha compute tpus queued-resources ssh "$name" "${where[@]}" --node=0 --worker=0 --command="$1"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
case $action in
  create)
    request=(gcloud compute tpus queued-resources create "$name" "${where[@]}"
      --accelerator-type="${accelerator:-v5litepod-16}" --runtime-version="${runtime:-v2-alpha-tpuv5-lite}")
    if [ "${slices:-1}" -gt 1 ]; then
      request+=(--node-count="$slices" --node-prefix="$name")
    else
      request+=(--node-id="$name")
    fi
    if $spot; then request+=(--spot); fi
    do_it "${request[@]}"
    ;;
  status) do_it gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' ;;
  install)
    archive=$(mktemp -u --suffix=.tar.gz)
    do_it git -C "$root" archive --format=tar.gz --prefix=dpo_jax/ --output="$archive" HEAD
    do_it gcloud alpha compute tpus queued-resources scp "$archive" "$name":dpo_jax.tar.gz "${where[@]}" \
      --node=all --worker=all
    do_it rm "$archive"
    # uv brings a Python of its own: that of some TPU images is older than 3.11.
    on_all 'tar xzf dpo_jax.tar.gz && python3 -m pip install -q --user uv &&
      ~/.local/bin/uv venv -q --clear --python 3.12 dpo_jax/.venv &&
      ~/.local/bin/uv pip install -q --python dpo_jax/.venv/bin/python "./dpo_jax[tpu]"'
    if [ -n "$nfs" ]; then
      mount="sudo mount -o rw,hard $(printf %q "$nfs") /mnt/shared"
      on_all "sudo apt-get install -yq nfs-common && sudo mkdir -p /mnt/shared && $mount && sudo chmod 777 /mnt/shared"
    fi
    ;;
  run)
    # setsid: the run goes on when the connection to it breaks.
    command=$(printf '%q ' .venv/bin/dpo-jax "$@" --distributed.auto)
    on_all "cd dpo_jax && { setsid nohup $command > ../dpo_jax.log 2>&1 < /dev/null & echo \$! > ../dpo_jax.pid; }"
    # shellcheck disable=SC2016 # it expands on the host
    on_first 'tail -n +1 -F --pid="$(cat dpo_jax.pid)" dpo_jax.log'
    ;;
  follow)
    # shellcheck disable=SC2016
    on_first 'tail -n 50 -F --pid="$(cat dpo_jax.pid)" dpo_jax.log'
    ;;
  stop)
    # shellcheck disable=SC2016
    on_all 'kill -TERM "$(cat dpo_jax.pid)"'
    ;;
  delete) do_it gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet ;;
esac
