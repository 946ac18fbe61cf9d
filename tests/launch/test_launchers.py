"""Launchers of Cloud TPU, GKE and Slurm: the commands that a dry run shows, and what these do here.

No cloud is asked: what a worker's shell gets is run in a folder of this machine, in which a script
stands in for Python, and for `srun`.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch

import pytest
import yaml

from tests.launch.conftest import ROOT

POD = ("tpu/pod", "--name=glm", "--zone=us-east5-b")
SSH = "gcloud compute tpus tpu-vm ssh glm --worker={} "
JOB = ("--", "--config=configs/chat.py", "--workdir=/share/my runs",
       "--config.task.text=it's $(x) $$y")


@pytest.fixture
def shown(door):
    """The commands that a dry run prints, as lists of words; what one reads stands behind it."""
    def run(*arguments):
        step = next(i for i, word in enumerate(arguments[1:], 1) if word[0] != "-")
        result = door(*arguments[:step], "--dry-run", *arguments[step:])
        assert result.code == 0, result.err
        assert not subprocess.run(["bash", "-n"], input=result.out, text=True,
                                  capture_output=True).stderr
        lines, read, _ = (result.out + " <<'EOF'\nEOF\n").split("EOF", 2)
        if "EOF'" not in result.out:
            return [shlex.split(line) for line in result.out.splitlines()]
        return [shlex.split(lines.removesuffix(" <<'")), read.removeprefix("'\n")]
    return run


def command(words):
    """What the shell of a worker gets."""
    (found,) = [word for word in words if word.startswith("--command=")]
    return found.removeprefix("--command=")


def test_the_steps_of_a_pod(shown):
    ask = ["gcloud", "compute", "tpus", "queued-resources", "describe", "glm",
           "--format=value(state.state)", "--zone=us-east5-b"]
    create = shown(*POD, "--type=v5litepod-16", "--spot", "--project=mine", "create")
    assert create == [
        ["gcloud", "compute", "tpus", "queued-resources", "create", "glm", "--node-id=glm",
         "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
         "--zone=us-east5-b", "--project=mine"], [*ask, "--project=mine"]]
    archive, copy, install, mount = shown(*POD, "--share=10.0.0.2:/runs", "install")
    assert archive == ["git", "-C", str(ROOT), "archive", "--prefix=glm-jax/",
                       "--output=build/glm-jax.tar.gz", "HEAD"]
    assert copy[4:] == ["scp", str(ROOT / "build/glm-jax.tar.gz"), "glm:", "--worker=all",
                        "--zone=us-east5-b"]
    for words in (install, mount):
        assert shlex.join(words).startswith(SSH.format("all"))
        assert words[-1] == "--zone=us-east5-b"
    assert command(install).startswith("tar -xzf glm-jax.tar.gz && ")
    assert command(install).endswith("install -r requirements.lock -r requirements-tpu.txt")
    assert shown(*POD, "install")[-1] == install  # no share, no mount
    (logs,), (stop,) = shown(*POD, "logs"), shown(*POD, "stop")
    for words in (logs, stop):
        assert shlex.join(words).startswith(SSH.format("0"))
    (delete,) = shown(*POD, "delete")
    assert delete[3:] == ["queued-resources", "delete", "glm", "--force", "--quiet",
                          "--zone=us-east5-b"]
    resume = shown(*POD, "--type=v4-32", "resume", *JOB)
    start = shown(*POD, "start", *JOB)
    assert resume == [ask, delete, *shown(*POD, "--type=v4-32", "create"),
                      *shown(*POD, "install"), *start]
    assert "--runtime-version=tpu-ubuntu2204-base" in resume[2]


def stand_in(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def test_what_a_pods_shells_do_with_it(shown, tmp_path):
    """The job runs on behind the shell, with its arguments as they were; `stop` ends it."""
    (start,), (stop,) = shown(*POD, "start", *JOB), shown(*POD, "stop")
    stand_in(tmp_path / "glm-jax/.venv/bin/python",
             'printf "%s\\n" "$@"; trap "echo saved; exit" TERM; while true; do sleep 0.01; done')
    shell = {"cwd": tmp_path, "env": os.environ | {"HOME": str(tmp_path)}, "timeout": 20}
    assert subprocess.run(["bash", "-c", command(start)], **shell).returncode == 0
    lines = ["launch/train.py", "--cluster", *JOB[1:]]

    def logged(lines):
        end = time.monotonic() + 20
        log = tmp_path / "job.log"
        while not log.exists() or log.read_text().splitlines() != lines:
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.01)
    try:
        logged(lines)
        assert subprocess.run(["bash", "-c", command(stop)], **shell).returncode == 0
        logged([*lines, "saved"])
    finally:
        subprocess.run(["kill", "-9", (tmp_path / "job.pid").read_text().strip()],
                       capture_output=True)


@pytest.mark.parametrize(("there", "writable", "stale"), [
    (False, False, False), (False, True, True), (True, True, False)])
def test_a_share_is_mounted_once_and_made_writable(shown, tmp_path, there, writable, stale):
    mount = command(shown(*POD, "--share=10.0.0.2:/runs", "install")[-1])
    share = tmp_path / "share"
    fails = f"&& [ $(grep -c nfs {tmp_path}/calls) != {int(stale)} -o ${{@: -1}} != nfs-common ]"
    stand_in(tmp_path / "bin/sudo", f'echo "$1 ${{@: -1}}" >> {tmp_path}/calls {fails}')
    stand_in(tmp_path / "bin/mountpoint", f'[ "$2" = {share} ] && exit {int(not there)}')
    if writable:
        share.mkdir()
    subprocess.run(["bash", "-ec", mount.replace("/share", str(share))], check=True, timeout=20,
                   env=os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
    assert (tmp_path / "calls").read_text().splitlines() == [
        *["apt-get nfs-common", "apt-get update"] * stale, "apt-get nfs-common",
        f"mkdir {share}", *[f"mount {share}"] * (not there),
        *[f"chmod {share}"] * (not writable)]


@pytest.fixture
def resumed(tmp_path):
    """`resume` with a gcloud of some answers: its result, and the commands in their order.

    `before` are the states until chips are asked for, one a look, `after` those from then on; the
    last one stays. "" is a call that fails. `ssh` is the exit code of the workers' shells.
    """
    stand_in(tmp_path / "bin/gcloud", """
echo "$3 $4" >> calls
case "$4" in
  describe)
    states=before; if grep -q create calls; then states=after; fi
    now=$(head -1 $states)
    if [ $(wc -l < $states) -gt 1 ]; then sed -i 1d $states; fi
    if [ "$now" = NOT_FOUND ]; then echo "ERROR: NOT_FOUND: Resource was not found." >&2; exit 1; fi
    if [ -z "$now" ]; then echo "ERROR: no network" >&2; exit 1; fi
    echo $now;;
  ssh) exit $SSH;;
esac""")
    stand_in(tmp_path / "bin/git", "")
    at_once = ("from launch import door; from launch.tpu import pod; pod.POLL_SECONDS = 0; "
               "door.run(pod.main, arguments=True)")

    def resume(*before, after=("ACTIVE",), ssh="0"):
        (tmp_path / "calls").unlink(missing_ok=True)
        for name, states in (("before", before), ("after", after)):
            (tmp_path / name).write_text("".join(state + "\n" for state in states))
        result = subprocess.run(
            [sys.executable, "-c", at_once, *POD[1:], "--type=v6e-16", "resume", *JOB],
            cwd=tmp_path, capture_output=True, text=True, timeout=25,
            env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                              "PYTHONPATH": str(ROOT), "SSH": ssh})
        return result, [line.split()[1] for line in
                        (tmp_path / "calls").read_text().splitlines()]
    return resume


INSTALL_START = ["scp", "ssh", "ssh"]


def test_a_pod_that_is_preempted_is_asked_for_anew(resumed):
    """Commands run in their order, a failure ends them."""
    for gone in ("SUSPENDED", "FAILED"):
        result, calls = resumed(gone)
        assert result.returncode == 0, result.stderr
        assert calls == ["describe", "delete", "create", "describe", *INSTALL_START]
    result, calls = resumed("SUSPENDED", after=["FAILED"])
    assert result.returncode == 2 and "error: glm: FAILED" in result.stderr
    assert calls[-2:] == ["create", "describe"]
    result, calls = resumed("SUSPENDED", after=[""])
    assert result.returncode == 2 and "gcloud can't say how it is, 10 times" in result.stderr
    assert calls[-10:] == ["describe"] * 10 and calls[-11] == "create"
    result, calls = resumed("SUSPENDED", ssh="7")
    assert result.returncode == 2 and "gcloud ended with exit code 7" in result.stderr
    assert calls.count("ssh") == 1


def test_a_pod_that_is_there_is_not_deleted(resumed):
    """Whether it runs, or gcloud fails once, or always; and what was never there is no failure."""
    result, calls = resumed("", "ACTIVE")
    assert result.returncode == 0, result.stderr
    assert calls == ["describe", "describe", "ssh"] and "no network" in result.stderr
    result, calls = resumed("")
    assert result.returncode == 2 and calls == ["describe"] * 10
    assert "gcloud can't say how it is, 10 times" in result.stderr
    assert "It is not deleted" in result.stderr
    result, calls = resumed("NOT_FOUND")
    assert result.returncode == 0, result.stderr
    assert calls == ["describe", "create", "describe", *INSTALL_START]


def test_a_pod_that_is_waited_for_is_not_asked_for_twice(resumed):
    waiting = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "CREATING"]
    result, calls = resumed(*waiting, "ACTIVE")
    assert result.returncode == 0, result.stderr
    assert calls == ["describe"] * 5 + INSTALL_START
    result, calls = resumed("SUSPENDING", "SUSPENDED")
    assert result.returncode == 0, result.stderr
    assert calls == ["describe", "describe", "delete", "create", "describe", *INSTALL_START]


def test_a_jobset(shown):
    flags = ("--name=glm", "--image=registry/glm-jax")
    words, text = shown("gke/jobset", *flags, "--tpu=v5p", "--topology=2x2x4", "--claim=runs",
                        "--slices=2", "--restarts=5", "--spot", "start", *JOB)
    assert words == ["kubectl", "apply", "--filename=-"]
    found = yaml.safe_load(text)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"]["name"] == "glm"
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert found["spec"]["failurePolicy"]["rules"] == [
        {"name": "mistakes", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    (replicated,) = found["spec"]["replicatedJobs"]
    assert (replicated["name"], replicated["replicas"]) == ("slice", 2)
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    assert job["completionMode"] == "Indexed"
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"] == {
        "containerName": "train", "operator": "In", "values": [2]}
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
                                   "cloud.google.com/gke-tpu-topology": "2x2x4",
                                   "cloud.google.com/gke-spot": "true"}
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["image"] == "registry/glm-jax"
    assert container["command"] == [
        "python", "launch/train.py", "--cluster", JOB[1], JOB[2],
        "--config.task.text=it's $$(x) $$$$y"]  # $$ is $ where Kubernetes has read it
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["volumeMounts"] == [{"name": "share", "mountPath": "/share"}]
    assert pod["volumes"] == [{"name": "share", "persistentVolumeClaim": {"claimName": "runs"}}]

    build, push = shown("gke/jobset", *flags, "build")
    assert build == ["docker", "build", f"--file={ROOT}/launch/gke/Dockerfile",
                     "--tag=registry/glm-jax", str(ROOT)]
    assert push == ["docker", "push", "registry/glm-jax"]
    (logs,), (delete,) = shown("gke/jobset", *flags, "logs"), shown("gke/jobset", *flags, "delete")
    assert logs[:3] == ["kubectl", "logs", "--follow"] and logs[-1] == (
        "--selector=jobset.sigs.k8s.io/jobset-name=glm,jobset.sigs.k8s.io/job-index=0,"
        "batch.kubernetes.io/job-completion-index=0")
    assert delete == ["kubectl", "delete", "jobset", "glm"]


def test_a_slurm_job_is_queued_again_when_it_has_saved(shown, tmp_path):
    words, text = shown("slurm/submit", "--name=glm", "--nodes=4", "--gpus=8", "--cpus=6",
                        "--time=1-12", "start", *JOB)
    assert words == ["sbatch"]
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line]
    assert asked == ["--job-name=glm", "--nodes=4", "--ntasks-per-node=8", "--gres=gpu:8",
                     "--cpus-per-task=6", "--time=1-12", "--output=%x-%j.log",
                     "--open-mode=append", "--requeue", "--signal=TERM@120"]
    for name in ("srun", "scontrol"):
        stand_in(tmp_path / name,
                 f'printf "{name}\\n" >> calls; printf "%s\\n" "$@" >> calls; exit ${{{name}:-0}}')
    for code in (0, 2, 128 + signal.SIGTERM):
        (tmp_path / "calls").unlink(missing_ok=True)
        done = subprocess.run(["bash"], input=text, text=True, cwd=tmp_path,
                              env={"PATH": f"{tmp_path}:{os.environ['PATH']}",
                                   "SLURM_JOB_ID": "17", "srun": str(code)})
        assert done.returncode == code
        calls = (tmp_path / "calls").read_text().splitlines()
        assert calls[:6] == ["srun", "--kill-on-bad-exit=0", "--cpus-per-task=6",
                             ".venv/bin/python", "launch/train.py", "--cluster"]
        assert calls[6:] == [*JOB[1:], *(["scontrol", "requeue", "17"] if code == 143 else [])]
    _, text = shown("slurm/submit", "--name=glm", "start", *JOB)
    assert "--ntasks-per-node=1\n#SBATCH --cpus" in text  # no GPUs asked for: CPUs


@pytest.mark.parametrize(("arguments", "message"), [
    ((*POD, "creat"), "'creat' is no step; the steps are create, install, start"),
    ((*POD,), "'' is no step"),
    ((*POD, "create"), "--type is missing: one of v4, v5litepod, v5p, v6e and a size, as in"),
    ((*POD, "--type=v7-8", "create"), "--type=v7-8"),
    ((*POD, "--type=v6e", "create"), "--type=v6e: one of"),
    ((*POD, "--type=v6e-0", "create"), "--type=v6e-0: one of"),
    ((*POD, "resume", *JOB), "--type is missing: one of"),
    ((*POD, "--share=nfs", "install"), "--share=nfs: server:/path is wanted"),
    ((*POD, "--project=my project", "logs"), "--project=my project: Google Cloud has no such name"),
    (("tpu/pod", "--name=--force", "--zone=us-east5-b", "delete"), "--name=--force: at most 40"),
    (("tpu/pod", "--name=glm", "--zone=", "logs"), "--zone=: Google Cloud has no such name"),
    ((*POD, "logs", "more"), "logs takes no argument 'more'"),
    ((*POD, "start"), "launch/train.py behind a --, with --config=…"),
    ((*POD, "start", "--", "--config=a.py"), "with --workdir=…"),
    (("tpu/pod", "--name=glm", "create"), "--zone is wanted"),
    (("gke/jobset", "--name=glm", "build"), "--image is wanted"),
    (("gke/jobset", "--name=glm", "--image=x", "--topology=4", "--claim=c", "start", *JOB),
     "--topology=4: a slice of --tpu=v6e has 2 sides, such as 4x4"),
    (("gke/jobset", "--name=glm", "--image=x", "--topology=0x4", "--claim=c", "start", *JOB),
     "--topology=0x4: a slice of --tpu=v6e has 2 sides"),
    (("gke/jobset", "--name=glm", "--image=x", "--tpu=v5p", "--topology=4x4", "--claim=c", "start",
      *JOB), "--topology=4x4: a slice of --tpu=v5p has 3 sides, such as 4x4x4"),
    (("gke/jobset", "--name=a,b", "delete"), "--name=a,b: at most 40"),
    (("gke/jobset", "--name=glm", "--image=x", "--topology=1x1", "--claim=c", "start", *JOB),
     "--topology=1x1: 1 in all, no multiple of --host-chips=4"),
    (("gke/jobset", "--name=glm", "--image=x", "--topology=4x5", "--claim=c", "start", *JOB),
     "--topology=4x5: the slices of --tpu=v6e are 1x1, 2x2, 2x4"),
    (("gke/jobset", "--name=glm", "--image=x", "--tpu=v5p", "--topology=4x4x6", "--claim=c",
      "start", *JOB), "--topology=4x4x6: the slices of --tpu=v5p are 2x2x1, 2x2x2"),
    (("gke/jobset", "--name=glm", "--image=x", "--tpu=v4", "--topology=8x4x4", "--claim=c",
      "start", *JOB), "sides that 4 divides, the smallest first"),
    (("gke/jobset", "--name=glm", "--image=x", "--topology=4x4", "start", *JOB),
     "--claim is wanted"),
    (("gke/jobset", "--name=Glm", "--image=x", "--topology=4x4", "--claim=c", "start", *JOB),
     "--name=Glm"),
    (("slurm/submit", "--name=glm", "--time=soon", "start", *JOB), "--time=soon"),
    (("slurm/submit", "--name=glm", "--time=0", "start", *JOB), "--time=0: minutes, hours"),
    (("slurm/submit", "--name=glm", "--time=0-0:00", "start", *JOB), "--time=0-0:00"),
    (("slurm/submit", "--name=-x", "start", *JOB), "--name=-x: letters, digits"),
    (("slurm/submit", "--name=a b", "start", *JOB), "--name=a b"),
    (("slurm/submit", "--name=glm", "--nodes=0", "start", *JOB), "--nodes=0"),
])
def test_what_is_refused_runs_nothing(refused, arguments, message):
    assert message in refused(*arguments)


def test_no_test_reaches_a_cloud(door):
    """The doors find programs that only fail, should one be run that must not be."""
    for arguments in ((*POD, "delete"), ("gke/jobset", "--name=glm", "delete"),
                      ("gke/jobset", "--name=glm", "--image=x", "build"),
                      ("slurm/submit", "--name=glm", "start", *JOB)):
        result = door(*arguments)
        assert result.code == 2 and "a test must not run this" in result.err


def test_json_is_what_the_manifest_takes():
    """Values with quotes stay one value: JSON's strings are YAML's."""
    for text in ('a"b', "it's", "a: b #c", "宝"):
        assert yaml.safe_load("x: " + json.dumps(text, ensure_ascii=False)) == {"x": text}


def test_the_image_is_sent_what_it_copies():
    copied = {name for line in (ROOT / "launch/gke/Dockerfile").read_text().splitlines()
              if line.startswith("COPY") for name in line.split()[1:-1]}
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines()
            if line.startswith("!")]
    assert {name for name in copied if any(fnmatch(name, part) for part in sent)} == copied
    assert all((ROOT / name).exists() for name in copied)
