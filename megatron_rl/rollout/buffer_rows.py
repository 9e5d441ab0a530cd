"""Rows of the replay buffer to the nouns of `types.py` and back; one query a table, however many groups are loaded.

It reads what `buffer.py` asks for and changes nothing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_rl.rollout.buffer_file import BufferFile
from megatron_rl.types import Ending, Group, Message, Outcome, OutcomeKind, Prompt, Segment, Trajectory


def ints_blob(values: np.ndarray) -> bytes:
    """[n] integers as little-endian int32"""
    return np.asarray(values).astype("<i4").tobytes()


def floats_blob(values: np.ndarray) -> bytes:
    """[n] as little-endian float32"""
    return np.asarray(values).astype("<f4").tobytes()


def prompt_row(prompt: Prompt) -> tuple:
    messages = json.dumps([[m.role, m.content] for m in prompt.messages], ensure_ascii=False)
    tags = json.dumps(dict(prompt.tags), ensure_ascii=False, sort_keys=True)
    return prompt.id, messages, ints_blob(prompt.token_ids), prompt.answer, prompt.verifier, tags, prompt.difficulty


def outcome_text(outcome: Outcome) -> str:
    return json.dumps({**asdict(outcome), "terms": dict(outcome.terms)}, ensure_ascii=False, sort_keys=True)


def load_groups(file: BufferFile, group_ids: str, values: Sequence[Any] = ()) -> list[Group]:
    """`group_ids`: a query that yields them. Oldest first, dropped members left out."""
    prompts = {
        row[0]: _prompt(*row[1:])
        for row in file.rows(
            "SELECT g.id, p.id, messages, token_ids, answer, verifier, tags, difficulty FROM grp g "
            f"JOIN prompt p ON p.id = g.prompt_id WHERE g.id IN ({group_ids}) ORDER BY g.id",
            values,
        )
    }
    members: dict[int, list[Trajectory]] = defaultdict(list)
    for trajectory in load_trajectories(file, f"state != 'dropped' AND group_id IN ({group_ids})", values):
        members[trajectory.group_id].append(trajectory)
    return [Group(i, prompt, tuple(members[i])) for i, prompt in prompts.items()]


def load_trajectories(file: BufferFile, where: str, values: Sequence[Any] = ()) -> list[Trajectory]:
    """`where`: a condition on table trajectory. In the order of their ids."""
    segments = _segments(file, f"SELECT id FROM trajectory WHERE {where}", values)
    rows = file.rows(f"SELECT id, group_id, outcome FROM trajectory WHERE {where} ORDER BY id", values)
    return [Trajectory(i, group_id, tuple(segments[i]), _outcome(text) if text else None) for i, group_id, text in rows]


def _segments(file: BufferFile, trajectory_ids: str, values: Sequence[Any]) -> dict[int, list[Segment]]:
    chunks: dict[int, list[tuple]] = defaultdict(list)
    for segment_id, *columns in file.rows(
        "SELECT c.segment_id, c.tokens, c.log_probs, c.kv_versions, c.from_policy FROM chunk c "
        f"JOIN segment s ON s.id = c.segment_id WHERE s.trajectory_id IN ({trajectory_ids}) ORDER BY c.segment_id, c.offset",
        values,
    ):
        chunks[segment_id].append(tuple(columns))
    segments: dict[int, list[Segment]] = defaultdict(list)
    for segment_id, trajectory_id, iteration, version, lineage, temperature, engine, ending in file.rows(
        "SELECT id, trajectory_id, iteration, weight_version, lineage, temperature, engine, ending FROM segment "
        f"WHERE trajectory_id IN ({trajectory_ids}) ORDER BY trajectory_id, ordinal",
        values,
    ):
        arrays = _arrays(chunks[segment_id])
        segments[trajectory_id].append(
            Segment(iteration, version, lineage, temperature, engine, Ending(ending or Ending.ABORT), *arrays)
        )
    return segments


def _arrays(chunks: list[tuple]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """token_ids, log_probs, kv_versions, from_policy of one segment, each [tokens]"""
    tokens, log_probs, versions = (b"".join(chunk[column] for chunk in chunks) for column in range(3))
    flags = [np.full(len(chunk[0]) // 4, chunk[3], np.bool_) for chunk in chunks]
    return (
        np.frombuffer(tokens, "<i4").astype(np.int32),
        np.frombuffer(log_probs, "<f4").astype(np.float32),
        np.frombuffer(versions, "<i4").astype(np.int32),
        np.concatenate(flags) if flags else np.zeros(0, np.bool_),
    )


def _prompt(
    prompt_id: str, messages: str, token_ids: bytes, answer: str, verifier: str, tags: str, difficulty: float | None
) -> Prompt:
    return Prompt(
        id=prompt_id,
        messages=tuple(Message(role, content) for role, content in json.loads(messages)),
        token_ids=np.frombuffer(token_ids, "<i4").astype(np.int32),
        answer=answer,
        verifier=verifier,
        tags=json.loads(tags),
        difficulty=difficulty,
    )


def _outcome(text: str) -> Outcome:
    fields = json.loads(text)
    return Outcome(**{**fields, "kind": OutcomeKind(fields["kind"])})
