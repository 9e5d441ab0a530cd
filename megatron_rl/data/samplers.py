"""In which order prompts are drawn (paper 2.3.4): uniformly, hard ones from an iteration on, or by 1 - success rate.

The i-th draw of a run is a pure function of (seed, i, what was observed before it): noise is counter-based, so a resumed
run goes on exactly where it stopped. Refuses an empty prompt set. One event loop owns a sampler.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_rl.config import SamplerConfig
from megatron_rl.errors import DataError
from megatron_rl.types import Prompt

log = logging.getLogger(__name__)

FIRST_RATE = 0.5  # success rate of a prompt with neither a difficulty nor an observation (ours: the paper leaves it open)
SHUFFLES, CHOICES = 0, 1  # streams of noise that never meet


class SuccessRates:
    """s_i of every prompt: its difficulty (else FIRST_RATE), then s <- (1 - smoothing) s + smoothing * mean(group)."""

    def __init__(self, prompts: Sequence[Prompt], smoothing: float) -> None:
        self._smoothing = smoothing
        self._index = {prompt.id: i for i, prompt in enumerate(prompts)}
        self._first = np.array([FIRST_RATE if p.difficulty is None else p.difficulty for p in prompts])
        self._observed: dict[str, float] = {}
        self.rates = self._first.copy()  # float64 [prompts]
        self.is_known = np.array([p.difficulty is not None for p in prompts])  # bool [prompts]: labelled or observed

    def observe(self, prompt_id: str, correct: Sequence[bool]) -> None:
        """Of a prompt that has left the data set since it was drawn, nothing is kept."""
        if prompt_id not in self._index or not correct:
            return
        old = self.rates[self._index[prompt_id]]
        self._set(prompt_id, float((1 - self._smoothing) * old + self._smoothing * np.mean(correct)))

    def state(self) -> dict[str, float]:
        return dict(self._observed)

    def restore(self, observed: dict[str, float]) -> None:
        self._observed = {}
        self.rates = self._first.copy()
        for prompt_id, rate in observed.items():
            if prompt_id in self._index:
                self._set(prompt_id, rate)

    def _set(self, prompt_id: str, rate: float) -> None:
        self._observed[prompt_id] = rate
        self.rates[self._index[prompt_id]] = rate
        self.is_known[self._index[prompt_id]] = True


class Uniform:
    """Every prompt once an epoch, each epoch in an order of its own."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise DataError("data: there is no prompt to train on; bring more questions or lower data.held_out")
        self.prompts, self.seed = tuple(prompts), seed
        self.num_drawn = 0
        self._epoch: int | None = None
        self._order = np.zeros(0, np.int64)  # [prompts], of the epoch `_epoch`

    def begin(self, iteration: int) -> None:
        """Called at the start of every rollout phase."""

    def draw(self, n: int) -> list[Prompt]:
        """The next `n` prompts of the run."""
        drawn = []
        for _ in range(n):
            drawn.append(self.prompts[self._choose(self.num_drawn)])
            self.num_drawn += 1
        return drawn

    def observe(self, prompt_id: str, correct: list[bool]) -> None:
        """What a trained group said of its prompt: one truth value a member."""

    def state(self) -> dict[str, Any]:
        """All that was observed, as JSON; the number of draws is the replay buffer's."""
        return {}

    def restore(self, state: dict[str, Any], num_drawn: int) -> None:
        """Go on after `num_drawn` draws; `{}` is the state before any observation."""
        self.num_drawn = num_drawn

    def _choose(self, draw: int) -> int:
        epoch, position = divmod(draw, len(self.prompts))
        if epoch != self._epoch:
            self._order = _noise(self.seed, epoch, SHUFFLES).permutation(len(self.prompts))
            self._epoch = epoch
        return int(self._order[position])


class Adaptive(Uniform):
    """What the samplers that follow success rates have in common."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, *, smoothing: float) -> None:
        super().__init__(prompts, seed)
        self.success = SuccessRates(self.prompts, smoothing)

    def observe(self, prompt_id: str, correct: list[bool]) -> None:
        self.success.observe(prompt_id, correct)

    def state(self) -> dict[str, Any]:
        return {"rates": self.success.state()}

    def restore(self, state: dict[str, Any], num_drawn: int) -> None:
        super().restore(state, num_drawn)
        self.success.restore(state.get("rates", {}))


class Curriculum(Adaptive):
    """Uniform before `switch_iteration`; from then on uniform over the prompts whose success rate is known to be below
    `hard_below` (paper 3.5).

    These run out as they are learnt, and the last ones may be out of reach. Where they are fewer than the groups of a batch, h of
    `batch`, a draw is one of them with probability h / batch, about once a batch each, and else uniform over all prompts, which
    also finds those that were forgotten. The log says when that begins."""

    def __init__(
        self, prompts: Sequence[Prompt], seed: int, *, switch_iteration: int, hard_below: float, smoothing: float, batch: int
    ) -> None:
        super().__init__(prompts, seed, smoothing=smoothing)
        self._switch_iteration, self._hard_below, self._batch = switch_iteration, hard_below, batch
        self._iteration = 0
        self._is_short = False  # of hard prompts, in the last phase

    def begin(self, iteration: int) -> None:
        self._iteration = iteration
        was_short, num_hard = self._is_short, len(self._hard())
        self._is_short = iteration >= self._switch_iteration and num_hard < self._batch
        if self._is_short and not was_short:
            log.warning(
                "sampler.hard_below=%g: in iteration %d only %d of %d prompts are known to have a lower success rate, fewer than "
                "rollout.groups_per_iteration=%d; the rest of a batch is drawn from all prompts",
                self._hard_below,
                iteration,
                num_hard,
                len(self.prompts),
                self._batch,
            )

    def _hard(self) -> np.ndarray:
        """int64 [hard prompts]: their indices"""
        return np.flatnonzero(self.success.is_known & (self.success.rates < self._hard_below))

    def _choose(self, draw: int) -> int:
        hard = self._hard() if self._iteration >= self._switch_iteration else np.zeros(0, np.int64)
        if not len(hard):
            return super()._choose(draw)
        noise = _noise(self.seed, draw, CHOICES)
        chosen = int(hard[noise.integers(len(hard))])
        return chosen if noise.random() * self._batch < len(hard) else super()._choose(draw)


class Prioritized(Adaptive):
    """Draws are independent, p_i proportional to max(1 - s_i, floor) (paper 2.3.4)."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, *, smoothing: float, floor: float) -> None:
        super().__init__(prompts, seed, smoothing=smoothing)
        self._floor = floor

    def probabilities(self) -> np.ndarray:
        """float64 [prompts]. Uniform where every weight is 0 (all solved, and a floor of 0)."""
        weights = np.maximum(1 - self.success.rates, self._floor)
        total = weights.sum()
        return weights / total if total > 0 else np.full(len(weights), 1 / len(weights))

    def _choose(self, draw: int) -> int:
        return int(_noise(self.seed, draw, CHOICES).choice(len(self.prompts), p=self.probabilities()))


def make_sampler(config: SamplerConfig, prompts: Sequence[Prompt], seed: int, *, batch: int) -> Uniform:
    """The sampler that `sampler.name` asks for; batch: groups of an iteration. Raises DataError for an empty prompt set."""
    if config.name == "curriculum":
        return Curriculum(
            prompts,
            seed,
            switch_iteration=config.switch_iteration,
            hard_below=config.hard_below,
            smoothing=config.smoothing,
            batch=batch,
        )
    if config.name == "prioritized":
        return Prioritized(prompts, seed, smoothing=config.smoothing, floor=config.floor)
    return Uniform(prompts, seed)


def _noise(seed: int, ordinal: int, stream: int) -> np.random.Generator:
    """The generator of one draw: Philox with key (seed, ordinal), so no draw depends on another."""
    key = np.array([seed % 2**64, ordinal], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))
