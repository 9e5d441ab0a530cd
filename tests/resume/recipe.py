"""A run of seconds for tests of the whole loop: a random two-layer model whose answers end at different lengths.

Phases end by exhaustion here (`groups_per_iteration` is out of reach), so what a phase yields does not depend on timing
and whole runs can be compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file, save_file

from examples.quickstart.make_model import make_model


def end_often(model: Path) -> None:
    """Scale the end token's embedding, so that a random model ends its answers at different lengths."""
    weights = load_file(model / "model.safetensors")
    end = json.loads((model / "config.json").read_text())["eos_token_id"]
    weights["model.embed_tokens.weight"][end] *= 6
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def write_recipe(folder: Path, *, iterations: int, ptx: bool = False) -> Path:
    """Model, prompts and config; returns the config's path. ptx: with a PTX term."""
    make_model(folder / "model", family="qwen3", hidden=32, layers=2, seed=0)
    end_often(folder / "model")
    prompts = [{"prompt": f"{a}+{b}=", "answer": ""} for a in range(6) for b in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    (folder / "given.jsonl").write_text("".join(json.dumps({"prompt": f"{i}", "response": "yz"}) + "\n" for i in range(9)))
    settings: dict[str, Any] = {
        "run": {"folder": "unset", "iterations": iterations, "threads": 1},
        "model": {"folder": str(folder / "model"), "dtype": "float32"},
        "data": {"source": "jsonl", "path": str(folder / "prompts.jsonl"), "max_prompt_tokens": 64},
        "rollout": {
            "group_size": 3,
            "groups_per_iteration": 64,
            "max_open_groups": 6,
            "token_budget": 5,
            "max_response_tokens": 8,
            "commit_tokens": 2,
            "embedded": {"kv_bytes": 4_000_000, "max_running": 16, "batch_sizes": [16]},
        },
        # right is a response without a letter from a to m: a random model is now right, now wrong
        "rewards": {
            "terms": [{"name": "regex", "options": {"pattern": "^[^a-m]*$()"}}],
            "length": {"schedule": "linear", "weight": 0.2, "start_iteration": 1, "ramp_iterations": 3},
            "toggle": {"period": 2},
        },
        "algorithm": {"tau": 0.5, "ptx": {"weight": 0.1 * ptx, "path": str(folder / "given.jsonl"), "tokens": 8}},
        "training": {"epochs": 2, "max_tokens_per_micro_batch": 256, "optimizer": {"lr": 1e-3}},
        "report": {"tensorboard": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
