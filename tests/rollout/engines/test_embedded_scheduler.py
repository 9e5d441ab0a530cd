"""The embedded engine's bookkeeping, walked with a fake model whose KV of a token is the text up to it."""

from __future__ import annotations

import numpy as np
from engine_scenarios import prompt, request
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.rollout.engines.embedded.scheduler import Running, Scheduler
from megatron_rl.types import Ending

PAGE_SIZE = 4


class FakeCache:
    """Executes plans: whoever computes a token must find its whole past in its own pages, and nobody else's page written."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.texts: dict[tuple[int, int], tuple[int, ...]] = {}
        self.num_computed = 0

    def step(self, draw) -> None:
        plan = self.scheduler.plan()
        assert plan.prefill or plan.decode, "there is work, so something runs"
        for source, target in plan.copies:
            for offset in range(PAGE_SIZE):
                if (source, offset) in self.texts:
                    self.texts[target, offset] = self.texts[source, offset]
        pieces = [(p.trajectory, p.start, p.end) for p in plan.prefill]
        pieces += [(t, t.num_tokens - 1, t.num_tokens) for t in plan.decode]
        for trajectory, start, end in pieces:
            self._compute(trajectory, start, end)
        for trajectory, _, end in pieces:
            trajectory.num_computed = end
            if trajectory.num_pending == 0:
                trajectory.push(draw(trajectory))
                if trajectory.ending is not None:
                    self.scheduler.end(trajectory, trajectory.ending)

    def _compute(self, trajectory: Running, start: int, end: int) -> None:
        text = tuple(trajectory.tokens[:end].tolist())
        for position in range(end):
            page, offset = trajectory.pages[position // PAGE_SIZE], position % PAGE_SIZE
            if position >= start:
                assert self.scheduler.pages.holders([page]) == [1], "written pages belong to one trajectory"
                self.texts[page, offset] = text[: position + 1]
                self.num_computed += 1
            assert self.texts[page, offset] == text[: position + 1]


def make(num_pages: int, max_running: int = 8, prefill_tokens: int = 1000) -> tuple[Scheduler, FakeCache]:
    scheduler = Scheduler(num_pages, PAGE_SIZE, max_running=max_running, prefill_tokens=prefill_tokens)
    return scheduler, FakeCache(scheduler)


def group(size: int, num_prompt: int, max_new_tokens: int = 9) -> list[Running]:
    return [Running.of(request(i, prompt(0, num_prompt), max_new_tokens, kv_key="g"), 100) for i in range(size)]


def test_a_group_computes_its_prompt_once_and_shares_its_whole_pages():
    scheduler, cache = make(200)
    for trajectory in group(8, 30):
        scheduler.add(trajectory)
    cache.step(lambda t: t.request.trajectory_id)
    assert cache.num_computed == 30 and len(scheduler.running) == 1, "the others wait for the prompt"
    cache.step(lambda t: t.request.trajectory_id)
    assert cache.num_computed == 30 + 8, "the first goes on, the others compute the last prompt token"
    used = scheduler.pages.num_usable - scheduler.pages.num_free
    assert used == 7 + 8, "seven whole pages shared; the eighth, partly filled, is one for each"
    assert len({t.pages[6] for t in scheduler.running}) == 1 and len({t.pages[7] for t in scheduler.running}) == 8


def test_requests_of_other_keys_share_nothing():
    scheduler, cache = make(200)
    for i in range(4):
        scheduler.add(Running.of(request(i, prompt(0, 30), 9), 100))
    cache.step(lambda t: 1)
    assert cache.num_computed == 4 * 30
    assert len({page for t in scheduler.running for page in t.pages}) == 4 * 8


def test_long_contexts_are_computed_in_pieces_while_others_decode():
    scheduler, cache = make(200, prefill_tokens=8)
    short, long = Running.of(request(0, [1], 30), 100), Running.of(request(1, prompt(0, 40), 30), 100)
    scheduler.add(short)
    scheduler.add(long)
    for _ in range(5):
        cache.step(lambda t: 7)
    assert (long.num_tokens, short.num_tokens) == (41, 6)


def test_retained_kv_gives_way_to_running_trajectories_finished_ones_first():
    scheduler, cache = make(1 + 12)
    for i, stop in ((0, ()), (1, (7,))):
        scheduler.add(Running.of(request(i, prompt(i, 15), 1, stop_token_ids=stop), 100))
        cache.step(lambda t: 7)
    assert [t.ending for t in scheduler.retained.values()] == [Ending.STOP, Ending.LENGTH]
    scheduler.add(Running.of(request(2, prompt(2, 20), 1), 100))
    cache.step(lambda t: 7)
    assert set(scheduler.retained) == {0, 2}


def test_the_youngest_gives_way_and_the_oldest_never_does():
    scheduler, cache = make(1 + 10)
    for i in range(2):
        scheduler.add(Running.of(request(i, prompt(i, 10), 24), 100))
    order = []
    while scheduler.has_work:
        cache.step(lambda t: 7)
        order += [i for i in scheduler.retained if i not in order]
        assert scheduler.running[:1] in ([], [t for t in scheduler.running if t.request.trajectory_id == min(1, len(order))])
    assert order == [0, 1]


def test_a_trajectory_that_goes_on_from_within_a_shared_page_gets_its_own_copy():
    scheduler, cache = make(200)
    for trajectory in group(2, 9, max_new_tokens=1):
        scheduler.add(trajectory)
    while scheduler.has_work:
        cache.step(lambda t: 7)
    shared = scheduler.retained[1].pages[1]
    assert scheduler.retained[0].pages[1] == shared
    scheduler.add(Running.of(request(0, [*prompt(0, 9)[:6], 5, 5, 5], 1, kv_key="g"), 100))
    cache.step(lambda t: 7)
    assert scheduler.retained[0].pages[0] == scheduler.retained[1].pages[0]
    assert scheduler.retained[0].pages[1] != shared == scheduler.retained[1].pages[1]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mix_of_requests_aborts_and_new_weights_ends_without_leak_or_wrong_kv(data):
    num_usable = data.draw(st.integers(8, 40))
    scheduler, cache = make(1 + num_usable, data.draw(st.integers(1, 6)), data.draw(st.integers(1, 30)))
    random = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    contexts: dict[int, list[int]] = {}
    keeps = data.draw(st.booleans())

    def drain(num_steps: int) -> None:
        while scheduler.has_work and num_steps:
            cache.step(lambda t: int(random.integers(0, 3)))
            num_steps -= 1

    for version in range(data.draw(st.integers(1, 4))):
        for _ in range(random.integers(1, 8)):
            identity = int(random.integers(0, 10))
            if any(t.request.trajectory_id == identity for t in (*scheduler.running, *scheduler.waiting)):
                continue
            context = contexts.setdefault(identity, prompt(identity % 2, int(random.integers(1, 14))))
            if random.random() < 0.2:
                context = [*context[: random.integers(0, len(context))], 0]  # goes on from earlier, another way
            room = num_usable * PAGE_SIZE - len(context)
            if room < 1:
                continue
            new = Running.of(
                request(identity, context, int(random.integers(1, min(20, room) + 1)), kv_key=str(identity % 2)), 10_000
            )
            contexts[identity] = new.tokens  # filled in as it runs
            scheduler.add(new)
            drain(int(random.integers(0, 4)))
        drain(int(random.integers(0, 30)))
        for trajectory in (*scheduler.running, *scheduler.waiting):
            if random.random() < 0.5:
                contexts[trajectory.request.trajectory_id] = trajectory.tokens[: trajectory.num_tokens].tolist()
                scheduler.end(trajectory, Ending.ABORT)
        drain(10_000)
        assert not scheduler.has_work, "everything ends"
        contexts = {identity: list(context) for identity, context in contexts.items()}
        scheduler.change_version(version + 1, version if keeps else version + 2)
        assert keeps or scheduler.pages.num_free == num_usable
    for identity in list(scheduler.retained):
        scheduler.drop_retained(identity)
    scheduler.pages.check_empty()
