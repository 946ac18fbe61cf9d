"""Commands of other programs: each is printed as a shell takes it, and run unless `--dry-run`."""

import re
import shlex
import subprocess
import sys

from absl import flags

from glm_jax.errors import UserError
from launch import door

DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the exact commands and run none of them",
                            module_name=door.__name__)  # --help shows it beside the door's own


def run(*command: str, stdin: str = "") -> None:
    """Runs a command, which reads `stdin`.

    Raises:
      UserError: when it ends with an error, which it has told itself.
    """
    _show(command, stdin)
    if not DRY_RUN.value and (code := subprocess.run(
            command, input=stdin or None, text=True).returncode):
        raise UserError(f"{command[0]} ended with exit code {code}; its message stands above")


def ask(*command: str, absent: str) -> str:
    """The output of a command that changes nothing; "" in a dry run, and where it fails.

    A failure that tells of `absent` (what is asked about is not there) is that word instead.
    """
    _show(command)
    if DRY_RUN.value:
        return ""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and absent in done.stderr:
        return absent
    print(done.stderr, end="", file=sys.stderr, flush=True)
    return "" if done.returncode else done.stdout.strip()


def _show(command: tuple[str, ...], stdin: str = "") -> None:
    print(shlex.join(command), end=" <<'EOF'\n" if stdin else "\n", flush=True)
    if stdin:
        print(f"{stdin}EOF", flush=True)


def check_name(name: str) -> None:
    """Raises a UserError for what neither Google Cloud nor Kubernetes takes as a name."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise UserError(f"--name={name}: at most 40 of a-z, 0-9 and -, from a letter on")


def step_and_job(known: str) -> tuple[str, list[str]]:
    """What to do (one of the words of `known`), and what stands behind it: the job's arguments.

    Raises:
      UserError: for another word, and for a start that names no config or no run folder.
    """
    step, *job = door.arguments() or [""]
    if step not in known.split():
        raise UserError(f"{step!r} is no step; the steps are {', '.join(known.split())}, behind "
                        "the flags")
    if step in ("start", "resume"):
        for flag in ("--config", "--workdir"):
            if not any(word == flag or word.startswith(flag + "=") for word in job):
                raise UserError(f"{step} wants the arguments of launch/train.py behind a --, with "
                                f"{flag}=… among them")
    elif job:
        raise UserError(f"{step} takes no argument {job[0]!r}")
    return step, job
