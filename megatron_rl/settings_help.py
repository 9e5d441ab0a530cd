"""The end of `megatron-rl train --help` and of the other commands that read a config file: every setting, from its field.

Refuses nothing and imports nothing heavy: `--help` answers at once.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from megatron_rl import config as configuration

HELP_WIDTH = 130  # where the output is no terminal


def listing(root: type[BaseModel]) -> type[TyperCommand]:
    """A command whose help ends with every setting of its config file."""

    class SettingsCommand(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            console = Console()
            if not console.is_terminal:
                console.width = HELP_WIDTH
            console.print(
                "[bold]Settings[/] of the config file, with units in brackets. [bold]ours[/]: the paper leaves the default open."
            )
            console.print(settings_table(root))

    return SettingsCommand


def settings_table(root: type[BaseModel]) -> Table:
    """Every setting of a kind of run: dotted key, default, `ours`, what it is."""
    table = Table("setting", "default", "", "", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    section = ""
    for key, info in configuration.iter_settings(root):
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            table.add_row(
                Text(f"\n{section}:", style="bold cyan"), "", "", Text(f"\n{root.model_fields[section].description or ''}")
            )
        default = (
            Text("required", style="bold") if info.is_required() else Text(_shown(info.get_default(call_default_factory=True)))
        )
        ours = Text("ours", style="dim") if info.json_schema_extra["ours"] else ""
        table.add_row(Text(f"  {key}"), default, ours, Text(f"{info.description or ''}{_choices(info.annotation)}"))
    return table


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, BaseModel):
        return "{" + ", ".join(f"{name}: {_shown(value)}" for name, value in default) + "}"
    if isinstance(default, tuple):
        return "[" + ", ".join(map(_shown, default)) + "]"
    return str(default)


def _choices(annotation: Any) -> str:
    names = [name for name in getattr(annotation, "__args__", ()) if isinstance(name, str)]
    return f" ({' | '.join(names)})" if names else ""
