"""Packing loses nothing, repeats nothing, and every row knows its place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.training.packing import PackedBatch, plan
from megatron_rl.types import TrainingSequence

BOS = 1_000_000  # prompt tokens are BOS + group; response tokens name their trajectory and place


def sequence(group: int, trajectory: int, prompt_tokens: int, mask: list[bool]) -> TrainingSequence:
    n = len(mask)
    return TrainingSequence(
        group_id=group,
        trajectory_id=trajectory,
        prompt_ids=np.full(prompt_tokens, BOS + group, np.int32),
        response_ids=(trajectory * 1000 + np.arange(n)).astype(np.int32),
        loss_mask=np.array(mask, bool),
        behaviour_log_probs=-np.arange(n, dtype=np.float32) - trajectory * 1000,
        weight_versions=np.arange(n, dtype=np.int32),
        advantage=trajectory / 8,
        weight=1 / (trajectory + 1),
        temperatures=None if trajectory % 3 == 2 else (0.5 + np.arange(n) / 64).astype(np.float32),
    )


@st.composite
def batches(draw: st.DrawFn) -> list[TrainingSequence]:
    found = []
    for group in range(draw(st.integers(0, 5))):
        prompt_tokens = draw(st.integers(1, 12))
        for _ in range(draw(st.integers(1, 4))):
            mask = draw(st.lists(st.booleans(), min_size=1, max_size=15))
            found.append(sequence(group, len(found), prompt_tokens, mask))
    return found


layouts = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 60),
        "share_prompts": st.booleans(),
        "multiple": st.sampled_from([1, 2, 4, 6]),
        "data_parallel": st.integers(1, 3),
        "micro_batch_multiple": st.integers(1, 2),
    }
)


@settings(max_examples=60, deadline=None)
@given(batches(), layouts)
def test_every_loss_token_is_trained_exactly_once_with_its_own_facts(sequences, layout):
    packs = [pack for rank in plan(sequences, **layout) for pack in rank]
    seen = {}
    for pack in packs:
        for i, target in enumerate(pack.targets):
            trajectory, at = divmod(int(target), 1000)
            assert (trajectory, at) not in seen
            owner = pack.sequence_ids[i]
            assert pack.trajectory_ids[owner] == trajectory
            assert pack.behaviour_log_probs[i] == sequences[trajectory].behaviour_log_probs[at]
            own = sequences[trajectory].temperatures
            assert pack.temperatures[i] == (1 if own is None else own[at])
            assert pack.weight_versions[i] == sequences[trajectory].weight_versions[at]
            assert pack.advantages[owner] == np.float32(sequences[trajectory].advantage)
            assert pack.weights[owner] == np.float32(sequences[trajectory].weight)
            seen[trajectory, at] = True
    assert set(seen) == {(s.trajectory_id, t) for s in sequences for t in np.flatnonzero(s.loss_mask)}


@settings(max_examples=60, deadline=None)
@given(batches(), layouts)
def test_the_context_of_every_loss_row_is_its_own_prompt_and_the_response_so_far(sequences, layout):
    for pack in (pack for rank in plan(sequences, **layout) for pack in rank):
        contexts = {}  # row: the ways it can be reached from the first position
        for branch in pack.branches:
            rows = branch.rows()
            assert pack.positions[rows].tolist() == list(range(len(rows)))
            for at, row in enumerate(rows):
                contexts.setdefault(int(row), set()).add(tuple(rows[: at + 1]))
        assert set(contexts) == set(range(len(pack.token_ids)))
        assert all(len(ways) == 1 for ways in contexts.values())
        for row, target in zip(pack.loss_rows, pack.targets, strict=True):
            own = sequences[int(target) // 1000]
            expected = [*own.prompt_ids, *own.response_ids[: int(target) % 1000]]
            assert pack.token_ids[list(next(iter(contexts[int(row)])))].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(batches(), layouts)
def test_ranks_get_equally_many_packs_within_the_limit_and_groups_stay_whole_where_they_fit(sequences, layout):
    ranks = plan(sequences, **layout)
    limit, multiple = layout["max_tokens"], layout["multiple"]
    assert len(ranks) == layout["data_parallel"]
    assert len({len(r) for r in ranks}) == 1 and len(ranks[0]) % layout["micro_batch_multiple"] == 0 and ranks[0]
    where = {}
    for pack in (pack for rank in ranks for pack in rank):
        rows = len(pack.token_ids) - pack.num_padding
        assert len(pack.token_ids) % multiple == 0 and len(pack.token_ids) > 0
        assert rows <= limit or len(pack.trajectory_ids) == 1
        for trajectory in pack.trajectory_ids:
            where.setdefault(sequences[trajectory].group_id, set()).add(id(pack))
    for group, packs in where.items():
        members = [s for s in sequences if s.group_id == group and s.loss_mask.any()]
        own = [int(np.flatnonzero(m.loss_mask)[-1]) for m in members]
        prompts = len(members[0].prompt_ids) * (1 if layout["share_prompts"] else len(members))
        assert len(packs) == 1 or sum(own) + prompts > limit


def test_sharing_computes_a_prompt_once():
    group = [sequence(0, j, 100, [True] * 10) for j in range(8)]
    [[shared]], [[alone]] = plan(group, max_tokens=2000), plan(group, max_tokens=2000, share_prompts=False)
    assert len(shared.token_ids) == 100 + 8 * 9
    assert len(alone.token_ids) == 8 * (100 + 9)


def test_nothing_behind_the_last_loss_token_is_computed():
    [[pack]] = plan([sequence(0, 0, 5, [False, True, False, False])], max_tokens=100)
    assert pack.token_ids.tolist() == [BOS] * 5 + [0] and pack.loss_rows.tolist() == [5] and pack.targets.tolist() == [1]


@pytest.mark.parametrize("data_parallel", [1, 2, 4])
def test_work_is_balanced_over_ranks(data_parallel):
    rng = np.random.default_rng(0)
    sequences = [sequence(g, g, 20, [True] * int(rng.integers(10, 200))) for g in range(64)]
    ranks = plan(sequences, max_tokens=1024, data_parallel=data_parallel)
    rows = [sum(len(p.token_ids) for p in packs) for packs in ranks]
    assert max(rows) <= 1.1 * min(rows)
    assert len(ranks[0]) * data_parallel <= 1.3 * sum(rows) / 1024 + data_parallel


def test_a_batch_without_loss_is_padding_only():
    [[pack]] = plan([sequence(0, 0, 5, [False, False])], max_tokens=100, multiple=4)
    assert isinstance(pack, PackedBatch) and len(pack.token_ids) == pack.num_padding == 4 and len(pack.targets) == 0
