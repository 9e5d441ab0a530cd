"""Log-probs and entropy of chosen tokens from hidden states, vocabulary-parallel, in chunks of rows.

[tokens, vocabulary] never exists: only rows that carry loss come here, a chunk of them is projected at a time, and backward
projects the chunk again instead of keeping it. Under tensor parallelism each rank holds a block of the vocabulary;
three small all-reduces a chunk (maximum, sum, chosen logit with the entropy's sum) join them. The softmax is float32
(float64 for float64 hidden states), whatever the model's dtype.
`trainer.py` selects the rows and sees to it that the gradient of `hidden` is added up over tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Vocabulary:
    """This rank's block of the padded vocabulary."""

    size: int  # real tokens over all ranks; rows beyond are padding and get no probability
    group: dist.ProcessGroup | None  # tensor-parallel ranks; None: the whole vocabulary is here

    def first(self, weight: torch.Tensor) -> int:
        """The token id of the weight's first row."""
        return 0 if self.group is None else dist.get_rank(self.group) * weight.size(0)

    def num_real(self, weight: torch.Tensor) -> int:
        """Rows of this rank's block that are real tokens."""
        return max(0, min(weight.size(0), self.size - self.first(weight)))

    def reduce(self, x: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(x, op, group=self.group)
        return x


def log_probs_and_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperatures: torch.Tensor,
    vocabulary: Vocabulary,
    chunk_rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden @ weight.T / temperature) at the targets, each row at its own temperature.

    hidden: [n, hidden], equal on all tensor-parallel ranks; weight: [padded vocabulary / TP, hidden]; targets: int64 [n];
    temperatures: floating [n]. Returns log-probs [n] and, without gradient, entropies [n] in nats. The gradient of `hidden` is
    this rank's share."""
    return _ChunkedLogProbs.apply(hidden, weight, targets, temperatures, vocabulary, chunk_rows)


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperatures: torch.Tensor,
        vocabulary: Vocabulary,
        chunk_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        log_probs, entropy, log_sums = (hidden.new_empty(len(targets), dtype=exact) for _ in range(3))
        for rows in _chunks(len(targets), chunk_rows):
            logits = _logits(hidden[rows], weight, temperatures[rows], vocabulary)
            highest = _highest(logits, vocabulary)
            scaled = logits - highest[:, None]
            weights = scaled.exp()
            # p . logits = sum(e^s * s) / sum(e^s), so one pass gives the normaliser and the entropy.
            here, _, chosen = _chosen(scaled, targets[rows], weight, vocabulary)
            sums = torch.stack([weights.sum(-1), (weights * scaled).sum(-1), torch.where(here, chosen, 0.0)])
            total, dot, logit = vocabulary.reduce(sums)
            log_probs[rows] = logit - total.log()
            entropy[rows] = total.log() - dot / total
            log_sums[rows] = highest + total.log()
        ctx.save_for_backward(hidden, weight, targets, temperatures, log_sums)
        ctx.vocabulary, ctx.chunk_rows = vocabulary, chunk_rows
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """d log p(y) / d logits = onehot(y) - p, divided by the temperature."""
        hidden, weight, targets, temperatures, log_sums = ctx.saved_tensors
        vocabulary: Vocabulary = ctx.vocabulary
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=log_sums.dtype)  # sums many chunks: not in bfloat16
        num_real = vocabulary.num_real(weight)
        for rows in _chunks(len(targets), ctx.chunk_rows):
            logits = _logits(hidden[rows], weight, temperatures[rows], vocabulary)
            slope = logits.sub_(log_sums[rows, None]).exp_().neg_()
            here, at, _chosen_logit = _chosen(slope, targets[rows], weight, vocabulary)
            slope.scatter_add_(1, at[:, None], here[:, None].to(slope.dtype))
            slope.mul_((grad[rows] / temperatures[rows])[:, None])
            slope = slope.to(hidden.dtype)
            grad_hidden[rows] = slope @ weight[:num_real]
            if slope.dtype == grad_weight.dtype:  # added in place: the product of a large vocabulary is not held beside its sum
                grad_weight[:num_real].addmm_(slope.T, hidden[rows])
            else:
                grad_weight[:num_real] += slope.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _chunks(num_rows: int, chunk_rows: int) -> list[slice]:
    return [slice(start, min(start + chunk_rows, num_rows)) for start in range(0, num_rows, chunk_rows)]


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperatures: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """[rows, real tokens of this rank], float32 or float64, each row divided by its temperature."""
    exact, block = torch.promote_types(hidden.dtype, torch.float32), weight[: vocabulary.num_real(weight)].T
    is_wide = hidden.is_cuda and hidden.dtype != exact  # not rounded to bfloat16: a logit of 20 would be off by up to 0.06
    logits = torch.mm(hidden, block, out_dtype=exact) if is_wide else (hidden @ block).to(exact)
    return logits.div_(temperatures[:, None])


def _highest(logits: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """[rows]: the largest logit over all ranks."""
    assert logits.size(1), "a tensor-parallel rank holds no real token of the vocabulary"
    return vocabulary.reduce(logits.amax(-1), dist.ReduceOp.MAX)


def _chosen(
    values: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, vocabulary: Vocabulary
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each row's target lies: (is it in this block, its column, its value); column 0 where it is elsewhere."""
    at = targets - vocabulary.first(weight)
    here = (at >= 0) & (at < values.size(1))
    at = torch.where(here, at, 0)
    return here, at, values.gather(1, at[:, None])[:, 0]
