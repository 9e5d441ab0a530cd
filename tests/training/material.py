"""Small random models, configs and batches, and a plain dense computation of the same step with transformers and torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from megatron_rl.algorithms.mirror_descent import mirror_descent
from megatron_rl.config import Config
from megatron_rl.training.trainer import Trainer
from megatron_rl.types import TrainingSequence
from megatron_rl.weights import hf

VOCABULARY = 67
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": lambda **shape: Qwen3Config(head_dim=8, **shape)}


def make_model(folder: Path, family: str = "qwen3", *, tied: bool = True, **shape: int) -> Path:
    """A random model folder; every weight differs from its initial value, biases and norms too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**(SHAPE | shape), tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def make_config(folder: Path, *, dtype: str = "float32", training: dict | None = None) -> Config:
    return Config.model_validate(
        {
            "run": {"folder": "run", "iterations": 1, "threads": 1},
            "model": {"folder": str(folder), "dtype": dtype},
            "data": {"source": "jsonl", "path": "prompts.jsonl"},
            "rollout": {
                "groups_per_iteration": 4,
                "token_budget": 64,
                "max_response_tokens": 64,
            },
            "training": {"optimizer": {"lr": 1e-2, "eps": 1e-3, "clip_grad": 1.0}, "log_prob_chunk": 7} | (training or {}),
        }
    )


def make_groups(
    *,
    num_groups: int = 4,
    group_size: int = 3,
    longest: int = 20,
    longest_prompt: int = 6,
    vocabulary: int = VOCABULARY,
    seed: int = 0,
) -> list[list[TrainingSequence]]:
    """Unequal lengths; a third of the tokens masked; some responses of one token, one wholly masked."""
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(num_groups):
        prompt = rng.integers(0, vocabulary, int(rng.integers(1, longest_prompt + 1))).astype(np.int32)
        rewards = rng.normal(size=group_size)
        members = []
        for j in range(group_size):
            n = 1 if j == 1 and g % 2 else int(rng.integers(1, longest + 1))
            mask = rng.random(n) < 0.67
            mask[-1] = g % 2 == 0 or j == 1
            if g == 0 and j == 0:
                mask[:] = False
            members.append(
                TrainingSequence(
                    group_id=g,
                    trajectory_id=g * group_size + j,
                    prompt_ids=prompt,
                    response_ids=rng.integers(0, vocabulary, n).astype(np.int32),
                    loss_mask=mask,
                    behaviour_log_probs=rng.normal(-3, 1, n).astype(np.float32),
                    weight_versions=np.where(np.arange(n) < n // 2, 3, 4).astype(np.int32),
                    advantage=float(rewards[j] - rewards.mean()),
                    weight=1 / (group_size * num_groups),
                    temperatures=np.where(np.arange(n) < n // 2, 1.2, 0.8).astype(np.float32),  # each version's own
                )
            )
        groups.append(members)
    return groups


def flat(groups: list[list[TrainingSequence]]) -> list[TrainingSequence]:
    return [member for group in groups for member in group]


def dense_log_probs(model: PreTrainedModel, sequence: TrainingSequence) -> torch.Tensor:
    """[response tokens], each at its temperature: no packing, no chunks, one sequence at a time."""
    ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.response_ids]).astype(np.int64))
    first = len(sequence.prompt_ids)
    logits = model(ids[None]).logits[0, first - 1 : -1].float()
    if sequence.temperatures is not None:
        logits = logits / torch.from_numpy(sequence.temperatures)[:, None]
    return torch.log_softmax(logits, -1).gather(1, ids[first:, None])[:, 0]


def dense_loss(
    model: PreTrainedModel, sequences: list[TrainingSequence], reference: list[torch.Tensor], tau: float
) -> torch.Tensor:
    """The batch's loss by `algorithms.mirror_descent`. Advantages were centred, so they serve as rewards with mean 0."""
    log_probs = [dense_log_probs(model, s) for s in sequences]
    return mirror_descent(
        torch.cat(log_probs),
        torch.cat(reference),
        torch.cat([torch.full((len(lp),), i) for i, lp in enumerate(log_probs)]),
        torch.tensor([s.advantage for s in sequences]),
        torch.tensor([s.group_id for s in sequences]),
        tau=tau,
        loss_mask=torch.from_numpy(np.concatenate([s.loss_mask for s in sequences])),
    )[0]


def dense_steps(
    folder: Path,
    minibatches: list[list[TrainingSequence]],
    config: Config,
    tau: float,
    loss_of: Callable[..., torch.Tensor] = dense_loss,
) -> tuple[list[float], list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Optimizer steps of one pass with transformers and torch's AdamW: losses, gradient norms, the first step's gradients and
    the parameters at the end, both under their Hugging Face names."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    o = config.training.optimizer
    adam = torch.optim.AdamW(model.parameters(), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay)
    with torch.no_grad():
        reference = [[dense_log_probs(model, s) for s in sequences] for sequences in minibatches]
    losses, norms, gradients = [], [], {}
    for sequences, before in zip(minibatches, reference, strict=True):
        adam.zero_grad()
        loss = loss_of(model, sequences, before, tau)
        loss.backward()
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters()}
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_grad)))
        adam.step()
    return losses, norms, gradients, {n: p.detach().clone() for n, p in model.named_parameters()}


def exported(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The trainer's weights under their Hugging Face names. Collective."""
    return {name: value.clone() for name, value in hf.export(trainer.chunks)}


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The gradients left by the last step, under the weights' names. Collective; not with the distributed optimizer, where a
    rank keeps only its shard."""
    return exported_as_weights(trainer, [p.main_grad for chunk in trainer.chunks for p in chunk.parameters()])


def exported_as_weights(trainer: Trainer, values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """values: one a parameter of this rank, in its shape. They take the weights' places for a moment. Collective."""
    parameters = [p for chunk in trainer.chunks for p in chunk.parameters()]
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)
        found = exported(trainer)
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
    return found


def one_sequence(prompt_tokens: int, response_tokens: int, vocabulary: int) -> TrainingSequence:
    """A group of one, every response token bearing loss."""
    rng = np.random.default_rng(0)
    return TrainingSequence(
        group_id=0,
        trajectory_id=0,
        prompt_ids=rng.integers(0, vocabulary, prompt_tokens).astype(np.int32),
        response_ids=rng.integers(0, vocabulary, response_tokens).astype(np.int32),
        loss_mask=np.ones(response_tokens, bool),
        behaviour_log_probs=np.zeros(response_tokens, np.float32),
        weight_versions=np.zeros(response_tokens, np.int32),
        advantage=1.0,
        weight=1.0,
    )
