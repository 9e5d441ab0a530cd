"""What is run, and what is compared with what. `RUNS`: a config of this folder, which is also its task, with overrides; a run may
serve several ablations. `ABLATIONS`: the arms, the paper's method first. How they are measured and drawn: `run.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SLOWER, FASTER = ("training.optimizer.lr=2.0e-4",), ("training.optimizer.lr=1.0e-3",)  # the configs have 5e-4
REST = ("algorithm.name=rest",)
PARTIAL = ("rollout.partial=true", "rollout.token_budget=16", "run.iterations=80")  # the first ones wait for a whole batch
KEEP = ("rollout.kv_policy=keep", "rollout.max_kv_age=4", "rollout.kv_store.host_bytes=33554432")  # as old as five segments get
LENGTH = ("rewards.length.schedule=constant", "rewards.length.start_iteration=15")
LOG_Z = ("algorithm.baseline=log_z",)
FOUR_STEPS = ("training.epochs=2",)  # an iteration, in two passes of two
WATCHED = ("evaluation.every=15",)  # answers held-out questions meanwhile, which disturbs nothing
COLD = ("rollout.temperature=0.5",)
DECAY = ("rollout.temperature_decay.end=0.5", "rollout.temperature_decay.iterations=40")

RUNS: dict[str, tuple[str, tuple[str, ...]]] = {  # name -> config and task, overrides
    "chain_full": ("chain", WATCHED),
    "chain_full_slower": ("chain", SLOWER),
    "chain_full_faster": ("chain", FASTER),
    "chain_rest": ("chain", REST),
    "chain_rest_slower": ("chain", (*REST, *SLOWER)),
    "chain_rest_faster": ("chain", (*REST, *FASTER)),
    "chain_partial": ("chain", PARTIAL),
    "chain_partial_slower": ("chain", (*PARTIAL, *SLOWER)),
    "chain_partial_slower_keep": ("chain", (*PARTIAL, *SLOWER, *KEEP)),
    "chain_partial_last": ("chain", (*PARTIAL, "algorithm.loss_segments=last")),
    "chain_tau_0.01": ("chain", ("algorithm.tau=0.01",)),
    "chain_tau_1": ("chain", ("algorithm.tau=1",)),
    "chain_moments": ("chain", ("training.optimizer.reset=false",)),
    "chain_grpo": ("chain", ("algorithm.name=grpo",)),
    "chain_curriculum": ("chain", ("sampler.name=curriculum", *WATCHED)),
    "chain_prioritized": ("chain", ("sampler.name=prioritized", *WATCHED)),
    "sum": ("sum", WATCHED),
    "sum_rest": ("sum", REST),
    "sum_rest_slower": ("sum", (*REST, *SLOWER)),
    "sum_length": ("sum", LENGTH),
    "sum_length_0.25": ("sum", (*LENGTH, "rewards.length.weight=0.25")),
    "sum_length_0.1": ("sum", (*LENGTH, "rewards.length.weight=0.1")),
    "sum_log_z": ("sum", LOG_Z),
    "sum_log_z_tau_1": ("sum", (*LOG_Z, "algorithm.tau=1")),
    "sum_tau_1": ("sum", ("algorithm.tau=1",)),
    "sum_steps_tau_0.01": ("sum", (*FOUR_STEPS, "algorithm.tau=0.01")),
    "sum_steps_tau_0.1": ("sum", FOUR_STEPS),
    "sum_steps_tau_1": ("sum", (*FOUR_STEPS, "algorithm.tau=1")),
    "sum_moments": ("sum", ("training.optimizer.reset=false",)),
    "sum_grpo": ("sum", ("algorithm.name=grpo",)),
    "sum_decay": ("sum", (*DECAY, *WATCHED)),
    "sum_cold": ("sum", (*COLD, *WATCHED)),
}


@dataclass(frozen=True)
class Ablation:
    title: str
    arms: Mapping[str, str]  # what it is called -> its run; the paper's method first, all others are compared with it
    with_length: bool = False
    with_cost: bool = False  # and correctness by quarters: whether the arms part in time
    comparable_batches: bool = True  # False: arms draw other prompts, or at another temperature; WATCHED ones compare them


ABLATIONS = {
    "rest_chain": Ablation(
        "Mirror descent against ReST at three learning rates, chains",
        {
            "mirror descent, 5e-4": "chain_full",
            "mirror descent, 2e-4": "chain_full_slower",
            "mirror descent, 1e-3": "chain_full_faster",
            "ReST, 5e-4": "chain_rest",
            "ReST, 2e-4": "chain_rest_slower",
            "ReST, 1e-3": "chain_rest_faster",
        },
    ),
    "rest_sum": Ablation(
        "Mirror descent against ReST, sums",
        {"mirror descent, 5e-4": "sum", "ReST, 5e-4": "sum_rest", "ReST, 2e-4": "sum_rest_slower"},
    ),
    "partial": Ablation(
        "Partial against full rollouts, chains",
        {"partial rollouts": "chain_partial", "full rollouts": "chain_full"},
        with_length=True,
        with_cost=True,
    ),
    "partial_slower": Ablation(
        "Partial against full rollouts, chains, learning rate 2e-4",
        {"partial rollouts": "chain_partial_slower", "full rollouts": "chain_full_slower"},
        with_length=True,
        with_cost=True,
    ),
    "stale_kv": Ablation(
        "KV of unfinished trajectories, chains, learning rate 2e-4",
        {"kept": "chain_partial_slower_keep", "recomputed": "chain_partial_slower"},
        with_cost=True,
    ),
    "loss_segments": Ablation(
        "Which segments carry loss in partial rollouts, chains",
        {"the last one": "chain_partial_last", "all": "chain_partial"},
        with_length=True,
    ),
    "length": Ablation(
        "Length reward from iteration 15 on, by its weight, sums",
        {"weight 1": "sum_length", "weight 0.25": "sum_length_0.25", "weight 0.1": "sum_length_0.1", "none": "sum"},
        with_length=True,
    ),
    "baseline": Ablation(
        "Mean reward against tau log Z as baseline, sums",
        {
            "mean, tau 0.1": "sum",
            "log Z, tau 0.1": "sum_log_z",
            "mean, tau 1": "sum_tau_1",
            "log Z, tau 1": "sum_log_z_tau_1",
        },
    ),
    "tau_chain": Ablation(
        "Tau with two optimizer steps an iteration, chains",
        {"tau 0.1": "chain_full", "tau 0.01": "chain_tau_0.01", "tau 1": "chain_tau_1"},
    ),
    "tau_sum": Ablation(
        "Tau with four optimizer steps an iteration, sums",
        {"tau 0.1": "sum_steps_tau_0.1", "tau 0.01": "sum_steps_tau_0.01", "tau 1": "sum_steps_tau_1"},
    ),
    "reset_chain": Ablation("Optimizer state, chains", {"reset every iteration": "chain_full", "kept": "chain_moments"}),
    "reset_sum": Ablation("Optimizer state, sums", {"reset every iteration": "sum", "kept": "sum_moments"}),
    "grpo_chain": Ablation("Mirror descent against GRPO, chains", {"mirror descent": "chain_full", "GRPO": "chain_grpo"}),
    "grpo_sum": Ablation("Mirror descent against GRPO, sums", {"mirror descent": "sum", "GRPO": "sum_grpo"}),
    "sampling": Ablation(
        "How prompts are drawn, chains, held-out questions",
        {"curriculum": "chain_curriculum", "prioritized": "chain_prioritized", "uniform": "chain_full"},
        comparable_batches=False,
    ),
    "temperature": Ablation(
        "Sampling temperature, sums, held-out questions",
        {"1 to 0.5 in 40 iterations": "sum_decay", "1": "sum", "0.5": "sum_cold"},
        comparable_batches=False,
    ),
}
