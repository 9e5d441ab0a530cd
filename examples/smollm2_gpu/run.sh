#!/usr/bin/env bash
# Trains SmolLM2-135M on one GPU. MODEL: its Hugging Face folder. Further words are overrides, e.g. run.seed=1.
set -euo pipefail
cd "$(dirname "$0")/../.."
MODEL=${MODEL:-.cache/smollm2}
python examples/smollm2_gpu/make_prompts.py
exec python -m megatron_rl train examples/smollm2_gpu/config.yaml model.folder="$MODEL" "$@"
