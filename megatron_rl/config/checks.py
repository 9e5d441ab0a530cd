"""The rules between settings. Each message: setting=value, rule, remedy.

`check` needs nothing but the settings, `check_world` the number of ranks, `check_model` the model's shape.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from megatron_rl.algorithms import ALGORITHMS
from megatron_rl.config.sections import AlgorithmConfig, Config, DataConfig, EvaluationConfig, RewardsConfig, RolloutConfig
from megatron_rl.config.shared import MegatronConfig
from megatron_rl.errors import ConfigError

if TYPE_CHECKING:
    from megatron_rl.model_config import ModelConfig


def check(c: Config) -> None:
    """The rules that need neither ranks nor model."""
    r, t = c.rollout, c.training
    if r.group_size < 2:
        raise ConfigError(f"rollout.group_size={r.group_size}: a group baseline needs at least 2 trajectories; set 2 or more")
    if r.min_groups > r.groups_per_iteration:
        raise ConfigError(
            f"rollout.min_groups={r.min_groups}: more than rollout.groups_per_iteration={r.groups_per_iteration}; lower it"
        )
    if r.token_budget * r.max_segments < r.max_response_tokens:
        raise ConfigError(
            f"rollout.token_budget={r.token_budget} times rollout.max_segments={r.max_segments} is less than "
            f"rollout.max_response_tokens={r.max_response_tokens}: long responses could never end; raise one of the first two"
        )
    if not r.partial and r.token_budget < r.max_response_tokens:
        raise ConfigError(
            f"rollout.partial=false: rollout.token_budget={r.token_budget} would cut responses of up to "
            f"rollout.max_response_tokens={r.max_response_tokens}; raise the budget to that, or set rollout.partial=true"
        )
    if r.max_staleness + 1 < r.max_segments:
        raise ConfigError(
            f"rollout.max_staleness={r.max_staleness}: a trajectory of rollout.max_segments={r.max_segments} segments is "
            f"{r.max_segments - 1} versions old and would be dropped; set it to at least {r.max_segments - 1}"
        )
    if not r.embedded.batch_sizes or sorted(set(r.embedded.batch_sizes)) != list(r.embedded.batch_sizes):
        raise ConfigError(
            f"rollout.embedded.batch_sizes={list(r.embedded.batch_sizes)}: must hold at least one size and rise strictly"
        )
    if r.embedded.batch_sizes[-1] < r.embedded.max_running:
        raise ConfigError(
            f"rollout.embedded.max_running={r.embedded.max_running}: larger than the last of "
            f"rollout.embedded.batch_sizes={list(r.embedded.batch_sizes)}; add that size"
        )
    check_training(t)
    if t.minibatches > r.groups_per_iteration:
        raise ConfigError(
            f"training.minibatches={t.minibatches}: more than rollout.groups_per_iteration={r.groups_per_iteration}; lower it"
        )
    if r.kv_policy == "keep" and r.kv_store.host_bytes <= 0:
        raise ConfigError(
            f"rollout.kv_store.host_bytes={r.kv_store.host_bytes}: rollout.kv_policy=keep puts KV into host memory; raise it, "
            "or set rollout.kv_policy=recompute"
        )
    _check_data(c.data)
    _check_rewards(c.rewards)
    _check_algorithm(c.algorithm)
    if c.evaluation.every:
        _check_evaluation(c.evaluation, c.data.held_out)
    if r.engine == "sglang":
        _check_sglang(r)
        if r.sglang.takes_turns and not r.sglang.urls and not t.optimizer.reset:
            raise ConfigError(
                "training.optimizer.reset=false: Adam's moments would stay on the GPU while the SGLang server has it; set it to "
                "true, or rollout.sglang.memory_saver=false where both fit, or rollout.sglang.colocated=false"
            )
        if 4 * c.weights.bucket_bytes > r.sglang.bucket_bytes:
            raise ConfigError(
                f"rollout.sglang.bucket_bytes={r.sglang.bucket_bytes}: less than 4 times "
                f"weights.bucket_bytes={c.weights.bucket_bytes}, which is gathered beside it; raise it or lower the other"
            )


def check_training(t: MegatronConfig) -> None:
    """The rules within `training` that need neither ranks nor model."""
    if t.virtual_pipeline and t.pipeline_parallel < 2:
        raise ConfigError(f"training.virtual_pipeline={t.virtual_pipeline}: needs training.pipeline_parallel of at least 2")
    if t.virtual_pipeline and not t.overlap_p2p_comm:
        raise ConfigError(
            "training.overlap_p2p_comm=false: with training.virtual_pipeline Megatron-Core 0.16 then computes a wrong loss "
            "without an error; set it to true"
        )
    if t.sequence_parallel and t.tensor_parallel < 2:
        raise ConfigError("training.sequence_parallel=true: needs training.tensor_parallel of at least 2")


def _check_data(d: DataConfig) -> None:
    if d.source == "reasoning_gym" and not (d.task or d.set):
        raise ConfigError("data.task: required when data.source is reasoning_gym, e.g. basic_arithmetic; or give data.set")
    if d.set and (d.source != "reasoning_gym" or d.task or d.task_options):
        raise ConfigError(
            f"data.set={d.set}: gives reasoning_gym's task and its options; set data.source to reasoning_gym, and leave "
            "data.task and data.task_options out"
        )
    if d.source != "reasoning_gym" and d.path is None:
        raise ConfigError(f"data.path: required when data.source is {d.source}")


def _check_evaluation(e: EvaluationConfig, held_out: int) -> None:
    if not e.sets or len(set(e.names)) < len(e.sets):
        raise ConfigError(f"evaluation.sets={list(e.sets)}: needs at least one, and no name twice; the names are {e.names}")
    if "held_out" in e.sets and not held_out:
        raise ConfigError("evaluation.sets: held_out is empty with data.held_out=0; set that, or name other sets")
    if e.samples > 1 and not e.temperature:
        raise ConfigError(
            f"evaluation.samples={e.samples}: greedy responses to one prompt are all the same; set evaluation.temperature above "
            "0, or samples to 1"
        )


def _check_rewards(r: RewardsConfig) -> None:
    if r.budget.by_tag and not r.budget.tag:
        raise ConfigError(f"rewards.budget.by_tag={r.budget.by_tag}: needs rewards.budget.tag, the tag whose values these are")
    for i, term in enumerate(r.terms):
        if term.range and not term.range[0] < term.range[1]:
            raise ConfigError(f"rewards.terms.{i}.range={list(term.range)}: the first must be below the second")


def _check_algorithm(a: AlgorithmConfig) -> None:
    if a.name not in ALGORITHMS:
        nearest = difflib.get_close_matches(a.name, ALGORITHMS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"algorithm.name={a.name}: no such algorithm; the nearest is {nearest}, and there are {', '.join(ALGORITHMS)}"
        )
    for key in sorted({key for keys in ALGORITHMS.values() for key in keys} - set(ALGORITHMS[a.name])):
        if (value := getattr(a, key)) != AlgorithmConfig.model_fields[key].default:
            readers = [name for name, keys in ALGORITHMS.items() if key in keys]
            raise ConfigError(
                f"algorithm.{key}={value}: {a.name} does not use it; unset it, or choose one of {', '.join(readers)}"
            )
    if a.ptx.weight and a.ptx.path is None:
        raise ConfigError(f"algorithm.ptx.weight={a.ptx.weight:g}: needs algorithm.ptx.path, the conversations to train on")


# Arguments that other settings decide, or that the engine's way of speaking to the server rests on.
_OWN_ARGUMENTS = {
    "model_path": "model.folder",
    "dtype": "model.dtype",
    "tp_size": "rollout.sglang.tensor_parallel",
    "tensor_parallel_size": "rollout.sglang.tensor_parallel",
    "host": "rollout.sglang.urls",
    "port": "rollout.sglang.port",
    "mem_fraction_static": "rollout.sglang.mem_fraction",
    "enable_memory_saver": "rollout.sglang.memory_saver",
    "attention_backend": "rollout.sglang.attention_backend",
    "sampling_backend": "rollout.sglang.sampling_backend",
    "enable_deterministic_inference": "rollout.sglang.deterministic",
    "stream_interval": "rollout.sglang.stream_interval",
    "base_gpu_id": "rollout.sglang.engines",
}


def _check_sglang(r: RolloutConfig) -> None:
    s = r.sglang
    if r.kv_policy == "keep" and s.urls:
        raise ConfigError(
            f"rollout.sglang.urls={list(s.urls)}: with rollout.kv_policy=keep a server needs our plugin, which only servers "
            "started by us have; leave the URLs unset, or set rollout.kv_policy=recompute"
        )
    if r.kv_policy == "keep" and (r.kv_store.drift_samples or r.kv_store.spill_folder):
        name = "drift_samples" if r.kv_store.drift_samples else "spill_folder"
        raise ConfigError(
            f"rollout.kv_store.{name}={getattr(r.kv_store, name)}: an SGLang server keeps KV in host memory and measures no "
            "drift; unset it, or set rollout.engine=embedded"
        )
    for name, key in _OWN_ARGUMENTS.items():
        if name in s.server_arguments:
            raise ConfigError(f"rollout.sglang.server_arguments.{name}: set {key} instead")
    for url in s.urls:
        if s.colocated and not url.startswith(("http://127.0.0.1:", "http://localhost:")):
            raise ConfigError(
                f"rollout.sglang.urls: {url}: with rollout.sglang.colocated=true weights reach a server through the memory of a "
                "shared GPU, so it must be on this machine, as http://127.0.0.1:<port>; set colocated=false where it has GPUs of "
                "its own"
            )
    if s.checkpoint_engine and not s.colocated:
        raise ConfigError(
            "rollout.sglang.checkpoint_engine=true: its parameter servers write into the GPUs of the trainer's ranks, so servers "
            "share them; set rollout.sglang.colocated=true, or leave it false"
        )
    if len(set(s.urls)) < len(s.urls):
        raise ConfigError(f"rollout.sglang.urls={list(s.urls)}: a server occurs twice; name each once")


def check_world(c: Config, world_size: int) -> None:
    """The rules that need the number of ranks."""
    check_layout(c.training, world_size)
    if c.rollout.embedded.ranks and c.rollout.embedded.ranks > world_size:
        raise ConfigError(f"rollout.embedded.ranks={c.rollout.embedded.ranks}: there are only {world_size} ranks")
    s = c.rollout.sglang
    is_placed = c.rollout.engine == "sglang" and s.checkpoint_engine and not s.urls
    if is_placed and (num_gpus := s.engines * s.tensor_parallel) > world_size:
        raise ConfigError(
            f"rollout.sglang.engines={s.engines} of tensor_parallel={s.tensor_parallel}: with checkpoint_engine=true each of "
            f"their {num_gpus} GPUs needs a trainer's rank, and there are {world_size}; lower one of them, or start more ranks"
        )


def check_layout(t: MegatronConfig, world_size: int) -> None:
    block = t.tensor_parallel * t.pipeline_parallel * t.context_parallel
    if world_size % block:
        raise ConfigError(
            f"training.tensor_parallel={t.tensor_parallel} x pipeline_parallel={t.pipeline_parallel} x "
            f"context_parallel={t.context_parallel} = {block} does not divide the {world_size} ranks; start a multiple of {block}"
        )


def check_model(c: Config, model: ModelConfig) -> None:
    """The rules that need the model's shape."""
    check_shape(c.training, model)
    r = c.rollout
    if r.engine == "sglang" and not r.sglang.urls:
        _check_cut("rollout.sglang.tensor_parallel", r.sglang.tensor_parallel, model)
    itemsize = 4 if c.model.dtype == "float32" else 2  # the least that `auto` may mean
    page_bytes = 2 * model.num_layers * model.num_kv_heads * r.embedded.page_size * model.head_dim * itemsize
    if r.kv_policy == "keep" and r.engine == "embedded" and r.kv_store.host_bytes < page_bytes:
        raise ConfigError(
            f"rollout.kv_store.host_bytes={r.kv_store.host_bytes}: one KV page of this model takes {page_bytes} bytes; "
            "raise it, or set rollout.kv_policy=recompute"
        )
    lengths = {"rollout.max_response_tokens": r.max_response_tokens, "evaluation.max_tokens": c.evaluation.max_tokens}
    for key, tokens in lengths.items():
        if tokens and c.data.max_prompt_tokens + tokens > model.max_positions:
            raise ConfigError(
                f"data.max_prompt_tokens={c.data.max_prompt_tokens} + {key}={tokens}: "
                f"more than the model's context of {model.max_positions}; lower one"
            )


def check_shape(t: MegatronConfig, model: ModelConfig) -> None:
    """Whether the model can be cut as `training` says."""
    tp, cp, stages = t.tensor_parallel, t.context_parallel, t.pipeline_parallel * (t.virtual_pipeline or 1)
    _check_cut("training.tensor_parallel", tp, model)
    if (model.num_heads // tp) % cp:
        raise ConfigError(
            f"training.context_parallel={cp}: must divide the {model.num_heads // tp} attention heads of a tensor-parallel rank"
        )
    if model.num_layers % stages:
        raise ConfigError(
            f"training.pipeline_parallel={t.pipeline_parallel} x virtual_pipeline={t.virtual_pipeline or 1}: "
            f"must divide the model's {model.num_layers} layers"
        )
    if (model.num_heads + 2 * model.num_kv_heads) * model.head_dim % tp:
        raise ConfigError(f"training.tensor_parallel={tp}: must divide the model's fused query, key and value rows")


def _check_cut(key: str, tp: int, model: ModelConfig) -> None:
    """What a trainer's and a server's ranks that share each layer both need. key: the setting that `tp` is of."""
    if model.num_heads % tp:
        raise ConfigError(f"{key}={tp}: must divide the model's {model.num_heads} attention heads")
    if max(model.num_kv_heads, tp) % min(model.num_kv_heads, tp):
        raise ConfigError(f"{key}={tp}: must divide, or be a multiple of, the model's {model.num_kv_heads} KV heads")
    if model.ffn_size % tp:
        raise ConfigError(f"{key}={tp}: must divide the model's feed-forward size {model.ffn_size}")
