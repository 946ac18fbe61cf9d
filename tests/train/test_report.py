"""The report: everything of the run is in the page, nothing foreign is, and text is only text."""

import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from glm_jax.files import write_json_atomic
from glm_jax.tasks.metrics import classification_metrics
from glm_jax.train.report import _ticks, result_table, write_report


class Page(HTMLParser):
    """Checks that tags close in order, and keeps what a reader would see."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


def make_folder(tmp_path):
    folder = tmp_path / "sentiment"
    folder.mkdir()
    labels, predictions = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    test = classification_metrics(labels, predictions, ["负面", "正面"])
    short = {"accuracy": test["accuracy"], "f1": test["f1"]}
    result = {"test": short, "best": {"f1": 0.75}, "steps": 40, "seconds": 75.2}
    write_json_atomic(folder / "result.json", result)
    config = {"train": {"learning_rate": 1e-3, "betas": [0.9, 0.95]}, "note": "</script><b>$HOME"}
    write_json_atomic(folder / "config.json", config)
    rows = [{"step": s, "train/loss": 1 / s} for s in range(1, 41)] + [
        {"step": 20, "eval/accuracy": 0.5, "eval/loss": 0.7, "eval/examples": 5},
        {"step": 40, "eval/accuracy": 0.75, "eval/loss": 0.6, "train/loss": None},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"st')
    return folder, test


def test_the_page_has_it_all_and_needs_nothing_else(tmp_path):
    folder, test = make_folder(tmp_path)
    rows = [
        {"text": "很好", "label": "正面", "predicted": "正面", "probability": 0.99},
        {"text": "还行吧", "label": "正面", "predicted": "正面", "probability": 0.51},
        {"text": "<img src=x onerror=1> & $5", "label": "负面", "predicted": "正面",
         "probability": 0.60},
        {"text": "太差了", "label": "负面", "predicted": "正面", "probability": 0.97},
    ]  # fmt: skip
    path = write_report(folder, {**test, "rows": rows}, "test")
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img|<iframe", text)
    page = Page(text)
    assert not {"src", "href", "onerror"} & {name for _, attrs in page.tags for name in attrs}

    seen = page.text
    wanted = ["sentiment", "40 steps · 1 min 15 s", "负面", "0.6667", "50.0%", "33.3%", "jaxlib"]
    for expected in [*wanted, "train.betas", "[0.9, 0.95]", "</script><b>$HOME", "best f1"]:
        assert any(expected in part for part in seen), expected
    texts = [part for part in seen if part in {row["text"] for row in rows}]
    assert texts == ["太差了", rows[2]["text"], "还行吧", "很好"]  # hardest first
    assert "eval/accuracy\nstep 40: 0.75" in seen
    assert not any("eval/examples\n" in part for part in seen)  # no share: not a curve


def render(folder, logged=(), result=None):
    """The page of a run folder with no more than this in it."""
    write_json_atomic(folder / "config.json", {})
    write_json_atomic(folder / "result.json",
                      {"test": {}, "steps": 100, "seconds": 9.6} | (result or {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    return Page(write_report(folder, {}, "test").read_text(encoding="utf-8"))


def test_curves_are_where_the_numbers_are(tmp_path):
    page = render(tmp_path, [{"step": s, "eval/f1": 0.2 + 0.008 * s} for s in (0, 50, 100)])
    (line,) = (attrs["points"] for tag, attrs in page.tags if tag == "polyline")
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, p.split(","))) for p in line.split())
    assert x1 - x0 == pytest.approx(x2 - x1) and x0 < x1
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11) and y0 > y1  # upwards is smaller


def test_a_run_without_classes_or_numbers_still_renders(tmp_path):
    page = render(tmp_path, result={"test": {"perplexity": 12.34567}})
    assert "12.35" in page.text and any("100 steps · 10 s" in part for part in page.text)
    assert "Confusion matrix" not in page.text and "Loss" not in page.text
    assert "Loss" in render(tmp_path, [{"step": 5, "train/loss": 0.0}]).text


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.7, 0.9), (1, 1), (0, 0), (-3, 4e5), (1e-7, 3e-7), (10, 1200)]
)
def test_ticks_cover_the_range_with_few_round_numbers(low, high):
    ticks = _ticks(low, high)
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 9
    assert all(b > a for a, b in itertools.pairwise(ticks))


def test_the_terminal_table():
    labels = ["[red]", "正面"]
    test = classification_metrics(np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0]), labels)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result_table({"test": {"accuracy": test["accuracy"]}}, test, "test"))
    console.print(result_table({"test": {"perplexity": 12.3456}}, {}, "test"))
    text = console.export_text()
    assert "test: accuracy 0.75" in text
    assert re.search(r"\[red\] +│ +0\.5000 +│ +1\.0000 +│ +0\.6667 +│ +1 ", text)
    assert "12.35" in text
