"""Make the quickstart's model and task on the spot: a tiny model that knows the answer's form and is mostly wrong.

`make_model` writes a random Hugging Face folder (Llama, Qwen2 or Qwen3; byte tokenizer of 261 tokens, chat template);
tests use it too. `warm_up` is what a random model needs before reinforcement learning: a few seconds of supervised steps
on `Answer: <digit>`, where the digit is right in three of ten examples and random in the others; it leaves a model that
answers right about once in four. `write_task` writes the JSONL of questions.
Run as a script it does all three: `python examples/quickstart/make_model.py FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

END, PAD = "<|end|>", "<|pad|>"
SPECIAL_TOKENS = [PAD, END, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def make_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Five special tokens and the 256 bytes: every text is encoded and decoded without loss. Saved into `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL_TOKENS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=PAD, extra_special_tokens=SPECIAL_TOKENS[2:]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(
    folder: str | Path,
    family: str = "qwen3",
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int = 128,
    tied: bool = True,
    max_positions: int = 512,
    seed: int = 0,
    **config_options: Any,
) -> Path:
    """Write a random model of a family (llama, qwen2, qwen3) and its tokenizer; returns the folder.

    float32, rope_theta 10000. `config_options` go to the Hugging Face config and win over everything else; qwen2 needs
    `hidden == heads * head_dim`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder)
    options: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tied,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        **config_options,
    }
    config = AutoConfig.for_model(family, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def questions() -> list[tuple[str, str]]:
    """(question, answer): a digit, and the digit that follows it; 0 follows 9."""
    return [(str(digit), str((digit + 1) % 10)) for digit in range(10)]


def write_task(path: str | Path) -> Path:
    """The JSONL file of all questions, in the form `data.source: jsonl` reads."""
    path = Path(path)
    lines = [json.dumps({"prompt": question, "answer": answer}) for question, answer in questions()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def warm_up(
    folder: str | Path, *, right: float = 0.3, steps: int = 300, batch: int = 64, lr: float = 3e-3, seed: int = 0
) -> float:
    """Supervised steps on `Answer: <digit>`, right in a share `right` of the examples; returns the last loss [nats/token]."""
    folder = Path(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    draw = random.Random(seed)
    loss = torch.tensor(float("nan"))
    for _ in range(steps):
        ids, labels = _examples(tokenizer, draw, batch, right)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return float(loss.detach())


def _examples(
    tokenizer: PreTrainedTokenizerFast, draw: random.Random, batch: int, right: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels, int64 [batch, tokens]; every text has the same length, and only the response is a label."""
    rows = []
    for question, answer in draw.choices(questions(), k=batch):
        digit = answer if draw.random() < right else draw.randrange(10)
        rows.append((f"<|user|>{question}<|end|><|assistant|>", f"Answer: {digit}<|end|>"))
    prompt_tokens = len(tokenizer(rows[0][0], add_special_tokens=False)["input_ids"])
    ids = torch.tensor(tokenizer([prompt + response for prompt, response in rows], add_special_tokens=False)["input_ids"])
    labels = ids.clone()
    labels[:, :prompt_tokens] = -100
    return ids, labels


def main() -> None:
    parser = argparse.ArgumentParser(description="Write model/ and task.jsonl of the quickstart.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=sorted(ARCHITECTURES), default="qwen3")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small lose more to waiting threads than they gain, on a busy machine most of all
    model = make_model(args.folder / "model", args.family, seed=args.seed)
    loss = warm_up(model, seed=args.seed)
    task = write_task(args.folder / "task.jsonl")
    print(f"{model}: warmed up (loss {loss:.2f} nats a token); {task}: {len(questions())} questions")


if __name__ == "__main__":
    main()
