"""The trainer: log-probs of a batch under the weights at hand, and the optimizer steps of an iteration.

It knows tokens, weights and an objective's coefficients; it knows no rewards, engines or algorithm. All methods are
collective. The loss is a sum over sequences whose weights hold the global denominator, and gradients are summed over
ranks, so neither depends on how many micro-batches or ranks share the work. Where micro-batches come from: `packing.py`; what
they are on a rank: `micro_batch.py`; what each contributes: `surrogate.py`; saving and loading: `checkpoint.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch.nn import functional

from megatron_rl.algorithms.objective import MeasuredObjective, Objective
from megatron_rl.config import TrainerConfig
from megatron_rl.errors import TrainingError
from megatron_rl.model_config import ModelConfig
from megatron_rl.training import cpu
from megatron_rl.training.log_probs import Vocabulary, log_probs_and_entropy
from megatron_rl.training.micro_batch import MicroBatch, Place, prepare
from megatron_rl.training.model import PolicyModel, build_model
from megatron_rl.training.optimizer import PolicyOptimizer
from megatron_rl.training.packing import PackedBatch, plan
from megatron_rl.training.parallel import Messages
from megatron_rl.training.surrogate import Sums, Surrogate
from megatron_rl.types import TrainingSequence
from megatron_rl.weights import hf

# For each minibatch, each micro-batch: float32 [loss_tokens] of this rank; empty except on the last pipeline stage.
Reference = list[list[torch.Tensor]]

# (micro-batch, its log-probs [loss_tokens], its entropies [loss_tokens]) to the scalar that is differentiated.
Use = Callable[[MicroBatch, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TrainingBatch:
    """An iteration's batch as one data-parallel rank trains it."""

    minibatches: tuple[tuple[PackedBatch, ...], ...]  # one optimizer step each
    weight_version: int  # of the weights at hand: tokens sampled from them make `mismatch/*`, older ones `drift/*`
    num_trained_tokens: int  # over all ranks, in one pass
    num_packed_tokens: int  # over all ranks, in one pass: rows computed, padding included
    num_micro_batches: int  # over all ranks, in one pass


# Packs, and the rows that carry loss, are padded to whole blocks: kernels like them, and oneDNN keeps a compiled matmul,
# with its memory, for every number of rows it has met.
ROWS = 64


class Trainer:
    """`torch.distributed` and Megatron's parallel state must be initialised (`parallel.initialize`). The weights are unset
    until `load_hf` or `checkpoint.load`."""

    def __init__(self, config: TrainerConfig, model: ModelConfig) -> None:
        self.config, self.model_config = config, model
        self.chunks: list[PolicyModel] = build_model(config, model)
        self.optimizer = PolicyOptimizer(config, self.chunks)
        self.is_master = dist.get_rank() == 0
        self.messages = Messages(config.training.collective_timeout_s)
        self._replicas: list[int] = self.messages.gather_all(parallel_state.get_data_parallel_rank())  # of every rank
        self._context_group = parallel_state.get_context_parallel_group()
        self._place = Place(
            context_rank=self._context_group.rank(),
            context_size=self._context_group.size(),
            device=cpu.device(),
            inverse_frequencies=model.inverse_frequencies().to(cpu.device()),
        )
        self._tensor_group = parallel_state.get_tensor_model_parallel_group()
        self._vocabulary = Vocabulary(
            size=model.vocab_size,
            group=self._tensor_group if self._tensor_group.size() > 1 else None,
        )

    def load_hf(self, folder: str | Path) -> None:
        """Weights from a Hugging Face folder. Raises DataError for a folder that does not fit the model."""
        hf.load(self.chunks, folder)
        self.optimizer.reload()

    def export_buckets(self, bucket_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Full tensors under their Hugging Face names, at most `bucket_bytes` at a time, equal on all ranks."""
        return hf.export_buckets(self.chunks, bucket_bytes)

    def distribute(
        self,
        minibatches: Sequence[Sequence[TrainingSequence]] | None,
        weight_version: int | None = None,
        *,
        whole_groups: bool = False,
    ) -> TrainingBatch:
        """Rank 0 plans each optimizer step's sequences into micro-batches and sends every rank its own; the other ranks'
        `minibatches` is ignored. `weight_version` is that of the weights at hand; None takes the batch's newest.
        `whole_groups` is for an objective that needs them."""
        batches: list[TrainingBatch] | None = None
        if self.is_master:
            assert minibatches is not None, "rank 0 must be given the batch"
            by_replica = self._plan(minibatches, weight_version, whole_groups)
            batches = [by_replica[replica] for replica in self._replicas]
        return self.messages.scatter(batches)

    def _plan(
        self, minibatches: Sequence[Sequence[TrainingSequence]], weight_version: int | None, whole_groups: bool
    ) -> list[TrainingBatch]:
        """The batch of each data-parallel rank."""
        t = self.config.training
        num_replicas = max(self._replicas) + 1
        planned = [
            plan(
                sequences,
                max_tokens=t.max_tokens_per_micro_batch,
                share_prompts=t.share_prompts,
                whole_groups=whole_groups,
                multiple=math.lcm(ROWS, t.context_parallel * (t.tensor_parallel if t.sequence_parallel else 1)),
                data_parallel=num_replicas,
                micro_batch_multiple=t.pipeline_parallel if t.virtual_pipeline else 1,
                attention_cost=self.model_config.attention_cost,
            )
            for sequences in minibatches
        ]
        packs = [pack for by_replica in planned for own in by_replica for pack in own]
        newest = max((int(pack.weight_versions.max(initial=0)) for pack in packs), default=0)
        return [
            TrainingBatch(
                minibatches=tuple(tuple(by_replica[replica]) for by_replica in planned),
                weight_version=newest if weight_version is None else weight_version,
                num_trained_tokens=sum(len(pack.targets) for pack in packs),
                num_packed_tokens=sum(len(pack.token_ids) for pack in packs),
                num_micro_batches=len(packs),
            )
            for replica in range(num_replicas)
        ]

    @torch.no_grad()
    def log_probs(self, batch: TrainingBatch) -> Reference:
        """Log-probs of every loss token under the weights at hand, kept on the ranks that computed them."""
        reference: Reference = []
        for minibatch in batch.minibatches:
            found = [torch.zeros(0, device=self._place.device) for _ in minibatch]

            def keep(b: MicroBatch, log_probs: torch.Tensor, _: torch.Tensor, into: list[torch.Tensor] = found) -> torch.Tensor:
                into[b.index] = log_probs
                return log_probs.sum()

            self._run(minibatch, keep, forward_only=True)
            reference.append(found)
        return reference

    def step(
        self, batch: TrainingBatch, objective: Objective, reference: Reference | None, *, epochs: int = 1
    ) -> dict[str, float]:
        """All optimizer steps of an iteration: `epochs` passes over the minibatches, from a reset optimizer unless the
        configuration keeps moments.

        `reference` None: the weights at hand are the reference, which is right for an iteration of one step only.
        Returns metrics, equal on all ranks; means over steps (loss, grad_norm), tokens or sequences.
        Raises TrainingError, on every rank, before an optimizer step whose loss or gradient is not finite."""
        assert reference is not None or len(batch.minibatches) * epochs == 1, "an iteration of several steps needs a reference"
        sums, norms = Sums.of(objective), []
        for _ in range(epochs):
            for i, minibatch in enumerate(batch.minibatches):
                surrogate = Surrogate(
                    objective=objective,
                    reference=reference[i] if reference else None,
                    weight_version=batch.weight_version,
                    context_group=self._context_group,
                    counts=self._tensor_group.rank() == 0,
                    sums=sums,
                )
                norms.append(self._optimizer_step(minibatch, surrogate))
        if not self.config.keeps_moments:
            self.optimizer.reset()  # the next iteration starts without moments; until then they would only hold memory
        measures = objective.measures if isinstance(objective, MeasuredObjective) else ()
        return _metrics(sums.over_ranks(self._place.device), norms, batch, measures)

    def _optimizer_step(self, minibatch: Sequence[PackedBatch], surrogate: Surrogate) -> float:
        """Returns the gradient's norm before clipping."""
        self.optimizer.zero_grad()
        self._run(minibatch, surrogate, forward_only=False)
        cpu.return_freed_memory()  # activations go before Adam's moments come
        norm = self.optimizer.gradient_norm()
        num_bad = surrogate.sums.over_ranks(self._place.device)["bad_micro_batches"]
        if num_bad or not math.isfinite(norm):
            self._refuse(minibatch, surrogate.sums, norm)
        self.optimizer.step(norm)
        return norm

    def _run(self, minibatch: Sequence[PackedBatch], use: Use, *, forward_only: bool) -> None:
        """Forward, and backward, over this rank's micro-batches in the order of Megatron's schedule; afterwards gradients
        are reduced over all ranks. `use` is called on the last pipeline stage."""
        iterators = [self._prepared(minibatch) for _ in self.chunks]
        interleaved = len(self.chunks) > 1
        get_forward_backward_func()(
            forward_step_func=partial(self._forward, use),
            data_iterator=iterators if interleaved else iterators[0],
            model=self.optimizer.wrapped if interleaved else self.optimizer.wrapped[0],
            num_microbatches=len(minibatch),
            seq_length=self.config.training.max_tokens_per_micro_batch,  # unused: lengths vary and are sent along
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _prepared(self, minibatch: Sequence[PackedBatch]) -> Iterator[MicroBatch]:
        for index, packed in enumerate(minibatch):
            yield prepare(packed, index, self._place)

    def _forward(
        self, use: Use, micro_batches: Iterator[MicroBatch], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        b = next(micro_batches)

        def last_stage(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
            loss = use(b, *self._log_probs(b, hidden))
            return loss, torch.tensor(len(b.targets), dtype=torch.int, device=loss.device), {}

        return chunk(b.token_ids, None, None, packed_seq_params=b.params), last_stage

    def _log_probs(self, b: MicroBatch, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [loss_tokens] from the last stage's output: [tokens / CP, 1, hidden], or its SP share."""
        num_tokens = len(b.targets)
        missing = -num_tokens % ROWS
        loss_rows, targets = (functional.pad(of_tokens, (0, missing)) for of_tokens in (b.loss_rows, b.targets))
        temperatures = functional.pad(b.temperatures, (0, missing), value=1.0)
        if self.config.training.sequence_parallel:  # in backward the vocabulary blocks' gradients are summed, then split
            rows = gather_from_sequence_parallel_region(hidden)[loss_rows, 0]
        else:  # in backward they are summed
            rows = copy_to_tensor_model_parallel_region(hidden[loss_rows, 0])
        weight = self.chunks[-1].output_weight
        chunk_rows = self.config.training.log_prob_chunk
        found = log_probs_and_entropy(rows, weight, targets, temperatures, self._vocabulary, chunk_rows)
        return found[0][:num_tokens], found[1][:num_tokens]

    def _refuse(self, minibatch: Sequence[PackedBatch], sums: Sums, norm: float) -> None:
        """Name the micro-batches at fault: those whose loss is not finite, else all that the gradient came from."""
        here = (sums.bad_trajectories, [int(t) for pack in minibatch for t in pack.trajectory_ids])
        found = self.messages.gather_all(here)
        bad = sorted({t for bad, _ in found for t in bad})
        guilty = bad or sorted({t for _, own in found for t in own})
        raise TrainingError(
            f"training: the {'loss' if bad else 'gradient'} is not finite (gradient norm {norm}) in the micro-batches of "
            f"trajectories {guilty}; no optimizer step was taken. Look at them with `megatron-rl inspect`; lower "
            "training.optimizer.lr, or train with model.dtype=float32",
            trajectory_ids=guilty,
        )


def _metrics(total: dict[str, float], norms: list[float], batch: TrainingBatch, measures: Sequence[str]) -> dict[str, float]:
    found = {
        "loss": total["loss"] / len(norms),
        "grad_norm": sum(norms) / len(norms),
        "entropy/mean": total["entropy"] / max(total["tokens"], 1),
        "log_ratio/abs_mean": total["log_ratio"] / max(total["sequences"], 1),
        "mismatch/logp_abs_mean": total["mismatch"] / max(total["current"], 1),
        "drift/logp_abs_mean": total["drift"] / max(total["older"], 1),
        "tokens/trained": batch.num_trained_tokens,
        "tokens/packed": batch.num_packed_tokens,
        "num_micro_batches": batch.num_micro_batches,
    }
    if total["supervised_tokens"]:
        found["supervised/nats_per_token"] = total["supervised_nats"] / total["supervised_tokens"]
    return found | {name: total[name] / max(total["sequences"], 1) for name in measures}
