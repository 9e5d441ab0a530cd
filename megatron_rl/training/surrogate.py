"""What one micro-batch contributes to an optimizer step: a scalar to differentiate, and its share of the metrics.

The scalar is -sum(weight * coefficient * log pi) with the objective's coefficients held fixed: its gradient is the loss's.
Sums over a sequence are completed over context-parallel ranks before the objective sees them. Next: `trainer.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_rl.algorithms.objective import MeasuredObjective, Objective, ObjectiveInputs
from megatron_rl.training.micro_batch import MicroBatch

_NAMES = (
    *("loss", "tokens", "entropy", "sequences", "log_ratio", "current", "mismatch", "older", "drift", "bad_micro_batches"),
    *("supervised_tokens", "supervised_nats"),
)


@dataclass
class Sums:
    """Sums over this rank's micro-batches. Ranks that hold the same numbers as another add nothing."""

    values: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_NAMES, 0.0))
    bad_trajectories: list[int] = field(default_factory=list)  # of micro-batches whose loss is not finite

    @classmethod
    def of(cls, objective: Objective) -> Sums:
        """Also for what the objective measures: every rank must sum the same names."""
        names = objective.measures if isinstance(objective, MeasuredObjective) else ()
        return cls(dict.fromkeys((*_NAMES, *names), 0.0))

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.values[name] += amount

    def over_ranks(self, device: torch.device) -> dict[str, float]:
        """Collective: the sums over all ranks, float64."""
        total = torch.tensor(list(self.values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return dict(zip(self.values, total.tolist(), strict=True))


@dataclass(frozen=True)
class Surrogate:
    """Called by the trainer on the last pipeline stage, once for each micro-batch of one optimizer step."""

    objective: Objective
    reference: list[torch.Tensor] | None  # float32 [loss_tokens] of each micro-batch; None: the weights at hand
    weight_version: int  # tokens of this version count as mismatch, others as drift
    context_group: dist.ProcessGroup
    counts: bool  # False on ranks that hold the same numbers as another
    sums: Sums

    def __call__(self, b: MicroBatch, log_probs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        """log_probs (differentiable) and entropy: float32 [loss_tokens]."""
        inputs = self._inputs(b, log_probs.detach(), entropy)
        if self.counts:
            self._count(b, inputs, entropy)
        coefficients = self.objective.coefficients(inputs)
        return -(inputs.weights[b.sequence_ids] * coefficients * log_probs).sum()

    def _inputs(self, b: MicroBatch, now: torch.Tensor, entropy: torch.Tensor) -> ObjectiveInputs:
        before = now if self.reference is None else self.reference[b.index]
        per_token = torch.stack((now - before, torch.ones_like(now)), dim=1)
        of_sequences = per_token.new_zeros(len(b.advantages), 2).index_add(0, b.sequence_ids, per_token)
        if self.context_group.size() > 1:
            dist.all_reduce(of_sequences, group=self.context_group)
        return ObjectiveInputs(
            log_probs=now,
            reference_log_probs=before,
            behaviour_log_probs=b.behaviour_log_probs,
            entropies=entropy,
            sequence_ids=b.sequence_ids,
            log_ratios=of_sequences[:, 0],
            num_tokens=of_sequences[:, 1],
            advantages=b.advantages,
            weights=b.weights,
            group_ids=b.group_ids,
            is_supervised=b.is_supervised,
        )

    def _count(self, b: MicroBatch, inputs: ObjectiveInputs, entropy: torch.Tensor) -> None:
        loss = float(self.objective.loss(inputs).sum())
        if not math.isfinite(loss):
            self.sums.add(bad_micro_batches=1)
            self.sums.bad_trajectories += b.trajectory_ids.tolist()
        supervised = inputs.is_supervised[b.sequence_ids]
        gap = (inputs.reference_log_probs - b.behaviour_log_probs).abs()
        current = (b.weight_versions == self.weight_version) & ~supervised
        older = (b.weight_versions != self.weight_version) & ~supervised
        self.sums.add(
            loss=loss,
            tokens=int((~supervised).sum()),
            entropy=float(entropy[~supervised].sum()),
            current=int(current.sum()),
            mismatch=float(gap[current].sum()),
            older=int(older.sum()),
            drift=float(gap[older].sum()),
            supervised_tokens=int(supervised.sum()),
            supervised_nats=-float(inputs.log_probs[supervised].sum()),
        )
        if self.context_group.rank() == 0:  # each context-parallel rank has the whole log-ratios
            sampled = inputs.log_ratios[~inputs.is_supervised]
            self.sums.add(sequences=len(sampled), log_ratio=float(sampled.abs().sum()))
            if isinstance(self.objective, MeasuredObjective):
                self.sums.add(**{name: float(values.sum()) for name, values in self.objective.measure(inputs).items()})
