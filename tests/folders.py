"""What two run folders are compared by."""

import json
from pathlib import Path


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl without what a clock measured."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if "second" not in name}
            for line in lines]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its name there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
