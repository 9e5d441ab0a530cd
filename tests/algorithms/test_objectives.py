"""Every objective against autograd of its published loss, written out response by response on a table of logits."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_rl.algorithms import ALGORITHMS, make_algorithm
from megatron_rl.algorithms.cross_entropy import WithPTX
from megatron_rl.algorithms.normalization import Normalization, sequence_weights
from megatron_rl.algorithms.objective import ObjectiveInputs
from megatron_rl.config import AlgorithmConfig
from megatron_rl.errors import MegatronRLError

GROUPS = torch.tensor([5, 5, 0, 0, 0, 9, 9, 9, 9])
LENGTHS = [3, 7, 1, 5, 2, 8, 4, 6, 3]
LONGEST, TAU = 10, 0.4
K = {5: 2, 0: 3, 9: 4}  # members of each group


class Case:
    """Nine responses in three groups. Each token has a context of its own; the policy is a softmax over five tokens."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        n = sum(LENGTHS)
        self.sequence_ids = torch.repeat_interleave(torch.arange(9), torch.tensor(LENGTHS))
        self.tokens = torch.randint(0, 5, (n,), generator=generator)
        self.logits = normal(n, 5).requires_grad_()
        self.reference = self._chosen(self.logits.detach() + 0.4 * normal(n, 5))
        self.behaviour = self.reference + 0.3 * normal(n)
        self.rewards = normal(9)

    def _chosen(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(logits, -1).gather(1, self.tokens[:, None])[:, 0]

    @property
    def log_probs(self) -> torch.Tensor:
        return self._chosen(self.logits)

    def of(self, values: torch.Tensor, j: int) -> torch.Tensor:
        return values[self.sequence_ids == j]

    def by_us(self, name: str, **settings) -> tuple[float, torch.Tensor]:
        """(loss, gradient of the logits) as the trainer computes them, in float64."""
        algorithm = make_algorithm(AlgorithmConfig(name=name, tau=TAU, **settings))
        weights = weights_of(algorithm.normalization.value)
        log_probs = self.log_probs
        p = torch.softmax(self.logits.detach(), -1)
        inputs = ObjectiveInputs(
            log_probs=log_probs.detach(),
            reference_log_probs=self.reference,
            behaviour_log_probs=self.behaviour,
            entropies=-(p * p.log()).sum(-1),
            sequence_ids=self.sequence_ids,
            log_ratios=torch.zeros(9, dtype=torch.float64).index_add(0, self.sequence_ids, (log_probs - self.reference).detach()),
            num_tokens=torch.tensor(LENGTHS, dtype=torch.float64),
            advantages=algorithm.advantages(self.rewards, GROUPS).double(),
            weights=weights,
            group_ids=GROUPS,
            is_supervised=torch.zeros(9, dtype=torch.bool),
        )
        surrogate = -(weights[self.sequence_ids] * algorithm.objective.coefficients(inputs) * log_probs).sum()
        return float(algorithm.objective.loss(inputs).sum()), torch.autograd.grad(surrogate, self.logits)[0]

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, self.logits)[0]


def weights_of(form: str) -> torch.Tensor:
    """By the definitions, in another way than `sequence_weights`."""
    in_group = {g: sum(n for n, own in zip(LENGTHS, GROUPS.tolist(), strict=True) if own == g) for g in K}
    out = []
    for n, g in zip(LENGTHS, GROUPS.tolist(), strict=True):
        mean = 1 / 3 / K[g]
        forms = {"sequence": mean, "response_tokens": mean / n, "constant": mean / LONGEST}
        out.append({**forms, "group_tokens": 1 / 3 / in_group[g], "batch_tokens": 1 / sum(LENGTHS)}[form])
    return torch.tensor(out, dtype=torch.float64)


def test_the_denominators_are_those_of_their_papers():
    by_group = [[3, 7], [1, 5, 2], [8, 4, 6, 3]]
    for form in Normalization:
        found = sequence_weights(by_group, form, max_tokens=LONGEST)
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), weights_of(form.value))
    assert sequence_weights([[0, 0]], Normalization.RESPONSE_TOKENS, max_tokens=1) == [0.5, 0.5], (
        "no loss token: no division by 0"
    )


# --- the published losses, each from the rewards on ------------------------------------------------------------------


def group_stats(case: Case, j: int) -> tuple[float, float, float, int]:
    """(reward, mean, unbiased standard deviation, members) of response j's group."""
    r = case.rewards[GROUPS[j] == GROUPS]
    return float(case.rewards[j]), float(r.mean()), float(r.std()), len(r)


def k2(case: Case) -> torch.Tensor:
    total = 0
    for j in range(9):
        r, mean, _, k = group_stats(case, j)
        log_ratio = case.of(case.log_probs, j).sum() - case.of(case.reference, j).sum()
        total = total + (r - mean - TAU * log_ratio) ** 2 / k / 3
    return total


def k25(case: Case) -> torch.Tensor:
    total = 0
    for j in range(9):
        r, mean, _, _ = group_stats(case, j)
        tokens_of_group = sum(n for n, g in zip(LENGTHS, GROUPS.tolist(), strict=True) if g == GROUPS[j])
        for now, old in zip(case.of(case.log_probs, j), case.of(case.behaviour, j), strict=True):
            x = now - old
            policy = x.exp() * (r - mean) if -0.3 <= x <= 0.2 else 0.0
            total = total - (policy - TAU * x**2) / tokens_of_group / 3
    return total


def rest(case: Case) -> torch.Tensor:
    total = 0
    for g in K:
        members = [j for j in range(9) if GROUPS[j] == g]
        best = max(members, key=lambda j: float(case.rewards[j]))
        if case.rewards[best] > 0.1:
            total = total - case.of(case.log_probs, best).sum() / 3
    return total


def rloo(case: Case) -> torch.Tensor:
    total = 0
    for j in range(9):
        others = [float(case.rewards[i]) for i in range(9) if GROUPS[i] == GROUPS[j] and i != j]
        total = (
            total
            - (float(case.rewards[j]) - sum(others) / len(others)) * case.of(case.log_probs, j).sum() / K[int(GROUPS[j])] / 3
        )
    return total


def clipped(ratio: torch.Tensor, advantage: float, low: float, high: float) -> torch.Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def ratios(case: Case, j: int) -> torch.Tensor:
    return (case.of(case.log_probs, j) - case.of(case.reference, j)).exp()


def ppo(case: Case) -> torch.Tensor:
    per_token = [clipped(ratios(case, j), r - m, 0.1, 0.3) for j in range(9) for r, m, _, _ in [group_stats(case, j)]]
    return torch.cat(per_token).mean()


def grpo(case: Case) -> torch.Tensor:
    total = 0
    for j in range(9):
        r, m, s, k = group_stats(case, j)
        total = total + clipped(ratios(case, j), (r - m) / s, 0.2, 0.2).mean() / k / 3
    return total


def dr_grpo(case: Case) -> torch.Tensor:
    total = 0
    for j in range(9):
        r, m, _, k = group_stats(case, j)
        total = total + clipped(ratios(case, j), r - m, 0.2, 0.2).sum() / LONGEST / k / 3
    return total


def reinforce_pp(case: Case) -> torch.Tensor:
    white = (case.rewards - case.rewards.mean()) / case.rewards.std()
    return torch.cat([clipped(ratios(case, j), float(white[j]), 0.2, 0.2) for j in range(9)]).mean()


def gspo(case: Case) -> torch.Tensor:
    total = 0
    for j in range(9):
        r, m, s, k = group_stats(case, j)
        geometric = ratios(case, j).prod() ** (1 / LENGTHS[j])
        total = total + clipped(geometric, (r - m) / s, 0.1, 0.2) / k / 3
    return total


def cispo(case: Case) -> torch.Tensor:
    per_token = []
    for j in range(9):
        r, m, s, _ = group_stats(case, j)
        weight = ratios(case, j).detach().clamp(0.0, 1.2)
        per_token.append(-weight * (r - m) / s * case.of(case.log_probs, j))
    return torch.cat(per_token).mean()


PUBLISHED = {
    "k2": (k2, {}),
    "k25": (k25, {"clip_low": 0.3, "clip_high": 0.2}),
    "rest": (rest, {"rest_threshold": 0.1}),
    "rloo": (rloo, {}),
    "ppo": (ppo, {"clip_low": 0.1, "clip_high": 0.3}),
    "grpo": (grpo, {}),
    "dr_grpo": (dr_grpo, {}),
    "reinforce_pp": (reinforce_pp, {}),
    "gspo": (gspo, {"clip_low": 0.1, "clip_high": 0.2}),
    "cispo": (cispo, {}),
}


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "mirror_descent"])  # it has a file of its own
@pytest.mark.parametrize("seed", range(3))
def test_gradient_and_loss_are_those_of_the_published_loss(name, seed):
    case = Case(seed)
    published, settings = PUBLISHED[name]
    loss = published(case)
    found, gradient = case.by_us(name, **settings)
    torch.testing.assert_close(gradient, case.gradient(loss), rtol=1e-4, atol=1e-7)  # advantages are float32
    assert found == pytest.approx(loss.item(), rel=1e-4)


def test_clipping_silences_some_tokens_here_and_a_masked_ratio_keeps_its_pull():
    """Else the tests above would pass without any bound."""
    case = Case(0)
    for name, bounds in (("grpo", (0.2, 0.2)), ("gspo", (0.1, 0.2)), ("ppo", (0.1, 0.3))):
        low, high = bounds
        near = case.by_us(name, clip_low=low, clip_high=high)[1]
        far = case.by_us(name, clip_low=0.999, clip_high=1e3)[1]
        assert ((near == 0) & (far != 0)).any() and (near != 0).any(), name
    assert (case.by_us("k25", clip_low=1e-9, clip_high=1e-9)[1] != 0).all(), "the squared log-ratio acts on masked tokens"


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "k25"])
def test_the_importance_cap_weighs_every_tokens_term(name):
    case = Case(1)
    factors = torch.minimum((case.reference - case.behaviour).exp(), torch.tensor(1.1, dtype=torch.float64))
    assert (factors == 1.1).any() and (factors < 1.1).any()
    plain, capped = case.by_us(name)[1], case.by_us(name, importance_cap=1.1)[1]
    torch.testing.assert_close(capped, factors[:, None] * plain)


# --- the terms that any objective may have ---------------------------------------------------------------------------


def enumerated(logits: torch.Tensor, reference: torch.Tensor):
    """All responses of two tokens over three, as one group each weighed by its own probability: exact expectations.

    logits: [1 + 3, 3], the first token's and, after each first token, the second's."""
    first, second = (torch.tensor(x) for x in zip(*[(a, b) for a in range(3) for b in range(3)], strict=True))

    def log_probs(table: torch.Tensor) -> torch.Tensor:  # [9, 2]
        table = torch.log_softmax(table, -1)
        return torch.stack((table[0, first], table[1 + first, second]), 1)

    p = torch.softmax(logits, -1)
    entropies = -(p * p.log()).sum(-1)
    now, before = log_probs(logits), log_probs(reference)
    inputs = ObjectiveInputs(
        log_probs=now.detach().flatten(),
        reference_log_probs=before.flatten(),
        behaviour_log_probs=before.flatten(),
        entropies=torch.stack((entropies[0].expand(9), entropies[1 + first]), 1).detach().flatten(),
        sequence_ids=torch.arange(9).repeat_interleave(2),
        log_ratios=(now - before).detach().sum(1),
        num_tokens=torch.full((9,), 2.0, dtype=torch.float64),
        advantages=torch.zeros(9, dtype=torch.float64),
        weights=now.detach().sum(1).exp(),
        group_ids=torch.zeros(9, dtype=torch.int64),
        is_supervised=torch.zeros(9, dtype=torch.bool),
    )
    return inputs, now, before


@pytest.mark.parametrize("term", ["k1", "k3", "entropy"])
def test_kl_and_entropy_gradients_are_exact_in_expectation(term):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    inputs, now, before = enumerated(logits, reference)
    kl, entropy = (0.0, 0.7) if term == "entropy" else (0.7, 0.0)
    estimator = "k3" if term == "entropy" else term
    made = make_algorithm(AlgorithmConfig(name="rloo", kl_weight=kl, kl_estimator=estimator, entropy_weight=entropy))
    coefficients = made.objective.coefficients(inputs)
    surrogate = -(inputs.weights[inputs.sequence_ids] * coefficients * now.flatten()).sum()
    found = torch.autograd.grad(surrogate, logits, retain_graph=True)[0]

    p, log_p, log_q = torch.softmax(logits, -1), torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
    reach = torch.cat((torch.ones(1, dtype=torch.float64), p[0].detach()))  # probability of each context
    if term == "k1":  # of whole responses: contexts move too
        exact = 0.7 * (now.sum(1).exp() * (now.sum(1) - before.sum(1))).sum()
        wanted_loss = exact
    elif term == "k3":  # its value is KL(pi || pi_i), its gradient that of KL(pi_i || pi), at contexts held fixed
        exact = 0.7 * (reach * (log_q.exp() * (log_q - log_p)).sum(-1)).sum()
        wanted_loss = 0.7 * (reach * (p * (log_p - log_q)).sum(-1)).sum()
    else:
        exact = 0.7 * (reach * (p * log_p).sum(-1)).sum()
        wanted_loss = exact
    torch.testing.assert_close(found, torch.autograd.grad(exact, logits)[0])
    assert float(made.objective.loss(inputs).sum()) == pytest.approx(wanted_loss.item())


def test_the_entropy_term_is_still_where_entropy_is_greatest():
    """Not in expectation only: at a uniform policy no token is pushed."""
    inputs, _, _ = enumerated(torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64))
    made = make_algorithm(AlgorithmConfig(name="rloo", entropy_weight=0.7))
    torch.testing.assert_close(made.objective.coefficients(inputs), torch.zeros(18, dtype=torch.float64))


def test_terms_are_added_with_the_objectives_own_denominator():
    case = Case(2)
    plain = case.by_us("grpo")[1]
    loss = 0
    for j in range(9):
        x = case.of(case.log_probs, j) - case.of(case.reference, j)
        loss = loss + 0.3 * ((-x).exp() - 1 + x).mean() / K[int(GROUPS[j])] / 3
    torch.testing.assert_close(case.by_us("grpo", kl_weight=0.3)[1], plain + case.gradient(loss), rtol=1e-6, atol=1e-9)


# --- advantages at the edges -----------------------------------------------------------------------------------------


def test_equal_rewards_give_no_advantage_and_no_nan():
    same, one_group = torch.full((4,), 0.3), torch.zeros(4, dtype=torch.int64)
    for name in ALGORITHMS:
        values = make_algorithm(AlgorithmConfig(name=name)).advantages(same, one_group)
        assert values.dtype == torch.float32
        assert torch.allclose(values, torch.ones(4) if name == "rest" else torch.zeros(4), atol=1e-6), name
    low = make_algorithm(AlgorithmConfig(name="rest", rest_threshold=0.3)).advantages(same, one_group)
    assert (low == 0).all(), "nothing is fitted in a group where nothing was right"


def test_rest_shares_its_weight_among_the_best():
    rewards, groups = torch.tensor([1.0, 0, 1, 0, 0.5, 1]), torch.tensor([0, 0, 0, 0, 1, 1])
    assert make_algorithm(AlgorithmConfig(name="rest")).advantages(rewards, groups).tolist() == [2, 0, 2, 0, 0, 2]


def test_a_group_of_one_has_no_leave_one_out_baseline():
    rewards, groups = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1])
    with pytest.raises(MegatronRLError, match="a group of one has no others.*rollout.group_size >= 2"):
        make_algorithm(AlgorithmConfig(name="rloo")).advantages(rewards, groups)
    for name in set(ALGORITHMS) - {"rloo"}:
        assert torch.isfinite(make_algorithm(AlgorithmConfig(name=name)).advantages(rewards, groups)).all(), name


def test_far_ratios_stay_finite_where_they_are_bounded():
    case = Case(3)
    case.reference = case.reference - 200.0  # exp overflows float32
    for name in ("k25", "cispo"):
        _, gradient = case.by_us(name)
        assert torch.isfinite(gradient).all(), name
    case.reference = case.behaviour = case.reference + 200.0
    assert math.isfinite(case.by_us("mirror_descent", importance_cap=2.0)[0])


def test_ptx_trains_supervised_sequences_by_cross_entropy_and_the_others_as_ever():
    generator = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    inputs, _, _ = enumerated(logits, reference)
    supervised = torch.arange(9) % 3 == 0
    inputs = replace(inputs, is_supervised=supervised, advantages=torch.randn(9, generator=generator, dtype=torch.float64))
    plain = make_algorithm(AlgorithmConfig(name="gspo")).objective
    mixed = WithPTX(plain)
    of_token = supervised[inputs.sequence_ids]
    for found, ordinary, cross_entropy in (
        (mixed.coefficients(inputs), plain.coefficients(inputs), torch.ones(18, dtype=torch.float64)),
        (mixed.loss(inputs), plain.loss(inputs), -inputs.weights[inputs.sequence_ids] * inputs.log_probs),
    ):
        torch.testing.assert_close(found[of_token], cross_entropy[of_token])
        torch.testing.assert_close(found[~of_token], ordinary[~of_token])
