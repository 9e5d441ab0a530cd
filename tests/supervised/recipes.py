"""A tiny model with a tokenizer, conversations of unequal length, and a dense computation of the same course."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

from examples.quickstart.make_model import make_model
from megatron_rl.supervised.course import Course
from megatron_rl.types import TrainingSequence

Loss = Callable[[PreTrainedModel, PreTrainedModel, list[TrainingSequence]], torch.Tensor]


def write_recipe(folder: Path, name: str, section: dict[str, Any], lines: list[dict[str, Any]]) -> Path:
    """Model, data and config of `name` (sft, dpo); returns the config's path."""
    make_model(folder / "model", hidden=32, layers=2, seed=0)
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {
        "run": {"folder": str(folder / "run"), "threads": 1, "checkpoint_every": 3},
        "model": {"folder": str(folder / "model"), "dtype": "float32"},
        "training": {"max_tokens_per_micro_batch": 64, "optimizer": {"eps": 1e-4}},
        "report": {"tensorboard": False},
        name: {"path": str(folder / "data.jsonl"), **section},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def token_log_probs(model: PreTrainedModel, sequence: TrainingSequence) -> torch.Tensor:
    """Of the loss-bearing tokens, one sequence at a time."""
    ids = torch.tensor([*sequence.prompt_ids.tolist(), *sequence.response_ids.tolist()])
    log_probs = torch.log_softmax(model(ids[None]).logits[0], -1)[:-1].gather(1, ids[1:, None])[:, 0]
    return log_probs[len(sequence.prompt_ids) - 1 :][torch.from_numpy(sequence.loss_mask)]


def dense_course(folder: Path, course: Course, loss_of: Loss) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights by transformers and torch's AdamW, moments kept from step to step."""
    model, before = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)
    losses = []
    for number, step in enumerate(course.steps):
        adam.zero_grad()
        loss = loss_of(model, before, course.sequences(number))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.param_groups[0]["lr"] = step.lr
        adam.step()
        losses.append(loss.item())
    return losses, {n: p.detach() for n, p in model.named_parameters()}
