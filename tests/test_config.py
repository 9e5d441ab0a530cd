"""Configuration: what is read, what is refused and in which words."""

from pathlib import Path

import pytest
import yaml

from megatron_rl import config
from megatron_rl.config import Config, check_model, check_world, dump, iter_settings, load
from megatron_rl.errors import ConfigError
from megatron_rl.model_config import ModelConfig

MINIMAL = {
    "run": {"folder": "runs/test", "iterations": 3},
    "model": {"folder": "model"},
    "data": {"source": "jsonl", "path": "questions.jsonl"},
    "rollout": {"groups_per_iteration": 4, "token_budget": 64, "max_response_tokens": 256},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_a_minimal_file_gives_every_setting_a_value(path):
    c = load(path)
    assert c.run.iterations == 3 and c.rollout.group_size == 8 and c.algorithm.baseline == "mean"
    assert c.buffer_path == Path("runs/test/buffer.sqlite") and c.max_open_groups == 8 and c.steps_per_iteration == 1


def test_overrides_reach_any_depth_and_are_yaml(path):
    overrides = [
        "training.optimizer.lr=3e-4",
        "rollout.embedded.batch_sizes=[1, 64]",
        "data.system_message='Reply with only \"Answer: X\".'",
        "rewards.terms=[{name: exact, options: {prefix: 'Answer:'}}]",
        "training.epochs=2",
        "training.minibatches=3",
        "buffer.path=/tmp/b.sqlite",
    ]
    c = load(path, overrides)
    assert c.training.optimizer.lr == 3e-4 and c.rollout.embedded.batch_sizes == (1, 64)
    assert c.data.system_message == 'Reply with only "Answer: X".'
    assert c.rewards.terms[0].options == {"prefix": "Answer:"}
    assert c.steps_per_iteration == 6 and c.buffer_path == Path("/tmp/b.sqlite")


@pytest.mark.parametrize("lr", ["1e-5", "1.0e-5", "0.00001"])
def test_learning_rates_may_be_written_with_or_without_a_point(path, lr):
    assert load(path, [f"training.optimizer.lr={lr}"]).training.optimizer.lr == 1e-5


def test_what_is_dumped_loads_to_the_same(path, tmp_path):
    overrides = [
        "data.worked_turns=[{question: 1+1, answer: 'Answer: 2'}]",
        "data.task_options={min_terms: 2}",
        "rewards.terms=[{name: regex, weight: 0.5, options: {pattern: '<(.*)>'}}]",
        "training.virtual_pipeline=2",
        "training.pipeline_parallel=2",
    ]
    c = load(path, overrides)
    again = tmp_path / "again.yaml"
    again.write_text(dump(c))
    assert load(again) == c


def test_the_loaded_configuration_cannot_be_changed(path):
    with pytest.raises(ValueError, match="frozen"):
        load(path).run.iterations = 5


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("rollout.groop_size", "rollout.group_size"),
        ("training.optimizer.weight_deca", "training.optimizer.weight_decay"),
        ("rolout.group_size", "rollout"),
        ("algorithm.taus", "algorithm.tau"),
        ("tensor_parallel", "training.tensor_parallel"),
        ("report.tensorbord", "report.tensorboard"),
        ("trainer", "training"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_name(path, key, nearest):
    with pytest.raises(ConfigError, match=rf"{key.split('.')[0]}.*: no such setting; the nearest is {nearest}$"):
        load(path, [f"{key}=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.iterations=0", r"run.iterations=0: input should be greater than or equal to 1"),
        ("rollout.temperature=hot", r"rollout.temperature='hot': input should be a valid number"),
        ("algorithm.baseline=median", r"algorithm.baseline='median': input should be 'mean' or 'log_z'"),
        ("sampler.floor=2", r"sampler.floor=2: input should be less than or equal to 1"),
        ("training.optimizer.lr=.nan", r"training.optimizer.lr=nan: "),
        ("rewards.terms=[{name: exact, weight: .inf}]", r"rewards.terms.0.weight=inf: "),
        ("rollout.token_budget=null", r"rollout.token_budget=None: "),
        ("run=5", r"run=5: "),
        ("run.iterations", r"override 'run.iterations': expected section.key=value"),
        ("=5", r"override '=5': expected section.key=value"),
        ("run.iterations.x=5", r"override 'run.iterations.x=5': iterations is not a section"),
        ("run.iterations=[", r"override 'run.iterations=\[': '\[' is not a YAML value"),
    ],
)
def test_a_malformed_value_is_refused_by_setting_and_value(path, override, message):
    with pytest.raises(ConfigError, match=message):
        load(path, [override])


def test_all_faults_of_a_file_are_reported_together(path):
    with pytest.raises(ConfigError, match="(?s)run.iterations=0.*training.epochs=0"):
        load(path, ["run.iterations=0", "training.epochs=0"])


def test_a_missing_setting_is_named(path):
    path.write_text(yaml.safe_dump({**MINIMAL, "run": {"folder": "x"}}))
    with pytest.raises(ConfigError, match=r"config.yaml: run.iterations: required and not set"):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "expected sections such as `run:`.*found list"),
        ("", "expected sections .* found NoneType"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(path, content, message):
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"config.yaml: {message}"):
        load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot read the config file: No such file"):
        load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.group_size=1"], "rollout.group_size=1: .*at least 2 trajectories"),
        (
            ["rollout.max_segments=2"],
            "rollout.token_budget=64 times rollout.max_segments=2 is less than rollout.max_response_tokens=256",
        ),
        (["rollout.partial=false"], "rollout.partial=false: rollout.token_budget=64 would cut .*=256; raise the budget"),
        (["rollout.max_staleness=6"], "rollout.max_staleness=6: .*set it to at least 7"),
        (["rollout.embedded.batch_sizes=[4, 2, 64]"], "rollout.embedded.batch_sizes=.*rise strictly"),
        (["rollout.embedded.batch_sizes=[]"], "must hold at least one size"),
        (["rollout.embedded.max_running=65"], "rollout.embedded.max_running=65: larger than the last"),
        (["training.virtual_pipeline=2"], "training.virtual_pipeline=2: needs training.pipeline_parallel of at least 2"),
        (
            ["training.virtual_pipeline=2", "training.pipeline_parallel=2", "training.overlap_p2p_comm=false"],
            "training.overlap_p2p_comm=false: .*wrong loss",
        ),
        (["training.sequence_parallel=true"], "training.sequence_parallel=true: needs training.tensor_parallel"),
        (["training.minibatches=5"], "training.minibatches=5: more than rollout.groups_per_iteration=4"),
        (["rewards.budget.by_tag={a: 5}"], "rewards.budget.by_tag=.*needs rewards.budget.tag"),
        (["rewards.terms=[{name: exact, range: [1, 0]}]"], r"rewards.terms.0.range=\[1.0, 0.0\]: the first must be below"),
        (
            ["algorithm.name=ppgo"],
            "algorithm.name=ppgo: no such algorithm; the nearest is ppo, and there are mirror_descent",
        ),
        (
            ["algorithm.clip_low=0.1"],
            "algorithm.clip_low=0.1: mirror_descent does not use it; unset it, or .* of k25, ppo,",
        ),
        (["algorithm.name=k25", "algorithm.importance_cap=2"], "algorithm.importance_cap=2.0: k25 does not use it; unset it"),
        (
            ["algorithm.name=grpo", "algorithm.baseline=log_z"],
            "algorithm.baseline=log_z: grpo does not use it; .*one of mirror_descent, k2$",
        ),
        (["data.source=reasoning_gym"], "data.task: required when data.source is reasoning_gym"),
        (["data.set=gsm_symbolic"], "data.set=gsm_symbolic: gives reasoning_gym's task and its options; set data.source"),
        (["evaluation.every=1"], "evaluation.sets: held_out is empty with data.held_out=0; set that, or name other sets"),
        (
            ["evaluation.every=1", "evaluation.sets=[a/x.jsonl, b/x.jsonl]"],
            r"evaluation.sets=.*no name twice; the names",
        ),
        (
            ["evaluation.every=1", "evaluation.sets=[gsm_symbolic]", "evaluation.samples=4"],
            "evaluation.samples=4: greedy responses to one prompt are all the same; set evaluation.temperature",
        ),
        (["data.path=null"], "data.path: required when data.source is jsonl"),
        (["data.source=huggingface", "data.path=null"], "data.path: required when data.source is huggingface"),
        (
            ["rollout.kv_policy=keep", "rollout.kv_store.host_bytes=0"],
            "rollout.kv_store.host_bytes=0: rollout.kv_policy=keep puts KV into host memory; raise it, or set",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(path, overrides)


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (["training.tensor_parallel=2", "training.context_parallel=2"], 6, r"= 4 does not divide the 6 ranks"),
        (["rollout.embedded.ranks=3"], 2, "rollout.embedded.ranks=3: there are only 2 ranks"),
    ],
)
def test_the_number_of_ranks_must_fit(path, overrides, ranks, message):
    with pytest.raises(ConfigError, match=message):
        check_world(load(path, overrides), ranks)


def test_fitting_worlds_are_accepted(path):
    check_world(load(path, ["training.tensor_parallel=2", "training.pipeline_parallel=2"]), 8)


def model(**changes: object) -> ModelConfig:
    shape: dict = {
        "family": "qwen3",
        "num_layers": 6,
        "hidden_size": 48,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 8,
        "ffn_size": 96,
        "vocab_size": 100,
        "max_positions": 4096,
        "norm_eps": 1e-6,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "tied_embeddings": False,
        "qkv_bias": False,
        "qk_norm": True,
        "eos_token_ids": (1,),
    }
    return ModelConfig(**{**shape, **changes})


@pytest.mark.parametrize(
    ("overrides", "changes", "message"),
    [
        (["training.tensor_parallel=4"], {}, "training.tensor_parallel=4: must divide the model's 6 attention heads"),
        (["training.tensor_parallel=3"], {}, "training.tensor_parallel=3: .* the model's 2 KV heads"),
        (["training.tensor_parallel=2"], {"ffn_size": 97}, "training.tensor_parallel=2: .*feed-forward size 97"),
        (
            ["rollout.engine=sglang", "rollout.sglang.tensor_parallel=2"],
            {"num_heads": 9, "num_kv_heads": 3},
            "rollout.sglang.tensor_parallel=2: must divide the model's 9 attention heads",
        ),
        (["training.context_parallel=4"], {}, "training.context_parallel=4: must divide the 6 attention heads"),
        (["training.pipeline_parallel=4"], {}, r"pipeline_parallel=4 x virtual_pipeline=1: must divide the model's 6 layers"),
        (
            ["training.pipeline_parallel=2", "training.virtual_pipeline=2"],
            {},
            r"pipeline_parallel=2 x virtual_pipeline=2: must divide the model's 6 layers",
        ),
        ([], {"max_positions": 2303}, "more than the model's context of 2303"),
        (
            ["rollout.kv_policy=keep", "rollout.kv_store.host_bytes=100"],
            {},
            "rollout.kv_store.host_bytes=100: one KV page of this model",
        ),
    ],
)
def test_the_models_shape_must_fit(path, overrides, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_model(load(path, overrides), model(**changes))


def test_fitting_models_are_accepted(path):
    parallel = ["training.tensor_parallel=2", "training.context_parallel=3", "training.pipeline_parallel=3"]
    check_model(load(path, parallel), model(max_positions=2304))


def test_every_setting_is_described_and_says_whose_default_it_is():
    leaves = iter_settings(Config)
    assert len(leaves) > 80 and len({key for key, _ in leaves}) == len(leaves)
    for key, info in leaves:
        assert info.description, key
        assert isinstance(info.json_schema_extra, dict) and "ours" in info.json_schema_extra, key
        unit = {"_s": "[s]", "_bytes": "[bytes]", "_tokens": "[tokens]"}
        for ending, bracket in unit.items():
            if key.endswith(ending):
                assert bracket in info.description, f"{key}: its description lacks the unit {bracket}"
    nested = [config.RewardTerm, config.WorkedTurn]
    assert all(field.description for section in nested for field in section.model_fields.values())
