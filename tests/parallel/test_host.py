"""A program that asks for large pages starts anew once, with its arguments, and no more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm_jax.parallel import host

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys
print("begun", flush=True)
from glm_jax.parallel import host
from pathlib import Path
host._MODE = Path(sys.argv[1])
host.use_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[2:])
"""


@pytest.mark.parametrize(("mode", "before", "after", "starts"), [
    ("always [madvise] never", "", "glibc.malloc.hugetlb=1", 2),
    ("always [madvise] never", "glibc.pthread.rseq=1",
     "glibc.pthread.rseq=1:glibc.malloc.hugetlb=1", 2),
    ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0", 1),
    ("[always] madvise never", "", "", 1),
    (None, "", "", 1),
])
def test_starts_anew_once(tmp_path, mode, before, after, starts):
    assert host._MODE.name == "enabled"
    (tmp_path / "program.py").write_text(PROGRAM)
    if mode:
        (tmp_path / "mode").write_text(mode)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py", tmp_path / "mode", "--a=b c", "好"],
        env=os.environ | {"GLIBC_TUNABLES": before, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True)
    assert done.stdout == "begun\n" * starts + f"{after} ['--a=b c', '好']\n", done.stderr
