"""How near our numbers are to the reference implementations': the README's table.

    python benchmarks/fidelity.py --json=fidelity.json

Runs the checks of tests/test_golden.py on each folder of $GLM_JAX_GOLDEN (by default
../shared/golden/public, else tests/golden: random weights, inputs, and what Transformers, PEFT or
the released code made of them) and prints the largest error of each model, in float32. It needs
requirements-dev.lock.
"""

import argparse
import os
import platform
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

try:
    import pytest  # noqa: F401  the checks are tests
except ModuleNotFoundError:
    sys.exit("pytest is missing: pip install -r requirements-dev.lock")

import jax  # noqa: E402

from glm_jax.convert.released import read_json  # noqa: E402
from glm_jax.files import write_json_atomic  # noqa: E402
from glm_jax.models import REGISTRY, architecture_of  # noqa: E402
from glm_jax.nn import compute  # noqa: E402
from tests import test_golden as golden  # noqa: E402

KINDS = ("forward", "gradient", "generation", "round trip")


def family(folder: Path) -> str | None:
    """The architecture that a folder is of, that of the base of an adapter; None of a tokenizer."""
    path = folder / ("base" if (folder / "adapter").is_dir() else "") / "config.json"
    return architecture_of(read_json(path)).name if path.exists() else None


def measure(folder: Path) -> dict[str, Any]:
    """The largest error of each kind in a folder, and what failed or why it was not checked."""
    golden.MEASURED.clear()
    found: dict[str, Any] = {"folder": folder.name}
    try:
        if reason := golden.run(folder):
            return found | {"skipped": reason}
    except AssertionError as error:
        found["failed"] = str(error).strip().splitlines()[0]
    for kind in {one.kind for one in golden.MEASURED}:
        own = [one for one in golden.MEASURED if one.kind == kind]
        worst = max(own, key=lambda one: one.error)
        found[kind] = {"error": worst.error, "of": worst.what, "count": sum(o.count for o in own),
                       "share of tolerance": max(one.share for one in own)}
    return found


def table(rows: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """The cells: a row a model, a column a kind."""
    cells = [["model", "cases", *KINDS]]
    for name, folders in rows.items():
        done = [row for row in folders if "skipped" not in row]
        line = [f"`{name}`", str(len(done))]
        for kind in KINDS:
            own = [row[kind] for row in done if kind in row]
            error, count = max((o["error"] for o in own), default=0), sum(o["count"] for o in own)
            if not own:
                line.append("")
            elif kind in ("forward", "gradient"):
                line.append(f"{error:.0e}")
            else:
                unit = "tokens" if kind == "generation" else "tensors"
                line.append(f"{count} {unit} equal" if not error else f"{error:.0f} {unit} DIFFER")
        if failed := [row["folder"] for row in done if "failed" in row]:
            line[0] += " FAILED: " + ", ".join(failed)
        if done:
            cells.append(line)
    return cells


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="folders whose names hold this")
    parser.add_argument("--json", default="", help="where to write the figures of each folder")
    args = parser.parse_args(argv)
    jax.config.update("jax_default_matmul_precision", "highest")
    compute.UNROLLED = 0  # layers are scanned, as in a deep model
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for folder in [folder for folder in golden.FOLDERS if args.only in folder.name]:
        try:
            name = family(folder)
        except golden.UserError:  # of a later version of this library
            continue
        if name is not None:
            print(f"{folder.name} …", file=sys.stderr, flush=True)
            rows[name].append(measure(folder))
    rows = {row.name: rows[row.name] for row in REGISTRY if row.name in rows}
    head, *lines = table(rows)
    for line in (head, ["---", *["--:"] * (len(head) - 1)], *lines):
        print("| " + " | ".join(line) + " |")
    if args.json:
        machine = {"system": platform.platform(), "cores": os.cpu_count(), "jax": jax.__version__,
                   "device": jax.devices()[0].device_kind}
        write_json_atomic(args.json, {"machine": machine, "models": rows})
    return int(not lines or any("failed" in row for own in rows.values() for row in own))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
