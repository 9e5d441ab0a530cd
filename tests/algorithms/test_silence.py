"""Where a sequence without an advantage may be left out, and where not."""

import pytest
import torch

from megatron_rl.algorithms import ALGORITHMS, make_algorithm
from megatron_rl.algorithms.objective import ObjectiveInputs
from megatron_rl.algorithms.silence import silent_without_advantage
from megatron_rl.config import AlgorithmConfig


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_sequence_without_advantage_is_silent_at_the_reference_unless_a_term_speaks_for_it(name):
    def silent(**settings) -> bool:
        return silent_without_advantage(make_algorithm(AlgorithmConfig(name=name, **settings)).objective)

    assert silent() == silent(kl_weight=0.1) == silent(importance_cap=1.2) == (name != "k25")  # k25 pulls to the engine
    assert not silent(entropy_weight=0.01)


def test_an_objective_that_couples_a_groups_members_leaves_none_out():
    class MinusMeanLength:
        def coefficients(self, inputs: ObjectiveInputs) -> torch.Tensor:
            return inputs.token_advantages * inputs.num_tokens.mean()

        def loss(self, inputs: ObjectiveInputs) -> torch.Tensor:
            return -self.coefficients(inputs) * inputs.log_probs

    assert not silent_without_advantage(MinusMeanLength())
