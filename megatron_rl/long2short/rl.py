"""The second RL phase (paper 2.4): the first one's config with the length reward on and much shorter responses allowed.

It is an ordinary run from an ordinary train config; this is what of it differs, as overrides. Start it from the model with the
best balance of accuracy and tokens; `plot.py` shows which.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config import load
from megatron_rl.errors import ConfigError, DataError

SHARE = 0.5  # of the first phase's longest response (paper: "significantly reduced"; the number is ours)
OF_THE_SECOND = (  # settings that the second phase changes, but for where it begins and lives
    "rollout.temperature",
    "rollout.temperature_decay.end",
    "buffer.path",
    "rollout.kv_store.spill_folder",
    "rollout.max_response_tokens",
    "rollout.token_budget",
    "rewards.length.schedule",
    "rewards.length.start_iteration",
)


def second_phase(
    config: Path, given: Sequence[str], out: Path, *, model: Path | None = None, max_tokens: int | None = None
) -> list[str]:
    """The overrides that turn the first phase's config file into the second phase.

    given: overrides by the user. One of `OF_THE_SECOND` is the second phase's and replaces what is said here; any other holds
    for both phases, so that a first phase that was begun with overrides is found with the same ones.
    out: its run folder; model: what it starts from, default the first run's `hf`; max_tokens: its longest response.
    Raises DataError where there is no such model, ConfigError for a length that is no reduction, or `model.folder` in `given`."""
    own = [override for override in given if override.partition("=")[0] in OF_THE_SECOND]
    both = [override for override in given if override not in own]
    if wrong := [override for override in both if override.startswith("model.folder=")]:
        raise ConfigError(f"{wrong[0]}: the second phase starts from a trained model; give it as --model")
    first = load(config, both)
    start = model or first.run.folder / "hf"
    if not (start / "config.json").is_file():
        raise DataError(f"{start}: no trained model there; finish the first phase, or give --model")
    if out.resolve() == first.run.folder.resolve():
        raise ConfigError(f"--out {out}: is the first phase's run.folder; give the second phase its own")
    before = first.rollout.max_response_tokens
    longest = max(1, int(before * SHARE)) if max_tokens is None else max_tokens
    decay = first.rollout.temperature_decay.end
    at_its_end = [f"rollout.temperature={decay}", "rollout.temperature_decay.end=null"] if decay is not None else []
    changes = [
        *both,
        *at_its_end,  # not back to exploring
        f"model.folder={json.dumps(str(start))}",
        f"run.folder={json.dumps(str(out))}",
        "buffer.path=null",  # and its KV: the first run's files are not the second's
        "rollout.kv_store.spill_folder=null",
        f"rollout.max_response_tokens={longest}",
        f"rollout.token_budget={min(first.rollout.token_budget, longest)}",
        "rewards.length.schedule=constant",
        "rewards.length.start_iteration=0",
        *own,
    ]
    if (asked := load(config, changes).rollout.max_response_tokens) >= before:
        raise ConfigError(
            f"rollout.max_response_tokens={asked} of the second phase: must be less than the first phase's {before}; give a "
            "smaller --max-tokens"
        )
    return changes
