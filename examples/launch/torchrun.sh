#!/usr/bin/env bash
# The quickstart on the ranks of one machine: two by default, as data-parallel replicas with an engine each.
#   RANKS=2 examples/launch/torchrun.sh [section.key=value ...]       e.g. training.tensor_parallel=2
set -euo pipefail
cd "$(dirname "$0")/../.."

bin="${VENV:-.venv}/bin"
[[ -d .cache/quickstart/model ]] || "$bin/python" examples/quickstart/make_model.py .cache/quickstart
exec "$bin/torchrun" --standalone --nproc-per-node "${RANKS:-2}" --no-python \
    "$bin/megatron-rl" train examples/quickstart/config.yaml run.folder=runs/quickstart-torchrun "$@"
