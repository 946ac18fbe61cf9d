"""Lists what is supported: architectures, their heads, and the forms that each is written in.

    python launch/models.py --json
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from launch import door

JSON = flags.DEFINE_bool("json", False, "as JSON, for programs")


def rows() -> list[dict[str, Any]]:
    """One for each row of the registry that has released folders."""
    from glm_jax.convert.renamed import WAYS
    from glm_jax.models import REGISTRY
    return [{"architecture": row.name,
             "model_type": row.config.model_type,  # type: ignore[attr-defined]
             "about": (sys.modules[row.config.__module__].__doc__ or "").splitlines()[0],
             "heads": dict(row.classes),
             "reads": ["safetensors", "bin", *(f"int{bits}" for bits in row.bits)],
             "writes": [row.name, *sorted(to for own, to in WAYS if own == row.name)]}
            for row in REGISTRY if row.classes]


def main() -> None:
    found = rows()
    if JSON.value:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    console = door.console()
    for row in found:
        console.print(f"[bold]{row['architecture']}[/bold]  {row['about']}", highlight=False)
        heads = ", ".join(f"{head} ({kind})" for head, kind in row["heads"].items())
        for name, text in (("model_type", row["model_type"]), ("heads", heads),
                           ("reads", ", ".join(row["reads"])),
                           ("writes", "safetensors as " + " or ".join(row["writes"]))):
            console.print(f"    {name:12}{text}", highlight=False, markup=False)


if __name__ == "__main__":
    door.run(main)
