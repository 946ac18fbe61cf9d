"""LoRA on questions and summaries of ragged length: packed rows beside Transformers + PEFT padded.

    python benchmarks/packing.py --json=packing.json

The data are configs/chat.py's kinds: two-part sayings, idioms, words, and news texts with their
titles to find, each as question, answer, end; both sides learn the same answers from the same ids,
with the same model folder, adapter and optimizer, in float32. Ours packs them by the instruction
task into rows of `--length`. Theirs pads micro-batches of `--batch` examples (the Trainer's own
default, 8) to the longest, by `DataCollatorForSeq2Seq`, shuffled, and as another column grouped by
length; it accumulates so many of them that a step of the optimizer takes as many tokens as ours
does. The sides alternate; a token counts where it is real and has a next one.

Longer rows lose fewer examples and fill better, but attention on a CPU computes the whole square of
a row, also between examples that don't see each other: 512 is what both are trained to here.
"""

import argparse
import functools
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.sides import Ours, Theirs  # noqa: E402
from benchmarks.throughput import (  # noqa: E402
    best_threads,
    grouped_order,
    in_turn,
    machine,
    ratio,
)
from glm_jax.parallel.host import use_huge_pages  # noqa: E402


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "glm_jax/assets/glm-nano-zh"))
    parser.add_argument("--data", default="", help="a file of conversations; the built-in if empty")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of each side in a round")
    parser.add_argument("--rows", type=int, default=8, help="of our batches")
    parser.add_argument("--length", type=int, default=512, help="tokens at most, and of our rows")
    parser.add_argument("--batch", type=int, default=8, help="examples of their micro-batches")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: the fastest")
    parser.add_argument("--json", default="", help="where to write the figures")
    return parser.parse_args()


def examples(args: argparse.Namespace) -> Any:
    """The rows of the instruction task, and the shape of its batches."""
    from glm_jax.data import questions
    from glm_jax.data.conversations import conversation, load_conversations
    from glm_jax.data.packing import Shape
    from glm_jax.data.tokenizer import load_tokenizer
    from glm_jax.tasks.instruction import Instruction
    kinds = (questions.riddles, questions.idioms, questions.words, questions.headlines)
    found = ([one for rows in load_conversations(args.data).values() for one in rows] if args.data
             else [conversation(*row) for kind in kinds for row in kind()])
    task = Instruction(None, load_tokenizer(args.model), Shape(args.rows, args.length, args.length),
                       {"train": found}, "plain")
    return task.source("train"), task.shape


class Padded:
    """Their batches: steps of micro-batches of the same examples, padded to the longest."""

    def __init__(self, folder: str, rows: Any, batch: int):
        import transformers
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="right")
        self.collate = transformers.DataCollatorForSeq2Seq(tokenizer)  # to the longest
        self.rows, self.batch = rows, batch

    def parts(self, numbers: list[int]) -> list[Any]:
        """The micro-batches of these examples."""
        return [self.collate([{"input_ids": self.rows.ids[i].tolist(),
                               "labels": np.where(self.rows.learned[i], self.rows.ids[i],
                                                  -100).tolist()} for i in part])
                for part in (numbers[n:n + self.batch]
                             for n in range(0, len(numbers), self.batch))]

    def steps(self, order: Callable[[], list[int]], size: int) -> Iterator[list[Any]]:
        """Steps of `size` examples, without end."""
        while True:
            numbers = order()
            for n in range(0, max(1, len(numbers) - size + 1), size):
                yield self.parts(numbers[n:n + size])


def count(parts: list[Any]) -> np.ndarray:
    """Of a step of theirs: real tokens that have a next one, real tokens, and all with padding."""
    masks = [part["attention_mask"] for part in parts]
    real = sum(int(mask.sum()) for mask in masks)
    return np.array([real - sum(map(len, masks)), real, sum(mask.numel() for mask in masks)])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from glm_jax.data.packing import Batches, assemble, plan, stream
    rows, shape = examples(args)
    ours, theirs = Ours(args.model, "lm"), Theirs(args.model, "lm")
    lengths = rows.lengths(0)
    epoch = plan(lengths, shape, np.random.default_rng(0))
    mean = float(lengths.sum() / len(epoch))
    fill = mean / (shape.rows * shape.length)
    # As many examples to a step of theirs as one of ours has in the mean, in whole micro-batches.
    size = args.batch * max(1, round(len(rows.ids) / len(epoch) / args.batch))
    padded = Padded(args.model, rows, args.batch)

    # The same examples, before anything is learned: the loss of a target must be the same.
    first = assemble([[rows.piece(i, 0) for i in row] for row in epoch[0]], shape, ours.pad_id)
    same = padded.parts([i for row in epoch[0] for i in row])
    losses = {"ours": ours.step(first), "theirs": theirs.step(*same)}
    if abs(losses["ours"] / losses["theirs"] - 1) > 1e-4:
        sys.exit(f"the two sides don't compute the same loss: {losses}")

    rng = np.random.default_rng(0)
    steps: dict[str, Iterator[Any]] = {
        "packed": stream(Batches(rows, shape, ours.pad_id, seed=0)),
        "padded": padded.steps(lambda: list(rng.permutation(len(lengths))), size),
        "grouped": padded.steps(lambda: grouped_order(list(lengths), args.batch, rng), size)}
    threads = best_threads(theirs, next(steps["padded"])[0], args.threads)
    counts = {name: np.zeros(3, int) for name in ("padded", "grouped")}

    def work(name: str) -> float:
        done = 0.0
        for _ in range(args.steps):
            batch = next(steps[name])
            if name == "packed":  # it always takes as long; how much it holds: the epoch's mean
                ours.step(batch)
                done += mean
            else:
                theirs.step(*batch)
                counts[name] += count(batch)
                done += count(batch)[0]
        return done

    rates = in_turn(args.rounds, {name: functools.partial(work, name) for name in steps})
    taken = args.rounds * args.steps
    return {
        "examples": len(rows.ids), "tokens": int(lengths.sum()), "longest": int(lengths.max()),
        "mean_length": float(lengths.mean()), "losses": losses,
        "torch_step_s_by_threads": threads, "examples_a_step": size,
        "micro_batches_a_step": size // args.batch, "tokens_a_second_by_round": rates,
        "fill": {"packed": fill, **{name: int(real) / int(places)
                                    for name, (_, real, places) in counts.items()}},
        "tokens_a_step": {"packed": mean, **{name: int(total[0]) / taken
                                             for name, total in counts.items()}},
        "tokens_a_second": {name: median(rate) for name, rate in rates.items()},
        "ratio": {name: ratio(rates["packed"], rates[name]) for name in counts}}


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    table = Table("LoRA, float32", "glm-jax, packed", "peer, padded", "peer, grouped by length")
    for name, key, form in (("real tokens a second", "tokens_a_second", ".0f"),
                            ("real tokens a step", "tokens_a_step", ".0f"),
                            ("fill (asked: 0.90)", "fill", ".3f"),
                            ("ours to theirs (asked: 1.50)", "ratio", ".2f")):
        table.add_row(name, *(format(result[key][side], form) if side in result[key] else ""
                              for side in ("packed", "padded", "grouped")))
    console = Console(soft_wrap=True)
    console.print(table)
    console.print("{examples} examples, {tokens} tokens, {mean_length:.1f} each, at most {longest};"
                  " a step of the peer, Transformers + PEFT: {examples_a_step} examples in "
                  "{micro_batches_a_step} micro-batches".format(**result))
    console.print("loss of the same examples before training: {ours:.6f} packed, {theirs:.6f} "
                  "padded".format(**result["losses"]))
    console.print(result["command"], *(f"{k} {v}" for k, v in result["machine"].items()), sep=" · ")


def main() -> None:
    args = flags()
    result: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "machine": machine()}
    result |= measure(args)
    show(result)
    if args.json:
        from glm_jax.files import write_json_atomic
        write_json_atomic(args.json, result)


if __name__ == "__main__":
    use_huge_pages()  # both sides are faster with them
    main()
