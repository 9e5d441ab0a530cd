"""A copy of a model with more groups of heads, which are empty: the same function, cut where the model itself cannot be.

SmolLM2 has 9 heads over 3 KV heads, which no two ranks can share. A further KV head whose rows of query, key and value are zero,
as are its heads' columns of the output projection, adds nothing to any output and has no gradient, so it stays empty however long
the model is trained. `python benchmarks/even_heads.py SOURCE TARGET [--kv-heads 4]`
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megatron_rl.errors import DataError
from megatron_rl.model_config import ModelConfig


def with_empty_heads(source: Path, target: Path, kv_heads: int) -> Path:
    """The model of `source` with `kv_heads` KV heads, in `target`. Raises DataError where it has more already."""
    model = ModelConfig.from_folder(source)
    if kv_heads < model.num_kv_heads:
        raise DataError(f"{source}: has {model.num_kv_heads} KV heads; {kv_heads} would be fewer, and heads are only added")
    heads = kv_heads * model.num_heads // model.num_kv_heads
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".bin") and "index" not in path.name:
            shutil.copyfile(path, target / path.name)
    content = json.loads((source / "config.json").read_text(encoding="utf-8"))
    content |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": model.head_dim}
    (target / "config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    tensors = {name: tensor for path in sorted(source.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    rows = {"q_proj": heads * model.head_dim, "k_proj": kv_heads * model.head_dim, "v_proj": kv_heads * model.head_dim}
    wide = {name: _widened(name, tensor, rows) for name, tensor in tensors.items()}
    save_file(wide, target / "model.safetensors", {"format": "pt"})
    return target


def _widened(name: str, tensor: torch.Tensor, rows: dict[str, int]) -> torch.Tensor:
    """Zeros behind the rows of q, k and v, weights and biases, and behind the columns of o."""
    part = name.split(".")[-2]
    if part == "o_proj":
        return F.pad(tensor, (0, rows["q_proj"] - tensor.shape[1])).contiguous()
    if part not in rows:
        return tensor
    missing = rows[part] - tensor.shape[0]
    return F.pad(tensor, (0, 0, 0, missing) if tensor.dim() == 2 else (0, missing)).contiguous()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--kv-heads", type=int, default=4)
    options = parser.parse_args()
    with_empty_heads(options.source, options.target, options.kv_heads)
