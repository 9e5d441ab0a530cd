"""The reward terms by name, and how a name in the config becomes a function.

A term is a function `(*, response: str, answer: str, prompt: Prompt, **options)` that returns a number (1.0 is a full
score), None when the response holds no answer (wrong format), or an `Outcome`. A user's own term is named by a dotted
path, `package.module:function`. Refuses unknown names and options before anything is scored. Next: `worker.py`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from megatron_rl.errors import RewardError
from megatron_rl.rewards import exact, math, reasoning_gym, regex
from megatron_rl.types import Outcome

Term = Callable[..., "float | Outcome | None"]

REWARDS: dict[str, Term] = {
    "exact": exact.score,
    "math": math.score,
    "reasoning_gym": reasoning_gym.score,
    "regex": regex.score,
}


def check_name(name: str) -> None:
    """Raises RewardError for a name that is neither a term nor formed like a dotted path. Imports nothing."""
    module, colon, function = name.partition(":")
    if name in REWARDS or (colon and module and function.isidentifier()):
        return
    nearest = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
    raise RewardError(
        f"rewards: there is no term {name!r}; the nearest is {nearest}; terms are {', '.join(REWARDS)}, "
        "or a dotted path package.module:function"
    )


def load_term(name: str, options: Mapping[str, Any]) -> Term:
    """The function behind `name` with its options bound. Imports a user's module, so it runs in workers only.

    Raises RewardError for an unknown name, a module or function that is not there, or options it does not take."""
    check_name(name)
    function = REWARDS[name] if name in REWARDS else _imported(name)
    try:
        inspect.signature(function).bind(response="", answer="", prompt=None, **options)
    except TypeError as e:
        raise RewardError(
            f"rewards: term {name} cannot be called with response=, answer=, prompt= and options {dict(options)}: {e}; "
            "correct its options or its signature"
        ) from e
    if name == "regex":
        regex.compiled(options["pattern"])
    return partial(function, **options)


def _imported(path: str) -> Term:
    module_name, _, function_name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except ImportError as e:
        raise RewardError(f"rewards: term {path}: cannot import {module_name}: {e}; install it or put it on PYTHONPATH") from e
    if not callable(function):
        raise RewardError(f"rewards: term {path}: module {module_name} has no function {function_name}")
    return function
