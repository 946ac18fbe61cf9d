"""Doors as a user's shell starts them, but forked from one process that has imported all."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]

# Reads a JSON line, a list of {"argv", "folder", "cwd", "limit", "devices"}; answers with a list of
# processes and, when all have ended, with one of their statuses. No backend of JAX is started
# before the fork: each door starts its own, with so many simulated devices (0: as it is).
SERVER = """
import json, os, resource, runpy, sys, traceback
import jax, glm_jax.train.loop, glm_jax.train.load
def start(job):
    child = os.fork()
    if not child:
        for number, name, how in ((0, "in", os.O_RDONLY), (1, "out", os.O_CREAT | os.O_WRONLY),
                                  (2, "err", os.O_CREAT | os.O_WRONLY)):
            os.dup2(os.open(os.path.join(job["folder"], name), how), number)
        sys.stdin = open(0, closefd=False)
        os.chdir(job["cwd"])
        if job["limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
        if job["devices"]:
            jax.config.update("jax_num_cpu_devices", job["devices"])
        sys.argv, code = job["argv"], 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    return child
for line in sys.stdin:
    children = list(map(start, json.loads(line)))
    print(json.dumps(children), flush=True)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(ends), flush=True)
"""


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[subprocess.Popen]:
    clouds = tmp_path_factory.mktemp("clouds")  # no door of a test reaches one
    for name in ("gcloud", "kubectl", "docker", "sbatch"):
        (clouds / name).write_text("#!/bin/sh\necho a test must not run this >&2; exit 97\n")
        (clouds / name).chmod(0o755)
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "JAX_PLATFORMS": "cpu",
                        "TF_CPP_MIN_LOG_LEVEL": "2",  # as a door sets it, ahead of jax
                        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                        "PATH": f"{clouds}:{os.environ['PATH']}",
                        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # a door forks, no new start
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, env=env,
                          stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        yield process
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def doors(server, tmp_path) -> Callable[..., list[SimpleNamespace]]:
    """`doors(("train", "--config=…"), …)`: several, which run at the same time."""
    def run(*each: Sequence[str], stdin: bytes = b"", cwd: Path = ROOT, limit: int = 0,
            devices: int = 0, meanwhile: Callable[[list[int]], None] = lambda pids: None
            ) -> list[SimpleNamespace]:
        jobs = []
        for name, *arguments in each:
            folder = tmp_path / f"door{len(list(tmp_path.glob('door*')))}"
            folder.mkdir()
            (folder / "in").write_bytes(stdin)
            argv = [str(ROOT / "launch" / f"{name}.py"), *map(str, arguments)]
            jobs.append({"argv": argv, "folder": str(folder), "cwd": str(cwd), "limit": limit,
                         "devices": devices})
        server.stdin.write(json.dumps(jobs) + "\n")
        server.stdin.flush()
        meanwhile(json.loads(server.stdout.readline()))
        return [SimpleNamespace(code=code, out=(folder / "out").read_text(),
                                err=(folder / "err").read_text())
                for code, folder in zip(json.loads(server.stdout.readline()),
                                        (Path(job["folder"]) for job in jobs), strict=True)]
    return run


@pytest.fixture
def door(doors) -> Callable[..., SimpleNamespace]:
    """`door("train", "--config=…", stdin=b"")`: its `code`, `out` and `err`.

    `meanwhile` is called with the process; no file may grow beyond `limit` bytes.
    """
    def run(*arguments: str, meanwhile: Callable[[int], None] = lambda pid: None,
            **how) -> SimpleNamespace:
        return doors(arguments, meanwhile=lambda pids: meanwhile(pids[0]), **how)[0]
    return run


@pytest.fixture
def pod(doors) -> Callable[..., list[SimpleNamespace]]:
    """`pod(2, "train", …)`: as `door`, in so many processes that are one job.

    `own` are further arguments of each; `meanwhile` is called with all of them.
    """
    def run(processes: int, *arguments: str, own: Sequence[Sequence[str]] | None = None, **how
            ) -> list[SimpleNamespace]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return doors(*((*arguments, f"--coordinator=127.0.0.1:{port}", f"--processes={processes}",
                        f"--process={number}", *(own[number] if own else ()))
                       for number in range(processes)), **how)
    return run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mesh") / "run"


@pytest.fixture
def trained(run_folder, door, base, reviews):
    """A run on two devices, split over `fsdp`."""
    if not run_folder.exists():
        done = door("train", "--config=configs/sentiment.py:smoke", f"--config.model.path={base}",
                    f"--config.task.train={reviews}", "--config.steps=4", "--config.eval.every=2",
                    "--config.checkpoint.every=2", "--config.mesh.cpu_devices=2",
                    "--config.mesh.fsdp=2", f"--workdir={run_folder}")
        assert done.code == 0, done.err
    return run_folder


@pytest.fixture
def refused(door) -> Callable[..., str]:
    """Runs a door that must refuse; its message: one line, no traceback, exit code 2."""
    def run(*arguments: str, **how) -> str:
        result = door(*arguments, **how)
        lines = result.err.strip().splitlines()
        assert result.code == 2, (result.code, result.out, result.err)
        assert len(lines) == 1 and lines[0].startswith("error: "), result.err
        assert result.out == "", result.out
        return lines[0]
    return run
