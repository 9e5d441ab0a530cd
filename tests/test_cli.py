import json
import re
import subprocess
import sys
from types import ModuleType

import pytest
import typer

from megatron_rl import cli, config
from megatron_rl.config import Config, DPOConfig, SFTConfig
from megatron_rl.data.ready_made import READY_MADE
from megatron_rl.errors import EngineError
from megatron_rl.evaluate import Way

MINIMAL = """
run: {folder: FOLDER/run, iterations: 1}
model: {folder: model}
data: {source: jsonl, path: prompts.jsonl}
rollout: {groups_per_iteration: 1, token_budget: 8, max_response_tokens: 16}
"""

COMMANDS = {  # frozen: scripts of users depend on it
    "train": ["config", "overrides"],
    "sft": ["config", "overrides"],
    "eval": [
        "config",
        "overrides",
        "--model",
        "--split",
        "--set",
        "--list",
        "--greedy",
        "--sampled",
        "--samples",
        "--record",
        "--html",
    ],
    "curate": [
        "config",
        "--out",
        "overrides",
        "--model",
        "--samples",
        "--temperature",
        "--tries",
        "--lowest",
        "--highest",
        "--in-flight",
    ],
    "sft-data": ["config", "--out", "overrides", "--model", "--samples", "--keep", "--most", "--max-tokens", "--bare"],
    "long2short": [],
    "convert": ["source", "target", "--to", "--tensor-parallel", "--pipeline-parallel", "--dtype"],
    "inspect": ["run", "--trajectory", "--group"],
    "report": ["run"],
    "doctor": ["config", "overrides"],
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["megatron-rl", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL.replace("FOLDER", str(tmp_path)))
    return path


def stub(monkeypatch, name, **functions):
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def test_the_commands_and_their_arguments_are_frozen():
    group = typer.main.get_command(cli.app)
    found = {
        name: [p.name if p.param_type_name == "argument" else p.opts[-1] for p in command.params]
        for name, command in group.commands.items()
    }
    assert found == COMMANDS


@pytest.mark.parametrize(("command", "root"), [(("train",), Config), (("sft",), SFTConfig), (("long2short", "dpo"), DPOConfig)])
def test_the_help_lists_every_setting_with_default_unit_and_mark(run, command, root):
    code, out, _ = run(*command, "--help")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if re.match(r"  \w+\.", line)}
    assert list(lines) == config.known_keys(root)
    for key, info in config.iter_settings(root):
        assert (" required " in lines[key]) == info.is_required(), key
        assert (" ours " in lines[key]) == info.json_schema_extra["ours"], key


def test_the_help_of_train_names_units_and_choices(run):
    _, out, _ = run("train", "--help")
    flat = " ".join(out.split())
    assert (
        "rollout.token_budget required tokens a trajectory may add in one iteration; the rest waits in the buffer [tokens]"
        in flat
    )
    assert "algorithm.tau 0.1 ours" in flat and "(mean | log_z)" in flat


def test_help_needs_neither_torch_nor_megatron():
    code = "import sys, megatron_rl.cli; sys.exit(bool({'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_module_form_is_the_same_command():
    out = subprocess.run([sys.executable, "-m", "megatron_rl", "--help"], capture_output=True, text=True)
    assert out.returncode == 0 and all(name in out.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: cannot read the config file"),
        (["train", "CONFIG", "rollout.groupsize=4"], "rollout.groupsize: no such setting; the nearest is rollout.group_size"),
        (["train", "CONFIG", "rollout.group_size=1"], "rollout.group_size=1: a group baseline needs at least 2"),
        (["eval"], "eval: give a CONFIG, or a MODEL folder with --set; --list names the ready-made sets"),
        (["eval", "CONFIG", "--samples", "4"], "--samples 4: greedy responses to one prompt are all the same; add --sampled"),
        (["eval", "."], "eval: give a CONFIG, or a MODEL folder with --set"),
        (["eval", ".", "--set", "gcd", "--record", "after"], "--record: a MODEL folder is no run"),
        (["long2short", "plot", "."], "plot: . is a model folder; say with --set what to evaluate it on"),
        (["long2short", "rl", "CONFIG", "--out", "x"], "run/hf: no trained model there; finish the first phase, or give --model"),
        (["inspect", "nowhere"], "nowhere: not a run folder"),
        (["inspect", "nowhere", "--trajectory", "1", "--group", "2"], "--trajectory and --group: give one of them"),
        (["report", "nowhere"], "nowhere: not a run folder"),
    ],
)
def test_a_mistake_of_the_user_is_one_line_on_stderr_and_exit_code_2(run, config_file, arguments, says):
    code, out, err = run(*(config_file if a == "CONFIG" else a for a in arguments))
    assert code == 2 and out == ""
    assert err.startswith("error: ") and says in err and err.count("\n") == 1


def test_an_error_while_training_is_said_the_same_way(run, config_file, monkeypatch):
    def train(settings):
        raise EngineError("engine 0: dead")

    stub(monkeypatch, "megatron_rl.loop", train=train)
    assert run("train", config_file) == (2, "", "error: engine 0: dead\n")


def test_train_gives_the_overridden_config_to_the_loop_and_its_exit_code_back(run, config_file, monkeypatch):
    seen = []
    stub(monkeypatch, "megatron_rl.loop", train=lambda settings: seen.append(settings) or 3)
    code, _, _ = run("train", config_file, "run.iterations=7", "rollout.group_size=4")
    assert code == 3
    assert (seen[0].run.iterations, seen[0].rollout.group_size) == (7, 4)


def test_an_interrupt_from_the_keyboard_says_how_to_go_on(run, config_file, monkeypatch):
    def train(settings):
        raise KeyboardInterrupt

    stub(monkeypatch, "megatron_rl.loop", train=train)
    code, _, err = run("train", config_file)
    assert code == 130 and "the same command goes on" in err


def test_a_bug_of_ours_keeps_its_traceback(config_file, monkeypatch):
    stub(monkeypatch, "megatron_rl.loop", train=lambda settings: {}["missing"])
    monkeypatch.setattr(sys, "argv", ["megatron-rl", "train", str(config_file)])
    with pytest.raises(KeyError):
        cli.main()


def test_eval_prints_and_records_the_greedy_and_the_sampled_result(run, config_file, tmp_path, monkeypatch):
    seen = {}

    def evaluate_ways(settings, model_folder, ways, *, split):
        seen.update(model=model_folder, ways=ways, split=split)
        scores = [{"name": "pass@1", "mean": 0.5, "low": 0.0, "high": 1.0}]
        found = {"model": str(model_folder), "n": 2, "mean": 0.5, "low": 0.0, "high": 1.0, "mean_tokens": 3.0, "scores": scores}
        found |= {"split": split, "temperature": 1.0}
        return [found | {"greedy": way.greedy, "samples": way.samples} for way in ways]

    stub(monkeypatch, "megatron_rl.evaluate", evaluate_ways=evaluate_ways, Way=Way)
    code, out, err = run("eval", config_file, "--model", tmp_path, "--record", "after")
    assert code == 0 and json.loads(out)["mean"] == 0.5 and "held_out, greedy" in err
    assert seen == {"model": tmp_path, "split": "held_out", "ways": [Way(greedy=True)]}
    both = ("--greedy", "--sampled", "--samples", "4")
    code, out, err = run("eval", config_file, "--model", tmp_path, "--record", "after", *both)
    assert code == 0 and "held_out, greedy" in err and "held_out, temperature 1" in err
    assert {name: way["samples"] for name, way in json.loads(out).items()} == {"greedy": 1, "sampled": 4}, "one document"
    assert seen["ways"] == [Way(greedy=True), Way(greedy=False, samples=4)]
    recorded = json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]
    assert (recorded["greedy"], recorded["sampled_mean"], recorded["sampled_samples"]) == (True, 0.5, 4)


def test_eval_takes_a_model_folder_and_a_set_without_any_config(run, tmp_path, monkeypatch):
    seen = {}

    def evaluate_ways(settings, model_folder, ways, *, split):
        verifier, tokens = settings.data.verifier, settings.rollout.max_response_tokens
        seen.update(model=model_folder, split=split, ways=ways, verifier=verifier, tokens=tokens)
        raise EngineError("enough")

    stub(monkeypatch, "megatron_rl.evaluate", evaluate_ways=evaluate_ways, Way=Way)
    run("eval", tmp_path, "rollout.max_response_tokens=77", "--set", "gsm_symbolic", "--sampled", "--samples", "4")
    ways = [Way(greedy=False, samples=4)]
    assert seen == {"model": tmp_path, "split": "gsm_symbolic", "ways": ways, "verifier": "math", "tokens": 77}


def test_eval_lists_the_ready_made_sets(run):
    code, out, _ = run("eval", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(READY_MADE)


def test_the_second_phase_trains_as_the_first_but_for_model_length_and_length_reward(run, config_file, tmp_path, monkeypatch):
    seen = []
    stub(monkeypatch, "megatron_rl.loop", train=lambda settings: seen.append(settings) or 0)
    trained = tmp_path / "run" / "hf"
    trained.mkdir(parents=True)
    (trained / "config.json").write_text("{}")
    config_file.write_text(config_file.read_text() + "\nsampler: {name: prioritized}\n")
    config_file.write_text(config_file.read_text().replace("rollout: {", "rollout: {temperature_decay: {end: 0.5}, "))
    first = config.load(config_file)
    for options, tokens in (([], 8), (["--max-tokens", "5"], 5), (["rollout.max_response_tokens=6"], 6)):
        assert run("long2short", "rl", config_file, *options, "--out", tmp_path / "short", "run.iterations=3")[0] == 0
        second = seen.pop()
        assert second.model.folder == trained and second.run.folder == tmp_path / "short" and second.run.iterations == 3
        assert second.rollout.max_response_tokens == tokens and second.rewards.length.schedule == "constant"
        assert second.rollout.temperature == 0.5 and second.rollout.temperature_decay.end is None
        assert second.sampler == first.sampler
        assert second.data == first.data and second.training == first.training and second.algorithm == first.algorithm
    for longer in (["--max-tokens", "16"], ["rollout.max_response_tokens=16"]):
        code, _, err = run("long2short", "rl", config_file, *longer, "--out", "x")
        assert code == 2 and "max_response_tokens=16 of the second phase: must be less than the first phase's 16" in err
    code, _, err = run("long2short", "rl", config_file, "model.folder=x", "--out", "x")
    assert code == 2 and "model.folder=x: the second phase starts from a trained model; give it as --model" in err


def test_a_first_phase_that_was_begun_with_overrides_is_found_with_them(run, config_file, tmp_path, monkeypatch):
    seen = []
    stub(monkeypatch, "megatron_rl.loop", train=lambda settings: seen.append(settings) or 0)
    trained = tmp_path / "elsewhere" / "hf"
    trained.mkdir(parents=True)
    (trained / "config.json").write_text("{}")
    given = [f"run.folder={trained.parent}", "rollout.temperature_decay={end: 0.25}", "rollout.token_budget=3"]
    assert run("long2short", "rl", config_file, *given, "--out", tmp_path / "short") == (0, "", "")
    assert (seen[0].model.folder, seen[0].run.folder) == (trained, tmp_path / "short")
    assert (seen[0].rollout.temperature, seen[0].rollout.temperature_decay.end, seen[0].rollout.token_budget) == (0.25, None, 3)


def test_convert_hands_its_options_on(run, tmp_path, monkeypatch):
    seen = []
    stub(monkeypatch, "megatron_rl.weights.convert", convert=lambda *paths, **options: seen.append((paths, options)))
    assert run("convert", tmp_path / "a", tmp_path / "b", "--to", "hf", "--tensor-parallel", "2")[0] == 0
    layout = {"tensor_parallel": 2, "pipeline_parallel": 1, "dtype": "bfloat16"}
    assert seen == [((tmp_path / "a", tmp_path / "b"), {"to": "hf", **layout})]
