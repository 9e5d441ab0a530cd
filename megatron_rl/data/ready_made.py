"""Ready-made sets: reasoning-gym tasks under fixed options, by name, for evaluation and for training (`data.set`).

As evaluation sets they also have a size, a seed, a system message and a form of the answer that never change, so that
numbers compare between models and runs. Every answer fits on a line. Who loads them: `evaluation_sets.py`, `reasoning_gym.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.errors import DataError

SIZE, SEED = 200, 20_250_122  # of an evaluation set: questions, and a seed apart from those that training data begin with
PREFIX = "Answer:"
SYSTEM_MESSAGE = f'Reason step by step. Then write the final answer on a last line of its own: "{PREFIX} X".'


@dataclass(frozen=True)
class ReadyMade:
    """A reasoning-gym task under fixed options."""

    task: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)


READY_MADE: dict[str, ReadyMade] = {
    "gsm_symbolic": ReadyMade("gsm_symbolic", "grade-school word problems from templates"),
    "aiw": ReadyMade("aiw", "how many sisters Alice's brother has, and the like"),
    "add_in_steps": ReadyMade(
        "basic_arithmetic",
        "sums of three one-digit numbers: the demo's task",
        {
            "min_terms": 3,
            "max_terms": 3,
            "min_digits": 1,
            "max_digits": 1,
            "operators": ["+"],
            "allow_parentheses": False,
            "allow_negation": False,
        },
    ),
    "basic_arithmetic": ReadyMade("basic_arithmetic", "expressions with brackets and the four operations"),
    "chain_sum": ReadyMade("chain_sum", "sums and differences of two-digit numbers"),
    "products": ReadyMade("products", "products of two-digit numbers"),
    "decimal_arithmetic": ReadyMade("decimal_arithmetic", "expressions of decimal numbers"),
    "fraction_simplification": ReadyMade("fraction_simplification", "fractions to lowest terms"),
    "gcd": ReadyMade("gcd", "greatest common divisors"),
    "lcm": ReadyMade("lcm", "least common multiples"),
    "prime_factorization": ReadyMade("prime_factorization", "prime factors"),
    "count_primes": ReadyMade("count_primes", "primes in an interval"),
    "base_conversion": ReadyMade("base_conversion", "numbers from one base to another"),
    "simple_equations": ReadyMade("simple_equations", "linear equations of one unknown"),
    "number_sequence": ReadyMade("number_sequence", "the next number"),
    "leg_counting": ReadyMade("leg_counting", "legs of a list of animals"),
    "letter_counting": ReadyMade("letter_counting", "how often a letter occurs"),
    "calendar_arithmetic": ReadyMade("calendar_arithmetic", "weekdays and days between dates"),
    "time_intervals": ReadyMade("time_intervals", "durations between times and dates"),
    "knights_knaves": ReadyMade("knights_knaves", "who lies and who does not"),
    "syllogism": ReadyMade("syllogism", "whether a conclusion follows"),
    "family_relationships": ReadyMade("family_relationships", "how two people are related"),
    "self_reference": ReadyMade("self_reference", "statements about the statements' own truth"),
    "countdown": ReadyMade("countdown", "an expression that makes a number"),
    "spell_backward": ReadyMade("spell_backward", "words spelt backward"),
}


def ready_made(name: str) -> ReadyMade:
    """Raises DataError for an unknown name, with the nearest one."""
    if name not in READY_MADE:
        nearest = difflib.get_close_matches(name, READY_MADE, n=1, cutoff=0.0)[0]
        raise DataError(
            f"there is no ready-made set {name!r}; the nearest is {nearest}. `megatron-rl eval --list` names them all; a file "
            "of your own must end with .jsonl"
        )
    return READY_MADE[name]
