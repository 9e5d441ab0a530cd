"""Does a sequence without an advantage move the weights at an iteration's first optimizer step? For most objectives it does
not: the policy is still the reference, so its log-ratio is 0 as well. Such sequences need not be computed.

Found by trying, so that an objective need not declare it: `rollout/selection.py` leaves them out where this says so.
"""

from __future__ import annotations

import torch

from megatron_rl.algorithms.objective import Objective, ObjectiveInputs

_TOKENS = (5, 9, 2, 7, 1, 6)  # of each sequence tried
_ADVANTAGES = (0.0, 0.7, 0.0, -0.4, 0.0, 0.0)
_GROUPS = (0, 1, 1, 1, 2, 2)


def silent_without_advantage(objective: Objective) -> bool:
    """Whether, with the policy at its reference, sequences of advantage 0 have coefficients of 0 and change no other's.

    False for an entropy term, for what compares with the engine's log-probs (k25), for what couples a group's members."""
    advantages = torch.tensor(_ADVANTAGES)
    whole, rest = _inputs(torch.ones(len(advantages), dtype=torch.bool)), _inputs(advantages != 0)
    found, alone = objective.coefficients(whole), objective.coefficients(rest)
    bears = whole.token_advantages != 0
    return bool((found[~bears] == 0).all()) and torch.equal(found[bears], alone)


def _inputs(kept: torch.Tensor) -> ObjectiveInputs:
    """Of the sequences `kept` (bool [sequences]): random log-probs, reference equal to the policy, engine beside it."""
    draws = torch.Generator().manual_seed(0)
    lengths = torch.tensor(_TOKENS)
    of_token = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    log_probs, behaviour, entropies = (-torch.rand(3, len(of_token), generator=draws)).unbind()
    tokens = kept[of_token]
    renumbered = torch.cumsum(kept, 0) - 1
    return ObjectiveInputs(
        log_probs=log_probs[tokens],
        reference_log_probs=log_probs[tokens],
        behaviour_log_probs=behaviour[tokens],
        entropies=-entropies[tokens],
        sequence_ids=renumbered[of_token[tokens]],
        log_ratios=torch.zeros(int(kept.sum())),
        num_tokens=lengths[kept].float(),
        advantages=torch.tensor(_ADVANTAGES)[kept],
        weights=torch.full((int(kept.sum()),), 1 / len(lengths)),
        group_ids=torch.tensor(_GROUPS)[kept],
        is_supervised=torch.zeros(int(kept.sum()), dtype=torch.bool),
    )
