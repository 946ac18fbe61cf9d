"""`--help` of every door: quick, since nothing heavy is imported for it, and clean."""

import resource
import subprocess
import sys

import pytest

from tests.launch.conftest import ROOT


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "convert"])
def test_help(name):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, str(ROOT / "launch" / f"{name}.py"), "--help"],
                          capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert f"python launch/{name}.py --" in done.stdout and "--[no]verbose" in done.stdout
    assert ("--config:" if name == "train" else "--model:") in done.stdout
    assert done.stderr == "" and "Traceback" not in done.stdout
    # Processor time: a busy machine makes the clock slow, not this.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "convert"])
def test_parsing_flags_imports_nothing_heavy(name):
    heavy = ["jax", "flax", "orbax", "torch", "transformers", "grain", "sklearn"]
    code = (f"import runpy, sys; runpy.run_path('launch/{name}.py'); "
            f"print([m for m in {heavy} if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
