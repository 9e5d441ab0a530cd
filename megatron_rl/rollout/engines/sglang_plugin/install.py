"""A folder that makes SGLang find the plugin: an entry point, its settings, and room for the sockets.

    <folder>/megatron_rl_kv-1.dist-info/   METADATA, entry_points.txt, settings.json
    <folder>/<rank>.sock                   one of each scheduler process, made by it

It lies in the system's temporary folder, since the path of a Unix socket is limited to 107 bytes. Who reads it: `plugin.py`.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import distribution
from pathlib import Path

from megatron_rl.kernels.kv_pages import Scheme

_NAME = "megatron_rl_kv"
_METADATA = f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: 1\n"
_ENTRY_POINT = f"[sglang.srt.plugins]\n{_NAME} = megatron_rl.rollout.engines.sglang_plugin:register\n"


@dataclass(frozen=True)
class PluginSettings:
    folder: str  # of the sockets
    host_bytes: int  # of all ranks of the server together
    compression: Scheme


def install(host_bytes: int, compression: Scheme) -> Path:
    """A new folder, to be put before the server's PYTHONPATH, and to be removed after its end."""
    folder = Path(tempfile.mkdtemp(prefix="mrl-kv-"))
    found = folder / f"{_NAME}-1.dist-info"
    found.mkdir()
    (found / "METADATA").write_text(_METADATA)
    (found / "entry_points.txt").write_text(_ENTRY_POINT)
    (found / "settings.json").write_text(json.dumps(asdict(PluginSettings(str(folder), host_bytes, compression))))
    return folder


def read_settings() -> PluginSettings:
    """In a process of the server."""
    text = distribution(_NAME).read_text("settings.json")
    assert text is not None, "written together with the entry point"
    return PluginSettings(**json.loads(text))


def socket_path(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.sock"
