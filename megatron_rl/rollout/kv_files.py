"""One trajectory's KV as a file: written when the host budget is spent or the run is stopped, read once, then checked.

    file   = magic, header bytes (uint32), header (JSON), token ids, page versions, births, pages, SHA-256 of all before it
    births = numbers that are equal for equal pages of one writer, so that a prompt shared by a group is put back once

A file appears under its name whole or not at all. It is trusted only after its last byte agreed with its checksum; whoever
reads pages must throw them away when `read_pages` raises. Who is spilled, and when: `kv_store.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from megatron_rl.errors import KVFileError

SUFFIX = ".kv"
_MAGIC = b"MRLKV001"
_LENGTH = struct.Struct("<I")
_MAX_HEADER_BYTES = 1 << 20
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class KVFile:
    """What stands before the pages."""

    trajectory_id: int
    fingerprint: str  # of run, lineage, model, layout and dtype
    writer: str  # one process's store
    slot_bytes: int  # of one page over all layers
    token_ids: np.ndarray  # int32 [tokens]
    versions: np.ndarray  # int32 [pages], oldest weight version in each
    births: np.ndarray  # uint64 [pages]


def write(path: Path, file: KVFile, pages: Iterator[torch.Tensor]) -> int:
    """`pages`: uint8 [some, slot_bytes] each, all of `file` in order. Returns the bytes written; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    digest = hashlib.sha256()
    with partial.open("wb") as f:
        for part in (_head(file), *map(np.ndarray.tobytes, _arrays(file))):
            digest.update(part)
            f.write(part)
        for rows in pages:
            data = rows.reshape(-1).numpy().data
            digest.update(data)
            f.write(data)
        f.write(digest.digest())
        f.flush()
        os.fsync(f.fileno())
        num_bytes = f.tell()
    partial.replace(path)
    return num_bytes


def read_head(path: Path) -> KVFile:
    """Everything but the pages, unchecked. Raises KVFileError where this cannot be a whole file of this format."""
    try:
        with path.open("rb") as f:
            file, _ = _read_head(path, f)
            expected = f.tell() + len(file.versions) * file.slot_bytes + _DIGEST_BYTES
            found = path.stat().st_size
    except OSError as e:
        raise KVFileError(f"{path}: cannot be read ({e.strerror}); its tokens are computed again") from e
    if found != expected:
        raise KVFileError(f"{path}: {found} bytes where {expected} belong; it was cut short, its tokens are computed again")
    return file


def read_pages(path: Path, buffer: torch.Tensor) -> Iterator[int]:
    """Fill `buffer`, uint8 [slots, slot_bytes], from its beginning again and again; yields how many pages stand in it.

    Raises KVFileError at the end where the checksum does not agree."""
    try:
        with path.open("rb") as f:
            file, digest = _read_head(path, f)
            if buffer.shape[1] != file.slot_bytes:
                raise KVFileError(f"{path}: pages of {file.slot_bytes} bytes, this engine's have {buffer.shape[1]}")
            num_left = len(file.versions)
            while num_left:
                rows = buffer[: min(num_left, len(buffer))]
                data = rows.view(-1).numpy().data
                if f.readinto(data) != rows.numel():
                    raise KVFileError(f"{path}: cut short; its tokens are computed again")
                digest.update(data)
                num_left -= len(rows)
                yield len(rows)
            if f.read() != digest.digest():
                raise KVFileError(f"{path}: its checksum does not agree; its tokens are computed again")
    except OSError as e:
        raise KVFileError(f"{path}: cannot be read ({e.strerror}); its tokens are computed again") from e


def _head(file: KVFile) -> bytes:
    header = {
        "trajectory_id": file.trajectory_id,
        "fingerprint": file.fingerprint,
        "writer": file.writer,
        "slot_bytes": file.slot_bytes,
        "num_tokens": len(file.token_ids),
        "num_pages": len(file.versions),
    }
    text = json.dumps(header).encode()
    return _MAGIC + _LENGTH.pack(len(text)) + text


def _arrays(file: KVFile) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return file.token_ids.astype("<i4"), file.versions.astype("<i4"), file.births.astype("<u8")


def _read_head(path: Path, f: BinaryIO) -> tuple[KVFile, hashlib._Hash]:
    """The file stands at its first page afterwards; the digest has seen everything before it."""
    start = f.read(len(_MAGIC) + _LENGTH.size)
    if len(start) < len(_MAGIC) + _LENGTH.size or not start.startswith(_MAGIC):
        raise KVFileError(f"{path}: does not begin like a KV file; its tokens are computed again")
    (num_bytes,) = _LENGTH.unpack(start[len(_MAGIC) :])
    text = f.read(min(num_bytes, _MAX_HEADER_BYTES))
    digest = hashlib.sha256(start + text)
    try:
        header = json.loads(text)
        num_tokens, num_pages = header.pop("num_tokens"), header.pop("num_pages")
        arrays = []
        for dtype, count in (("<i4", num_tokens), ("<i4", num_pages), ("<u8", num_pages)):
            data = f.read(np.dtype(dtype).itemsize * count)
            digest.update(data)
            arrays.append(np.frombuffer(data, dtype, count))
        return KVFile(**header, token_ids=arrays[0], versions=arrays[1], births=arrays[2]), digest
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise KVFileError(f"{path}: its header cannot be read ({e}); its tokens are computed again") from e
