"""A job on a TPU slice of Google Kubernetes Engine, as a JobSet.

    python launch/gke/jobset.py --name=glm --image=REGISTRY/glm-jax build
    python launch/gke/jobset.py --name=glm --image=REGISTRY/glm-jax --tpu=v6e --topology=4x4 \\
        --claim=runs start -- --config=configs/chat.py --workdir=/share/chat
    python launch/gke/jobset.py --name=glm logs      # delete

`--claim` is a PersistentVolumeClaim (ReadWriteMany, such as Filestore's) that all hosts see as
/share. After a preemption or a crash Kubernetes starts all hosts again, `--restarts` times, and the
job goes on from its last checkpoint; not after a mistake that a user can mend (exit code 2).
`delete` lets it save first.

https://jobset.sigs.k8s.io/docs/concepts (JobSet, its failure policy),
https://cloud.google.com/kubernetes-engine/docs/tutorials/tpu-multislice-kueue (labels of nodes)
"""

import json
import math
import re
import sys
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from absl import flags

from glm_jax.errors import UserError
from glm_jax.train.chips import is_slice, sides_of, slices_of
from launch import door, shell

ROOT = Path(__file__).resolve().parents[2]
NAME = flags.DEFINE_string("name", None, "of the JobSet", required=True)
IMAGE = flags.DEFINE_string("image", "", "the container image, built from the Dockerfile here")
TPU = flags.DEFINE_enum("tpu", "v6e", ["v4", "v5e", "v5p", "v6e"], "the kind of chip")
TOPOLOGY = flags.DEFINE_string("topology", "", "of a slice, such as 4x4 or 2x2x4")
HOST_CHIPS = flags.DEFINE_integer("host_chips", 4, "chips of a host", lower_bound=1)
SLICES = flags.DEFINE_integer("slices", 1, "how many slices", lower_bound=1)
CLAIM = flags.DEFINE_string("claim", "", "the PersistentVolumeClaim that is /share")
RESTARTS = flags.DEFINE_integer("restarts", 20, "how often the job may start again", lower_bound=0)
SPOT = flags.DEFINE_bool("spot", False, "on nodes that may be taken away at any time")

ACCELERATORS = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice",
                "v6e": "tpu-v6e-slice"}


def check_slice(kind: str, shape: str) -> list[int]:
    """The sides of a slice that there is; raises a UserError for another."""
    sides = [int(side) for side in re.findall(r"[1-9]\d*", shape)]
    count = sides_of(kind)
    if not re.fullmatch("x".join([r"[1-9]\d*"] * count), shape):
        raise UserError(f"--topology={shape}: a slice of --tpu={kind} has {count} sides, such as "
                        f"{'x'.join('4' * count)}")
    if not is_slice(kind, shape):
        raise UserError(f"--topology={shape}: the slices of --tpu={kind} are {slices_of(kind)}")
    return sides


def manifest(job: list[str]) -> str:
    """jobset.yaml, filled."""
    sides = check_slice(TPU.value, TOPOLOGY.value)
    chips = math.prod(sides)
    if chips % HOST_CHIPS.value:
        raise UserError(f"--topology={TOPOLOGY.value}: {chips} in all, no multiple of "
                        f"--host-chips={HOST_CHIPS.value}")
    if not CLAIM.value:
        raise UserError("--claim is wanted: all hosts share the run folder")
    template = Template(Path(__file__).with_name("jobset.yaml").read_text(encoding="utf-8"))
    spot = {"cloud.google.com/gke-spot": "true"} if SPOT.value else {}
    words = ["python", "launch/train.py", "--cluster", *job]
    return template.substitute(
        name=NAME.value, image=json.dumps(image()), claim=json.dumps(CLAIM.value),
        restarts=RESTARTS.value, slices=SLICES.value, hosts=chips // HOST_CHIPS.value,
        chips=HOST_CHIPS.value,
        # Kubernetes fills in $(NAME), and makes one dollar of two.
        command=json.dumps([word.replace("$", "$$") for word in words], ensure_ascii=False),
        nodes=json.dumps({"cloud.google.com/gke-tpu-accelerator": ACCELERATORS[TPU.value],
                          "cloud.google.com/gke-tpu-topology": TOPOLOGY.value} | spot))


def image() -> str:
    if not IMAGE.value:
        raise UserError("--image is wanted: where the container image lies")
    return IMAGE.value


def main() -> None:
    step, job = shell.step_and_job("build start logs delete")
    shell.check_name(NAME.value)
    if step == "build":
        shell.run("docker", "build", f"--file={ROOT / 'launch/gke/Dockerfile'}",
                  f"--tag={image()}", str(ROOT))
        shell.run("docker", "push", image())
    elif step == "start":
        shell.run("kubectl", "apply", "--filename=-", stdin=manifest(job))
    elif step == "logs":
        shell.run("kubectl", "logs", "--follow", "--tail=-1", "--container=train",
                  f"--selector=jobset.sigs.k8s.io/jobset-name={NAME.value},"
                  "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0")
    else:
        shell.run("kubectl", "delete", "jobset", NAME.value)


if __name__ == "__main__":
    door.run(main, arguments=True)
