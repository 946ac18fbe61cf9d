"""The report of a run: report.html, one file that needs nothing else, and a table for the terminal.

The page is a template, the report.html beside this file; here is what it is filled with.
"""

import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jinja2
from flax.traverse_util import flatten_dict
from rich import markup
from rich.table import Table

from glm_jax.convert.released import read_json
from glm_jax.files import write_text_atomic
from glm_jax.train.trackers import read_rows

Points = list[tuple[int, float]]
COLOURS = ("one", "two", "three")  # classes of report.html
FRAME = {"width": 720, "height": 260, "left": 56, "right": 696, "top": 10, "bottom": 220}


def write_report(folder: Path, details: Mapping[str, Any], split: str) -> Path:
    """Writes `report.html` from the run folder's config.json, result.json and metrics.jsonl.

    `details` of `split` are what result.json leaves out, all optional: `labels`, `classes` and
    `confusion` as tasks.metrics.classification_metrics returns them, and `rows`: mappings with
    `text`, `label`, `predicted` and `probability` (of what was predicted).
    """
    result, ran_on = read_json(folder / "result.json"), environment()
    minutes, seconds = divmod(round(result["seconds"]), 60)
    took = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    others = {k: v for k, v in result.items() if k not in (split, "steps", "seconds")}
    numbers = _numbers({split: result[split]}) | _numbers(others)
    template = jinja2.Template(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8"),
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    config = flatten_dict(read_json(folder / "config.json"), sep=".",
                          is_leaf=lambda _, value: not value)  # an empty mapping is shown too
    page = template.render(
        FRAME, title=folder.resolve().name,
        subtitle=f"{result['steps']:,} steps · {took} · {ran_on['devices']}",
        tiles=[(name.replace(".", " ").replace("_", " "), n) for name, n in numbers.items()],
        charts=_charts(read_rows(folder / "metrics.jsonl")), split=split,
        **{name: details.get(name, ()) for name in ("labels", "classes", "confusion")},
        hardest=_hardest(details.get("rows", ())),
        config={name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                for name, value in config.items()},
        environment=ran_on)
    write_text_atomic(folder / "report.html", page)
    return folder / "report.html"


def environment() -> dict[str, str]:
    """What the run ran on: versions, platform and devices."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "devices": f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform})",
        "processes": str(jax.process_count()),
    }


def result_table(result: Mapping[str, Any], details: Mapping[str, Any], split: str) -> Table:
    """The figures of `split` for the terminal; with the `classes` of `details`, a row for each."""
    numbers = _numbers(result[split])
    if "classes" not in details:
        table = Table(split, "")
        for name, number in numbers.items():
            table.add_row(name, number)
        return table
    title = f"{split}: " + ", ".join(f"{name} {number}" for name, number in numbers.items())
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    for name in ("precision", "recall", "F1", "examples"):
        table.add_column(name, justify="right")
    for row in details["classes"]:
        scores = (f"{row[key]:.4f}" for key in ("precision", "recall", "f1"))
        table.add_row(markup.escape(row["label"]), *scores, f"{row['support']:,}")
    return table


def _numbers(tree: dict[str, Any]) -> dict[str, str]:
    """The numbers among nested values, by dotted name, as they are shown."""
    return {name: f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
            for name, value in flatten_dict(tree, sep=".").items()
            if isinstance(value, int | float) and not isinstance(value, bool)}


def _charts(logged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    def points(name: str) -> Points:
        return [(row["step"], row[name]) for row in logged
                if isinstance(row.get(name), int | float)]

    train = points("train/loss")
    losses = [("train/loss", train, "raw"), ("train/loss, smoothed", _smooth(train), "line"),
              ("eval/loss", points("eval/loss"), "dots")]
    names = sorted({k for row in logged for k in row if k.startswith("eval/")} - {"eval/loss"})
    shares = [(n, points(n), "dots") for n in names if all(0 <= v <= 1 for _, v in points(n))]
    both = (("Loss", losses), ("Evaluation", shares[: len(COLOURS)]))
    return [_chart(title, series) for title, series in both if any(s[1] for s in series)]


def _smooth(points: Points) -> Points:
    """An exponential mean over about a twenty-fifth of the points, without a start at zero."""
    keep, mean, weight, smoothed = 1 - 1 / max(1, len(points) // 25), 0.0, 0.0, []
    for step, value in points:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append((step, mean / weight))
    return smoothed


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers from at or below `low` to at or above `high`."""
    rough = (high - low or abs(high) or 1) / 5
    power = 10 ** math.floor(math.log10(rough))
    unit = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.8)
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [i * unit for i in range(first, max(last, first + 1) + 1)]


def _thin(points: Points, most: int) -> Points:
    return points[:: max(1, math.ceil(len(points) / most))]


def _chart(title: str, series: Sequence[tuple[str, Points, str]]) -> dict[str, Any]:
    """A figure as the page draws it; a series is "raw", "line" or "dots". Hover for the values."""
    series = [s for s in series if s[1]]
    steps = [step for _, points, _ in series for step, _ in points]
    values = [value for _, points, _ in series for _, value in points]
    ticks = _ticks(min(values), max(values))
    x0, x1 = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        share = (step - x0) / (x1 - x0)
        return round(FRAME["left"] + share * (FRAME["right"] - FRAME["left"]), 1)

    def y(value: float) -> float:
        share = (ticks[-1] - value) / (ticks[-1] - ticks[0])
        return round(FRAME["top"] + share * (FRAME["bottom"] - FRAME["top"]), 1)

    curves, colour = [], -1
    for name, points, style in series:
        colour += style != "line"  # a smoothed line has the colour of its raw one
        dot, radius = ("dot", 3.5) if style == "dots" and len(points) <= 60 else ("hover", 5)
        curves.append({
            "name": name, "css": COLOURS[colour], "raw": " raw" if style == "raw" else "",
            "line": " ".join(f"{x(step)},{y(value)}" for step, value in _thin(points, 1500)),
            "dot": dot, "radius": radius,
            "dots": [(x(step), y(value), f"{name}\nstep {step:,}: {value:.5g}")
                     for step, value in _thin(points, 200) if style != "raw"]})
    return {"title": title, "curves": curves,
            "ys": [(y(tick), f"{tick:.6g}") for tick in ticks],
            "xs": [(x(tick), f"{int(tick):,}") for tick in _ticks(min(steps), max(steps))
                   if x0 <= tick <= x1 and tick == int(tick)]}


def _hardest(rows: Iterable[Mapping[str, Any]], most: int = 25) -> list[Mapping[str, Any]]:
    """The mistakes it was surest of, then the right answers it was least sure of."""

    def ease(row: Mapping[str, Any]) -> tuple[bool, float]:
        right = row["predicted"] == row["label"]
        return right, row["probability"] if right else -row["probability"]

    return sorted(rows, key=ease)[:most]
