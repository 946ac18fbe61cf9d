"""The report of a run: report.html, one file that needs nothing else, and a table for the terminal.

The page is report.html beside this file; here are the pieces that go into it.
"""

import importlib.metadata
import json
import math
import platform
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import jax
from rich import markup
from rich.table import Table

from glm_jax.files import write_text_atomic
from glm_jax.train.trackers import read_rows

Points = list[tuple[int, float]]
COLOURS = ("one", "two", "three")  # classes of report.html
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 720, 260, 56, 696, 40


def write_report(
    folder: Path, details: Mapping[str, Any] | None = None, split: str = "test"
) -> Path:
    """Writes `report.html` from the run folder's config.json, result.json and metrics.jsonl.

    `details` of `split` are what result.json leaves out, all optional: `labels`, `classes` and
    `confusion` as tasks.metrics.classification_metrics returns them, and `rows`: mappings with
    `text`, `label`, `predicted` and `probability` (of what was predicted).
    """
    config, result = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("config.json", "result.json")
    )
    logged = read_rows(folder / "metrics.jsonl")
    page = render_report(
        folder.resolve().name, logged, config, result, details or {}, environment(), split=split
    )
    write_text_atomic(folder / "report.html", page)
    return folder / "report.html"


def render_report(
    title: str,
    logged: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    result: Mapping[str, Any],
    details: Mapping[str, Any],
    environment: Mapping[str, str],
    *,
    split: str = "test",
) -> str:
    """The page. `logged` are the rows of metrics.jsonl, `details` see `write_report`; what is
    absent is left out.
    """
    page = resources.files("glm_jax.train").joinpath("report.html").read_text(encoding="utf-8")
    pieces = {
        "title": escape(title),
        "subtitle": escape(_subtitle(result, environment)),
        "tiles": _tiles(result, split),
        "curves": _curves(logged),
        "confusion": _confusion(details),
        "classes": _classes(details, split),
        "hardest": _hardest(details.get("rows", ())),
        "config": _pairs("Config", _flat(config)),
        "environment": _pairs("Environment", environment.items()),
    }
    return string.Template(page).substitute(pieces)


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


def result_table(
    result: Mapping[str, Any], details: Mapping[str, Any] | None = None, split: str = "test"
) -> Table:
    """The figures of `split` for the terminal; with the `classes` of `details`, a row for each."""
    numbers = _numbers(result.get(split, {}))
    if not details or "classes" not in details:
        table = Table(split, "")
        for name, value in numbers:
            table.add_row(name, _number(value))
        return table
    title = f"{split}: " + ", ".join(f"{name} {_number(value)}" for name, value in numbers)
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    for name in ("precision", "recall", "F1", "examples"):
        table.add_column(name, justify="right")
    for row in details["classes"]:
        scores = (f"{row[key]:.4f}" for key in ("precision", "recall", "f1"))
        table.add_row(markup.escape(row["label"]), *scores, f"{row['support']:,}")
    return table


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _subtitle(result: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    parts = []
    if "steps" in result:
        parts.append(f"{result['steps']:,} steps")
    if "seconds" in result:
        minutes, seconds = divmod(round(result["seconds"]), 60)
        parts.append(f"{minutes} min {seconds} s" if minutes else f"{seconds} s")
    return " · ".join([*parts, environment.get("devices", "")])


def _numbers(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The numbers among nested values, by dotted name."""
    flat = _flat(values)
    return [(k, v) for k, v in flat if isinstance(v, int | float) and not isinstance(v, bool)]


def _tiles(result: Mapping[str, Any], split: str) -> str:
    first = [(f"{split} {name}", value) for name, value in _numbers(result.get(split, {}))]
    hidden = (split, "steps", "seconds")
    others = _numbers({name: value for name, value in result.items() if name not in hidden})
    return "".join(
        f'<div class="tile"><b>{_number(value)}</b>'
        f"<span>{escape(re.sub('[._]', ' ', name))}</span></div>"
        for name, value in first + others
    )


def _curves(logged: Sequence[Mapping[str, Any]]) -> str:
    def points(name: str) -> Points:
        return [
            (row["step"], row[name]) for row in logged if isinstance(row.get(name), int | float)
        ]

    train = points("train/loss")
    losses = [("train/loss", train, "raw"), ("train/loss, smoothed", _smooth(train), "line")]
    losses.append(("eval/loss", points("eval/loss"), "dots"))
    names = sorted({k for row in logged for k in row if k.startswith("eval/")} - {"eval/loss"})
    shares = [(n, points(n), "dots") for n in names if all(0 <= v <= 1 for _, v in points(n))]
    return _chart("Loss", losses) + _chart("Evaluation", shares[: len(COLOURS)])


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


def _chart(title: str, series: Sequence[tuple[str, Points, str]]) -> str:
    """A figure in SVG; a series is drawn as "raw", "line" or "dots". Hover for the values."""
    series = [s for s in series if s[1]]
    if not series:
        return ""
    steps = [step for _, points, _ in series for step, _ in points]
    values = [value for _, points, _ in series for _, value in points]
    xs, ys = _ticks(min(steps), max(steps)), _ticks(min(values), max(values))
    x0, x1 = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return round(LEFT + (step - x0) / (x1 - x0) * (RIGHT - LEFT), 1)

    def y(value: float) -> float:
        return round(10 + (ys[-1] - value) / (ys[-1] - ys[0]) * (HEIGHT - BOTTOM - 10), 1)

    marks = []
    for tick in ys:
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y(tick)}" '
                     f'y2="{y(tick)}"/><text x="{LEFT - 8}" y="{y(tick) + 4}" '
                     f'text-anchor="end">{tick:.6g}</text>')  # fmt: skip
    for tick in xs:
        if x0 <= tick <= x1 and tick == int(tick):
            marks.append(f'<text x="{x(tick)}" y="{HEIGHT - BOTTOM + 18}" '
                         f'text-anchor="middle">{int(tick):,}</text>')  # fmt: skip
    legend, colour = [], -1
    for name, points, style in series:
        colour += style != "line"  # a smoothed line has the colour of its raw one
        css = COLOURS[colour]
        line = " ".join(f"{x(step)},{y(value)}" for step, value in _thin(points, 1500))
        raw = " raw" if style == "raw" else ""
        marks.append(f'<g class="{css}"><polyline class="curve{raw}" points="{line}"/>')
        dot, radius = ("dot", 3.5) if style == "dots" and len(points) <= 60 else ("hover", 5)
        for step, value in [] if raw else _thin(points, 200):
            label = f"{escape(name)}\nstep {step:,}: {value:.5g}"
            marks.append(f'<circle class="{dot}" cx="{x(step)}" cy="{y(value)}" r="{radius}">'
                         f"<title>{label}</title></circle>")  # fmt: skip
        marks.append("</g>")
        legend.append(f'<span><i class="{css}{raw}"></i>{escape(name)}</span>')
    return (
        f"<h2>{title}</h2><figure><figcaption>{''.join(legend)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(marks)}'
        f'<text x="{RIGHT}" y="{HEIGHT - 5}" text-anchor="end">step</text></svg></figure>'
    )


def _confusion(details: Mapping[str, Any]) -> str:
    if "confusion" not in details:
        return ""
    names, lines = [escape(str(name)) for name in details["labels"]], []
    for i, (name, row) in enumerate(zip(names, details["confusion"], strict=True)):
        cells, total = [], max(sum(row), 1)
        for j, count in enumerate(row):
            share, hue = count / total, "good" if i == j else "bad"
            cells.append(
                f'<td class="cell" style="background:rgba(var(--{hue}),{0.06 + 0.64 * share:.2f})" '
                f'title="{name} taken for {names[j]}">{count:,}<small>{share:.1%}</small></td>'
            )
        lines.append(f"<tr><th>{name}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        '<h2>Confusion matrix</h2><p class="soft">Rows are the true labels, columns what was '
        'predicted; shares are of the row.</p><div class="scroll"><table class="confusion">'
        f'<thead><tr><th class="axis">true ↓ predicted →</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _table(title: str, note: str, columns: Mapping[str, str], lines: list[list[str]]) -> str:
    """A table; `columns` are heading to css class, the cells of a line are HTML already."""
    head = "".join(f'<th class="{css}">{name}</th>' for name, css in columns.items())
    body = ""
    for line in lines:
        cells = zip(columns.values(), line, strict=True)
        body += "<tr>" + "".join(f'<td class="{css}">{c}</td>' for css, c in cells) + "</tr>"
    return (
        f'<h2>{title}</h2><p class="soft">{note}</p><div class="scroll"><table class="wide">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _classes(details: Mapping[str, Any], split: str) -> str:
    if "classes" not in details:
        return ""
    columns = {"class": "label"}
    columns |= dict.fromkeys(("precision", "recall", "F1", "examples"), "number")
    lines = [
        [escape(str(row["label"])), *(f"{row[k]:.4f}" for k in ("precision", "recall", "f1")),
         f"{row['support']:,}"]
        for row in details["classes"]
    ]  # fmt: skip
    return _table("Classes", f"On the {escape(split)} split.", columns, lines)


def _hardest(rows: Iterable[Mapping[str, Any]], most: int = 25) -> str:
    """The mistakes it was surest of, then the right answers it was least sure of."""

    def ease(row: Mapping[str, Any]) -> tuple[bool, float]:
        right = row["predicted"] == row["label"]
        return right, row["probability"] if right else -row["probability"]

    lines = []
    for row in sorted(rows, key=ease)[:most]:
        text = row["text"] if len(row["text"]) <= 400 else row["text"][:400] + " …"
        wrong = "" if row["predicted"] == row["label"] else ' class="wrong"'
        predicted = f"<span{wrong}>{escape(row['predicted'])}</span>"
        lines.append([escape(text), escape(row["label"]), predicted, f"{row['probability']:.3f}"])
    if not lines:
        return ""
    columns = {"text": "text", "true": "label", "predicted": "label", "probability": "number"}
    note = "The mistakes that the model was surest of, then what it barely got right."
    return _table("Hardest examples", note, columns, lines)


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested values as (dotted name, value)."""
    pairs: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _pairs(title: str, pairs: Iterable[tuple[str, Any]]) -> str:
    lines = ""
    for name, value in pairs:
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        cells = (f"<td><code>{escape(cell)}</code></td>" for cell in (name, shown))
        lines += f"<tr>{''.join(cells)}</tr>"
    return f"<details><summary>{title}</summary><table>{lines}</table></details>"
