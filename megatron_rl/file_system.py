"""What kind of file system a path lies on, because SQLite's write-ahead log needs a local one.

It only looks; what to do about it is said by `doctor.py` and at the start of a run.
"""

from __future__ import annotations

from pathlib import Path

# Shared between machines: their locks and memory maps do not hold what SQLite's write-ahead log asks of them.
NETWORK_KINDS = frozenset(
    ["nfs", "nfs4", "lustre", "cifs", "smb3", "smbfs", "ceph", "beegfs", "gpfs", "afs", "9p", "orangefs", "pvfs2", "wekafs"]
    + [f"fuse.{name}" for name in ("sshfs", "glusterfs", "juicefs", "s3fs", "gcsfuse", "ceph", "beegfs")]
)


def file_system_kind(path: str | Path, mounts: str | Path = "/proc/mounts") -> str | None:
    """Kind of the file system that holds `path`, or will when it is made, e.g. `ext4`. None where `mounts` is missing."""
    try:
        table = Path(mounts).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # no Linux
        return None
    resolved = Path(path).resolve()
    best, kind = -1, None
    for line in table.splitlines():
        _, point, found, *_ = line.split()
        point = point.replace("\\040", " ")  # the table writes a space as an octal escape
        if resolved.is_relative_to(point) and len(point) >= best:  # of equal points the later mount hides the earlier
            best, kind = len(point), found
    return kind


def network_advice(path: str | Path) -> str | None:
    """What to change when `path`, a replay buffer, would lie on a network file system; None when it does not."""
    kind = file_system_kind(path)
    if kind not in NETWORK_KINDS:
        return None
    return f"{path} is on {kind}, a network file system, which SQLite cannot rely on: set buffer.path to a node-local disk"
