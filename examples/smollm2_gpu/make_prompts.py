"""Writes every sum of three one-digit numbers as a prompt, in a seeded order: the demo's task without reasoning-gym.

python examples/smollm2_gpu/make_prompts.py [.cache/smollm2_gpu/prompts.jsonl]
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path


def main(path: Path) -> None:
    rows = [
        {"prompt": f"Calculate {a} + {b} + {c}.", "answer": str(a + b + c)} for a, b, c in itertools.product(range(10), repeat=3)
    ]
    random.Random(0).shuffle(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".cache/smollm2_gpu/prompts.jsonl"))
