"""Curate a prompt set with the model that will be trained (paper 2.1): `megatron-rl curate`.

The folder it writes: `decisions.jsonl`, one line a prompt as it is decided, from which an interrupted curation goes on;
at the end `kept.jsonl` (a `data.path`, with difficulty and tags), `dropped.jsonl` (with the reason) and `report.json`. Cheap
rules come before generation, in which a bounded number of prompts is at a time. Refuses to go on with other settings or prompts
than it began with. The rules: `data/curation.py`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rl.answering import answer, in_order, sampling_at
from megatron_rl.config import Config, dump
from megatron_rl.data import curation
from megatron_rl.data.curation import Verdict
from megatron_rl.data.evaluation_sets import check_room
from megatron_rl.data.sources import load_prompts
from megatron_rl.data.tokenizer import ChatTokenizer
from megatron_rl.errors import DataError
from megatron_rl.folder_engines import folder_engines
from megatron_rl.resumable import bind_settings, digest, read_log
from megatron_rl.rewards.scorer import Scorer
from megatron_rl.rollout.engines.base import Engine
from megatron_rl.run_folder import write_atomically
from megatron_rl.types import Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rules:
    """What `megatron-rl curate` takes beside the config; the paper gives samples and tries."""

    samples: int = 10
    temperature: float = 1.0  # "relatively high" (paper 2.1); the number is ours
    tries: int = 8
    answer_tokens: int = 32  # of a try without reasoning
    lowest: float = 0.0  # pass rates that are kept
    highest: float = 0.9
    in_flight: int = 32  # prompts worked on at a time; changes no decision


@dataclass(frozen=True)
class Decision:
    id: str
    verdict: Verdict
    reason: str
    pass_rate: float | None = None


def curate(config: Config, model_folder: Path, out: Path, rules: Rules) -> dict[str, int]:
    """Decide every training prompt of `data`; returns how many got which verdict.

    Raises DataError for prompts that cannot be answered or judged, where `out` holds another curation, and where nothing is left
    to keep."""
    tokenizer = ChatTokenizer.from_folder(model_folder)
    prompts = load_prompts(config.data, tokenizer, terms=config.rewards.names).train
    check_room(prompts, "train", model_folder)
    out.mkdir(parents=True, exist_ok=True)
    decisive = {key: value for key, value in asdict(rules).items() if key != "in_flight"}
    settings = {"config": dump(config), "model": str(model_folder), "rules": decisive, "prompts": digest(prompts)}
    bind_settings(out, json.dumps(settings, indent=2), conflict="holds a curation that began with other settings or prompts")
    with asyncio.Runner() as runner, folder_engines(config, model_folder, runner, name="curation") as engines:
        decisions = runner.run(decide(config, engines, tokenizer, prompts, out / "decisions.jsonl", rules))
    return _write_results(config, prompts, decisions, out)


async def decide(
    config: Config, engines: Sequence[Engine], tokenizer: ChatTokenizer, prompts: Sequence[Prompt], log_file: Path, rules: Rules
) -> dict[str, Decision]:
    """All decisions by prompt id; those already in the file are taken from there, the others are added in the prompts' order,
    each as soon as it and those before it are made."""
    scorer = Scorer(config.rewards, config.rollout.repetition.penalty)
    raw = read_log(log_file)
    decided = {r["id"]: Decision(r["id"], Verdict(r["verdict"]), r["reason"], r["pass_rate"]) for r in raw}
    todo = [(i, prompt) for i, prompt in enumerate(prompts) if prompt.id not in decided]
    first: dict[str, str] = {}
    repeats = {p.id: earlier for p in prompts if (earlier := first.setdefault(curation.repeat_key(p), p.id)) != p.id}
    judge = _Judge(config, engines, tokenizer, scorer, repeats, rules)
    try:
        async with aclosing(in_order((judge.decide(i, prompt) for i, prompt in todo), rules.in_flight)) as decisions:
            with log_file.open("a", encoding="utf-8") as file:
                async for decision in decisions:
                    file.write(json.dumps(asdict(decision)) + "\n")
                    file.flush()
                    decided[decision.id] = decision
                    if len(decided) % rules.in_flight == 0 or len(decided) == len(prompts):
                        log.info("%d of %d prompts decided", len(decided), len(prompts))
    finally:
        await scorer.close()
    return decided


@dataclass(frozen=True)
class _Judge:
    """Decides prompts one by one; many at a time share the engines."""

    config: Config
    engines: Sequence[Engine]
    tokenizer: ChatTokenizer
    scorer: Scorer
    repeats: dict[str, str]  # prompt id -> the earlier prompt of the same question
    rules: Rules

    async def decide(self, i: int, prompt: Prompt) -> Decision:
        """Cheap rules first. `i` is the prompt's place among all: request ids follow from it, so neither an interruption nor
        what else runs changes a sample."""
        rules = self.rules
        if prompt.id in self.repeats:
            return Decision(prompt.id, Verdict.REPEAT, f"the question of prompt {self.repeats[prompt.id]}")
        if kind := curation.guessable(prompt):
            return Decision(prompt.id, kind, "the answer can be guessed, or not checked, because of its kind")
        bare = replace(prompt, token_ids=self.tokenizer.encode_chat(curation.without_reasoning(prompt.messages)))
        if hits := await self._num_correct(i, bare, rules.tries, rules.answer_tokens, first_sample=0):
            reason = f"{hits} of {rules.tries} tries without reasoning are right"
            return Decision(prompt.id, Verdict.EASY_TO_HACK, reason)
        limit = self.config.rollout.max_response_tokens
        rate = await self._num_correct(i, prompt, rules.samples, limit, first_sample=rules.tries) / rules.samples
        verdict = curation.by_pass_rate(rate, lowest=rules.lowest, highest=rules.highest)
        return Decision(prompt.id, verdict, f"pass rate {rate:g}, kept are {rules.lowest:g} to {rules.highest:g}", rate)

    async def _num_correct(self, i: int, prompt: Prompt, samples: int, max_tokens: int, *, first_sample: int) -> int:
        (responses,) = await answer(
            [self.engines[i % len(self.engines)]],
            self.tokenizer,
            self.scorer,
            [prompt],
            samples=samples,
            sampling=sampling_at(self.config, self.tokenizer, self.rules.temperature),
            max_tokens=max_tokens,
            first_id=i * (self.rules.samples + self.rules.tries) + first_sample,
        )
        return sum(r.is_correct for r in responses)


def _write_results(config: Config, prompts: Sequence[Prompt], decisions: dict[str, Decision], out: Path) -> dict[str, int]:
    opening = 2 * len(config.data.worked_turns) + (config.data.system_message is not None)
    kept: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    for prompt in prompts:
        decision = decisions[prompt.id]
        line = {
            "messages": [dataclasses.asdict(m) for m in prompt.messages[opening:]],
            "answer": prompt.answer,
            "verifier": prompt.verifier,
            "tags": {**prompt.tags, "answer_kind": curation.answer_kind(prompt.answer)},
            "difficulty": prompt.difficulty if decision.pass_rate is None else decision.pass_rate,
            "curation": {"verdict": decision.verdict, "reason": decision.reason, "source_difficulty": prompt.difficulty},
        }
        (kept if decision.verdict is Verdict.KEPT else dropped).append(line)
    counts = Counter(decisions[p.id].verdict.value for p in prompts)
    for name, lines in (("kept", kept), ("dropped", dropped)):
        write_atomically(out / f"{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    kinds = Counter(line["tags"]["answer_kind"] for line in kept)
    report = {"prompts": len(prompts), "verdicts": dict(counts), "kept_answer_kinds": dict(kinds)}
    write_atomically(out / "report.json", json.dumps(report, indent=2) + "\n")
    if not kept:
        raise DataError(f"{out}: nothing is left of {len(prompts)} prompts; dropped.jsonl says why each was dropped")
    return dict(counts)
