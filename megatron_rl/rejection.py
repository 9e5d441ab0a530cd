"""Rejection sampling: n responses to every training prompt, and the right ones as supervised data. `megatron-rl sft-data`
(paper 2.2: verified long-CoT paths) and `megatron-rl long2short reject` (paper 2.4: the shortest right one of 8).

The folder it writes: `answers.jsonl`, every response as it is scored, from which an interrupted sampling goes on; at the end
`sft.jsonl` (an `sft.path`), for long2short `pairs.jsonl` (a `dpo.path`), and `report.json`. What is kept follows from the
answers alone: other rules need no new sampling, and their results replace those there. Refuses a folder whose answers were
sampled in another way.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_rl.answering import Response, answer, sampling_at
from megatron_rl.config import Config
from megatron_rl.data.evaluation_sets import check_room
from megatron_rl.data.sources import load_prompts
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.errors import DataError
from megatron_rl.folder_engines import folder_engines
from megatron_rl.long2short.selection import preference_pairs
from megatron_rl.resumable import bind_settings, digest, read_log
from megatron_rl.rewards.scorer import Scorer
from megatron_rl.rollout.engines.base import Engine
from megatron_rl.run_folder import write_atomically
from megatron_rl.types import Ending, Prompt

log = logging.getLogger(__name__)

BATCH = 32  # prompts answered between two writes


@dataclass(frozen=True)
class Rules:
    samples: int = 8  # responses to each prompt
    keep: Literal["shortest", "first", "all"] = "first"  # of the right ones
    most: int = 1  # of one prompt, unless all are kept
    max_tokens: int | None = None  # a longer response is not kept
    bare: bool = False  # leave out data.system_message and data.worked_turns, which only drew the responses forth
    pairs: bool = False  # also write preference pairs (paper 2.4)


def select(responses: Sequence[Response], rules: Rules) -> tuple[list[Response], Counter[str]]:
    """The responses of one prompt that are kept, and why the others are not. A cut-off response is never right here, nor is one
    without a text, whatever the verifier says: it would teach to answer nothing."""
    why: Counter[str] = Counter()
    right: list[Response] = []
    for r in responses:
        if not r.is_correct or r.ending is not Ending.STOP:
            why["cut off" if r.ending is not Ending.STOP else "wrong"] += 1
        elif not r.text.strip():
            why["blank"] += 1
        elif rules.max_tokens is not None and r.num_tokens > rules.max_tokens:
            why["too long"] += 1
        elif any(r.text == other.text for other in right):
            why["repeat"] += 1
        else:
            right.append(r)
    if rules.keep == "shortest":
        right.sort(key=lambda r: r.num_tokens)
    kept = right if rules.keep == "all" else right[: rules.most]
    why["surplus"] += len(right) - len(kept)
    return kept, +why


def write_data(config: Config, model_folder: Path, out: Path, rules: Rules) -> dict[str, Any]:
    """Sample, score, select; returns the report. Raises DataError for prompts that cannot be answered or judged, and when no
    response is kept: the file would be empty."""
    tokenizer = ChatTokenizer.from_folder(model_folder)
    prompts = load_prompts(config.data, tokenizer, terms=config.rewards.names).train
    check_room(prompts, "train", model_folder)
    out.mkdir(parents=True, exist_ok=True)
    _check_settings(out, config, model_folder, rules.samples, prompts)
    log_file = out / "answers.jsonl"
    answers = _read_answers(log_file)
    if len(answers) < len(prompts):
        with asyncio.Runner() as runner, folder_engines(config, model_folder, runner, name="rejection") as engines:
            runner.run(_answer_rest(config, engines, tokenizer, prompts, rules.samples, log_file, answers))
    return _write_results(config, prompts, answers, out, rules)


async def _answer_rest(
    config: Config,
    engines: Sequence[Engine],
    tokenizer: ChatTokenizer,
    prompts: Sequence[Prompt],
    samples: int,
    log_file: Path,
    answers: list[list[Response]],
) -> None:
    """Extends `answers`, a part of the prompts at a time. Request ids follow from a prompt's place."""
    r = config.rollout
    sampling = sampling_at(config, tokenizer, r.temperature)
    scorer = Scorer(config.rewards, r.repetition.penalty)
    try:
        while len(answers) < len(prompts):
            done = len(answers)
            part = prompts[done : done + BATCH]
            limit, first = r.max_response_tokens, done * samples
            found = await answer(
                engines, tokenizer, scorer, part, samples=samples, sampling=sampling, max_tokens=limit, first_id=first
            )
            with log_file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps([asdict(response) for response in row]) + "\n" for row in found)
            answers += found
            log.info("%d of %d prompts answered", len(answers), len(prompts))
    finally:
        await scorer.close()


def _check_settings(out: Path, config: Config, model_folder: Path, samples: int, prompts: Sequence[Prompt]) -> None:
    """What the answers depend on may not change; the questions neither, since answers belong to them by their order."""
    sections = ("model", "data", "rollout", "rewards")
    settings: dict[str, Any] = config.model_dump(mode="json", include=set(sections))
    settings |= {"seed": config.run.seed, "model_folder": str(model_folder), "samples": samples}
    text = json.dumps(settings | {"prompts": digest(prompts)}, indent=2, sort_keys=True)
    bind_settings(out, text, conflict="holds answers sampled with other settings or prompts")


def _read_answers(file: Path) -> list[list[Response]]:
    """One row a prompt, in order."""
    return [[Response(r["text"], r["num_tokens"], r["is_correct"], Ending(r["ending"])) for r in row] for row in read_log(file)]


def _write_results(
    config: Config, prompts: Sequence[Prompt], answers: Sequence[Sequence[Response]], out: Path, rules: Rules
) -> dict[str, Any]:
    opening = 2 * len(config.data.worked_turns) + (config.data.system_message is not None) if rules.bare else 0
    lines: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    why: Counter[str] = Counter()
    for prompt, row in zip(prompts, answers, strict=True):
        messages = [dataclasses.asdict(m) for m in prompt.messages[opening:]]
        kept, others = select(row, rules)
        why += others
        lines += [{"messages": [*messages, _said(r)], "num_tokens": r.num_tokens, "prompt_id": prompt.id} for r in kept]
        pairs += [
            {"messages": messages, "chosen": a.text, "rejected": b.text, "num_tokens": [a.num_tokens, b.num_tokens]}
            for a, b in (preference_pairs(row) if rules.pairs else ())
        ]
    for name in ("sft.jsonl", "pairs.jsonl"):  # of other rules: never beside this report
        (out / name).unlink(missing_ok=True)
    num_tokens = [line["num_tokens"] for line in lines]
    report = {
        "prompts": len(prompts),
        "responses": sum(map(len, answers)),
        "kept": len(lines),
        "not_kept": dict(why),
        "prompts_without": len(prompts) - len({line["prompt_id"] for line in lines}),
        "mean_tokens": sum(num_tokens) / max(1, len(num_tokens)),
        **({"pairs": len(pairs)} if rules.pairs else {}),
        "rules": asdict(rules),
    }
    write_atomically(out / "report.json", json.dumps(report, indent=2) + "\n")
    if not lines:
        raise DataError(
            f"{out}: no response to the {len(prompts)} prompts is kept: {dict(why)}; take easier prompts, or raise the number of "
            "samples or rollout.max_response_tokens"
        )
    _write_lines(out / "sft.jsonl", lines)
    if pairs:
        _write_lines(out / "pairs.jsonl", pairs)
    elif rules.pairs:
        log.warning("%s: no pair: no prompt has a right response and a longer one to reject; pairs.jsonl is not written", out)
    return report


def _said(response: Response) -> dict[str, str]:
    return {"role": "assistant", "content": response.text}


def _write_lines(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    write_atomically(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
