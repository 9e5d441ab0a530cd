#!/usr/bin/env bash
# Runs the CUDA kernels on KV pages, at small sizes, under compute-sanitizer: memcheck, then racecheck. Needs a GPU and the
# extension built for it. At most 90 seconds; fails where a tool finds anything or runs out of time.
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor its own allocation, so that one byte too far is seen
status=0
for tool in memcheck racecheck; do
    echo "== $tool"
    timeout 45 compute-sanitizer --tool "$tool" --error-exitcode 1 --report-api-errors no --kernel-name kernel_substring=_pages \
        python3 benchmarks/sanitize_kv.py || { echo "== $tool: FAILED with status $?"; status=1; }
done
exit "$status"
