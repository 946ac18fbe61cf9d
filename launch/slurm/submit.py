"""A job of several nodes under Slurm: one process a GPU, or one a node where there are none.

    python launch/slurm/submit.py --name=glm --nodes=4 --gpus=8 --time=24:00:00 start -- \\
        --config=configs/chat.py --workdir=runs/chat

Run where the job shall run, in a folder that all nodes share, with its environment in .venv.
Partition and account: $SBATCH_PARTITION, $SBATCH_ACCOUNT. Two minutes before its time is over, or
when it is preempted, the job saves; it is queued again and goes on. `scancel` ends it.

https://slurm.schedmd.com/sbatch.html, https://slurm.schedmd.com/srun.html
"""

import re
import shlex
import sys
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from absl import flags

from glm_jax.errors import UserError
from launch import door, shell

NAME = flags.DEFINE_string("name", None, "of the job", required=True)
NODES = flags.DEFINE_integer("nodes", 1, "how many nodes", lower_bound=1)
GPUS = flags.DEFINE_integer("gpus", 0, "GPUs of a node; 0: one process a node, on its CPUs",
                            lower_bound=0)
CPUS = flags.DEFINE_integer("cpus", 8, "CPUs of a process", lower_bound=1)
TIME = flags.DEFINE_string("time", "24:00:00", "at most, until it is queued again")


def script(job: list[str]) -> str:
    """job.sbatch, filled."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", TIME.value) or not re.search("[1-9]", TIME.value):
        raise UserError(f"--time={TIME.value}: minutes, hours:minutes:seconds or days-hours, above "
                        "0")
    if not re.fullmatch(r"\w[\w.-]*", NAME.value):
        raise UserError(f"--name={NAME.value}: letters, digits, '_', '.' and '-', no '-' or '.' "
                        "in front")
    template = Template(Path(__file__).with_name("job.sbatch").read_text(encoding="utf-8"))
    return template.safe_substitute(
        name=NAME.value, nodes=NODES.value, tasks=GPUS.value or 1, cpus=CPUS.value,
        time=TIME.value, gpus=f"\n#SBATCH --gres=gpu:{GPUS.value}" if GPUS.value else "",
        job=shlex.join(job))


def main() -> None:
    _, job = shell.step_and_job("start")
    shell.run("sbatch", stdin=script(job))


if __name__ == "__main__":
    door.run(main, arguments=True)
