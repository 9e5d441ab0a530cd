"""What conducts a rollout phase in a test: prompts in order, a scorer and a tokenizer without a model, one iteration."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from fake_engine import STOP, FakeEngine
from material import prompt

from megatron_rl.config import Config
from megatron_rl.model_config import ModelConfig
from megatron_rl.rollout.buffer import ReplayBuffer
from megatron_rl.rollout.scheduler import Rollout
from megatron_rl.types import Ending, Group, Outcome, OutcomeKind, Prompt

MODEL = ModelConfig(
    "llama",
    1,
    8,
    1,
    1,
    8,
    8,
    100_000,
    64,
    1e-5,
    1e4,
    None,
    tied_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
    eos_token_ids=(STOP,),
)


class Prompts:
    """The i-th draw is prompt i, as a resumed sampler would go on."""

    def __init__(self, drawn: int = 0) -> None:
        self.drawn = drawn

    def draw(self, n: int) -> list[Prompt]:
        self.drawn += n
        return [prompt(i) for i in range(self.drawn - n, self.drawn)]


class Scorer:
    """Reward by the first token; `fails` names responses that cannot be scored. Answers after a seeded number of turns."""

    def __init__(self, fails: Callable[[str], bool] = lambda response: False, seed: int = 0) -> None:
        self.fails, self.random = fails, random.Random(seed)
        self.endings: list[Ending] = []

    async def score(self, prompt: Prompt, response: str, ending: Ending) -> Outcome:
        for _ in range(self.random.randrange(5)):
            await asyncio.sleep(0)
        self.endings.append(ending)
        if self.fails(response):
            return Outcome(OutcomeKind.FAILED, 0.0, False, detail="exact: crashed")
        reward = float(int(response.split()[0]) % 2)
        return Outcome(OutcomeKind.VALUE, reward, reward == 1.0, {"exact": reward})


class Tokenizer:
    stop_token_ids = (STOP,)

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def rollout(
    buffer: ReplayBuffer, engines: FakeEngine | list[FakeEngine], settings: Config, scorer: Scorer | None = None
) -> Rollout:
    engines = engines if isinstance(engines, list) else [engines]
    return Rollout(buffer, engines, Prompts(buffer.num_drawn), scorer or Scorer(), Tokenizer(), settings, MODEL)


def run(phase: Rollout, iteration: int, version: int = 0, record: bool = True) -> list[Group]:
    """One iteration as the loop does it."""
    groups = asyncio.run(asyncio.wait_for(phase.run(iteration, version), 60))
    if groups and record:
        phase.buffer.record_batch(iteration, [g.id for g in groups])
    phase.buffer.check()
    return groups


def endings(buffer: ReplayBuffer, trajectory_id: int) -> list[tuple[int, Ending]]:
    (trajectory,) = buffer.trajectories([trajectory_id])
    return [(len(s.token_ids), s.ending) for s in trajectory.segments]


def content(buffer: ReplayBuffer, count: int) -> list:
    """All that generation decided: segments as they stand, however their chunks were committed."""
    return [
        [(s.iteration, s.weight_version, s.ending, s.token_ids.tolist(), s.log_probs.tolist()) for s in t.segments]
        for t in buffer.trajectories(range(count))
    ]
