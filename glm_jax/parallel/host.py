"""The process on its host: memory in large pages."""

import os
import sys
from pathlib import Path

_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLE = "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
    """Starts this program anew with malloc in 2 MiB pages, where Linux leaves the choice to it.

    On a CPU XLA takes the temporaries of a step from the system and gives them back after it:
    faulting them in, 4 KiB at a time, takes a good part of a step. glibc reads the setting only
    when a process starts. To be called before anything else; does nothing the second time.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in tunables or not _MODE.exists():
        return
    if "[madvise]" not in _MODE.read_text():
        return  # always: there is nothing to ask for; never: nothing to be had
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, _TUNABLE)))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
