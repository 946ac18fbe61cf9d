"""`--help` of every door: quick, since nothing heavy is imported for it, and clean.

And what a door refuses before it loads anything.
"""

import resource
import signal
import subprocess
import sys

import pytest

from tests.launch.conftest import ROOT

DOORS = {"train": "--config:", "evaluate": "--model:", "predict": "--model:", "convert": "--model:",
         "corpus": "--out:", "generate": "--model:", "models": "--[no]json:",
         "tpu/pod": "--type:", "gke/jobset": "--topology:", "slurm/submit": "--gpus:"}


@pytest.mark.parametrize("name", DOORS)
def test_help(name):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, str(ROOT / "launch" / f"{name}.py"), "--help"],
                          capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert f"python launch/{name}.py --" in done.stdout and "--[no]verbose" in done.stdout
    assert DOORS[name] in done.stdout
    assert done.stderr == "" and "Traceback" not in done.stdout
    # Processor time: a busy machine makes the clock slow, not this.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


@pytest.mark.parametrize("name", DOORS)
def test_parsing_flags_imports_nothing_heavy(name):
    heavy = ["jax", "flax", "orbax", "torch", "transformers", "grain", "sklearn"]
    code = (f"import runpy, sys; runpy.run_path('launch/{name}.py'); "
            f"print([m for m in {heavy} if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", ["evaluate", "predict", "convert", "generate"])
def test_a_door_without_its_model_says_what_is_wanted(name):
    done = subprocess.run([sys.executable, str(ROOT / "launch" / f"{name}.py")],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model is wanted: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("name", "said"), [("SIGTERM", "stopped by SIGTERM"),
                                            ("SIGINT", "stopped")])
@pytest.mark.parametrize("where", ["main", "config"])
def test_a_signal_is_one_line_wherever_it_comes(tmp_path, name, said, where):
    """In what a door runs, and while its flags are parsed, which imports the config file."""
    raises = f"import os, signal, time; os.kill(os.getpid(), signal.{name}); time.sleep(60)\n"
    config = raises * (where == "config") + "from configs.sentiment import get_config\n"
    (tmp_path / "c.py").write_text(config)
    code = ("import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from launch import door; door.flags_with_config()\n"  # a background job ignores it
            f"def main():\n    {raises if where == 'main' else 'pass'}\n"
            f"sys.argv = ['x', '--config={tmp_path / 'c.py'}']; door.run(main)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 128 + getattr(signal, name), done.stderr
    assert done.stderr.strip() == said


@pytest.mark.parametrize("flags", [[], ["--verbose"]])
def test_the_hubs_client_tells_of_its_tries_only_when_asked(flags):
    code = ("import sys; from launch import door\n"
            "def main():\n    from huggingface_hub.utils import logging\n"
            "    print(logging.get_logger('huggingface_hub.x').isEnabledFor(logging.WARNING))\n"
            f"sys.argv = ['x', *{flags}]; door.run(main)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == str(bool(flags)), done.stderr


def test_what_follows_two_dashes_is_a_text_as_it_stands():
    code = ("import sys; from launch import door\n"
            "sys.argv = ['x', '--verbose', 'a', '--', '--so-so', '好']\n"
            "door.run(lambda: print(door.arguments()), arguments=True)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "['a', '--so-so', '好']", done.stderr


def test_what_is_refused_before_anything_is_loaded(refused, tmp_path):
    none, absent = f"--model={tmp_path / 'none'}", tmp_path / "absent"
    inside = f"--json={absent / 'x.json'}"
    assert f"there is no folder {absent}" in refused("evaluate", none, inside)
    assert "a folder, not a file" in refused("evaluate", none, f"--json={tmp_path}")
    assert r"argument 2 is not UTF-8 at its character 2: 'a\udcff'" in refused(
        "predict", none, "好", "a\udcff")
    assert f"{absent}" in refused("corpus", f"--tokenizer={absent}")
    assert "unexpected argument 'more'" in refused("corpus", "more")


@pytest.mark.parametrize(("arguments", "message"), [
    (("plan", "--topology=h100:1", "--json=/nope/x.json"),
     "--json=/nope/x.json: a file is wanted, in a folder that is there"),
    (("plan", "--topology=h100:1", "--json=/tmp"), "--json=/tmp: a file is wanted"),
    (("train", "--heartbeat=abc"), "--heartbeat=abc: a whole number is wanted"),
    (("train", "--heartbeat=0"), "--heartbeat=0"),
    (("train", "--config.steps=x"), "--config.steps=x: a whole number is wanted"),
])
def test_flags_are_refused_before_the_model_is_looked_for(refused, arguments, message):
    absent = ("--config=configs/chat.py", "--config.model.path=absent")
    assert message in refused(*arguments[:1], *absent, *arguments[1:])
