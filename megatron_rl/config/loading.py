"""From a YAML file and overrides to a frozen configuration of any kind, and back to YAML."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_rl.config.checks import check
from megatron_rl.config.sections import Config
from megatron_rl.config.shared import Section
from megatron_rl.config.supervised import SupervisedConfig, check_supervised
from megatron_rl.errors import ConfigError

Supervised = TypeVar("Supervised", bound=SupervisedConfig)
Root = TypeVar("Root", bound=BaseModel)


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply overrides `section.key=value` (values are YAML), check everything, freeze.

    Raises ConfigError naming the key, what was found and the remedy."""
    config = _read(Config, Path(path), overrides)
    check(config)
    return config


def load_supervised(root: type[Supervised], path: str | Path, overrides: list[str] | None = None) -> Supervised:
    """The same for `SFTConfig` or `DPOConfig`."""
    config = _read(root, Path(path), overrides)
    check_supervised(config)
    return config


def _read(root: type[Root], path: Path, overrides: list[str] | None) -> Root:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{path}: cannot read the config file: {e.strerror}") from e
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {e}") from e
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `run:` and `model:`, found {type(tree).__name__}")
    for override in overrides or []:
        _override(tree, override)
    try:
        return root.model_validate(tree)
    except ValidationError as e:
        raise ConfigError(f"{path}: " + "; ".join(_explain(root, dict(error)) for error in e.errors())) from e


def load_bare(model_folder: Path, overrides: list[str] | None = None) -> Config:
    """The settings for evaluating a model folder without a config file: `bare_model.yaml`, then overrides."""
    own = f"model.folder={json.dumps(str(model_folder))}"
    return load(Path(__file__).with_name("bare_model.yaml"), [own, *(overrides or [])])


def dump(config: BaseModel) -> str:
    """The resolved configuration as YAML that reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value")
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {section} is not a section")
        node = child
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise ConfigError(f"override {override!r}: {value!r} is not a YAML value: {e}") from e


def _explain(root: type[BaseModel], error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(where, [*root.model_fields, *known_keys(root)], n=1, cutoff=0.0)
        return f"{where}: no such setting; the nearest is {nearest[0]}"
    if error["type"] == "missing":
        return f"{where}: required and not set"
    return f"{where}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def known_keys(root: type[BaseModel] = Config) -> list[str]:
    """All dotted settings, in the order of the file."""
    return [key for key, _ in iter_settings(root)]


def iter_settings(section: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, pydantic FieldInfo) of every leaf setting."""
    leaves: list[tuple[str, Any]] = []
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            leaves += iter_settings(kind, f"{prefix}{name}.")
        else:
            leaves.append((prefix + name, info))
    return leaves
