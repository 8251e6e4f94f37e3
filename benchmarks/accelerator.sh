#!/usr/bin/env bash
# Everything worth knowing of one GPU or TPU in under 8 minutes: see accelerator.py. Needs the package's dependencies and
# a jax that sees the device; downloads nothing. OUT/accelerator.json is written after each case.
#
#   bash benchmarks/accelerator.sh OUT [--toy] [--sections ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: accelerator.sh OUT [options of accelerator.py]}
shift
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"
python3 -c 'import jax; print(jax.__version__, [d.device_kind for d in jax.devices()])'
python3 benchmarks/accelerator.py --out "$out" "$@" 2>&1 | tee "$out/accelerator.log"
