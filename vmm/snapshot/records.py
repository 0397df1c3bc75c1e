"""The record file of a snapshot: one plain value, its format's version, and a digest over all of it."""

from __future__ import annotations

from typing import Any

from vmm.errors import SnapshotError
from vmm.snapshot import cbor

MAGIC = b"PYVMMSNP"
VERSION = 2
VERSIONS = (1, VERSION)  # in version 1 a differential's parent had a path, which is ignored
SIZE_MAX = 1 << 30  # bytes: a TiB of memory has 96 MiB of bitmap and checksums
_HEADER = 8 + 4 + 8
_DIGEST = 32


def digest(content: bytes) -> bytes:
    """BLAKE2b-256."""
    from hashlib import blake2b

    return blake2b(content, digest_size=_DIGEST).digest()


def pack(records: dict[str, Any]) -> bytes:
    """Return the content of a record file; its last 32 bytes are its digest. Raises ``ValueError`` for other values."""
    payload = cbor.encode(records)
    content = MAGIC + VERSION.to_bytes(4, "little") + len(payload).to_bytes(8, "little") + payload
    return content + digest(content)


def unpack(path: str, content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return records and digest of a record file. Raises :class:`~vmm.errors.SnapshotError` naming ``path``."""
    if content[: len(MAGIC)] != MAGIC:
        raise SnapshotError(f"{path} is not a record file of a snapshot: give the directory pyvmm wrote")
    version = int.from_bytes(content[8:12], "little")
    if version not in VERSIONS:
        raise SnapshotError(
            f"{path} is of format version {version}, and this pyvmm reads 1 and {VERSION}: take one that does"
        )
    size = int.from_bytes(content[12:_HEADER], "little")
    if len(content) != _HEADER + size + _DIGEST or digest(content[:-_DIGEST]) != content[-_DIGEST:]:
        raise SnapshotError(f"{path} is damaged: take another snapshot")
    try:
        records = cbor.decode(content[_HEADER:-_DIGEST])
    except ValueError as error:
        raise SnapshotError(f"{path} holds no records ({error}): take another snapshot") from None
    if not isinstance(records, dict):
        raise SnapshotError(f"{path} holds no records: take another snapshot")
    return records, content[-_DIGEST:]
