"""Convert a Hugging Face model folder to a Megatron checkpoint, or back. The same as `megatron-rl convert`.

python tools/convert_checkpoint.py MODEL_FOLDER CHECKPOINT --to megatron
python tools/convert_checkpoint.py runs/NAME/checkpoints/iteration_000100 MODEL_FOLDER --to hf --dtype bfloat16
torchrun --nproc-per-node 4 tools/convert_checkpoint.py ... --tensor-parallel 2 --pipeline-parallel 2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_rl.errors import MegatronRLError
from megatron_rl.weights.convert import convert


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="model folder, or checkpoint folder")
    parser.add_argument("target", type=Path, help="folder to write; must not exist")
    parser.add_argument("--to", choices=("megatron", "hf"), required=True, help="what the target is to be")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks that share each layer while converting [ranks]")
    parser.add_argument("--pipeline-parallel", type=int, default=1, help="ranks in a row while converting [ranks]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of a written model folder")
    options = parser.parse_args(arguments)
    try:
        convert(**vars(options))
    except MegatronRLError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
