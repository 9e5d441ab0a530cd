#!/usr/bin/env bash
# The demo: evaluate, train, evaluate again, say where the report is. Interrupted, the same command goes on where it stopped.
#   run.sh [--model FOLDER] [--run FOLDER] [section.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/../.."

here=examples/smollm2
bin="${VENV:-.venv}/bin"
model=.cache/smollm2
run=
while [[ $# -gt 0 && "$1" == --* ]]; do
    case "$1" in
        --model) model="${2:?--model needs a folder}" ;;
        --run) run="${2:?--run needs a folder}" ;;
        *) echo "$0: unknown option $1; known are --model FOLDER and --run FOLDER" >&2; exit 2 ;;
    esac
    shift 2
done
run="${run:-runs/$(basename "$model")}"
settings=("$here/config.yaml" "model.folder=$model" "run.folder=$run" "$@")

recorded() { [[ -e "$run/evaluation.json" ]] && grep -q "\"$1\"" "$run/evaluation.json"; }

# The same command before and after: greedily, then one sample a question. There is room for more KV than beside training.
evaluate() {
    "$bin/megatron-rl" eval "${settings[@]}" rollout.embedded.kv_bytes=402653184 --model "$1" --record "$2" --greedy --sampled
}

[[ "$model" != .cache/smollm2 ]] || "$bin/python" "$here/convert_model.py" --out "$model"
if [[ $# -eq 0 ]] && recorded after; then
    echo "This run is finished. To do another: --run FOLDER, or remove $run."
else
    recorded before || evaluate "$model" before
    "$bin/megatron-rl" train "${settings[@]}"
    if [[ ! -d "$run/hf" ]]; then
        echo "Stopped before the end; the same command goes on."
        exit 0
    fi
    evaluate "$run/hf" after
    "$bin/megatron-rl" report "$run" >/dev/null
fi
echo "Report: $run/report.html    Model: $run/hf"
