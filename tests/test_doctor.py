import sys
from importlib import metadata

import pytest

from megatron_rl import cli, doctor
from megatron_rl.doctor import State, examine
from megatron_rl.file_system import NETWORK_KINDS, file_system_kind, network_advice

CONFIG = """
run: {folder: FOLDER/run, iterations: 1}
model: {folder: FOLDER/model}
data: {source: jsonl, path: FOLDER/prompts.jsonl}
rollout: {groups_per_iteration: 1, token_budget: 8, max_response_tokens: 16}
"""


def by_name(findings):
    return {f.name: f for f in findings}


@pytest.fixture
def without(monkeypatch):
    """`without(name)`: that package's metadata are gone; `without(name, version)`: another version is there."""
    real = metadata.version

    def hide(name, version=None):
        def look(asked):
            if asked != name:
                return real(asked)
            if version is None:
                raise metadata.PackageNotFoundError(asked)
            return version

        monkeypatch.setattr(doctor.metadata, "version", look)

    return hide


def test_every_requirement_of_the_package_has_a_finding():
    names = {r.name for r in doctor._requirements()}
    assert {"torch", "megatron-core", "transformers", "math-verify", "reasoning-gym"} <= names
    assert "pytest" not in names, "the extras are not required"
    assert names <= set(by_name(examine()))


def test_where_the_tests_run_nothing_is_missing():
    assert [f for f in examine() if f.state is State.MISSING] == []


def test_a_missing_package_is_named_with_its_remedy_and_ends_in_exit_code_1(without, monkeypatch, capsys):
    without("math-verify")
    found = by_name(examine())["math-verify"]
    assert found.state is State.MISSING and found.remedy.startswith("pip install 'math-verify>=")
    monkeypatch.setattr(sys, "argv", ["megatron-rl", "doctor"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    assert "missing" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "version"), [("megatron-core", "0.17.0"), ("torch", "2.10.1"), ("torch", "2.14.0")])
def test_a_version_outside_the_supported_range_is_missing(without, name, version):
    without(name, version)
    found = by_name(examine())[name]
    assert found.state is State.MISSING and version in found.found and "outside" in found.found


def test_a_local_build_of_a_supported_torch_is_supported(without):
    without("torch", "2.12.1+cu130")
    assert by_name(examine())["torch"].state is not State.MISSING


def test_more_threads_than_cores_is_advice(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    found = by_name(examine())["threads"]
    assert found.state is State.ADVICE and "unset OMP_NUM_THREADS" in found.remedy


def test_a_broken_config_is_a_finding_like_any_other(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {}")
    found = by_name(examine(tmp_path / "config.yaml"))["config"]
    assert found.state is State.MISSING and "run.folder: required" in found.remedy


def test_of_a_config_the_model_prompts_and_rewards_are_looked_at_each_on_its_own(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    findings = by_name(examine(tmp_path / "config.yaml", ["rewards.terms=[{name: exakt}]"]))
    assert findings["config"].state is State.OK
    assert "config.json is missing" in findings["model"].remedy
    assert findings["prompts"].state is State.MISSING
    assert "the nearest is exact" in findings["rewards"].remedy


def test_a_good_config_has_only_good_findings(tmp_path, make_model):
    make_model(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    (tmp_path / "config.yaml").write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    findings = by_name(examine(tmp_path / "config.yaml", ["data.max_prompt_tokens=64"]))
    assert [findings[name].state for name in ("config", "model", "prompts", "rewards")] == [State.OK] * 4
    assert findings["prompts"].found == "1 to train on, 0 held out"


def test_the_kind_of_file_system_is_that_of_the_nearest_mount(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda / ext4 rw 0 0\nhost:/home /home nfs4 rw 0 0\n/dev/sdb /home/local xfs rw 0 0\n"
        "pool /with\\040space lustre rw 0 0\nold /twice ext4 rw 0 0\nnew /twice tmpfs rw 0 0\n"
    )
    kinds = {
        "/tmp/run": "ext4",
        "/homestead": "ext4",
        "/home/me/run": "nfs4",
        "/home/local/run": "xfs",
        "/with space/run": "lustre",
        "/twice/run": "tmpfs",
    }
    assert {path: file_system_kind(path, mounts) for path in kinds} == kinds
    assert file_system_kind("/tmp", tmp_path / "nowhere") is None
    assert {"nfs4", "lustre"} <= NETWORK_KINDS and not {"ext4", "xfs", "tmpfs", "overlay"} & NETWORK_KINDS


def test_a_buffer_on_a_network_file_system_is_advised_to_move(monkeypatch, tmp_path):
    monkeypatch.setattr("megatron_rl.file_system.file_system_kind", lambda path: "nfs4")
    assert "set buffer.path to a node-local disk" in (network_advice(tmp_path) or "")
    findings = by_name(doctor.storage(tmp_path, None))
    assert findings["file system"].state is State.ADVICE


def test_a_full_disk_is_advice(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "LEAST_DISK_BYTES", 1 << 60)
    found = by_name(doctor.storage(tmp_path, None))["disk"]
    assert found.state is State.ADVICE and "run.keep_checkpoints" in found.remedy
