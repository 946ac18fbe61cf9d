"""A job on a Cloud TPU pod, from the request for its chips to their end.

    python launch/tpu/pod.py --name=glm --zone=us-east5-b --type=v6e-16 --spot create
    python launch/tpu/pod.py --name=glm --zone=us-east5-b --share=10.0.0.2:/runs install
    python launch/tpu/pod.py --name=glm --zone=us-east5-b start -- \\
        --config=configs/chat.py --workdir=/share/chat
    python launch/tpu/pod.py --name=glm --zone=us-east5-b logs      # stop, delete

`create` waits for the chips; `install` brings this checkout (HEAD) to all workers, and mounts the
share; `start` leaves the job running on all of them. `stop` tells one worker, and all stop behind
the same step. `resume` after a preemption, with the flags of all three, asks for the chips anew,
installs and starts; the job goes on from its last checkpoint.

https://cloud.google.com/tpu/docs/queued-resources, /tpu/docs/jax-pods, /tpu/docs/runtimes,
/sdk/gcloud/reference/compute/tpus/queued-resources/create, /filestore/docs/mounting-fileshares
"""

import re
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from absl import flags

from glm_jax.errors import UserError
from launch import door, shell

ROOT = Path(__file__).resolve().parents[2]
NAME = flags.DEFINE_string("name", None, "of the queued resource and of its TPU", required=True)
ZONE = flags.DEFINE_string("zone", None, "of Google Cloud, such as us-east5-b", required=True)
PROJECT = flags.DEFINE_string("project", "", "of Google Cloud; gcloud's own by default")
TYPE = flags.DEFINE_string("type", "", "of the chips: v6e-16, v5p-32, v5litepod-16, v4-32")
SPOT = flags.DEFINE_bool("spot", False, "cheaper chips that may be taken away at any time")
SHARE = flags.DEFINE_string("share", "", "server:/path of an NFS share, mounted as /share")

RUNTIMES = {"v4": "tpu-ubuntu2204-base", "v5litepod": "v2-alpha-tpuv5-lite",
            "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
ARCHIVE = "build/glm-jax.tar.gz"
POLL_SECONDS = 30  # between two looks whether the chips are there
MISSES = 10  # looks in a row that gcloud may fail at
INSTALL = ("tar -xzf glm-jax.tar.gz && curl -LsSf https://astral.sh/uv/install.sh | sh && "
           "cd glm-jax && ~/.local/bin/uv venv --allow-existing --python=3.11 && "
           "~/.local/bin/uv pip install -r requirements.lock -r requirements-tpu.txt")
# A new machine may still be installing by itself; a new Filestore share is writable by root only.
NFS = "sudo apt-get -o DPkg::Lock::Timeout=300 install -y nfs-common"
MOUNT = (f"({NFS} || (sudo apt-get update && {NFS})) && sudo mkdir -p /share && "  # stale lists
         "(mountpoint -q /share || sudo mount -t nfs {} /share) && "
         "(test -w /share || sudo chmod a+rwx /share)")


def gcloud(*words: str) -> tuple[str, ...]:
    place = [f"--zone={ZONE.value}"] + [f"--project={PROJECT.value}"] * bool(PROJECT.value)
    return ("gcloud", "compute", "tpus", *words, *place)


def on(worker: str, command: str) -> tuple[str, ...]:
    return gcloud("tpu-vm", "ssh", NAME.value, f"--worker={worker}", f"--command={command}")


def settled() -> tuple[str, bool]:
    """The state that the request for chips comes to: ACTIVE, FAILED, SUSPENDED or NOT_FOUND.

    And whether it was waited for. gcloud may fail in between; a dry run looks once.

    Raises:
      UserError: when gcloud fails time and again.
    """
    missed, waited = 0, False
    while missed < MISSES:
        now = shell.ask(*gcloud("queued-resources", "describe", NAME.value,
                                "--format=value(state.state)"), absent="NOT_FOUND")
        if now in ("ACTIVE", "FAILED", "SUSPENDED", "NOT_FOUND") or shell.DRY_RUN.value:
            return now, waited
        waited |= bool(now)
        missed = 0 if now else missed + 1
        time.sleep(POLL_SECONDS)
    raise UserError(f"{NAME.value}: gcloud can't say how it is, {MISSES} times in a row; its "
                    "message stands above. It is not deleted: `resume` looks again, `delete` "
                    "ends it")


def check_type() -> str:
    """The kind of `--type`; raises a UserError where it is none."""
    kind, _, size = TYPE.value.partition("-")
    if kind not in RUNTIMES or not re.fullmatch(r"[1-9]\d*", size):
        what = f"--type={TYPE.value}:" if TYPE.value else "--type is missing:"
        raise UserError(f"{what} one of {', '.join(RUNTIMES)} and a size, as in v6e-16")
    return kind


def check_flags() -> None:
    """Raises a UserError for a flag that gcloud or a worker's shell would trip over."""
    shell.check_name(NAME.value)
    for flag in (ZONE, PROJECT):
        if (flag.value or flag is ZONE) and not re.fullmatch(r"\w[-\w.:]*", flag.value, re.ASCII):
            raise UserError(f"--{flag.name}={flag.value}: Google Cloud has no such name; a zone is "
                            "such as us-east5-b, a project such as my-project")
    if SHARE.value and not re.fullmatch(r"[^\s:/]+:/\S*", SHARE.value):
        raise UserError(f"--share={SHARE.value}: server:/path is wanted, such as 10.0.0.2:/runs")


def create() -> None:
    kind = check_type()
    shell.run(*gcloud("queued-resources", "create", NAME.value, f"--node-id={NAME.value}",
                      f"--accelerator-type={TYPE.value}", f"--runtime-version={RUNTIMES[kind]}",
                      *["--spot"] * SPOT.value))
    now, _ = settled()
    if now != "ACTIVE" and not shell.DRY_RUN.value:
        raise UserError(f"{NAME.value}: {now}; `delete` it, and ask again or elsewhere")


def install() -> None:
    if not shell.DRY_RUN.value:
        (ROOT / ARCHIVE).parent.mkdir(exist_ok=True)
    shell.run("git", "-C", str(ROOT), "archive", "--prefix=glm-jax/", f"--output={ARCHIVE}", "HEAD")
    shell.run(*gcloud("tpu-vm", "scp", str(ROOT / ARCHIVE), f"{NAME.value}:", "--worker=all"))
    shell.run(*on("all", INSTALL))
    if SHARE.value:
        shell.run(*on("all", MOUNT.format(shlex.quote(SHARE.value))))


def start(job: list[str]) -> None:
    train = shlex.join([".venv/bin/python", "launch/train.py", "--cluster", *job])
    shell.run(*on("all", f"cd glm-jax && {{ setsid nohup {train} > ~/job.log 2>&1 < /dev/null & "
                         "echo $! > ~/job.pid; }"))


def delete() -> None:
    shell.run(*gcloud("queued-resources", "delete", NAME.value, "--force", "--quiet"))


def resume(job: list[str]) -> None:
    """Chips that were taken away are asked for anew; a request that still waits is waited for."""
    check_type()  # before anything is deleted
    before, waited = settled()
    if before in ("FAILED", "SUSPENDED") or shell.DRY_RUN.value:
        delete()
    if before != "ACTIVE":
        create()
    if before != "ACTIVE" or waited:  # these chips are new
        install()
    start(job)


def main() -> None:
    step, job = shell.step_and_job("create install start logs stop resume delete")
    check_flags()
    if step == "create":
        create()
    elif step == "install":
        install()
    elif step == "start":
        start(job)
    elif step == "logs":
        shell.run(*on("0", "tail -n +1 -F job.log"))
    elif step == "stop":
        shell.run(*on("0", 'kill -TERM "$(cat job.pid)"'))
    elif step == "resume":
        resume(job)
    else:
        delete()


if __name__ == "__main__":
    door.run(main, arguments=True)
