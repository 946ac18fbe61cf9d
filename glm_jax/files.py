"""Files: small ones are written whole, so that no reader sees a half; hashes; a folder's lock."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from glm_jax.errors import UserError


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity as None, at any depth: JSON has neither."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_text_atomic(path: str | Path, text: str) -> None:
    """Writes `text` as UTF-8, replacing `path` only when every byte is on the disk."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself lasts only when the folder is on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON with sorted keys, so that equal values give equal bytes."""
    text = json.dumps(finite(value), ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False)
    write_text_atomic(path, text + "\n")


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_sha256(path: str | Path, blocks: int = 64, size: int = 2**16) -> str:
    """The SHA-256 of a file's size and of so many blocks of it, spread evenly.

    It tells files that are not one another's copies apart, without reading all of a large one.
    """
    total, found = os.path.getsize(path), hashlib.sha256()
    found.update(str(total).encode())
    with open(path, "rb") as file:
        for block in range(blocks):
            file.seek(max(total - size, 0) * block // (blocks - 1))
            found.update(file.read(size))
    return found.hexdigest()


def sha256_of_all(paths: Iterable[str | Path], digest: Callable[[Path], str] = sha256) -> str:
    """One SHA-256 for several files: that of theirs, one after another."""
    return hashlib.sha256(b"".join(bytes.fromhex(digest(Path(path))) for path in paths)).hexdigest()


def resolve(path: str | Path) -> Path:
    """A path from the current directory or, where nothing lies there, from the project's root."""
    inside = Path(__file__).parents[1] / path
    return inside if inside.exists() and not Path(path).exists() else Path(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within: no other process of this machine may be in here. The lock ends with the process.

    Raises:
      UserError: when one is.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder}: another process is training in this folder; wait until it has "
                        "ended, or name another --workdir") from None
    except OSError:
        pass  # a network file system that knows no locks
    try:
        yield
    finally:
        os.close(descriptor)
