"""Measure task forms on the unaided model, to choose the one the demo trains on.

For every form in `candidates.yaml` (the `data` section of a config): pass rate at temperature 1, share of mixed groups
(neither all right nor all wrong: only those carry a gradient), greedy pass rate, token counts, and how many different
questions there are. Uses transformers, so it needs nothing of the trainer or the engine. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).parent
BATCH = 128  # responses generated together
PREFIX = "Answer:"


@dataclass(frozen=True)
class Measured:
    """One row of the table. Rates are between 0 and 1, lengths in tokens."""

    name: str
    sampled: float
    mixed: float
    greedy: float
    prompt_tokens: float  # mean
    answer_tokens: tuple[float, float]  # median, 90th percentile
    questions: int  # different ones among `DRAWN`
    examples: list[str]


DRAWN = 20_000  # questions generated to count the different ones


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure task forms on the unaided model.")
    parser.add_argument("--model", type=Path, default=HERE.parent.parent / ".cache" / "smollm2", help="model folder")
    parser.add_argument("--forms", type=Path, default=HERE / "candidates.yaml", help="YAML: name -> data section")
    parser.add_argument("--only", nargs="*", help="names of forms; default all")
    parser.add_argument("--prompts", type=int, default=32, help="prompts sampled 8 times each")
    parser.add_argument("--greedy", type=int, default=128, help="prompts answered greedily")
    parser.add_argument("--max-tokens", type=int, default=48, help="tokens of a response")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    forms = yaml.safe_load(args.forms.read_text(encoding="utf-8"))
    print("| form | sampled | mixed groups of 8 | greedy | prompt tokens | answer tokens, median and 90 % | questions |")
    print("|---|---|---|---|---|---|---|")
    for name in args.only or forms:
        m = measure(name, forms[name], model, tokenizer, args)
        print(
            f"| {m.name} | {m.sampled:.2f} | {m.mixed:.0%} | {m.greedy:.2f} | {m.prompt_tokens:.0f} | "
            f"{m.answer_tokens[0]:.0f}, {m.answer_tokens[1]:.0f} | {m.questions} |",
            flush=True,
        )
        for example in m.examples:
            print(f"<!-- {example} -->", flush=True)


def measure(
    name: str, form: dict[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> Measured:
    entries = unique_entries(form)
    chosen = entries[: max(args.prompts, args.greedy)]
    prompts = [chat(form, entry["question"], tokenizer) for entry in chosen]
    answers = [entry["answer"] for entry in chosen]
    torch.manual_seed(0)
    sampled = answer(model, tokenizer, prompts[: args.prompts], 8, True, args.max_tokens)
    greedy = answer(model, tokenizer, prompts[: args.greedy], 1, False, args.max_tokens)
    right = [[is_right(text, a) for text, _ in group] for group, a in zip(sampled, answers, strict=False)]
    greedy_right = [is_right(group[0][0], a) for group, a in zip(greedy, answers, strict=False)]
    lengths = sorted(n for group in sampled for _, n in group)
    return Measured(
        name=name,
        sampled=statistics.mean(r for group in right for r in group),
        mixed=statistics.mean(0 < sum(group) < 8 for group in right),
        greedy=statistics.mean(greedy_right),
        prompt_tokens=statistics.mean(len(tokenizer.encode(p)) for p in prompts),
        answer_tokens=(lengths[len(lengths) // 2], lengths[len(lengths) * 9 // 10]),
        questions=len(entries),
        examples=[f"{chosen[i]['question']!r}: {[t for t, _ in sampled[i][:3]]!r}, wanted {answers[i]!r}" for i in range(3)],
    )


def unique_entries(form: dict[str, Any]) -> list[dict[str, Any]]:
    """Different questions in the order they are generated; the worked ones are left out."""
    data = reasoning_gym.create_dataset(form["task"], size=DRAWN, seed=1, **form.get("task_options", {}))
    entries = {entry["question"]: entry for entry in data}
    for turn in form.get("worked_turns", []):
        entries.pop(turn["question"], None)
    return list(entries.values())


def chat(form: dict[str, Any], question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    messages = [{"role": "system", "content": form["system_message"]}]
    for turn in form.get("worked_turns", []):
        messages += [{"role": "user", "content": turn["question"]}, {"role": "assistant", "content": turn["answer"]}]
    messages.append({"role": "user", "content": question})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@torch.inference_mode()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], samples: int, sampling: bool, max_tokens: int
) -> list[list[tuple[str, int]]]:
    """For every prompt, its (text, tokens with the stop token) responses."""
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampling else {"do_sample": False}
    out: list[list[tuple[str, int]]] = []
    for start in range(0, len(prompts), BATCH // samples):
        batch = tokenizer(prompts[start : start + BATCH // samples], return_tensors="pt", padding=True)
        ids = model.generate(
            **batch, **settings, max_new_tokens=max_tokens, num_return_sequences=samples, pad_token_id=tokenizer.unk_token_id
        )
        made = ids[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(made, skip_special_tokens=True)
        lengths = (made != tokenizer.unk_token_id).sum(dim=1).tolist()
        rows = list(zip(texts, lengths, strict=True))
        out += [rows[i : i + samples] for i in range(0, len(rows), samples)]
    return out


def is_right(text: str, wanted: str) -> bool:
    """Exact match of what follows the last `Answer:` on its line, as the verifier `exact` with that prefix does."""
    _, found, tail = text.rpartition(PREFIX)
    return bool(found) and tail.partition("\n")[0].strip() == wanted


if __name__ == "__main__":
    main()
