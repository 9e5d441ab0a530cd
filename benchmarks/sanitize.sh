#!/usr/bin/env bash
# Runs the CUDA kernels on KV pages, at small sizes, under compute-sanitizer: memcheck, racecheck, and memcheck of a planted error,
# which it must find. Needs a GPU and the extension built for it. At most two minutes. The log says on which device, with which
# versions and commit. Fails where a tool finds anything, runs out of time or says nothing, and where the planted error is missed.
#
#   benchmarks/sanitize.sh [--out DIR]      # DIR/sanitize.txt; DIR is benchmarks/results/logs unless given
set -euo pipefail
cd "$(dirname "$0")/.."

out=benchmarks/results/logs
if [ "${1:-}" = --out ]; then out=${2:?--out needs a folder}; fi
mkdir -p "$out"
log="$out/sanitize.txt"

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor its own allocation, so that one byte too far is seen

check() { # seconds, tool, arguments of sanitize_kv.py
    timeout "$1" compute-sanitizer --tool "$2" --error-exitcode 1 --report-api-errors no --kernel-name kernel_substring=_pages \
        python3 benchmarks/sanitize_kv.py "${@:3}" 2>&1
}

clean() { # seconds, tool, the line with which it says that it found nothing
    local found
    if found=$(check "$1" "$2") && grep -q "every kernel ran" <<<"$found" && grep -qF "$3" <<<"$found"; then
        printf '== %s\n%s\n' "$2" "$found"
    else
        printf '== %s\n%s\n== %s: FAILED\n' "$2" "$found" "$2"
        return 1
    fi
}

planted() {
    local found
    if found=$(check 30 memcheck --planted); then :; fi # it fails, as it should
    echo "== memcheck, a planted error"
    if ! grep -F -m 1 "Invalid __global__ read" <<<"$found"; then
        printf '%s\n== planted error: NOT FOUND\n' "$found"
        return 1
    fi
}

{
    status=0
    echo "device, driver: $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1)"
    echo "torch, CUDA: $(python3 -c 'import torch; print(torch.__version__, torch.version.cuda)')"
    echo "compute-sanitizer: $(compute-sanitizer --version | tail -n 1)"
    echo "date: $(date -u +%F), commit: $(git rev-parse --verify --quiet HEAD || echo unknown)"
    clean 45 memcheck "ERROR SUMMARY: 0 errors" || status=1
    clean 45 racecheck "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" || status=1
    planted || status=1
    if [ "$status" = 0 ]; then echo "clean"; else echo "NOT CLEAN"; fi
} 2>&1 | tee "$log"
[ "$(tail -n 1 "$log")" = clean ]
