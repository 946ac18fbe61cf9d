"""Fetching pinned archives: real pip on a local folder, the cache, hashes and member reading."""

import hashlib
import io
import os
import tarfile
import zipfile
from types import SimpleNamespace

import pytest

from glm_jax.data.fetch import Archive, cache_folder, fetch, member, members
from glm_jax.errors import UserError


def wheel_bytes(name: str = "tinypkg", version: str = "1.0") -> bytes:
    """A wheel that holds one data file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr(f"{name}/rows.txt", "你好\n")
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA",
                       f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL",
                       "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """pip sees only one local folder, and the cache is empty."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("GLM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def archive(content: bytes, registry: str = "pypi") -> Archive:
    sha256 = hashlib.sha256(content).hexdigest()
    return Archive(registry, "tinypkg", "1.0", "tinypkg-1.0-py3-none-any.whl", sha256)


def test_pip_fetches_once_and_the_cache_serves_afterwards(registry):
    content = wheel_bytes()
    (registry / "tinypkg-1.0-py3-none-any.whl").write_bytes(content)
    path = fetch(archive(content))
    assert path.read_bytes() == content
    assert path.parent == cache_folder()
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written beside it
    (registry / "tinypkg-1.0-py3-none-any.whl").unlink()
    assert fetch(archive(content)) == path


def test_a_changed_file_of_the_registry_is_refused(registry):
    (registry / "tinypkg-1.0-py3-none-any.whl").write_bytes(wheel_bytes() + b"more")
    with pytest.raises(UserError, match=r"can't fetch tinypkg 1\.0"):
        fetch(archive(wheel_bytes()))
    assert not list(cache_folder().iterdir())


def test_a_damaged_cached_file_names_both_hashes(registry):
    wanted = archive(b"right")
    cache_folder().mkdir(parents=True)
    path = cache_folder() / wanted.filename
    path.write_bytes(b"wrong")
    with pytest.raises(UserError) as error:
        fetch(wanted)
    for part in (wanted.sha256, hashlib.sha256(b"wrong").hexdigest(), str(path), "delete"):
        assert part in str(error.value)


def test_no_network_says_what_failed_and_where_to_put_the_file(registry):
    wanted = archive(b"absent")
    with pytest.raises(UserError) as error:
        fetch(wanted)
    message = str(error.value)
    for part in ("tinypkg 1.0", "pip download", str(cache_folder() / wanted.filename),
                 wanted.sha256):
        assert part in message
    assert "\n" not in message


def test_what_pip_says_is_its_error_not_its_tries(registry, monkeypatch):
    said = ("WARNING: Retrying (Retry(total=1)) after connection broken by 'NewConnectionError'\n"
            "ERROR: No matching distribution found for tinypkg==1.0\n"
            "WARNING: There was an error checking the latest version of pip")
    monkeypatch.setattr("glm_jax.data.fetch.subprocess.run", lambda *a, **how: SimpleNamespace(
        returncode=1, stderr=said, stdout=""))
    with pytest.raises(UserError, match="failed: ERROR: No matching distribution found for tinypk"):
        fetch(archive(b"absent"))


def test_a_missing_client_is_named(registry, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="npm is not installed"):
        fetch(archive(b"absent", "npm"))


def test_no_space_is_a_clear_error(registry, monkeypatch):
    content = wheel_bytes()
    (registry / "tinypkg-1.0-py3-none-any.whl").write_bytes(content)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glm_jax.data.fetch.os.replace", full)
    with pytest.raises(UserError, match=r"No space left on device.*GLM_JAX_CACHE"):
        fetch(archive(content))
    assert not list(cache_folder().iterdir())


def tar_bytes(mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in (("./usr/a.txt", b"one"), ("./usr/b.bin", b"two")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def ar_entry(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
    return header + content + b"\n" * (len(content) % 2)


@pytest.mark.parametrize("kind", ["whl", "tgz", "deb"])
def test_members_are_read_out_of_each_kind_of_archive(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    if kind == "whl":
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("usr/a.txt", "one")
            packed.writestr("usr/b.bin", "two")
    elif kind == "tgz":
        path.write_bytes(tar_bytes("w:gz"))
    else:
        path.write_bytes(b"!<arch>\n" + ar_entry("debian-binary", b"2.0") +
                         ar_entry("control.tar.xz", b"odd") +
                         ar_entry("data.tar.xz", tar_bytes("w:xz")))
    assert [content for _, content in members(path, "*/usr/*.txt" if kind != "whl" else "*.txt")
            ] == [b"one"]
    assert member(path, "*b.bin") == b"two"
    with pytest.raises(UserError, match="2 files fit"):
        member(path, "*usr/*")
