#!/usr/bin/env bash
# One dpo-jax command on every host of TPU slices of a GKE cluster that has JobSet. See docs/jobset.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: jobset.sh ACTION [OPTIONS] [-- COMMAND ...]

actions:
  run       write the manifest and hand it to kubectl: `dpo-jax COMMAND ... --distributed.auto` on every host
  stop      delete it: its pods get SIGTERM, the run saves and ends

options:
  --name NAME          of the JobSet (default dpo)
  --image IMAGE        for run: a container image with dpo-jax installed
  --claim CLAIM        for run: a ReadWriteMany volume claim, mounted as /mnt/shared; --out must lie there
  --machine TYPE       for run: GKE's name of the accelerator (default tpu-v5-lite-podslice)
  --topology SHAPE     for run: of one slice (default 4x4)
  --chips N            for run: of one host (default 4)
  --slices N           for run: number of slices (default 1)
  --restarts N         for run: how often it is started again after a lost host, a preemption or a stop that saved
                       (exit codes 75, 143, killed; default 100)
  --dry_run            print the manifest, or the command; run none

example:
  jobset.sh run --image REGISTRY/dpo_jax --claim shared --slices 2 -- dpo configs/zephyr_ddpo.py \
    --model /mnt/shared/sft --data /mnt/shared/pairs.jsonl --out /mnt/shared/runs/first --mesh.data 2
TEXT
}

fail() {
  printf 'jobset.sh: error: %s\n' "$1" >&2
  exit 2
}

action=${1:-}
case $action in
  run | stop) shift ;;
  -h | --help) usage && exit 0 ;;
  *) usage >&2 && exit 2 ;;
esac

name=dpo image='' claim='' machine=tpu-v5-lite-podslice topology=4x4 chips=4 slices=1 restarts=100 dry=false only=''
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry=true && shift && continue ;;
    --) shift && break ;;
  esac
  [ $# -ge 2 ] || fail "$1 wants a value, or is not an option (jobset.sh --help)"
  case $1 in
    --name) name=$2 ;;
    --image) image=$2 && only=$1 ;;
    --claim) claim=$2 && only=$1 ;;
    --machine) machine=$2 && only=$1 ;;
    --topology) topology=$2 && only=$1 ;;
    --chips) chips=$2 && only=$1 ;;
    --slices) slices=$2 && only=$1 ;;
    --restarts) restarts=$2 && only=$1 ;;
    *) fail "unknown option $1 (jobset.sh --help)" ;;
  esac
  shift 2
done
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "--name $name: small letters, digits and hyphens"

if [ "$action" = stop ]; then
  [ -z "$only" ] || fail "$only belongs to run"
  [ $# -eq 0 ] || fail "only run takes a command"
  command=(kubectl delete jobset "$name")
  if $dry; then printf '%q ' "${command[@]}" && echo; else "${command[@]}"; fi
  exit
fi

[ $# -gt 0 ] || fail "give the command of dpo-jax after --"
[ -n "$image" ] || fail "--image is missing"
[ -n "$claim" ] || fail "--claim is missing"
for word in "$image" "$claim" "$machine"; do
  [[ $word =~ ^[A-Za-z0-9][-A-Za-z0-9._/:@]*$ ]] || fail "$word: is no name that Kubernetes takes"
done
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "--topology $topology: write it as 4x4 or 4x4x4"
for number in "$chips" "$slices"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "$number: give a number"
done
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts $restarts: give a number"
total=$((${topology//x/*}))
[ $((total % chips)) -eq 0 ] || fail "--chips $chips: a slice of $topology has $total chips"
hosts=$((total / chips))

# A word as YAML (and JSON) quotes it.
quoted() {
  local word=${1//\\/\\\\}
  word=${word//\"/\\\"}
  word=${word//$'\n'/\\n}
  # Kubernetes would replace $(NAME) in a command; $$ is a plain $.
  printf '"%s"' "${word//\$/\$\$}"
}

manifest() {
  cat <<TEXT
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool  # a slice of its own for each job
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      # An error to mend (exit codes 1 and 2) ends it at once. All else starts all hosts again, as long as restarts last.
      - name: error
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: dpo-jax
                  operator: In
                  values: [1, 2]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300  # for the checkpoint after SIGTERM
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $machine
                cloud.google.com/gke-tpu-topology: $topology
              containers:
                - name: dpo-jax
                  image: $image
                  command:
TEXT
  for word in dpo-jax "$@" --distributed.auto; do
    printf '                    - %s\n' "$(quoted "$word")"
  done
  cat <<TEXT
                  ports:
                    - containerPort: 8471
                    - containerPort: 8080
                  resources:
                    limits:
                      google.com/tpu: $chips
                  volumeMounts:
                    - name: shared
                      mountPath: /mnt/shared
              volumes:
                - name: shared
                  persistentVolumeClaim:
                    claimName: $claim
TEXT
}

if $dry; then manifest "$@"; else manifest "$@" | kubectl apply -f -; fi
