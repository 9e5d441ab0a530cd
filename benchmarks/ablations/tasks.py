"""The two tasks of the ablations, and the tiny models that begin on them: `python benchmarks/ablations/tasks.py NAME FOLDER`.

`chain`: `b>f` asks for every symbol on the way, `cdef`; the ways are short as a rule and long now and then, and every token
must be right. `sum`: `7+5` asks for the last digit, `=2`; a response may count up to it first, `89012=2`, and count again, which
it need not, `89012;89012=2`. Each FOLDER gets model/ (a random Qwen3 of two layers, warmed up until it knows the form and often
slips), task.jsonl (four of five questions), held_out.jsonl (every fifth, in neither the warm-up nor the training) and, of chains,
hard.jsonl (the long ways among those). The repository's root must be on PYTHONPATH, as `run.py` puts it.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from examples.quickstart.make_model import make_model

SYMBOLS = string.ascii_lowercase + string.digits + "!#$%&()*+,-./:;<=?@[]^_"  # of one case: `exact` folds it
BANDS = ((0.75, 2, 8), (0.17, 9, 24), (0.08, 25, 56))  # share of the questions, shortest and longest way
NUM_CHAINS = 400
CHAIN_SLIP, SUM_SLIP = 0.12, 0.06  # of one symbol, in the warm-up
WORKED, AGAIN = 0.8, 0.6  # shares of the warm-up's sums that are counted up, and of counts after which another one comes
DIRECT_RIGHT, MOST_COUNTS = 0.3, 4  # how often an answer without a count is right; counts of one response at most


@dataclass(frozen=True)
class Task:
    questions: Callable[[], list[tuple[str, str]]]  # (question, answer)
    response: Callable[[random.Random, str, str], str]  # to a question with its answer, as the warm-up shows it
    steps: int  # of the warm-up


def chains() -> list[tuple[str, str]]:
    """Different questions, drawn once and for all."""
    draw, found = random.Random(0), dict[str, str]()
    while len(found) < NUM_CHAINS:
        ((_, shortest, longest),) = draw.choices(BANDS, weights=[share for share, _, _ in BANDS])
        start, way = draw.randrange(len(SYMBOLS)), draw.randint(shortest, longest)
        chain = [SYMBOLS[(start + step) % len(SYMBOLS)] for step in range(way + 1)]
        found[f"{chain[0]}>{chain[-1]}"] = "".join(chain[1:])
    return list(found.items())


def slipping_chain(draw: random.Random, question: str, answer: str) -> str:
    """The way, some symbols of it left out or doubled; its end is never missed."""
    written = [symbol * draw.choice((0, 2)) if draw.random() < CHAIN_SLIP else symbol for symbol in answer[:-1]]
    return "".join(written) + answer[-1]


def sums() -> list[tuple[str, str]]:
    return [(f"{start}+{steps}", str((start + steps) % 10)) for start in range(10) for steps in range(1, 10)]


def worked_or_direct(draw: random.Random, question: str, answer: str) -> str:
    """Counted up, once or several times, the last count being what is answered; or the answer at once, mostly wrong."""
    if draw.random() >= WORKED:
        return f"={answer}" if draw.random() < DIRECT_RIGHT else f"={draw.randrange(10)}"
    counts = [count(draw, question)]
    while len(counts) < MOST_COUNTS and draw.random() < AGAIN:
        counts.append(count(draw, question))
    return f"{';'.join(counts)}={counts[-1][-1]}"


def count(draw: random.Random, question: str) -> str:
    """Each step +1 or, slipping, +0 or +2."""
    digit, written = int(question[0]), ""
    for _ in range(int(question[2])):
        digit = (digit + (draw.choice((0, 2)) if draw.random() < SUM_SLIP else 1)) % 10
        written += str(digit)
    return written


TASKS = {"chain": Task(chains, slipping_chain, steps=600), "sum": Task(sums, worked_or_direct, steps=600)}


Questions = list[tuple[str, str]]


def split(questions: Questions) -> tuple[Questions, Questions]:
    """Those that are trained on, and every fifth, which never is."""
    return [question for i, question in enumerate(questions) if i % 5 != 4], questions[4::5]


def write_task(path: Path, questions: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"prompt": question, "answer": answer}) for question, answer in questions]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def warm_up(folder: Path, texts: Callable[[], tuple[str, str]], *, steps: int, batch: int = 64, lr: float = 3e-3) -> float:
    """Supervised steps on (question, response) as `texts` gives them; returns the last loss [nats/token]."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = torch.tensor(float("nan"))
    for _ in range(steps):
        ids, labels = examples(tokenizer, [texts() for _ in range(batch)])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    model.save_pretrained(folder)
    return float(loss.detach())


def examples(tokenizer: PreTrainedTokenizerFast, texts: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels, int64 [batch, longest]; only the response is a label. Padding is at the end, where causal attention
    sees it last."""
    rows = []
    for question, response in texts:
        prompt = tokenizer(f"<|user|>{question}<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
        rows.append((prompt, tokenizer(f"{response}<|end|>", add_special_tokens=False)["input_ids"]))
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), -100)
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        labels[i, len(prompt) : end] = torch.tensor(response)
    return ids, labels


def make(name: str, folder: Path) -> float:
    """Model and task of a name; returns the warm-up's last loss."""
    torch.set_num_threads(1)  # matrices this small lose more to waiting threads than they gain
    task, draw = TASKS[name], random.Random(1)
    questions, held_out = split(task.questions())
    make_model(folder / "model")

    def texts() -> tuple[str, str]:
        question, answer = draw.choice(questions)
        return question, task.response(draw, question, answer)

    loss = warm_up(folder / "model", texts, steps=task.steps)
    write_task(folder / "held_out.jsonl", held_out)
    if hard := [(question, answer) for question, answer in held_out if len(answer) > BANDS[0][2]]:
        write_task(folder / "hard.jsonl", hard)
    write_task(folder / "task.jsonl", questions)  # last: a folder with it is whole
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TASKS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(f"{arguments.folder}: loss {make(arguments.name, arguments.folder):.3f} nats a token")


if __name__ == "__main__":
    main()
