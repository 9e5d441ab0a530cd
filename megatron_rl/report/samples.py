"""Sampled trajectories for the report: which ones, and their tokens coloured by the weight version that made them.

Tokens are shown as they were trained, each decoded in the context of the one before; nothing is ever encoded again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from html import escape
from itertools import zip_longest

import numpy as np
from tokenizers import Tokenizer

from megatron_rl.config import Config
from megatron_rl.report.charts import number, tooltip
from megatron_rl.report.run_data import RunData, Trained, open_buffer
from megatron_rl.report.style import NUM_COLOURS
from megatron_rl.types import Group, Prompt, Segment, Trajectory

log = logging.getLogger(__name__)

MAX_TOKENS = 16_000  # shown in the whole report, shared among its trajectories
UNLIKELY = np.log(0.2)  # tokens below this log-prob are underlined


def samples_card(run: RunData) -> str:
    """The card of sampled trajectories, at most `report.samples` of them."""
    ids = choose(run.trained, run.config.report.samples)
    if not ids:
        return '<section class="card wide"><h2>Sampled trajectories</h2><p class="nothing">no data</p></section>'
    with open_buffer(run.config) as buffer:
        trajectories = buffer.trajectories(ids)
        groups = {group.id: group for group in buffer.groups(sorted({t.group_id for t in trajectories}))}
    facts = {t.trajectory_id: t for t in run.trained}
    decoder = load_decoder(run.config)
    limit = MAX_TOKENS // len(ids)
    body = "".join(_sample(t, groups[t.group_id], facts[t.id], decoder, limit) for t in trajectories)
    about = (
        "Each token is coloured by the weight version it was sampled from (colours repeat after eight versions); trajectories of "
        "several versions come first. Point at a token for its version and log-prob; tokens with p < 0.2 are underlined."
    )
    return f'<section class="card wide"><h2>Sampled trajectories</h2><p class="note">{escape(about)}</p>{body}</section>'


def choose(trained: Sequence[Trained], count: int) -> list[int]:
    """Trajectory ids: up to half of `count` with several weight versions, then in turn from the run's start and its end,
    one right and one wrong answer each where there are both. The same run always gives the same choice."""
    mixed = [t for t in trained if t.num_versions > 1]  # in the order of training
    several = [max(part, key=lambda t: t.num_versions) for part in _parts(mixed, (count + 1) // 2)]
    taken = {t.trajectory_id for t in several}
    rest = [t for t in trained if t.trajectory_id not in taken]
    early, late = _alternating(rest, count), _alternating(rest[::-1], count)
    ids = [t.trajectory_id for t in several]
    for trajectory in (t for pair in zip_longest(early, late) for t in pair if t is not None):
        if len(ids) < count and trajectory.trajectory_id not in ids:
            ids.append(trajectory.trajectory_id)
    return ids[:count]


def load_decoder(config: Config) -> Tokenizer | None:
    """The tokenizer of the run's model; None where its folder cannot be read any more, and ids are shown instead.

    Without transformers, whose import takes longer than the whole report."""
    for folder in (config.model.folder, config.run.folder / "hf"):
        path = folder / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
            json.loads(text)  # tokenizers raises a bare Exception for a torn file
            return Tokenizer.from_str(text)
        except (OSError, ValueError) as e:
            log.warning("%s: cannot be read (%s); without it the report shows token ids", path, e)
    return None


def token_texts(decoder: Tokenizer, token_ids: Iterable[int], before: Iterable[int] = ()) -> list[str]:
    """The text each token adds to those before it; a character made of several tokens stands at its last one."""
    context = [int(i) for i in before][-1:]
    pending: list[int] = []
    texts: list[str] = []
    for token in token_ids:
        pending.append(int(token))
        prefix, whole = (_decoded(decoder, ids) for ids in (context, context + pending))
        text = whole[len(prefix) :] if whole.startswith(prefix) else _decoded(decoder, pending)
        if text.endswith("\ufffd") and len(pending) < 4:  # UTF-8 characters are at most four bytes
            texts.append("")
            continue
        texts.append(text)
        context, pending = pending[-1:], []
    if pending:
        texts[-1] = _decoded(decoder, pending)
    return texts


def coloured_tokens(trajectory: Trajectory, prompt: Prompt, decoder: Tokenizer | None, limit: int) -> str:
    """HTML of the response, one span a segment; of more than `limit` tokens the middle is left out."""
    ids, total = trajectory.token_ids, trajectory.num_tokens
    head, tail = (total, total) if total <= limit else (limit * 2 // 3, total - limit // 3)
    texts = [""] * total
    for start, end in ((0, head), (tail, total)):
        if decoder is None:
            texts[start:end] = [f"{i} " for i in ids[start:end]]
        else:
            before = ids[start - 1 : start] if start else prompt.token_ids[-1:]
            texts[start:end] = token_texts(decoder, ids[start:end], before)
    spans, offset = [], 0
    for segment in trajectory.segments:
        end = offset + len(segment.token_ids)
        shown = [i for i in range(offset, end) if i < head or i >= tail]
        tokens = "".join(_token(segment, i - offset, texts[i]) for i in shown if i < head)
        if offset <= head < end and head < tail:
            tokens += f'<b class="end">… {tail - head:,} tokens not shown …</b>'
        tokens += "".join(_token(segment, i - offset, texts[i]) for i in shown if i >= tail)
        v = segment.weight_version
        spans.append(f'<span class="seg v{v % NUM_COLOURS}" data-v="{v}" data-i="{segment.iteration}">{tokens}</span>')
        lineage = f", lineage {segment.lineage}" if segment.lineage else ""
        where = f"iteration {segment.iteration}, weight version {v}{lineage}, engine {segment.engine}"
        about = f"segment ended as {segment.ending}\n{where}"
        spans.append(f'<b class="end" data-t="{tooltip(about)}">{segment.ending}</b>')
        offset = end
    return "".join(spans)


def _token(segment: Segment, i: int, text: str) -> str:
    log_prob = float(segment.log_probs[i])
    css = [name for name, on in (("u", log_prob < UNLIKELY), ("tool", not segment.from_policy[i])) if on]
    kind = f' class="{" ".join(css)}"' if css else ""
    kv = f' data-k="{segment.kv_versions[i]}"' if segment.kv_versions[i] != segment.weight_version else ""
    shown = escape(text).replace("\n", "⏎\n") or "·"
    return f'<i{kind} data-p="{log_prob:.3f}"{kv}>{shown}</i>'


def _sample(trajectory: Trajectory, group: Group, facts: Trained, decoder: Tokenizer | None, limit: int) -> str:
    outcome, prompt = trajectory.outcome, group.prompt
    assert outcome is not None, "trained trajectories are scored"
    versions = sorted({s.weight_version for s in trajectory.segments if len(s.token_ids)})
    chips = f'<span class="chip {"up" if outcome.correct else "down"}">reward {number(outcome.reward)}</span>'
    chips += "".join(f'<span class="chip v{v % NUM_COLOURS}">version {v}</span>' for v in versions)
    terms = "".join(f"<span>{escape(name)} {number(value)}</span>" for name, value in outcome.terms.items())
    segments = f"{len(trajectory.segments)} segment{'s' if len(trajectory.segments) != 1 else ''}"
    question = next((m.content for m in reversed(prompt.messages) if m.role == "user"), "")
    whole = "\n\n".join(f"{m.role}: {m.content}" for m in prompt.messages)
    return (
        f'<div class="sample"><div class="head"><b>Trajectory {trajectory.id}</b>{chips}<span>group {group.id}</span>'
        f"<span>trained in iteration {facts.iteration}</span><span>{trajectory.num_tokens:,} tokens in {segments}</span>{terms}"
        f"<span>right answer <code>{escape(_short(prompt.answer, 80))}</code></span></div>"
        f'<details class="prompt"><summary>{escape(_short(question, 600))}</summary>'
        f'<div class="text">{escape(_short(whole, 4000))}</div></details>'
        f'<div class="tokens">{coloured_tokens(trajectory, prompt, decoder, limit)}</div></div>'
    )


def _decoded(decoder: Tokenizer, ids: list[int]) -> str:
    return decoder.decode(ids, skip_special_tokens=False) if ids else ""


def _parts(items: Sequence[Trained], count: int) -> list[Sequence[Trained]]:
    """At most `count` runs of items, of even length and none empty."""
    count = min(count, len(items))
    return [items[i * len(items) // count : (i + 1) * len(items) // count] for i in range(count)]


def _alternating(items: Sequence[Trained], count: int) -> list[Trained]:
    """The first right and wrong ones, in turn."""
    right = [t for t in items if t.correct][:count]
    wrong = [t for t in items if not t.correct][:count]
    return [t for pair in zip_longest(right, wrong) for t in pair if t is not None]


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + " …"
