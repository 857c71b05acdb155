"""JSON that carries a digest of itself, so that a change or a cut is noticed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 20


def sealed(content: Mapping[str, Any]) -> str:
    """JSON text of a mapping with a digest of itself in it."""
    return json.dumps({"sha256": digest_of(content), **content}, indent=1)


def unsealed(text: str) -> dict[str, Any]:
    """The content of `sealed`, checked.

    Raises:
        ValueError: it was changed, or cut off.
    """
    content: dict[str, Any] = json.loads(text)
    if not isinstance(content, dict) or content.pop("sha256", None) != digest_of(content):
        raise ValueError("its own checksum does not fit")
    return content


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes, read block by block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def digest_of(content: object) -> str:
    """Digest of plain values; mappings may say what they say in any order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
