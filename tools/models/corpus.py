"""Byte corpora of Python source: what may be trained on, and what is held out for the evaluation.

A file is held out by its name alone, so the same rule holds for every Python version and on every machine, and the
standard library of the running interpreter always contains text that no model here has seen.
"""

from __future__ import annotations

import hashlib
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

SEPARATOR = b"\0"  # between files; also the models' begin and end token
MIN_FILE_BYTES, MAX_FILE_BYTES = 400, 300_000  # shorter says nothing; longer is mostly generated tables


def is_held_out(path: Path) -> bool:
    """True for the sixteenth of all file names that no model is trained on."""
    return zlib.crc32(path.name.encode()) % 16 == 0


def source_files(roots: Iterable[Path]) -> Iterator[tuple[Path, bytes]]:
    """Each distinct UTF-8 Python file below the roots, in a fixed order."""
    seen = set()
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            try:
                content = path.read_bytes()
                content.decode()
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.sha256(content).digest()
            if MIN_FILE_BYTES <= len(content) <= MAX_FILE_BYTES and digest not in seen:
                seen.add(digest)
                yield path, content


def training_corpus(roots: Iterable[Path]) -> bytes:
    """All training files, each followed by the separator."""
    return b"".join(content + SEPARATOR for path, content in source_files(roots) if not is_held_out(path))


def held_out_texts(count: int, length: int) -> list[tuple[str, bytes]]:
    """`count` passages of `length` bytes, each the beginning of another held-out file of the standard library.

    Library modules come first, the longest at the head; then the interpreter's own tests, which repeat themselves.
    """
    root = Path(sysconfig.get_path("stdlib"))
    candidates = [
        (path.relative_to(root), content)
        for path, content in source_files([root])
        if is_held_out(path) and len(content) >= length - 1 and "site-packages" not in path.parts
    ]
    candidates.sort(key=lambda entry: (any("test" in part for part in entry[0].parts), -len(entry[1]), str(entry[0])))
    if len(candidates) < count:
        raise ValueError(
            f"held_out_texts: the standard library at {root} must have {count} held-out files of {length} bytes, "
            f"got {len(candidates)}"
        )
    return [(str(name), (SEPARATOR + content)[:length]) for name, content in candidates[:count]]
